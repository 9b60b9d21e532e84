"""Frontiers, ledgers, rejections and alternatives as tables of at most 100 columns: functions that return what rich prints. The numbers are the planner's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tradespace.cost.memory import Ledger
from tradespace.planner.candidate import Candidate
from tradespace.planner.explain import Alternative, ShapeRow
from tradespace.planner.reject import Rejection
from tradespace.planner.search import Frontier
from tradespace.spec.estimate import Estimate
from tradespace.units import format_bytes

WIDTH = 100
FRONTIER_ROWS = 16
_NOT_THERE_YET = {"loading": "while loading", "layers": "peak of a layer", "head": "peak at the logits"}


def _table(title: str, *columns: tuple[str, str]) -> Table:
    """A plain table; columns as (heading, "left" or "right"). The last left-justified column folds, the others stay on one line."""
    table = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading, side in columns:
        table.add_column(heading, justify="right" if side == "right" else "left", no_wrap=side != "fold", overflow="fold" if side == "fold" else "ellipsis")
    return table


def size(estimate: Estimate | float | None) -> str:
    value = estimate.value if isinstance(estimate, Estimate) else estimate
    return "?" if value is None else format_bytes(value)


def rate(estimate: Estimate) -> str:
    """Tokens per second with three digits; "?" where nobody knows."""
    if estimate.value is None:
        return "?"
    return f"{estimate.value:,.0f}" if estimate.value >= 100 else f"{estimate.value:.3g}"


def loss(estimate: Estimate) -> str:
    """Nats per token: "exact", a figure, or "?"."""
    if estimate.value is None:
        return "?"
    return "exact" if estimate.value == 0 else f"{estimate.value:.4f}"


def source_mark(estimate: Estimate) -> str:
    """The first word of a source: exact, measured, assumed, modelled …"""
    return estimate.source.split(":", 1)[0].split(" ", 1)[0]


def ledger_view(ledger: Ledger, title: str = "") -> RenderableType:
    """One row per line of the ledger and one per pool with its peak."""
    table = _table("", ("line", "left"), ("pool", "left"), ("bytes", "right"), ("source", "left"), ("formula", "fold"))
    for line in ledger.lines:
        when = _NOT_THERE_YET.get(line.phase)
        formula = f"{line.formula} ({when})" if when else line.formula
        table.add_row(line.name, line.pool, size(line.bytes), source_mark(line.bytes), Text(formula, style="dim"))
    for pool in ledger.pools:
        table.add_row(Text(f"peak of {pool}", style="bold"), pool, Text(size(ledger.total_bytes(pool)), style="bold"), "", "")
    return Group(Text(title, style="bold"), table) if title else table


def _weights(candidate: Candidate) -> str:
    kept = next(iter(candidate.weights.exceptions.values()), None)
    return candidate.weights.default if kept is None else f"{candidate.weights.default}, head {kept}"


def _cache(candidate: Candidate) -> str:
    layout = f"paged {candidate.kv.block_size}" if candidate.kv.layout == "paged" else "contig."
    return f"{candidate.kv.describe_store()} {layout}"


def _layers(candidate: Candidate) -> str:
    streamed = candidate.placement.streamed_layers
    where = f"{streamed} from {candidate.placement.stream_from}" if streamed else "resident"
    return f"{where}, {candidate.tensor_parallel} dev." if candidate.tensor_parallel > 1 else where


def shown(frontier: Frontier, limit: int = FRONTIER_ROWS) -> list[Candidate]:
    """At most `limit` rows of the frontier by ascending bytes: both ends, those that run, then an even choice of the rest; and the best."""
    rows = list(frontier.pareto)
    if len(rows) > limit:
        keep = {0, len(rows) - 1}
        running = [index for index, candidate in enumerate(rows) if not candidate.runs]
        for indices in (running, range(len(rows))):
            room = limit - len(keep)
            fresh = [index for index in indices if index not in keep]
            keep.update(fresh[round(position * (len(fresh) - 1) / max(1, room - 1))] for position in range(min(room, len(fresh))))
        rows = [rows[index] for index in sorted(keep)]
    if frontier.best is not None and frontier.best not in rows:
        rows.append(frontier.best)
    return sorted(rows, key=lambda candidate: candidate.objectives)


def frontier_view(frontier: Frontier, limit: int = FRONTIER_ROWS) -> RenderableType:
    """The Pareto frontier of bytes, decode speed (tok/s) and loss (KL, nats per token); "→" marks the best plan, "runs" what this version can run."""
    heading = f"frontier: {len(frontier.pareto)} of {len(frontier.candidates):,} plans priced, {len(frontier.eligible):,} of them fit"
    columns = (("", "left"), ("weights", "left"), ("KV", "left"), ("attention", "left"), ("layers", "left"), ("bytes", "right"))
    table = _table(heading, *columns, ("decode", "right"), ("prefill", "right"), ("KL", "right"), ("runs", "left"))
    rows = shown(frontier, limit)
    for candidate in rows:
        is_best = candidate is frontier.best
        table.add_row(
            "→" if is_best else "",
            _weights(candidate),
            _cache(candidate),
            candidate.attention,
            _layers(candidate),
            size(candidate.total_bytes),
            rate(candidate.decode_tokens_per_s),
            rate(candidate.prefill_tokens_per_s),
            loss(candidate.quality),
            "no" if candidate.runs else "yes",
            style="bold" if is_best else "",
        )
    return Group(table, *_notes(frontier, rows))


def _notes(frontier: Frontier, rows: Sequence[Candidate]) -> list[Text]:
    notes = []
    best = frontier.best
    if len(frontier.pareto) > len(rows):
        notes.append(f"{len(frontier.pareto) - len(rows)} more in --json.")
    if best is not None:
        seconds = best.decode.seconds
        notes.append(
            f"tok/s: {seconds.source}; the best plan's decode is bound by {best.decode.bound} at {best.decode.arithmetic_intensity:.1f} operations a byte."
        )
        if all(best.objectives != point.objectives for point in frontier.pareto):
            notes.append("The best plan spends bytes on faster prefill, which the frontier does not count.")
        if best.quality.source != "exact":
            notes.append(f"KL in nats per token; the best's: {best.quality.source}.")
        if best.runs:
            notes.append(f"The best cannot run yet: {'; '.join(best.runs)}.")
        if not best.serves_all:
            full = best.question.workload.concurrency * best.question.workload.context_tokens
            notes.append(f"Its cache holds {best.kv_tokens:,} tokens, not the {full:,} of all sequences at full length: then some wait.")
    elif frontier.nearest is not None:
        notes.append(f"Nothing fits. Nearest: --context {frontier.nearest.plan.max_context} --concurrency 1, {frontier.nearest.plan.describe()}.")
    return [Text(note, style="dim") for note in notes]


def rejections_view(frontier: Frontier) -> RenderableType:
    """Why every family of options that the best plan does not use lost."""
    table = _table("why not", ("option", "left"), ("reason", "fold"))
    for family, reasons in _grouped(frontier.why_not):
        table.add_row(family, reasons)
    return table


def _grouped(rejections: Iterable[Rejection]) -> list[tuple[str, str]]:
    """Options of one axis that lost for the same reason share a row: ("KV fp8, int4, int2", …)."""
    rows: dict[tuple[str, str], list[str]] = {}
    for rejection in rejections:
        axis, _, value = rejection.family.partition(" ")
        rows.setdefault((axis, rejection.reason), []).append(value)
    return [(f"{axis} {', '.join(values)}", reason) for (axis, reason), values in rows.items()]


def alternatives_view(alternatives: Sequence[Alternative]) -> RenderableType:
    """Each way out in a line, with its ledger."""
    parts: list[RenderableType] = [Text("or instead", style="bold")]
    for number, found in enumerate(alternatives, 1):
        candidate = found.candidate
        speed = f"decode {rate(candidate.decode_tokens_per_s)} tok/s, KL {loss(candidate.quality)}"
        parts.append(Text(f"{number}. {found.kind}: {found.text} ({speed})"))
        parts.append(_short_ledger(candidate))
    return Group(*parts)


def _short_ledger(candidate: Candidate) -> RenderableType:
    """The ledger with all weights in one line: enough to add up."""
    ledger = candidate.ledger
    each = " on each device" if candidate.tensor_parallel > 1 else ""
    table = _table("", ("line", "left"), ("pool", "left"), ("bytes", "right"))
    weights = sum(line.bytes.require() for line in ledger.lines if line.name.startswith("weights: "))
    is_shown = False
    for line in ledger.lines:
        if not line.name.startswith("weights: "):
            table.add_row(f"   {line.name}", line.pool, size(line.bytes))
        elif not is_shown:
            is_shown = True
            table.add_row(f"   weights, {candidate.weights.describe()}", line.pool, size(weights))
    for pool in ledger.pools:
        table.add_row(Text(f"   peak of {pool}{each if pool == 'device' else ''}", style="bold"), pool, Text(size(ledger.total_bytes(pool)), style="bold"))
    return table


def what_if_view(rows: Sequence[ShapeRow]) -> RenderableType:
    """Shapes of models side by side; weights and cache in decimal units, as publications have them."""
    columns = (("model", "fold"), ("layers", "right"), ("width", "right"), ("ffn", "right"), ("KV heads", "right"), ("params", "right"))
    table = _table("what if", *columns, ("weights", "right"), ("KV/token", "right"), ("KV cache", "right"), ("decode t/s", "right"))
    for row in rows:
        table.add_row(
            row.name,
            str(row.layers),
            str(row.width),
            str(row.ffn),
            str(row.kv_heads),
            f"{row.parameters / 1e9:.2f}B",
            format_bytes(row.weight_bytes, decimal=True),
            format_bytes(row.kv_token_bytes, decimal=True),
            format_bytes(row.kv_workload_bytes, decimal=True),
            rate(row.decode_tokens_per_s),
        )
    return table
