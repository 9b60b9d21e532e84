"""What holding less of the past costs: KL divergence to the full cache for every store and policy, on WikiText-2, and whether a pass key is still found.

Protocol: windows of CONTEXT tokens; all but the last SCORED are read as a prompt, in steps of STEP tokens, with the very cache that is measured; the last
SCORED are then fed one by one, as if they had been generated, and each prediction is compared with the one over the full cache of fp32. So stores and policies
meet tokens as the engine would bring them. Weights and activations are fp32: what differs is the cache alone. Policies that forget get SLOTS tokens.

The pass key: five digits in a sentence among the pages of a book (pd-books), at several depths; found if the model, asked for it at the end, would go on with
exactly these digits, greedily. Policies that forget get KEY_SLOTS of the prompt's KEY_CONTEXT tokens.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor

import tradespace as ts
from tradespace import api
from tradespace.kernels.attention import KERNELS
from tradespace.kernels.view import Span, StepBatch, positions_of
from tradespace.kv.cache import KVCache
from tradespace.lab.common import command_line, data_file, markdown_table
from tradespace.lab.kv_verdicts import verdicts
from tradespace.llm import LLM
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Record, new_record
from tradespace.model.layer import Layer
from tradespace.model.rebuild import Rebuilding
from tradespace.model.transformer import Transformer
from tradespace.quality.divergence import Tally
from tradespace.spec.kv import KVPlan, Retain, pointless, sequence_bytes, token_bytes
from tradespace.spec.plan import Plan
from tradespace.spec.tensors import num_parameters
from tradespace.spec.weights import WeightPlan
from tradespace.units import format_bytes

MODEL, DTYPE = "smollm2-135m", "fp32"
CONTEXT, SCORED, STEP, WINDOWS, SLOTS, SINKS = 2048, 128, 512, 1, 1024, 4
KEY_CONTEXT, KEY_SLOTS, KEY_DEPTHS, KEY_DIGITS = 1024, 512, (0.1, 0.3, 0.5, 0.7), 5
QUICK = {"windows": 1, "scored": 16, "depths": (0.5,)}
SEED = 20231116
QUICK_NAMES = ("int8", "sinks + window")


def stores() -> dict[str, KVPlan]:
    """Every store with full retention."""
    names = ("bf16", "fp16", "fp8", "int8", "int4", "int4c", "int2", "int2-token", "int2-token-tail", "x-fp32", "x-bf16", "x-int8", "x-int4")
    mixed = {"k=int8,v=int4": KVPlan(store="int8", values="int4"), "k=int4c,v=int2": KVPlan(store="int4c", values="int2", block_size=64)}
    return {name: KVPlan(store=name, block_size=64) for name in names} | mixed


def policies(slots: int) -> dict[str, KVPlan]:
    """Every policy that forgets, with so many tokens a sequence, in fp32."""
    retained = {
        "window": Retain(kind="sliding", window=slots),
        "sinks + window": Retain(kind="sliding", window=slots - SINKS, sinks=SINKS),
        "H2O": Retain(kind="h2o", budget=slots),
        "SnapKV": Retain(kind="snapkv", budget=slots),
    }
    return {name: KVPlan(store=DTYPE, retain=retain) for name, retain in retained.items()}


class Reader:
    """One model over any cache: sequences of equal length side by side, fed in steps."""

    def __init__(self, transformer: Transformer, kv: KVPlan, sequences: int, context: int):
        self.kv, self.size = kv, kv.block_slots(context)
        self.each = max(1, -(-kv.retain.tokens(context) // self.size))
        self.cache = KVCache(
            transformer.spec,
            kv,
            num_blocks=sequences * self.each,
            block_size=self.size,
            dtype=transformer.dtype,
            max_sequences=sequences,
            max_context=context,
        )
        self.transformer, self.model = transformer, Rebuilding(transformer) if kv.retain.rebuilds else transformer
        self.length = 0

    @torch.inference_mode()
    def feed(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """The next tokens of every sequence; logits (B, V) after the last of each."""
        count = len(tokens[0])
        self.length += count
        spans = [Span(row * count, count, self.length, tuple(range(row * self.each, (row + 1) * self.each)), row) for row in range(len(tokens))]
        batch = StepBatch.from_spans(spans, block_size=0 if self.kv.places_tokens else self.size)
        ids_T = torch.tensor([token for sequence in tokens for token in sequence])
        hidden_TD = self.model.forward(ids_T, positions_of(spans), batch, self.cache)
        return self.transformer.logits(hidden_TD, torch.tensor([span.query_start + count - 1 for span in spans]))

    def read(self, tokens: Sequence[Sequence[int]], step: int) -> Tensor:
        """Whole prompts in steps; logits after their last tokens."""
        last = torch.empty(0)
        for start in range(0, len(tokens[0]), step):
            last = self.feed([sequence[start : start + step] for sequence in tokens])
        return last


@contextmanager
def weighing(transformer: Transformer, kv: KVPlan) -> Iterator[None]:
    """Kernels that return attention weights in all layers, where the cache wants them."""
    attentions = [layer.attn for layer in transformer.layers if isinstance(layer, Layer) and layer.attn is not None]
    before = [attention.attend for attention in attentions]
    if kv.retain.evicts:
        kernel = KERNELS["reference"]()
        for attention in attentions:
            attention.attend = kernel
    try:
        yield
    finally:
        for attention, attend in zip(attentions, before, strict=True):
            attention.attend = attend


def predictions(transformer: Transformer, kv: KVPlan, windows: Sequence[Sequence[int]], scored: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(log-probabilities (B, V), next tokens (B)) of the last `scored` tokens of each window."""
    with weighing(transformer, kv):
        reader = Reader(transformer, kv, len(windows), len(windows[0]))
        prompt = len(windows[0]) - scored
        logits_BV = reader.read([window[:prompt] for window in windows], STEP)
        for at in range(prompt, len(windows[0])):
            yield logits_BV.log_softmax(-1), torch.tensor([window[at] for window in windows])
            if at + 1 < len(windows[0]):
                logits_BV = reader.feed([window[at : at + 1] for window in windows])


