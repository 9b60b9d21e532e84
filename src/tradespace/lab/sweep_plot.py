"""A sweep drawn: bytes of the weights against mean KL divergence, as a PNG (matplotlib) and as one HTML page with its script inside (plotly)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tradespace.errors import InputError
from tradespace.measure.record import Record, write_atomically
from tradespace.units import MiB

TITLE = "Bytes against divergence"
X_LABEL, Y_LABEL = "weights, MiB", "mean KL to the reference, nats per token"
# colours that stay apart for most eyes (Okabe and Ito), and shapes beside them
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SHAPES = (("o", "circle"), ("s", "square"), ("^", "triangle-up"), ("D", "diamond"), ("v", "triangle-down"), ("P", "cross"), ("*", "star"))


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


def _caption(record: Record) -> str:
    equal = [row["format"] for row in record.rows if row["mean_kl"] <= 0]
    return record.notes.split("; left out")[0] + (f"; no divergence at all, so not drawn: {', '.join(equal)}" if equal else "")


def draw_png(record: Record, path: Path) -> None:
    """Writes the picture, 1600 × 1000 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 10), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    front = _front(record)
    axes.plot([row["bytes"] / MiB for row in front], [row["mean_kl"] for row in front], color="#999999", linewidth=1, label="nothing beats these")
    for index, (method, rows) in enumerate(_series(record).items()):
        colour, shape = COLOURS[index % len(COLOURS)], SHAPES[index % len(SHAPES)][0]
        axes.errorbar(
            [row["bytes"] / MiB for row in rows], [row["mean_kl"] for row in rows], yerr=[min(row["kl_error"], 0.9 * row["mean_kl"]) for row in rows],
            fmt=shape, color=colour, label=method, capsize=2, elinewidth=1,
        )  # fmt: skip
        for row in rows:  # names of the best above their points, the others' small and below
            place, size = ((5, 5), 10) if row["pareto"] else ((5, -8), 7)
            axes.annotate(row["format"], (row["bytes"] / MiB, row["mean_kl"]), textcoords="offset points", xytext=place, fontsize=size, color=colour)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yscale("log")
    axes.set_xlabel(X_LABEL)
    axes.set_ylabel(Y_LABEL)
    axes.set_title(f"{TITLE}\n{_caption(record)}", fontsize=10, wrap=True)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


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
                text=[row["format"] for row in rows],
                textposition="top center",
                name=method,
                marker={"color": COLOURS[index % len(COLOURS)], "symbol": SHAPES[index % len(SHAPES)][1], "size": 9},
                customdata=[[row["bits_per_weight"], row["p99_kl"], 100 * row["top1_agreement"], row["perplexity"]] for row in rows],
                hovertemplate="%{text}<br>%{x:.1f} MiB, %{customdata[0]:.2f} bits a weight<br>KL %{y:.5f}, 99%: %{customdata[1]:.4f}"
                "<br>same top token %{customdata[2]:.2f}%<br>perplexity %{customdata[3]:.3f}",
            )
        )
    figure.update_layout(
        title={"text": f"{TITLE}<br><sup>{_caption(record)}</sup>"},
        xaxis_title=X_LABEL,
        yaxis_title=Y_LABEL,
        xaxis_type="log",
        yaxis_type="log",
        template="plotly_white",
    )
    write_atomically(path, to_html(figure, include_plotlyjs=True, full_html=True))
