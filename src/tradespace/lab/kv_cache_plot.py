"""The cache experiment drawn: bytes, speed and divergence over length, as a PNG (matplotlib) and as one HTML page with its script inside (plotly)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from tradespace.lab.kv_cache_findings import at, lengths, paragraphs, seconds, verdict_lines
from tradespace.lab.kv_cache_kinds import FULL
from tradespace.lab.kv_cache_simulation import finding, is_simulated
from tradespace.lab.sweep_plot import SHAPES
from tradespace.measure.record import Record, write_atomically
from tradespace.units import MiB, format_bytes

TITLE = "A cache that holds less: bytes, speed, quality"
GROUPS = {"full": "#000000", "window": "#D55E00", "exact": "#0072B2", "store": "#009E73"}
LEAST_KL = 1e-6  # below it a divergence is rounding, and drawn on the floor


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture over length: `value(record, name, n)`; logarithmic on both axes."""

    label: str
    value: Callable[[Record, str, int], float]
    of: Callable[[str], bool] = lambda name: True


PANELS = (
    Panel(label="cache, MiB", value=lambda record, name, n: at(record, n)[name]["bytes"] / MiB),
    Panel(label="decode, tokens a second", value=lambda record, name, n: 1 / seconds(record, name, n)),
    Panel(
        label="KL to the full cache, nats per token",
        value=lambda record, name, n: max(LEAST_KL, at(record, n)[name]["mean_kl"]),
        of=lambda name: name != FULL,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One cache's line: colour by group, shape within it; dashed where it is lossy."""

    name: str
    colour: str
    shape: int
    exact: bool

    @property
    def label(self) -> str:
        return self.name if self.exact else f"{self.name} (lossy)"


def series(record: Record) -> list[Series]:
    """In the order of the record's longest length."""
    found, used = [], dict.fromkeys(GROUPS, 0)
    for row in at(record, lengths(record)[-1]).values():
        found.append(Series(name=row["name"], colour=GROUPS[row["group"]], shape=used[row["group"]] % len(SHAPES), exact=row["exact"]))
        used[row["group"]] += 1
    return found


def points(record: Record, panel: Panel, name: str) -> tuple[list[int], list[float]]:
    """(lengths, values) where this cache was measured."""
    kept = [n for n in lengths(record) if name in at(record, n)]
    return kept, [panel.value(record, name, n) for n in kept]


def caption(record: Record) -> str:
    row = next(row for row in record.rows if row["part"] == "model")
    return f"{row['model']}, fp32, {record.device['name']}; solid: exact, dashed: lossy; KL below {LEAST_KL:g} is drawn there"


def draw_png(record: Record, path: Path) -> None:
    """Writes the picture: three panels, one legend below. The record has the real model's part."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 7), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for line in series(record):
            if panel.of(line.name):
                look = {"color": line.colour, "marker": SHAPES[line.shape][0], "linestyle": "-" if line.exact else "--", "alpha": 0.85}
                axes.plot(*points(record, panel, line.name), label=line.label, **look)
        axes.set(xlabel="tokens", ylabel=panel.label, yscale="log")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths(record), [f"{n:,}" for n in lengths(record)])
        axes.minorticks_off()
        axes.grid(visible=True, which="major", alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(f"{TITLE}\n{caption(record)}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


def draw_html(record: Record, path: Path) -> None:
    """Writes the page: the panels with figures under the pointer, then both findings, the simulation's and the verdicts."""
    from plotly.io import to_html
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=len(PANELS), subplot_titles=[panel.label for panel in PANELS])
    for column, panel in enumerate(PANELS, 1):
        for line in series(record):
            if panel.of(line.name):
                figure.add_trace(_trace(record, panel, line, legend=column == 1), row=1, col=column)
    ticks = lengths(record)
    figure.update_xaxes(type="log", title="tokens", tickmode="array", tickvals=ticks, ticktext=[f"{n:,}" for n in ticks])
    figure.update_yaxes(type="log")
    figure.update_layout(title=f"{TITLE}<br><sup>{escape(caption(record))}</sup>", template="plotly_white", height=650)
    drawn = to_html(figure, include_plotlyjs=True, full_html=False)
    text = "\n".join(_html(paragraph) for paragraph in [*paragraphs(record), *([finding(record)] if is_simulated(record) else []), *verdict_lines(record)])
    style = "body{font-family:sans-serif;margin:2em auto;max-width:1500px;line-height:1.45}"
    head = f"<meta charset='utf-8'><title>{TITLE}</title><style>{style}</style>"
    write_atomically(path, f"<!doctype html><html><head>{head}</head><body>{drawn}{text}</body></html>\n")


def _trace(record: Record, panel: Panel, line: Series, *, legend: bool):
    from plotly.graph_objects import Scatter

    kept, values = points(record, panel, line.name)
    rows = [at(record, n)[line.name] for n in kept]
    return Scatter(
        x=kept,
        y=values,
        name=line.label,
        legendgroup=line.name,
        showlegend=legend,
        mode="lines+markers",
        line={"color": line.colour, "dash": "solid" if line.exact else "dash"},
        marker={"symbol": SHAPES[line.shape][1], "size": 9},
        customdata=[[format_bytes(row["bytes"]), row["speedup"], row["perplexity"], row["reference_perplexity"], row["mean_kl"]] for row in rows],
        hovertemplate=f"{escape(line.label)}<br>%{{x:,}} tokens: %{{customdata[0]}}<br>%{{customdata[1]:.2f}} times the full cache's speed"
        "<br>perplexity %{customdata[2]:.4g} (full %{customdata[3]:.4g}), KL %{customdata[4]:.2g}<extra></extra>",
    )


def _html(text: str) -> str:
    """A paragraph of our Markdown: nothing but **bold** and list items occurs in it."""
    pieces = escape(text.removeprefix("- "), quote=False).split("**")
    body = "".join(f"<b>{piece}</b>" if index % 2 else piece for index, piece in enumerate(pieces))
    return f"<li>{body}</li>" if text.startswith("- ") else f"<p>{body}</p>"