def divergence(transformer: Transformer, kv: KVPlan, reference: Sequence[Tensor], windows: Sequence[Sequence[int]], scored: int) -> dict[str, float]:
    tally = Tally()
    for before_BV, (found_BV, targets_B) in zip(reference, predictions(transformer, kv, windows, scored), strict=True):
        tally.add(before_BV, found_BV, targets_B)
    found = asdict(tally.result())
    return {name: found[name] for name in ("mean_kl", "kl_error", "median_kl", "p99_kl", "top1_agreement", "perplexity", "reference_perplexity", "num_tokens")}


def passkeys(llm: LLM, depths: Sequence[float]) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt, digits) as token ids: a book's pages with the key at each depth."""
    pages = llm.tokenizer.encode(data_file("pd-books", "valid.txt").read_text(encoding="utf-8")[200_000:400_000], add_special_tokens=False)
    draw = random.Random(SEED)
    for number, depth in enumerate(depths):
        key = "".join(str(draw.randrange(10)) for _ in range(KEY_DIGITS))
        needle = llm.tokenizer.encode(f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n", add_special_tokens=False)
        question = llm.tokenizer.encode("\n\nWhat is the pass key? The pass key is", add_special_tokens=False)
        answer = llm.tokenizer.encode(f" {key}", add_special_tokens=False)
        room = KEY_CONTEXT - len(needle) - len(question) - len(answer)
        filler = pages[number * 2000 : number * 2000 + room]
        at = int(depth * room)
        yield [*filler[:at], *needle, *filler[at:], *question], answer


def finds(transformer: Transformer, kv: KVPlan, prompt: list[int], answer: list[int]) -> bool:
    """Whether every token of the answer is the likeliest, given the prompt and the answer before it."""
    with weighing(transformer, kv):
        reader = Reader(transformer, kv, 1, KEY_CONTEXT)
        logits_BV = reader.read([prompt], STEP)
        for token in answer:
            if int(logits_BV[0].argmax()) != token:
                return False
            logits_BV = reader.feed([[token]])
    return True


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """Every store and policy (quick: two of them on an eighth of the text)."""
    device = this_machine()
    spec = api.find_spec(MODEL)
    count, scored, depths = (QUICK["windows"], QUICK["scored"], QUICK["depths"]) if quick else (WINDOWS, SCORED, KEY_DEPTHS)
    plan = Plan(model=spec.name, weights=WeightPlan(default=DTYPE), kv=KVPlan(store=DTYPE), max_context=CONTEXT, step_tokens=STEP, kv_tokens=CONTEXT)
    chosen = {**stores(), **policies(SLOTS)}
    chosen = {name: kv for name, kv in chosen.items() if not quick or name in QUICK_NAMES}
    rows = []
    with ts.open(MODEL, plan=plan, memory="3GiB") as llm:
        transformer = llm.transformer
        ids = llm.tokenizer.encode(data_file("wikitext2", "wiki.test.raw").read_text(encoding="utf-8")[: 12 * CONTEXT * count], add_special_tokens=False)
        windows = [ids[start * CONTEXT : (start + 1) * CONTEXT] for start in range(count)]
        full = KVPlan(store=DTYPE)
        started = time.perf_counter()
        reference = [logprobs_BV for logprobs_BV, _ in predictions(transformer, full, windows, scored)]
        say(f"full cache: {time.perf_counter() - started:.0f} s; {len(chosen)} caches to compare with it")
        for name, kv in chosen.items():
            found = divergence(transformer, kv, reference, windows, scored)
            rows.append(_row(llm, name, kv) | found)
            say(f"{name}: KL {found['mean_kl']:.2e} ± {found['kl_error']:.0e} nats a token")
        del reference
        keys = list(passkeys(llm, depths))
        for name, kv in {"full": full, **policies(KEY_SLOTS)}.items():
            hits = [finds(transformer, kv, prompt, answer) for prompt, answer in keys]
            rows.append({"name": f"pass key: {name}", "kv": kv.describe(), "depths": list(depths), "found": hits, "share_found": sum(hits) / len(hits)})
            say(f"pass key, {name}: {sum(hits)} of {len(hits)}")
    notes = (
        f"WikiText-2 test, {count} windows of {CONTEXT} tokens, the last {scored} of each fed one by one after a prompt in steps of {STEP}; "
        f"KL to the full fp32 cache; weights and activations {DTYPE}; policies keep {SLOTS} tokens. "
        f"Pass key: pd-books, {KEY_CONTEXT} tokens, policies keep {KEY_SLOTS}"
    )
    rows += [] if quick else verdicts(rows)
    return new_record("kv_quality", command=command_line(), device=device, repeats=1, rows=rows, notes=notes)


def _row(llm: LLM, name: str, kv: KVPlan) -> dict[str, object]:
    spec = llm.spec
    elements = sum(mixer.K * (mixer.H + mixer.Hv) for index in spec.attention_layers if (mixer := spec.layers[index].mixer) is not None)  # type: ignore[union-attr]
    return {
        "name": name,
        "kv": kv.describe(),
        "store": kv.describe_store(),
        "retain": kv.retain.describe(),
        "model": spec.name,
        "family": spec.family,
        "parameters": num_parameters(spec),
        "token_bytes": token_bytes(spec, kv),
        "bits_per_element": 8 * token_bytes(spec, kv) / elements,
        "sequence_bytes": sequence_bytes(spec, kv, CONTEXT),
        "pointless": pointless(spec, kv) or "",
    }


def markdown(record: Record) -> str:
    measured = [row for row in record.rows if "mean_kl" in row]
    table = markdown_table(
        ("cache", "of 2,048 tokens", "bits an element", "mean KL, nats", "same top token", "perplexity (full)"),
        [
            (
                row["kv"],
                format_bytes(row["sequence_bytes"]),
                f"{row['bits_per_element']:.2f}",
                f"{row['mean_kl']:.2g} ± {row['kl_error']:.1g}",
                f"{row['top1_agreement']:.1%}",
                f"{row['perplexity']:.4g} ({row['reference_perplexity']:.4g})",
            )
            for row in measured
        ],
    )
    keys = [f"{row['name']}: {sum(row['found'])} of {len(row['found'])} found" for row in record.rows if "found" in row]
    bars = [f"{row['verdict']}: {row['bar']} ({row['measured']})" for row in record.rows if "verdict" in row]
    return "\n\n".join((table, *("\n".join(f"- {line}" for line in lines) for lines in (keys, bars) if lines)))
