"""What do activations in int8 cost? KL divergence to the torch path in fp32 of our native path and of llama.cpp, on the same file and the same text.

Both round each product's activations to int8, each in its own blocks; what is asked is that ours lose no more. Keys and values are in fp32 on all sides; the
part "caches" asks the same of what users get who choose nothing: llama.cpp's cache of fp16, and ours, which some machines hold and multiply in bf16.

The exact mode (`--activations fp32`) shares weights and text. It and the torch path are two ways to compute in fp32, each with its own order of summation,
so both are measured against a float64 pass over the same weights (`double.py`): the largest distance of a logit, and the root of the mean square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tradespace.comparing import forward_of
from tradespace.kernels.view import Span, StepBatch, positions_of
from tradespace.lab.agreement import LlamaCpp, open_ours, require_llama_cpp, token_window
from tradespace.lab.bench.models import prepare
from tradespace.lab.common import command_line, markdown_table, read_text
from tradespace.lab.double import double_logits
from tradespace.llm import LLM
from tradespace.loading.resolve import resolve
from tradespace.loading.tokenizer import Tokenizer
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Record, commit_of, new_record
from tradespace.model.transformer import Transformer
from tradespace.quality.divergence import ROWS, Divergence, compare
from tradespace.quality.forward import Passage

SUBJECTS = (("smollm2-135m", "q4_0"), ("smollm2-135m", None), ("smollm2-135m", "q8_0"), ("gemma3-270m", None))
NAMES: dict[tuple[str, str | None], str] = {("smollm2-135m", None): "smollm2-135m Q4_1", ("gemma3-270m", None): "gemma3-270m Q4_K_M"}
TEXTS = {"WikiText-2": ("wikitext2", "wiki.test.raw"), "books": ("pd-books", "valid.txt")}
POSITIONS = 512
EXACT_BAR = 1e-4  # of a logit
PARTS = ("int8", "caches", "exact")
HELD = {"int8": "holds", "caches": "holds", "exact": "exact_holds"}  # by part: whether its bar does


def run(*, quick: bool, say: Callable[[str], None], only: Sequence[str] = PARTS) -> Record:
    """Every file on both texts (quick: the first of each), and of both questions those in `only`."""
    if {"int8", "caches"} & set(only):
        require_llama_cpp()  # before anything is measured
    rows: list[dict[str, Any]] = []
    # of each row, as parts are measured one at a time and joined
    where = {"commit": commit_of(Path(__file__).parent)[0][:10], "on": this_machine().name}
    for model, file_format in SUBJECTS[:1] if quick else SUBJECTS:
        path = str(prepare(model, file_format=file_format, say=say))
        tokenizer = Tokenizer.from_files(resolve(path, download=False))
        name = NAMES.get((model, file_format), f"{model} {(file_format or '').upper()}")
        for text, parts in list(TEXTS.items())[: 1 if quick else None]:
            window = token_window(tokenizer, read_text(*parts), POSITIONS)
            for part in only:
                measured = _exact_row(path, window) if part == "exact" else _int8_row(path, window, usual_cache=part == "caches")
                row = {"part": part, "model": name, "text": text} | measured | where
                say(f"{name}, {text}: {_told(row)}")
                rows.append(row)
    rows.sort(key=lambda row: PARTS.index(row["part"]))
    notes = f"{POSITIONS} predicted tokens of each text; keys and values in fp32, but for the part that says otherwise"
    return new_record("activations", command=command_line(), device=this_machine(), repeats=1, rows=rows, notes=notes)


def _told(row: Mapping[str, Any]) -> str:
    if row["part"] != "exact":
        return f"KL {row['ours_kl']:.2e} ours, {row['llama_cpp_kl']:.2e} llama.cpp"
    return f"from float64 the exact mode's logits at most {row['exact_from_double']:.1e}, the torch path's {row['torch_from_double']:.1e}"


def _int8_row(path: str, window: list[int], *, usual_cache: bool) -> dict[str, Any]:
    """KL to the torch path in fp32, of our native path and of llama.cpp, their caches in fp32 or as each has it by itself."""
    reference = torch.cat([piece.log_softmax(-1) for piece in _ours(path, "sdpa", "fp32", "auto", window)])
    with open_ours(path, "native", "stored", "auto", kv_store=None if usual_cache else "fp32") as llm:
        store = llm.plan.kv.store
        int8 = torch.cat([piece.log_softmax(-1) for piece in _logits(llm, window[:-1])])
    with LlamaCpp(Path(path), usual_cache=usual_cache) as oracle:
        theirs = torch.cat(list(oracle.logprobs(window[:-1])))  # the last token is only predicted
    ours, llama = (_divergence(reference, other, window) for other in (int8, theirs))
    row = {
        "num_tokens": ours.num_tokens,
        "store": store,
        "ours_kl": ours.mean_kl,
        "ours_error": ours.kl_error,
        "peer": f"llama-cpp-python {require_llama_cpp().__version__}",
    }
    row |= {"llama_cpp_kl": llama.mean_kl, "llama_cpp_error": llama.kl_error}
    return row | {"ours_top1": ours.top1_agreement, "llama_cpp_top1": llama.top1_agreement, "holds": ours.mean_kl <= llama.mean_kl}


def _ours(path: str, attention: str, weights: str, activations: str, window: list[int]) -> Iterator[Tensor]:
    """Logits after each token but the last, a few rows at a time."""
    with open_ours(path, attention, weights, activations) as llm:
        yield from _logits(llm, window[:-1])


def _logits(llm: LLM, ids: list[int]) -> Iterator[Tensor]:
    """Logits after each of `ids`, a step and a few rows at a time, through the engine's own cache."""
    forward = forward_of(llm, rows=ROWS)
    with torch.inference_mode():
        for start in range(0, len(ids), forward.step_tokens):
            stop = min(start + forward.step_tokens, len(ids))
            spans = [Span(0, stop - start, stop, tuple(range(-(-stop // forward.block_size))))]
            batch = StepBatch.from_spans(spans, block_size=forward.block_size)
            hidden_TD = forward.transformer.forward(torch.tensor(ids[start:stop]), positions_of(spans), batch, forward.cache)
            for row in range(0, stop - start, forward.rows):
                yield forward.transformer.logits(hidden_TD, torch.arange(row, min(row + forward.rows, stop - start))).clone()


def _torch_and_double(path: str, window: list[int]) -> tuple[Tensor, Tensor]:
    """Logits of the torch path in fp32, and in float64 of the very weights that it holds."""
    with open_ours(path, "sdpa", "fp32", "auto") as llm:
        model = forward_of(llm, rows=ROWS).transformer
        assert isinstance(model, Transformer), "no native kernel was asked for"
        return torch.cat(list(_logits(llm, window[:-1]))), torch.cat(list(double_logits(model, window[:-1], rows=ROWS)))


def _exact_row(path: str, window: list[int]) -> dict[str, Any]:
    """How far the torch path and the exact mode lie from float64, and from each other."""
    torch_TV, double_TV = _torch_and_double(path, window)
    native = list(_ours(path, "native", "stored", "fp32", window))
    sizes = [len(piece) for piece in native]
    parts = list(zip(torch_TV.split(sizes), double_TV.split(sizes), native, strict=True))
    torch_far, exact_far = (_Distance.of((part[which].double() - part[1] for part in parts), double_TV.numel()) for which in (0, 2))
    row = {"exact_from_double": exact_far.largest, "exact_rms": exact_far.rms, "torch_from_double": torch_far.largest, "torch_rms": torch_far.rms}
    largest = max(float((theirs - ours).abs().max()) for theirs, _, ours in parts)
    return row | {"exact_logit_difference": largest, "largest_logit": float(double_TV.abs().max()), "exact_holds": exact_far.largest <= EXACT_BAR}


@dataclass(frozen=True)
class _Distance:
    """Of logits from those in float64."""

    largest: float
    rms: float

    @classmethod
    def of(cls, differences: Iterator[Tensor], count: int) -> _Distance:
        largest = squares = 0.0
        for difference in differences:
            largest, squares = max(largest, float(difference.abs().max())), squares + float(difference.square().sum())
        return cls(largest, (squares / count) ** 0.5)


def _divergence(reference: Tensor, other: Tensor, window: list[int]) -> Divergence:
    return compare(lambda _: iter(reference.split(ROWS)), lambda _: iter(other.split(ROWS)), [Passage(window)])


def markdown(record: Record) -> str:
    """A table for each part that there is."""
    found = {part: [row for row in record.rows if row["part"] == part] for part in PARTS}
    held = {part: "holds everywhere" if all(row[key] for row in found[part]) else "DOES NOT hold everywhere" for part, key in HELD.items()}
    said = []
    for part in ("int8", "caches"):
        if not found[part]:
            continue
        header = ("file", "text", "KL of ours, nats", "of llama.cpp", "same top token, ours", "llama.cpp")
        kl = [
            (
                r["model"],
                r["text"],
                f"{r['ours_kl']:.2e} ± {r['ours_error']:.0e}",
                f"{r['llama_cpp_kl']:.2e} ± {r['llama_cpp_error']:.0e}",
                f"{r['ours_top1']:.2%}",
                f"{r['llama_cpp_top1']:.2%}",
            )
            for r in found[part]
        ]
        mean = {side: sum(r[f"{side}_kl"] for r in found[part]) / len(found[part]) for side in ("ours", "llama_cpp")}
        caches = f"Caches as each has them by itself, ours in {', '.join(sorted({r['store'] for r in found[part]}))}. " if part == "caches" else ""
        bar = f"Bar: KL to the torch path in fp32 no larger than llama.cpp's: {held[part]}; mean of the rows {mean['ours']:.2e} and {mean['llama_cpp']:.2e}."
        said.append(f"{markdown_table(header, kl, left=2)}\n\n{caches}{bar} {_where(found[part])}")
    if found["exact"]:
        header = ("file", "text", "largest logit", "exact mode from float64", "rms", "torch in fp32 from float64", "rms", "the two from each other")
        keys = ("exact_from_double", "exact_rms", "torch_from_double", "torch_rms", "exact_logit_difference")
        far = [(r["model"], r["text"], f"{r['largest_logit']:.1f}", *(f"{r[key]:.1e}" for key in keys)) for r in found["exact"]]
        bar = f"Bar: the exact mode (`--activations fp32`) within {EXACT_BAR:g} of every logit in float64: {held['exact']}. {_where(found['exact'])}"
        said.append(f"{markdown_table(header, far, left=2)}\n\n{bar}")
    return "\n\n".join((*said, f"{record.notes}."))


def _where(rows: Sequence[Mapping[str, Any]]) -> str:
    places = dict.fromkeys(f"commit {row['commit']} on {row['on']}{', ' + row['peer'] if 'peer' in row else ''}" for row in rows)
    return f"This part: {'; '.join(places)}."
