"""Does the GPU engine compute what the CPU engine computes, from a real checkpoint, in every kind of weights and cache?

SmolLM2's file is opened twice for each way: on the card, and on the CPU in torch's own operations, with the same formats of weights and cache. One window of
held-out text is scored in both (large products, attention of whole prompts and chunks), then prompts are continued greedily (products of few rows, attention
over pages, graphs). Activations are bf16 on the card and fp32 on the CPU, so log-probabilities agree to bf16's rounding and ties may fall the other way.

What the CPU says takes minutes, and a card stands idle meanwhile: it is kept in the cache folder, under the name of all that defines it, and `python -m
tradespace.lab.gpu_agreement [MODEL]` works it out on any machine beforehand. TRADESPACE_HOME says where: carry the folder to the card's machine.

`compute-sanitizer --tool memcheck python -m tradespace lab run gpu-agreement --quick` runs the kernels of a step under the checker of memory accesses.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tradespace.engine.request import SamplingParams
from tradespace.errors import TradespaceError, UnsupportedError
from tradespace.lab.agreement import token_window
from tradespace.lab.common import command_line, markdown_table, read_text
from tradespace.lab.kept import kept
from tradespace.llm import LLM, open
from tradespace.loading.resolve import resolve
from tradespace.measure.record import Figure, Record, new_record

WAYS = (
    *((weights, "bf16") for weights in ("bf16", "int8", "fp8", "int4-g64", "int4-g64-zp", "nf4", "w8a8", "fp8-a8")),
    *(("bf16", store) for store in ("int8", "fp8")),
)
QUICK = (("bf16", "bf16"), ("int8", "int8"), ("int4-g64", "fp8"), ("nf4", "bf16"), ("w8a8", "bf16"))
POSITIONS, ANSWER = 384, 48
PROMPTS = ("The capital of France is", "In the beginning", "Water boils when", "She opened the door and")
LOSS_LIMIT = 0.005  # of the loss, what the two may differ by
MEMORY = "6GiB"
MODEL = "smollm2-135m"
RECIPE = 1  # raised when what the CPU is asked changes


def scores(llm: LLM, ids: Sequence[int]) -> list[float]:
    """The log-probability of each token of `ids` but the first."""
    request = llm.engine.add(list(ids), SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0))
    while not request.finished:
        llm.engine.step()
    if request.error is not None:
        raise request.error
    return [found.logprob for found in request.prompt_logprobs if found is not None]


def answers(llm: LLM, tokens: int) -> list[tuple[int, ...]]:
    """Greedy continuations of PROMPTS, all at once, then of the first alone: a step of one sequence has kernels of its own."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return [completion.output_ids for prompts in (PROMPTS, PROMPTS[:1]) for completion in llm.generate(list(prompts), params)]


@dataclass(frozen=True, slots=True)
class Said:
    """What a device made of one way: log-probabilities of the text, and the tokens of each answer. `torch`: its version."""

    scores: list[float]
    answers: list[list[int]]
    torch: str


def said_by(device: str, model: str, weights: str, store: str, positions: int, tokens: int) -> Said:
    """Opens the model on "cuda" or the "cpu" (in torch's own operations) and asks."""
    import torch

    attention = "sdpa" if device == "cpu" else None
    llm = open(model, memory=MEMORY, context=1024, concurrency=4, weights=weights, kv_store=store, device=device, attention=attention)
    try:
        ids = token_window(llm.tokenizer, read_text("pd-books", "valid.txt"), positions)
        return Said(scores(llm, ids), [list(answer) for answer in answers(llm, tokens)], torch.__version__)
    finally:
        llm.close()
        gc.collect()


def said_by_cpu(model: str, weights: str, store: str, positions: int, tokens: int) -> Said:
    """As it was kept, or asked now and kept."""
    size = sum(path.stat().st_size for path in resolve(model, progress=False).weights)
    settings = {
        "model": model,
        "bytes": size,
        "weights": weights,
        "store": store,
        "positions": positions,
        "tokens": tokens,
        "prompts": PROMPTS,
        "recipe": RECIPE,
    }
    found = kept("gpu-agreement", settings, lambda folder: asdict(said_by("cpu", model, weights, store, positions, tokens)))
    return Said(**found)


