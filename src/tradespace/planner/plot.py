"""A frontier as data for a picture, and as one HTML file that needs nothing else: bytes against tok/s, coloured by loss, the chosen plan marked, and its
ledger as a bar against the budget. `cli/plan_plot.py` draws the same data as PNG.
"""

from __future__ import annotations

import json
from html import escape

from tradespace.planner.candidate import Candidate
from tradespace.planner.plot_page import PAGE
from tradespace.planner.search import Frontier
from tradespace.units import format_bytes

BANDS = ("exact", "at most 0.01", "at most 0.05", "more", "unknown")  # nats per token
COLOURS = ("#1b7837", "#5aae61", "#c2a500", "#d6604d", "#8073ac")
BEHIND = 600  # plans that others beat, drawn faintly: at most so many


def band(candidate: Candidate) -> int:
    """Which colour a plan's loss has."""
    loss = candidate.quality.value
    if loss is None:
        return 4
    return 0 if loss == 0 else 1 if loss <= 0.01 else 2 if loss <= 0.05 else 3


def _point(candidate: Candidate) -> dict[str, object]:
    return {
        "bytes": candidate.total_bytes,
        "speed": candidate.decode_tokens_per_s.value,
        "band": band(candidate),
        "loss": candidate.quality.value,
        "text": candidate.plan.describe(),
        "size": format_bytes(candidate.total_bytes),
        "runs": not candidate.runs,
    }


def plot_data(frontier: Frontier) -> dict[str, object]:
    """What the picture shows, as plain values. Plans of unknown speed have no place in it and are counted instead."""
    question, best = frontier.question, frontier.best
    known = [found for found in frontier.pareto if found.decode_tokens_per_s.value]
    beaten = [found for found in frontier.eligible if found.decode_tokens_per_s.value]
    step = max(1, len(beaten) // BEHIND)
    pool = None if best is None else best.ledger.pools[0]
    lines = [] if best is None else [line for line in best.ledger.lines if line.pool == pool and line.bytes.value]
    return {
        "title": f"{question.model.name} on {question.device.name}",
        "budget": question.memory_bytes,
        "budget_text": format_bytes(question.memory_bytes),
        "bands": list(BANDS),
        "colours": list(COLOURS),
        "frontier": [_point(found) for found in known],
        "behind": [[found.total_bytes, found.decode_tokens_per_s.value] for found in beaten[::step]],
        "unplaced": len(frontier.pareto) - len(known),
        "best": None if best is None else _point(best),
        "degree": 1 if best is None else best.tensor_parallel,
        "pool": pool,
        "peak": 0 if best is None or pool is None else best.ledger.total_bytes(pool).value,
        "ledger": [{"name": line.name, "bytes": line.bytes.value, "size": format_bytes(line.bytes.require()), "phase": line.phase} for line in lines],
    }


def plot_html(frontier: Frontier) -> str:
    """One self-contained page: no network, no library."""
    data = plot_data(frontier)
    # "</" would end the script element inside a string
    body = json.dumps(data, allow_nan=False).replace("</", "<\\/")
    return PAGE.replace("%TITLE%", escape(str(data["title"]))).replace("%DATA%", body)
