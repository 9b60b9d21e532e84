"""`tradespace demo`: the whole way on this machine: what it is, the plan, the text, and predicted against measured."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.rule import Rule

from tradespace.cli.doctor import doctor_tables
from tradespace.cli.options import Json, Memory, console, print_json
from tradespace.cli.plan_view import frontier_view, ledger_view
from tradespace.cli.run import report_table, stream_to_terminal

PROMPT = "Why is the sky blue? Answer in three sentences."


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="As `tradespace run` takes it.")] = "smollm2-135m",
    memory: Memory = "900MiB",
    json: Json = False,
) -> None:
    """Show the machine, the plan, the text as it is generated, and predicted against measured.

    Example: tradespace demo smollm2-135m --memory 900MiB
    """
    import tradespace as ts

    out = console()
    machine = ts.this_machine()
    if not json:
        out.print(Rule("this machine", align="left"))
        for table in doctor_tables(machine):
            out.print(table)
    ts.pull(model, progress=not json)
    frontier = ts.plan(model, memory=memory, runnable_only=True)
    if not json:
        out.print(Rule(f"the plan for {model} in {memory}", align="left"))
        if frontier.best is not None:
            out.print(ledger_view(frontier.best.ledger))
        out.print(frontier_view(frontier))
    with ts.open(model, memory=memory, concurrency=1, progress=not json) as llm:
        params = llm.sampling(max_tokens=128, temperature=0.0)
        prompt = llm.render(PROMPT)
        if json:
            completion = llm.generate([prompt], params)[0]
            print_json({"machine": machine, "plan": llm.plan.to_dict(), "completion": completion, "report": llm.report().to_dict()})
            return
        out.print(Rule(f"> {PROMPT}", align="left"))
        stream_to_terminal(llm, prompt, params)
        out.print(Rule("predicted against measured", align="left"))
        out.print(report_table(llm.report()))
