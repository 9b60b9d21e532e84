"""What do activations in int8 cost? KL divergence to the torch path in fp32 of our native path and of llama.cpp, on the same file and the same text.

Both round each product's activations to int8, each in its own blocks; what is asked is that ours lose no more. The exact mode (`--activations fp32`) shares
weights and text: there the largest difference of a logit is shown. Keys and values are in fp32 on all sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tradespace.comparing import forward_of
from tradespace.kernels.view import Span, StepBatch, positions_of
from tradespace.lab.agreement import LlamaCpp, open_ours, require_llama_cpp, token_window
from tradespace.lab.bench.models import prepare
from tradespace.lab.common import command_line, markdown_table, read_text
from tradespace.llm import LLM
from tradespace.loading.resolve import resolve
from tradespace.loading.tokenizer import Tokenizer
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Record, new_record
from tradespace.quality.divergence import ROWS, Divergence, compare
from tradespace.quality.forward import Passage

SUBJECTS = (("smollm2-135m", "q4_0"), ("smollm2-135m", None), ("smollm2-135m", "q8_0"), ("gemma3-270m", None))
NAMES: dict[tuple[str, str | None], str] = {("smollm2-135m", None): "smollm2-135m Q4_1", ("gemma3-270m", None): "gemma3-270m Q4_K_M"}
TEXTS = {"WikiText-2": ("wikitext2", "wiki.test.raw"), "books": ("pd-books", "valid.txt")}
POSITIONS = 512
EXACT_BAR = 1e-4  # of a logit


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """Every file on both texts (quick: the first of each)."""
    version = require_llama_cpp().__version__
    rows: list[dict[str, Any]] = []
    for model, file_format in SUBJECTS[:1] if quick else SUBJECTS:
        path = str(prepare(model, file_format=file_format, say=say))
        tokenizer = Tokenizer.from_files(resolve(path, download=False))
        name = NAMES.get((model, file_format), f"{model} {(file_format or '').upper()}")
        for text, parts in list(TEXTS.items())[: 1 if quick else None]:
            window = token_window(tokenizer, read_text(*parts), POSITIONS)
            logits = torch.cat(list(_ours(path, "sdpa", "fp32", "auto", window)))
            largest = _largest_difference(logits, _ours(path, "native", "stored", "fp32", window))
            reference = logits.log_softmax(-1)
            del logits
            int8 = torch.cat([piece.log_softmax(-1) for piece in _ours(path, "native", "stored", "auto", window)])
            with LlamaCpp(Path(path)) as oracle:
                theirs = torch.cat(list(oracle.logprobs(window[:-1])))  # the last token is only predicted
            ours, llama = (_divergence(reference, other, window) for other in (int8, theirs))
            row = {"model": name, "text": text, "num_tokens": ours.num_tokens, "ours_kl": ours.mean_kl, "ours_error": ours.kl_error}
            row |= {"llama_cpp_kl": llama.mean_kl, "llama_cpp_error": llama.kl_error, "ours_top1": ours.top1_agreement, "llama_cpp_top1": llama.top1_agreement}
            row |= {"exact_logit_difference": largest, "holds": ours.mean_kl <= llama.mean_kl, "exact_holds": largest <= EXACT_BAR}
            say(f"{name}, {text}: KL {ours.mean_kl:.2e} ours, {llama.mean_kl:.2e} llama.cpp; exact mode within {largest:.1e} of a logit")
            rows.append(row)
    notes = f"llama-cpp-python {version}; {POSITIONS} predicted tokens of each text; keys and values in fp32"
    return new_record("activations", command=command_line(), device=this_machine(), repeats=1, rows=rows, notes=notes)


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


def _largest_difference(logits_TV: Tensor, pieces: Iterator[Tensor]) -> float:
    """Over all rows; `pieces` are held one at a time."""
    largest, row = 0.0, 0
    for piece in pieces:
        largest, row = max(largest, float((logits_TV[row : row + len(piece)] - piece).abs().max())), row + len(piece)
    assert row == len(logits_TV), "both read the same window"
    return largest


def _divergence(reference: Tensor, other: Tensor, window: list[int]) -> Divergence:
    return compare(lambda _: iter(reference.split(ROWS)), lambda _: iter(other.split(ROWS)), [Passage(window)])


def markdown(record: Record) -> str:
    header = ("file", "text", "KL of ours, nats", "of llama.cpp", "same top token, ours", "llama.cpp", "exact mode, largest logit difference")
    rows = [
        (
            r["model"],
            r["text"],
            f"{r['ours_kl']:.2e} ± {r['ours_error']:.0e}",
            f"{r['llama_cpp_kl']:.2e} ± {r['llama_cpp_error']:.0e}",
            f"{r['ours_top1']:.2%}",
            f"{r['llama_cpp_top1']:.2%}",
            f"{r['exact_logit_difference']:.1e}",
        )
        for r in record.rows
    ]
    held = {key: "holds everywhere" if all(r[key] for r in record.rows) else "DOES NOT hold everywhere" for key in ("holds", "exact_holds")}
    return (
        f"{markdown_table(header, rows, left=2)}\n\n{record.notes}. Bars: KL to the torch path in fp32 no larger than llama.cpp's: {held['holds']}; the "
        f"exact mode within {EXACT_BAR:g} of every logit: {held['exact_holds']}."
    )
