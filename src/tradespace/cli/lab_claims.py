"""`tradespace lab claims` and `tradespace lab attention`: the audit, and the experiment on attention with its picture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from tradespace.cli.options import Json, console, print_json

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for record and picture.")]


def register(lab: typer.Typer) -> None:
    lab.command("claims")(claims)
    lab.command("attention")(attention)


def claims(claim: Annotated[str | None, typer.Argument(metavar="[ID]", help="A number or a code: 9, A9. Default: all.")] = None, json: Json = False) -> None:
    """What is said of space and time in LLMs, and what our calculations and records say: confirmed, holds if, refuted, not testable.

    Example: tradespace lab claims A9
    """
    from tradespace.lab.claims import decide, find_claims, to_dict

    chosen = find_claims(claim)
    rows = [to_dict(each, decide(each)) for each in chosen]
    if json:
        print_json(rows)
        return
    out = console()
    if claim is not None:
        for key, value in rows[0].items():
            if value != "":
                out.print(f"[bold]{key}[/bold]  {escape(str(value))}", soft_wrap=True)
        return
    table = Table("", "claim", "verdict", "figure", show_lines=False)
    for each, row in zip(chosen, rows, strict=True):
        table.add_row(each.code, escape(each.wording), row["verdict"], escape(row["figure"]))
    out.print(table)
    counts = Counter(row["verdict"] for row in rows)
    out.print(f"{len(rows)} claims: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))


def attention(
    output: Output = Path("results"),
    quick: Annotated[bool, typer.Option("--quick", help="Up to 4,096 tokens: to see that it works, not to quote.")] = False,
    json: Json = False,
) -> None:
    """Bytes and time of attention over its length: the whole matrix, blocks, chunks, tiles. Powers are fitted and claims judged.

    Example: tradespace lab attention --output results
    """
    from tradespace.lab.attention import draw, markdown, run
    from tradespace.lab.sweep_plot import require_plotters
    from tradespace.measure.record import write_record

    require_plotters()
    notes = console(stderr=True)
    notes.print("about two minutes, the longest at 32,768 tokens" if not quick else "about ten seconds", style="dim")
    record = run(quick=quick, say=lambda line: notes.print(escape(line), style="dim", soft_wrap=True))
    write_record(output / "attention.json", record)
    draw(record, output / "attention.png")
    if json:
        print_json(record)
        return
    console().print(Markdown(markdown(record)))
    notes.print(f"wrote {output / 'attention.json'} and {output / 'attention.png'}", soft_wrap=True)
