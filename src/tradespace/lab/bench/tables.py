"""Cells as figures and rows of a record, and as tables of at most 100 columns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from tradespace.lab.bench.rounds import Cell, Engine
from tradespace.measure.record import Figure
from tradespace.units import format_bytes, format_rate, format_seconds

SHARE = {"decode": "MBU", "batch": "MBU", "prefill": "MFU"}


def figures_of(cell: Cell, prefix: str = "") -> dict[str, Figure]:
    """Every repeat of everything that was timed, under "label: what"."""
    name = f"{prefix}{cell.task.label}"
    found = {f"{name}: {engine.name}": Figure.of(engine.tokens_per_s, "tok/s") for engine in cell.engines}
    found |= {f"{name}: {cell.ours.name} / {peer.name}": Figure.of(cell.ratios(peer), "×") for peer in cell.engines[1:]}
    found[f"{name}: read bandwidth"] = Figure.of(cell.read_bytes_per_s, "B/s")
    return found | {f"{name}: {dtype} matmul rate": Figure.of(rates, "op/s") for dtype, rates in cell.flops_per_s.items()}


def rows_of(cell: Cell, **more: Any) -> list[dict[str, Any]]:
    """A row for each engine that took part, and one for each that did not."""
    common = {**more, "label": cell.task.label, "kind": cell.task.kind, "prompt": cell.task.prompt, "sequences": cell.task.sequences}
    common |= {"tokens": cell.task.tokens, "threads": cell.task.threads, "bytes_per_token": cell.work.bytes_per_token, "stored_bytes": cell.work.weight_bytes}
    rows: list[dict[str, Any]] = []
    for engine in cell.engines:
        row = {**common, "engine": engine.name, "version": engine.version, "settings": engine.settings, "tried": engine.tried}
        row |= {"tokens_per_s": statistics.median(engine.tokens_per_s), "share": cell.share(engine), "share_of": share_of(cell, engine)}
        row |= {"startup_s": engine.startup_s, "peak_bytes": engine.peak_bytes, "facts": engine.facts}
        rows.append(row)
    return rows + [{**common, "engine": name, "absent": reason} for name, reason in cell.absent.items()]


def share_of(cell: Cell, engine: Engine) -> str:
    """What `Cell.share` is a share of, in words."""
    if cell.task.kind == "prefill":
        if cell.share(engine) is None:
            return f"nothing: torch has no {engine.dtype} products for this CPU that beat its fp32"
        return f"{engine.dtype} matmul rate, {statistics.median(cell.flops_per_s[engine.dtype]):.3g} op/s"
    return f"read bandwidth, {statistics.median(cell.read_bytes_per_s):.3g} B/s at {cell.work.read_bytes:.3g} bytes"


def cell_table(cell: Cell) -> Table:
    """One cell: engines down, what was measured across."""
    table = Table("engine", title=cell.task.label, title_justify="left")
    for column in ("tok/s [spread]", f"{cell.ours.name} / it", SHARE[cell.task.kind], "start-up", "peak RSS"):
        table.add_column(column, justify="right")
    for engine in cell.engines:
        ratio = spread(cell.ratios(engine), 2) if engine is not cell.ours else ""
        share = cell.share(engine)
        table.add_row(
            engine.name,
            spread(engine.tokens_per_s, 0),
            ratio,
            "–" if share is None else f"{share:.0%}",
            format_seconds(engine.startup_s),
            format_bytes(engine.peak_bytes),
        )
    return table


def notes_of(cell: Cell) -> list[str]:
    """What the table stands on, a sentence a line."""
    found = [f"{len(cell.read_bytes_per_s)} interleaved rounds, {cell.task.threads} threads; ratios are medians of paired rounds"]
    if cell.task.kind == "prefill":
        found += [f"MFU of {engine.name}: of the {share_of(cell, engine)}" for engine in cell.engines]
    else:
        found.append(
            f"MBU: {format_bytes(cell.work.bytes_per_token)} a token; {format_rate(statistics.median(cell.read_bytes_per_s), 'B/s')} read at that size"
        )
    for engine in cell.engines:
        others = ", ".join(f"{name} {speed:,.0f}" for name, speed in engine.tried.items() if name != engine.settings)
        found.append(f"{engine.name} {engine.version}: {engine.settings}" + (f" (its best; {others} tok/s)" if others else ""))
    return [escape(line) for line in [*found, *(f"{name} takes no part: {reason}" for name, reason in cell.absent.items())]]


def spread(values: Sequence[float], digits: int) -> str:
    """median [min–max].

    >>> spread([1.0, 3.0, 2.0], 1)
    '2.0 [1.0–3.0]'
    """
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} [{low}–{high}]"
