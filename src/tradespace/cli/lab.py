"""`tradespace lab`: experiments that measure on this machine what the documentation states, and write a record of each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from tradespace.cli import lab_cache, lab_claims
from tradespace.cli.options import Json, console, print_json
from tradespace.cli.training_options import parse_duration
from tradespace.errors import InputError

lab = typer.Typer(no_args_is_help=True, help="Measure, and keep the record.\n\nExample: tradespace lab run memory")
lab_claims.register(lab)
lab_cache.register(lab)


def register(app: typer.Typer) -> None:
    app.add_typer(lab, name="lab")


@lab.command("list")
def list_experiments(json: Json = False) -> None:
    """The experiments, what each one asks, and about how long it takes.

    Example: tradespace lab list
    """
    from tradespace.lab.experiments import EXPERIMENTS

    if json:
        print_json([{"name": e.name, "question": e.question, "minutes": e.minutes} for e in EXPERIMENTS.values()])
        return
    table = Table("experiment", "question", "minutes")
    for experiment in EXPERIMENTS.values():
        table.add_row(experiment.name, experiment.question, f"{experiment.minutes:g}")
    console().print(table)


@lab.command("run")
def run(
    name: Annotated[str, typer.Argument(metavar="NAME|all")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the record.")] = Path("results"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repeats and smaller grids: to see that it works, not to quote.")] = False,
    only: Annotated[list[str] | None, typer.Option("--only", help="Only this part of it (cpu-speed: decode, prefill, batch, start); the rest stays.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda, for experiments that run on either. Default: cpu.")] = None,
    time_limit: Annotated[str | None, typer.Option("--time-limit", help="Such as 240s or 8m, for experiments that can be cut; what is done is kept.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Name or path, for experiments that take one (distill-student: the teacher).")] = None,
    json: Json = False,
) -> None:
    """Run one experiment (or all) and write its record.

    Example: tradespace lab run memory --output results

    Part:    tradespace lab run cpu-speed --only decode
    """
    from tradespace.lab.experiments import EXPERIMENTS
    from tradespace.measure.record import read_record, write_record

    if name != "all" and name not in EXPERIMENTS:
        raise InputError(f"no experiment '{name}'. Known: {', '.join(EXPERIMENTS)}, or all")
    notes = console(stderr=True)
    for experiment in EXPERIMENTS.values() if name == "all" else [EXPERIMENTS[name]]:
        if name == "all" and experiment.on != "cpu":
            notes.print(f"{experiment.name} left out: it needs a device of kind {experiment.on}. Alone: tradespace lab run {experiment.name}", style="dim")
            continue
        notes.print(f"{experiment.name}: {experiment.question} (about {experiment.minutes:g} minutes)", style="dim", soft_wrap=True)
        record = experiment.run(
            quick=quick, say=lambda line: notes.print(escape(line), style="dim", soft_wrap=True), only=only or (), device=device,
            time_limit_s=parse_duration(time_limit), model=model,
        )  # fmt: skip
        path = output / experiment.file
        if only and path.exists():
            record = experiment.joined(read_record(path), record, only)
        write_record(path, record)
        written = [path, *([drawn] if (drawn := experiment.draw(record, path)) else [])]
        if json:
            print_json(record)
        else:
            console().print(Markdown(experiment.markdown(record)))
            notes.print(f"wrote {' and '.join(map(str, written))}", soft_wrap=True)