def compared(model: str, weights: str, store: str, positions: int, tokens: int) -> dict[str, Any]:
    """One way on both devices."""
    gpu, cpu = said_by("cuda", model, weights, store, positions, tokens), said_by_cpu(model, weights, store, positions, tokens)
    differences = [abs(a - b) for a, b in zip(gpu.scores, cpu.scores, strict=True)]
    same = [next((n for n, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x)) for x, y in zip(gpu.answers, cpu.answers, strict=True)]
    losses = {"cuda": -statistics.fmean(gpu.scores), "cpu": -statistics.fmean(cpu.scores)}
    return {
        "weights": weights,
        "store": store,
        "mean": statistics.fmean(differences),
        "worst": max(differences),
        "loss_cuda": losses["cuda"],
        "loss_cpu": losses["cpu"],
        "same_tokens": sum(same),
        "same": same,
        "tokens": tokens * (len(PROMPTS) + 1),
        "cpu_torch": cpu.torch,
        "holds": abs(losses["cuda"] / losses["cpu"] - 1) <= LOSS_LIMIT,
    }


def run(*, quick: bool, say: Callable[[str], None], model: str | None = None) -> Record:
    """Every way; one that fails is a row that says why. Raises UnsupportedError without a CUDA device."""
    import torch

    from tradespace.llm_cuda import device_spec

    if not torch.cuda.is_available():
        raise UnsupportedError("gpu-agreement compares a CUDA device with the CPU, and torch sees no such device")
    model, rows = model or MODEL, []
    for weights, store in QUICK if quick else WAYS:
        try:
            row = compared(model, weights, store, 96 if quick else POSITIONS, 8 if quick else ANSWER)
            say(f"{weights}, cache {store}: {row['mean']:.4f} of a nat apart, {row['same_tokens']} of {row['tokens']} tokens before the first that differs")
        except TradespaceError as error:
            row = {"weights": weights, "store": store, "error": str(error), "holds": False}
            say(f"{weights}, cache {store}: {error}")
        rows.append(row)
    figures = {f"{row['weights']}, cache {row['store']}: mean difference": Figure.of([row["mean"]], "nat") for row in rows if "mean" in row}
    notes = f"{sum(row['holds'] for row in rows)} of {len(rows)} ways have the same loss within {LOSS_LIMIT:.1%}. {model}{', short texts' if quick else ''}"
    return new_record("gpu-agreement", command=command_line(), device=device_spec(0), repeats=1, figures=figures, rows=rows, notes=notes)


def markdown(record: Record) -> str:
    """A line a way."""
    rows = [
        (row["weights"], row["store"], row["error"], "", "", "no")
        if "error" in row
        else (
            row["weights"],
            row["store"],
            f"{row['mean']:.4f}",
            f"{row['loss_cuda']:.4f} / {row['loss_cpu']:.4f}",
            f"{row['same_tokens']} of {row['tokens']}",
            "yes" if row["holds"] else "no",
        )
        for row in record.rows
    ]
    return markdown_table(("weights", "cache", "mean difference, nat", "loss GPU / CPU", "equal tokens", "holds"), rows) + f"\n\n{record.notes}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tradespace.lab.gpu_agreement",
        description="Works out and keeps what the CPU says, before a card is there.",
        epilog=f"Example: python -m tradespace.lab.gpu_agreement {MODEL}",
    )
    parser.add_argument("model", nargs="?", default=MODEL, help="a model as `tradespace run` takes it")
    wanted = parser.parse_args().model
    try:
        for way in WAYS:
            print(f"{way[0]}, cache {way[1]}: loss {-statistics.fmean(said_by_cpu(wanted, *way, POSITIONS, ANSWER).scores):.4f}", flush=True)
    except TradespaceError as error:
        sys.exit(f"error: {error}")
