"""The cache experiment as Markdown: the longest length in full, speed over all lengths, both findings, the simulation, the verdicts."""

from __future__ import annotations

from typing import Any

from tradespace.lab import kv_cache_simulation
from tradespace.lab.common import markdown_table
from tradespace.lab.kv_cache_findings import at, lengths, over_full, paragraphs, verdict_lines
from tradespace.lab.kv_cache_kinds import FULL
from tradespace.measure.record import Figure, Record
from tradespace.units import format_bytes

HEADER = ("cache", "tokens that stay", "", "bytes", "decode tok/s", "over full", "perplexity (full's)", "KL, nats", "same top token", "tokens timed")


def rate(figure: Figure) -> str:
    """Tokens a second with its spread, of seconds a token."""

    def text(value: float) -> str:
        return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"

    return f"{text(1 / figure.median)} [{text(1 / figure.max)}–{text(1 / figure.min)}]"


def ratio(value: float) -> str:
    return f"{value:.2f}×" if value >= 0.1 else f"{value:.1g}×"


def table(record: Record, n: int) -> str:
    """Every cache at one length."""
    return markdown_table(HEADER, [_line(record, row) for row in at(record, n).values()], left=3)


def _line(record: Record, row: Any) -> tuple[str, ...]:
    seconds, over = (record.figures[f"model: {row['name']} at {row['n']}{what}"] for what in ("", " over full"))
    full = row["name"] == FULL
    return (
        row["name"],
        f"{row['grows']}: {row['tokens_kept']:,}" if row["grows"] not in ("n", "ids") else "n" if row["grows"] == "n" else "ids alone",
        "exact" if row["exact"] else "lossy",
        format_bytes(row["bytes"]),
        rate(seconds),
        "1" if full else f"{ratio(over.median)} [{ratio(over.min)}–{ratio(over.max)}]",
        f"{row['perplexity']:.4g} ({row['reference_perplexity']:.4g})",
        "0" if full else f"{row['mean_kl']:.2g} ± {row['kl_error']:.1g}",
        f"{row['top1_agreement']:.0%}",
        f"{row['timed_tokens']}",
    )


def by_length(record: Record) -> str:
    """Speed over the full cache's, and KL, at every length."""
    all_n = lengths(record)
    rows = []
    for name in at(record, all_n[-1]):
        found = [at(record, n).get(name) for n in all_n]
        cells = ["" if row is None else f"{ratio(over_full(record, name, row['n']))}, {row['mean_kl']:.1g}" for row in found]
        rows.append((name, *cells))
    return markdown_table(("speed over full, KL in nats", *(f"{n:,} tokens" for n in all_n)), [row for row in rows if row[0] != FULL])


def markdown(record: Record) -> str:
    parts = []
    if all_n := lengths(record):
        model = next(iter(at(record, all_n[-1]).values()))["model"]
        parts += [f"{model}, {all_n[-1]:,} tokens:", table(record, all_n[-1])]
        parts += [by_length(record)] if len(all_n) > 1 else []
        parts += paragraphs(record)
    if kv_cache_simulation.is_simulated(record):
        parts.append(kv_cache_simulation.markdown(record))
    head, *lines = verdict_lines(record)
    return "\n\n".join([*parts, head, "\n".join(lines)])
