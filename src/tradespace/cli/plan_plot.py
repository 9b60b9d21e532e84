"""`plan --plot FILE` and `plan --export TOOL`: the picture as HTML (needs nothing) or PNG (matplotlib, extra `lab`), the plan in another tool's words."""

from __future__ import annotations

import io
from pathlib import Path

from tradespace.cli.options import write_file
from tradespace.errors import InputError, TradespaceError
from tradespace.planner.export import EXPORTERS, Export
from tradespace.planner.plot import BANDS, COLOURS, band, plot_data, plot_html
from tradespace.planner.search import Frontier
from tradespace.units import GiB, format_bytes


def check_wishes(tool: str | None, path: Path | None) -> None:
    """Raises InputError for a tool or a kind of picture that does not exist, before a search is paid for."""
    if tool is not None and tool not in EXPORTERS:
        raise InputError(f"no export for '{tool}'. Known: {', '.join(EXPORTERS)}")
    if path is not None and path.suffix.lower() not in (".html", ".htm", ".png"):
        raise InputError(f"--plot {path}: give a name that ends in .html or .png")


def save_plot(path: Path, frontier: Frontier) -> None:
    """Writes FILE.html or FILE.png, whole or not at all. Raises InputError for another ending."""
    if path.suffix.lower() in (".html", ".htm"):
        write_file(path, plot_html(frontier), "--plot")
    elif path.suffix.lower() == ".png":
        _write_bytes(path, _png(frontier))
    else:
        raise InputError(f"--plot {path}: give a name that ends in .html or .png")


def _write_bytes(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise InputError(f"--plot: cannot write {path}: {error.strerror}. Give a path that you may write to") from error


def _png(frontier: Frontier) -> bytes:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise TradespaceError("a PNG needs matplotlib: pip install 'tradespace[lab]'. Or give a name that ends in .html, which needs nothing") from None
    data, best = plot_data(frontier), frontier.best
    figure = Figure(figsize=(10, 7), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(5, 1))
    behind = [(c.total_bytes / GiB, c.decode_tokens_per_s.value or 0) for c in frontier.eligible[:: max(1, len(frontier.eligible) // 600)]]
    if behind:
        above.scatter(*zip(*behind, strict=True), s=6, color="#99a", alpha=0.3, label="beaten")
    for index, (name, colour) in enumerate(zip(BANDS, COLOURS, strict=True)):
        points = [(c.total_bytes / GiB, c.decode_tokens_per_s.value) for c in frontier.pareto if band(c) == index and c.decode_tokens_per_s.value]
        if points:
            above.scatter(*zip(*points, strict=True), s=34, color=colour, label=f"loss {name}", edgecolors="white", linewidths=0.5)
    if best is not None and best.decode_tokens_per_s.value:
        above.scatter(
            [best.total_bytes / GiB], [best.decode_tokens_per_s.value], s=170, facecolors="none", edgecolors="#d1006c", linewidths=2.2, label="chosen"
        )
    above.set(xscale="log", yscale="log", xlabel="GiB over all devices", ylabel="decode, tokens a second", title=f"{data['title']} in {data['budget_text']}")
    above.legend(fontsize=8)
    above.grid(alpha=0.3, which="both")
    if best is not None:
        pool, left = best.ledger.pools[0], 0.0
        for line in best.ledger.lines:
            if line.pool == pool and line.bytes.value:
                below.barh(0, line.bytes.value / GiB, left=left, label=f"{line.name} {format_bytes(line.bytes.value)}")
                left += line.bytes.value / GiB
        below.axvline(frontier.question.memory_bytes / GiB, color="#d1006c", linestyle="--")
        below.set(yticks=[], xlabel=f"GiB of {pool}, line by line; dashed: the budget")
        below.legend(fontsize=6, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.45))
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def print_export(found: Export) -> None:
    """The text as it is, so that it can be piped; the notes as comments below it."""
    print(found.text if found.text.endswith("\n") else f"{found.text}\n", end="")
    for note in found.notes:
        print(f"# not expressed or not the same: {note}")
    if found.file_name:
        print(f"# save this as {found.file_name}")
