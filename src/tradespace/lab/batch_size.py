"""Experiment batch-size: how many tokens a small Llama needs to a fixed held-out loss at each batch size, with the rate that suits it, over two sizes of data:
does the best batch grow as the square root of the examples?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from statistics import fmean

from tradespace.api import find_machine
from tradespace.lab.common import command_line, markdown_table
from tradespace.lab.training_text import book_tokens, digest, held_out_loss, scratch_trainer, shaped
from tradespace.measure.record import Figure, Record, new_record
from tradespace.train.data import Document, pack
from tradespace.train.loop import Trainer

SHAPE, VOCAB, CONTEXT = "layers=2,width=96,heads=6,ffn=256", 512, 64
BATCHES = (2, 4, 8, 16, 32, 64)
RATES = {2: 1e-3, 4: 1.5e-3, 8: 2e-3, 16: 3e-3, 32: 4e-3, 64: 5e-3}  # about with the square root of the batch, from the usual 2e-3 at 8
EXAMPLES = (1024, 4096)
GOAL = 4.4  # nats of a token of the 512
MOST_TOKENS = 400_000
SEEDS = (0, 1, 2)


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """Trains at a constant rate until the held-out loss is at GOAL, looked at every 8,192 tokens; what never gets there is recorded as such."""
    most, seeds = (60_000, SEEDS[:1]) if quick else (MOST_TOKENS, SEEDS)
    train, held_out = book_tokens(VOCAB, max(EXAMPLES) * CONTEXT * 4)
    test = held_out[: CONTEXT * 128]
    spec = shaped(f"{SHAPE},vocab={VOCAB},context={CONTEXT}")
    rows, figures = [], {}
    for examples in EXAMPLES:
        data = pack([Document(train[: examples * CONTEXT])], CONTEXT, source="pd-books")
        for batch in BATCHES:
            found = []
            for seed in seeds:
                trainer = scratch_trainer(spec, data, steps=most, batch=batch, lr=RATES[batch], seed=seed, warmup=8, clip=1.0, shape="constant")
                found.append(_tokens_to_goal(trainer, test, batch, most))
            reached = [tokens for tokens, _ in found if tokens is not None]
            steps = [tokens / (batch * CONTEXT) for tokens in reached]
            row = {"examples": examples, "batch": batch, "reached": len(reached), "runs": len(found), "best_loss": min(loss for _, loss in found)}
            if reached:
                row |= {"tokens": fmean(reached), "steps": fmean(steps)}
                figures[f"{examples} examples, batch {batch}"] = Figure.of(reached, "tokens")
            rows.append(row)
            say(f"{examples} examples, batch {batch}: " + (f"{fmean(reached):,.0f} tokens" if reached else f"not reached ({row['best_loss']:.3f})"))
    notes = f"{findings(rows)}. Goal {GOAL} nats of {len(test):,} held-out tokens; AdamW, constant rates {RATES}; tokens {digest(train)}"
    say(notes)
    return new_record("batch-size", command=command_line(), device=find_machine(None), repeats=len(seeds), figures=figures, rows=rows, notes=notes)


def _tokens_to_goal(trainer: Trainer, test: Sequence[int], batch: int, most: int) -> tuple[int | None, float]:
    """(tokens to the goal, None where it was not reached; the best held-out loss seen). Ends where it rose for good: the data are known by heart."""
    every = max(1, 8192 // (batch * CONTEXT))
    best = float("inf")
    while trainer.step * batch * CONTEXT < most:
        for _ in range(every):
            trainer.advance()
        loss = held_out_loss(trainer.model, test, CONTEXT, blocks_at_once=32)
        best = min(best, loss)
        if loss <= GOAL:
            return trainer.step * batch * CONTEXT, best
        if loss > best + 0.3:
            return None, best
    return None, best


def findings(rows: Sequence[dict]) -> str:
    """The batch of fewest tokens for each size of data, and √examples beside it."""
    said = []
    for examples in dict.fromkeys(row["examples"] for row in rows):
        here = [row for row in rows if row["examples"] == examples and row["reached"] == row["runs"]]
        if not here:
            said.append(f"{examples} examples: no batch reached the goal in all runs")
            continue
        best = min(here, key=lambda row: row["tokens"])
        said.append(f"{examples} examples: fewest tokens at batch {best['batch']} ({best['tokens']:,.0f}); √examples = {sqrt(examples):.0f}")
    return "; ".join(said)


def markdown(record: Record) -> str:
    """Tokens and steps to the goal."""
    table = [
        (
            f"{row['examples']:,}",
            str(row["batch"]),
            f"{row['tokens']:,.0f}" if "tokens" in row else "not reached",
            f"{row['steps']:,.0f}" if "steps" in row else "",
            f"{row['reached']} of {row['runs']}",
        )
        for row in record.rows
    ]
    return markdown_table(("examples", "batch", "tokens", "steps", "runs that got there"), table, left=0) + f"\n\n{record.notes}"
