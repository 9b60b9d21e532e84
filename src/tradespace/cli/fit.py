"""`tradespace fit`: which models of the zoo fit on a device, ranked, each with its best resident plan."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from tradespace.cli.options import Context, Json, Memory, console, print_json
from tradespace.errors import BudgetError

SHOWN = 15


def register(app: typer.Typer) -> None:
    app.command("fit")(fit)


def fit(
    memory: Memory = None,
    device: Annotated[str | None, typer.Option("--device", help="a100-40gb, '2x h100-80gb', rtx-4090, m4-max …; default: this machine, measured.")] = None,
    context: Context = None,
    concurrency: Annotated[int, typer.Option("--concurrency", "-np", min=1, help="Sequences at once.")] = 1,
    runnable: Annotated[bool, typer.Option("--runnable", help="Only models that this version runs.")] = False,
    everything: Annotated[bool, typer.Option("--all", help=f"All models that fit, not the first {SHOWN}.")] = False,
    json: Json = False,
) -> None:
    """Rank the published models that fit a budget whole: published score, predicted speed, longest context, best plan each. No weights, no torch.

    Example: tradespace fit --memory 16GB --device rtx-4090
    """
    from tradespace import api
    from tradespace.units import format_bytes

    machine = api.find_machine(device)
    budget = api.budget_bytes(memory, machine)
    found = api.fit(memory=budget, device=machine, context=context, concurrency=concurrency, runnable_only=runnable)
    if json:
        print_json({"device": machine.name, "memory_bytes": budget, "models": [entry.to_dict() for entry in found]})
        return
    if not found:
        smallest = "smollm2-135m"
        raise BudgetError(f"no model of the zoo fits {format_bytes(budget)} whole. The smallest is {smallest}: tradespace plan {smallest} says what it needs")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left", title_style="bold")
    table.title = f"{len(found)} published models fit {format_bytes(budget)} on {machine.name} with all layers resident"
    for heading in ("tier", "MMLU", "model", "weights", "bytes", "tok/s", "longest context", "runs"):
        table.add_column(heading, justify="left" if heading in ("tier", "model", "weights", "runs") else "right", no_wrap=True)
    for entry in found if everything else found[:SHOWN]:
        best, speed = entry.candidate, entry.candidate.decode_tokens_per_s.value
        table.add_row(
            entry.tier,
            "?" if entry.score.value is None else f"{entry.score.value:.1f}",
            entry.model.name,
            best.weights.default,
            format_bytes(best.total_bytes),
            "?" if speed is None else f"{speed:.3g}",
            f"{entry.longest_context:,}",
            "plan only" if entry.model.plan_only else "yes" if not best.runs else "no",
        )
    out = console()
    out.print(table)
    hidden = 0 if everything else max(0, len(found) - SHOWN)
    out.print(
        f"{f'{hidden} more with --all. ' if hidden else ''}Tier: band of the published MMLU score, source of each in --json. Speeds: predicted.", style="dim"
    )
    out.print("What one of them costs, line by line: tradespace plan MODEL with the same --memory and --device", style="dim")
