"""What happens to bytes, speed and quality as the cache of a real model shrinks from n to √n to constant; and the published simulation of it, rebuilt.

Protocol: at a length of n tokens, all but the last few are read as a prompt with the very cache that is measured, in steps of STEP tokens (at once where
keys are projected anew); a cache that rebuilds takes the full one's last keys and values, which are what its own would be. The last tokens are then fed one
by one. Caches take turns, token by token, so every ratio of times is of the same moment; each prediction is compared with the full cache's for the same
token. All lengths score the same tokens, with more or less before them. Weights and activations are fp32, on torch's kernels. A cache that is slow gets as
many tokens as its share of time allows: each row says how many.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tradespace as ts
from tradespace import api
from tradespace.errors import InputError
from tradespace.kernels.view import Span, StepBatch
from tradespace.kv.retain.recent import Recent, RecentView
from tradespace.lab import kv_cache_simulation
from tradespace.lab.common import command_line, data_file
from tradespace.lab.experiments import KV_PARTS
from tradespace.lab.kv_cache_kinds import DTYPE, MINIMAL, NOTHING, Cache, caches, is_exact
from tradespace.lab.kv_cache_table import markdown
from tradespace.lab.kv_quality import Reader
from tradespace.llm import LLM
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Figure, Record, new_record
from tradespace.model.transformer import Transformer
from tradespace.quality.divergence import Tally
from tradespace.spec.kv import KVPlan, Retain, model_refusal, pointless, sequence_bytes
from tradespace.spec.kv_workspace import rebuild_bytes
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec
from tradespace.spec.plan import Plan
from tradespace.spec.tensors import num_parameters
from tradespace.spec.weights import WeightPlan

__all__ = ["LENGTHS", "markdown", "measure", "run"]

MODEL = "smollm2-135m"
LENGTHS, QUICK_LENGTHS = (512, 1024, 2048, 4096, 8192), (512, 1024)
SCORED, QUICK_SCORED = 64, 16
SHARE_S, QUICK_SHARE_S = 10.0, 4.0  # of one cache at one length; two tokens at least, one where it takes more than twice the share
STEP = 512  # tokens of a prompt at once
PROBE = 128  # tokens read to say how long it will take
KEPT = ("mean_kl", "kl_error", "p99_kl", "top1_agreement", "perplexity", "reference_perplexity", "num_tokens")


def run(
    *,
    quick: bool,
    say: Callable[[str], None],
    only: Sequence[str] = KV_PARTS,
    model: str = MODEL,
    lengths: Sequence[int] | None = None,
    text: Path | None = None,
) -> Record:
    """The parts `only`. `lengths` (default by `quick`) are clipped to the model's context; `text` is WikiText-2's test set unless given."""
    rows: list[dict[str, Any]] = []
    figures: dict[str, Figure] = {}
    device, notes, repeats = this_machine(), [], 0
    if "model" in only:
        spec = api.find_spec(model)
        wanted = clipped(QUICK_LENGTHS if quick and lengths is None else lengths or LENGTHS, spec, say)
        scored = QUICK_SCORED if quick else SCORED
        with ts.open(model, plan=_plan(spec, wanted[-1])) as llm:
            found = measure(llm, wanted, encoded(llm, text, wanted[-1] + 1), scored=scored, quick=quick, say=say)
        rows, figures, repeats = found[0], found[1], scored
        notes.append(
            f"{spec.name}, weights and activations {DTYPE}, {'WikiText-2 test' if text is None else text.name}: the same last {scored} tokens at every "
            "length, fed one by one; caches take turns; times are of the whole step, logits included"
        )
    if "simulation" in only:
        say("simulation: about ten seconds" if quick else "simulation: about half a minute")
        found = kv_cache_simulation.simulate(quick=quick)
        rows, figures = [*rows, *found[0]], figures | found[1]
        notes.append("simulation: one layer, random numbers in fp32, rounds take turns")
    return new_record("kv_cache", command=command_line(), device=device, repeats=repeats or len(rows), figures=figures, rows=rows, notes=". ".join(notes))


def clipped(lengths: Sequence[int], spec: ModelSpec, say: Callable[[str], None]) -> list[int]:
    """The lengths in order, none above the model's context. Raises InputError where none is left that holds more than the smallest cache."""
    kept = sorted({min(length, spec.max_context) for length in lengths})
    if any(length > spec.max_context for length in lengths):
        say(f"lengths above {spec.max_context:,} tokens, the context of {spec.name}, are clipped to it")
    if not kept or kept[0] < 8 * MINIMAL:
        raise InputError(f"--lengths {','.join(map(str, lengths))}: each must be at least {8 * MINIMAL} tokens, eight times the smallest cache")
    return kept


