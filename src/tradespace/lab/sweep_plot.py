"""A sweep drawn: bytes of the weights against mean KL divergence, as a PNG (matplotlib) and as one HTML page with its script inside (plotly)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tradespace.errors import InputError
from tradespace.measure.record import Record, write_atomically
from tradespace.units import MiB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Bytes against divergence"
X_LABEL, Y_LABEL = "weights, MiB", "mean KL to the reference, nats per token"
# colours that stay apart for most eyes (Okabe and Ito), and shapes beside them
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SHAPES = (("o", "circle"), ("s", "square"), ("^", "triangle-up"), ("D", "diamond"), ("v", "triangle-down"), ("P", "cross"), ("*", "star"))


# of a name in the picture, in pixels: a letter's width, a line's height, half of a mark, what is near; and places around a point, nearest first
LETTER, LINE, MARK, NEAR = 7.6, 14, 6, 26
PLACES = tuple((side * dx, sign * dy) for dx in (9, 26, 45, 70) for dy in (0, 13, 26, 45, 70, 100) for sign in (-1, 1) for side in (-1, 1))


def require_plotters() -> None:
    """Raises InputError naming the extra where one of them is missing: before anything is measured."""
    for package in ("matplotlib", "plotly"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(f"drawing a sweep needs {package}, which is not installed. Run: pip install 'tradespace[lab]'") from error


def _series(record: Record) -> dict[str, list[Mapping[str, Any]]]:
    """Points by method, in the record's order. A point without any divergence has no place on a logarithmic axis."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in record.rows:
        if row["mean_kl"] > 0:
            found.setdefault(row["method"], []).append(row)
    return found


def _front(record: Record) -> list[Mapping[str, Any]]:
    return [row for row in record.rows if row["pareto"] and row["mean_kl"] > 0]


def _best_of_formats(record: Record) -> dict[str, Mapping[str, Any]]:
    """Of each format the point that loses least: all of its points stand one above the other, so one name serves them."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in record.rows:
        if row["mean_kl"] > 0 and (row["format"] not in found or row["mean_kl"] < found[row["format"]]["mean_kl"]):
            found[row["format"]] = row
    return found


def _caption(record: Record) -> str:
    equal = [row["format"] for row in record.rows if row["mean_kl"] <= 0]
    return record.notes.split("; left out")[0] + (f"; no divergence at all, so not drawn: {', '.join(equal)}" if equal else "")


def _ticks(record: Record) -> list[float]:
    """MiB at which the axis is marked: powers of two and the halves between them, one beyond either end."""
    sizes = [row["bytes"] / MiB for row in record.rows]
    marks = [2.0**power * half for power in range(-4, 24) for half in (1, 1.5)]
    return [mark for mark in marks if min(sizes) / 1.5 <= mark <= max(sizes) * 1.5]


def draw_png(record: Record, path: Path) -> None:
    """Writes the picture, 1600 × 1000 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 10), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    front = _front(record)
    axes.plot([row["bytes"] / MiB for row in front], [row["mean_kl"] for row in front], color="#999999", linewidth=1, label="nothing beats these")
    named: list[tuple[Mapping[str, Any], str]] = []
    best = _best_of_formats(record)
    for index, (method, rows) in enumerate(_series(record).items()):
        colour, shape = COLOURS[index % len(COLOURS)], SHAPES[index % len(SHAPES)][0]
        axes.errorbar(
            [row["bytes"] / MiB for row in rows], [row["mean_kl"] for row in rows], yerr=[min(row["kl_error"], 0.9 * row["mean_kl"]) for row in rows],
            fmt=shape, color=colour, label=method, capsize=2, elinewidth=1,
        )  # fmt: skip
        named += [(row, colour) for row in rows if row is best[row["format"]]]
    axes.set_xscale("log", base=2)
    axes.set_xticks(_ticks(record))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yscale("log")
    axes.set_xlabel(X_LABEL)
    axes.set_ylabel(Y_LABEL)
    axes.set_title(f"{TITLE}\n{_caption(record)}", fontsize=10, wrap=True)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
    figure.draw_without_rendering()  # places are in pixels: the layout must be done
    _name_points(axes, named, [row for row in record.rows if row["mean_kl"] > 0])
    figure.savefig(path, format="png", metadata={"Software": None})


