"""Claims about training that a record in results/ decides. Each function takes the record of the claim's experiment; nothing here measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import exp
from typing import Any

from tradespace.lab.claims_found import NOT_MEASURED, Found, judged
from tradespace.lab.fitting import exponent
from tradespace.measure.record import Record


def grouped_heads(record: Record) -> Found:
    """Held-out loss of a quarter of the KV heads against all of them."""
    loss = {row["name"]: row["loss"] for row in record.rows}
    base = loss["kv heads 8 (all)"]
    quarter, one = (loss[name] / base - 1 for name in ("kv heads 2 (a quarter)", "kv heads 1"))
    return judged(quarter < 0.01, f"loss {quarter:+.2%} with a quarter of the KV heads and {one:+.2%} with one, of equal parameters (three seeds, one million)")


def root_of_layers(record: Record) -> Found:
    """Fitted power of L of the least bytes over segment lengths."""
    least = [(row["L"], row["bytes"]) for row in record.rows if row["part"] == "L" and row["k_star"] >= 2]
    if len(least) < 2:
        return Found(NOT_MEASURED, "the record has fewer than two depths at which k* is 2 or more")
    power = exponent(least)
    return judged(abs(power - 0.5) <= 0.1, f"L^{power:.2f} over L = {', '.join(str(L) for L, _ in least)}, each at its best k")


def _wide(record: Record) -> dict[str, Mapping[str, Any]] | None:
    found = {row["kind"]: row for row in record.rows if row["part"] == "wide"}
    return found if {"none", "norms", "full"} <= found.keys() else None


def recompute_time(record: Record) -> Found:
    """A step with each layer recomputed over one that keeps everything."""
    found = _wide(record)
    if found is None:
        return Found(NOT_MEASURED, "the record has no wide model: tradespace lab run checkpointing")
    more = found["full"]["seconds"] / found["none"]["seconds"] - 1
    return judged(0.2 <= more <= 0.4, f"{more:+.0%} with every layer recomputed (width 512, fp32, CPU)")


def cheap_operations(record: Record) -> Found:
    """Norms recomputed."""
    found = _wide(record)
    if found is None:
        return Found(NOT_MEASURED, "the record has no wide model: tradespace lab run checkpointing")
    saved = 1 - found["norms"]["bytes"] / found["none"]["bytes"]
    more = found["norms"]["seconds"] / found["none"]["seconds"] - 1
    return judged(0.1 <= saved <= 0.2 and 0.05 <= more <= 0.1, f"norms recomputed: {saved:.1%} fewer bytes for {more:+.1%} time")


def best_batch(record: Record) -> Found:
    """The batch of fewest tokens for each number of examples: four times the examples should double it."""
    best = {}
    for row in record.rows:
        if row["reached"] == row["runs"] and ("tokens" in row) and row["tokens"] < best.get(row["examples"], (0, float("inf")))[1]:
            best[row["examples"]] = (row["batch"], row["tokens"])
    (few, (small, _)), (many, (large, _)) = sorted(best.items())[0], sorted(best.items())[-1]
    return judged(
        abs(large / small - (many / few) ** 0.5) < 0.5 and small > 2,
        f"fewest tokens to equal loss at a batch of {small} for {few:,} examples and of {large} for {many:,}: the smallest that was tried",
    )


def from_random_weights(record: Record) -> Found:
    """Held-out perplexity against a bigram's."""
    loss, bigram = (record.figures[name].median for name in ("held-out loss", "held-out loss of a bigram"))
    return judged(loss < bigram, f"held-out perplexity {exp(loss):.1f} after half a million tokens; a bigram of the same tokens {exp(bigram):.1f}")


TRAINING: dict[int, Callable[[Record], Found]] = {
    12: grouped_heads,
    17: root_of_layers,
    18: recompute_time,
    38: best_batch,
    85: cheap_operations,
    116: from_random_weights,
}