def encoded(llm: LLM, text: Path | None, count: int) -> list[int]:
    """The first `count` tokens of the text. Raises InputError where it has fewer."""
    whole = (data_file("wikitext2", "wiki.test.raw") if text is None else text).read_text(encoding="utf-8")
    ids = llm.tokenizer.encode(whole[: 16 * count], add_special_tokens=False)
    ids = ids if len(ids) >= count else llm.tokenizer.encode(whole, add_special_tokens=False)
    if len(ids) < count:
        raise InputError(f"the text has {len(ids):,} tokens, the longest length takes {count:,}. Give a longer text or smaller --lengths")
    return ids[:count]


def _plan(spec: ModelSpec, context: int) -> Plan:
    """For the weights alone: the engine's own cache is as small as one can be, since none of what is measured goes through it."""
    kv = KVPlan(store=DTYPE, layout="contiguous", retain=Retain(kind="sliding", window=MINIMAL))
    return Plan(model=spec.name, weights=WeightPlan(default=DTYPE), kv=kv, max_context=context, step_tokens=min(STEP, context), kv_tokens=context)


# ---------------------------------------------------------------------------------------------------------------- the real model


@dataclass
class Course:
    """One cache on its way through the last tokens of a text."""

    name: str
    reader: Reader
    share_s: float
    taken: list[float] = field(default_factory=list)
    over: list[float] = field(default_factory=list)  # the full cache's seconds over its own, in the same round
    tally: Tally = field(default_factory=Tally)

    @property
    def goes_on(self) -> bool:
        """One token at least; a second one unless the first took more than twice the share; more while the next would likely stay within the share."""
        taken = sum(self.taken)
        return not self.taken or (len(self.taken) == 1 and taken <= 2 * self.share_s) or taken + self.taken[-1] <= self.share_s

    def feed(self, token: int) -> Tensor:
        start = time.perf_counter()
        logits_BV = self.reader.feed([[token]])
        self.taken.append(time.perf_counter() - start)
        return logits_BV.log_softmax(-1)