def _name_points(axes: Axes, named: Sequence[tuple[Mapping[str, Any], str]], points: Sequence[Mapping[str, Any]]) -> None:
    """The formats of `named` (point, colour) beside their points, where they cover no other name and none of `points`: of a few places around it the nearest
    that is free, with a line to it where that is far. The best points choose first, and in bold."""

    def pixels(row: Mapping[str, Any]) -> tuple[float, float]:
        x, y = axes.transData.transform((row["bytes"] / MiB, row["mean_kl"]))
        return float(x), float(y)

    taken: list[tuple[float, ...]] = [(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in map(pixels, points)]
    inside = axes.get_window_extent().extents
    legend = axes.get_legend()
    if legend is not None:
        taken.append(tuple(legend.get_window_extent().extents))
    for row, colour in sorted(named, key=lambda entry: not entry[0]["pareto"]):
        x, y = pixels(row)
        width, height = LETTER * len(row["format"]), LINE
        boxes = [(x + dx - (width if dx < 0 else 0), y + dy - height / 2) for dx, dy in PLACES]
        kept = [
            place for place, (left, low) in enumerate(boxes) if inside[0] < left and left + width < inside[2] and inside[1] < low and low + height < inside[3]
        ]
        free = (place for place in kept if not any(_cover((*boxes[place], boxes[place][0] + width, boxes[place][1] + height), box) for box in taken))
        place = next(free, 0)
        left, low = boxes[place]
        taken.append((left, low, left + width, low + height))
        far = abs(PLACES[place][0]) > NEAR or abs(PLACES[place][1]) > NEAR
        axes.annotate(
            row["format"], (row["bytes"] / MiB, row["mean_kl"]), textcoords="offset pixels", xytext=(left - x, low - y), color=colour, fontsize=9,
            fontweight="bold" if row["pareto"] else "normal", arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6} if far else None,
        )  # fmt: skip


def _cover(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether two boxes (left, low, right, high) share a pixel."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def draw_html(record: Record, path: Path) -> None:
    """Writes the page: hover over a point for its figures."""
    from plotly.graph_objects import Figure, Scatter
    from plotly.io import to_html

    figure = Figure()
    front = _front(record)
    sizes, losses = [row["bytes"] / MiB for row in front], [row["mean_kl"] for row in front]
    figure.add_trace(Scatter(x=sizes, y=losses, mode="lines", name="nothing beats these", line={"color": "#999999"}))
    for index, (method, rows) in enumerate(_series(record).items()):
        figure.add_trace(
            Scatter(
                x=[row["bytes"] / MiB for row in rows],
                y=[row["mean_kl"] for row in rows],
                error_y={"type": "data", "array": [row["kl_error"] for row in rows]},
                mode="markers+text",
                # beside the best points only: the others' names show under the pointer
                text=[row["format"] if row["pareto"] else "" for row in rows],
                textposition="bottom left",
                name=method,
                marker={"color": COLOURS[index % len(COLOURS)], "symbol": SHAPES[index % len(SHAPES)][1], "size": 9},
                hovertext=[row["format"] for row in rows],
                customdata=[[row["bits_per_weight"], row["p99_kl"], 100 * row["top1_agreement"], row["perplexity"]] for row in rows],
                hovertemplate="%{hovertext}<br>%{x:.1f} MiB, %{customdata[0]:.2f} bits a weight<br>KL %{y:.5f}, 99%: %{customdata[1]:.4f}"
                "<br>same top token %{customdata[2]:.2f}%<br>perplexity %{customdata[3]:.3f}",
            )
        )
    figure.update_layout(
        title={"text": f"{TITLE}<br><sup>{_caption(record)}</sup>"},
        xaxis_title=X_LABEL,
        yaxis_title=Y_LABEL,
        xaxis={"type": "log", "tickmode": "array", "tickvals": (ticks := _ticks(record)), "ticktext": [f"{tick:g}" for tick in ticks]},
        yaxis={"type": "log", "dtick": 1, "exponentformat": "power"},
        template="plotly_white",
    )
    write_atomically(path, to_html(figure, include_plotlyjs=True, full_html=True))