def measure(
    llm: LLM, lengths: Sequence[int], ids: Sequence[int], *, scored: int, quick: bool, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[str, Figure]]:
    """Rows and figures of every cache at every length; `ids` are one more than the longest length. Says first how long it will take."""
    rows: list[dict[str, Any]] = []
    figures: dict[str, Figure] = {}
    share_s = QUICK_SHARE_S if quick else SHARE_S
    scored = min(scored, lengths[0] // 2)
    expected = expected_s(llm, lengths, ids, scored, share_s, quick)
    how_long = f"{expected:.0f} s" if expected < 100 else f"{expected / 60:.0f} minutes"
    say(f"about {how_long} for {', '.join(f'{n:,}' for n in lengths)} tokens")
    for n in lengths:
        started = time.perf_counter()
        own_rows, own_figures = measure_length(llm, n, ids[-n - 1 :], scored=scored, share_s=share_s, quick=quick, say=say)
        rows, figures = [*rows, *own_rows], figures | own_figures
        say(f"{n:,} tokens: {time.perf_counter() - started:.0f} s. " + "; ".join(f"{r['name']} {r['speedup']:.2f}×" for r in own_rows))
    return rows, figures


def expected_s(llm: LLM, lengths: Sequence[int], ids: Sequence[int], scored: int, share_s: float, quick: bool) -> float:
    """Seconds that it will take, from those of a short prompt and a token after it. Attention makes a token at 8K about twice as dear as an early one."""
    probe = Reader(llm.transformer, KVPlan(store=DTYPE, layout="contiguous"), 1, PROBE)
    start = time.perf_counter()
    probe.read([ids[: PROBE - 2]], STEP)
    each_s = (time.perf_counter() - start) / PROBE
    probe.feed([ids[PROBE - 2 : PROBE - 1]])
    start = time.perf_counter()
    probe.feed([ids[PROBE - 1 : PROBE]])
    token_s = time.perf_counter() - start
    total = 0.0
    for n in lengths:
        kinds = caches(n, quick=quick)
        prefill_s = n * each_s * (1 + n / 8192)
        slow = sum(kv.kv.retain.rebuilds or kv.kv.of_input for kv in kinds)
        reading = sum(not kind.kv.retain.rebuilds for kind in kinds)
        total += reading * prefill_s + (len(kinds) - slow) * scored * 1.5 * token_s + slow * min(scored * prefill_s, max(share_s, prefill_s))
    return total


def measure_length(
    llm: LLM, n: int, ids: Sequence[int], *, scored: int, share_s: float, quick: bool, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[str, Figure]]:
    """Rows and figures at n tokens: prompts first, then the last tokens, round by round, the full cache first in each."""
    kinds = []
    for kind in caches(n, quick=quick):
        if (reason := model_refusal(llm.spec, kind.kv)) is not None:
            say(f"{kind.name} left out: {reason}")
        else:
            kinds.append(kind)
    prompt, targets = ids[: n - scored], ids[n - scored + 1 : n + 1]
    courses = [Course(kinds[0].name, _read(llm.transformer, kinds[0], prompt, n), share_s)]
    for kind in kinds[1:]:
        rebuilds = kind.kv.retain.rebuilds
        reader = rebuilding(llm.transformer, kind, prompt, n, courses[0].reader) if rebuilds else _read(llm.transformer, kind, prompt, n)
        courses.append(Course(kind.name, reader, share_s))
    nothing = Course(NOTHING, Reader(llm.transformer, kinds[0].kv, 1, MINIMAL), share_s)
    for token, target in zip(ids[n - scored : n], targets, strict=True):
        reference_BV = courses[0].feed(token)
        nothing.reader.length = MINIMAL - 1  # the same few tokens again: no past that grows
        nothing.feed(token)
        nothing.over.append(courses[0].taken[-1] / nothing.taken[-1])
        for course in courses:
            if course is not courses[0]:
                if not course.goes_on:
                    continue
                course.tally.add(reference_BV, course.feed(token), torch.tensor([target]))
            else:
                course.tally.add(reference_BV, reference_BV, torch.tensor([target]))
            course.over.append(courses[0].taken[-1] / course.taken[-1])
    figures = {}
    for course in (*courses, nothing):
        figures[f"model: {course.name} at {n}"] = Figure.of(warm(course.taken), "s")
        figures[f"model: {course.name} at {n} over full"] = Figure.of(warm(course.over), "×")
    rows = [_row(llm.spec, kind, course, n) for kind, course in zip(kinds, courses, strict=True)]
    return rows, figures


def warm(values: Sequence[float]) -> Sequence[float]:
    """Without the first round, in which buffers are found and pages touched, where there are three or more."""
    return values[1:] if len(values) > 2 else values


def _read(transformer: Transformer, kind: Cache, prompt: Sequence[int], n: int) -> Reader:
    """A reader that has read the prompt: at once where each step would project all keys before it again."""
    reader = Reader(transformer, kind.kv, 1, n)
    reader.read([prompt], len(prompt) if kind.kv.of_input else STEP)
    return reader


def rebuilding(transformer: Transformer, kind: Cache, prompt: Sequence[int], n: int, full: Reader) -> Reader:
    """A reader whose cache rebuilds, as if it had read the prompt, which `full` has: its ids, and of the last tokens the keys and values."""
    reader = Reader(transformer, kind.kv, 1, n)
    reader.length, recent, span = len(prompt), reader.cache.retain, Span(0, len(prompt), len(prompt), (0,))
    assert isinstance(recent, Recent) and reader.cache.ids_BS is not None and full.length == len(prompt)
    reader.cache.ids_BS[0, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
    for layer in transformer.spec.attention_layers if recent.window else ():
        view = reader.cache.view(layer)
        assert isinstance(view, RecentView)
        view.write(*full.cache.view(layer).read(span), StepBatch.from_spans([span]))
        view.settle(StepBatch.from_spans([span]))
    return reader


def _row(spec: ModelSpec, kind: Cache, course: Course, n: int) -> dict[str, Any]:
    result = asdict(course.tally.result())
    held, stated = course.reader.cache.nbytes, sequence_bytes(spec, kind.kv, n)
    return {
        "part": "model",
        "n": n,
        "name": kind.name,
        "group": kind.group,
        "grows": kind.grows,
        "kv": kind.kv.describe(),
        "exact": is_exact(spec, kind.kv),
        "model": spec.name,
        "parameters": num_parameters(spec),
        "tokens_kept": kind.kv.retain.tokens(n),
        "bytes": held,
        "spec_bytes": stated,
        "transient_bytes": _transient(spec, kind.kv, n),
        "pointless": pointless(spec, kind.kv) or "",
        "timed_tokens": len(warm(course.taken)),
        "speedup": Figure.of(warm(course.over), "×").median,
        **{key: result[key] for key in KEPT},
    }


def _transient(spec: ModelSpec, kv: KVPlan, n: int) -> int:
    """Bytes that a step of a rebuilding cache holds at its peak beside what stays: the spec's, which a test holds against torch's allocations."""
    mixers = [mixer for index in spec.attention_layers if isinstance(mixer := spec.layers[index].mixer, Attention)]
    return max((rebuild_bytes(kv, mixer, spec.D, n, 4) for mixer in mixers), default=0)
