"""`tradespace bench tiles`: tile sizes of a model's decode products, measured on this card and kept."""

from __future__ import annotations

from typing import Annotated

import typer

from tradespace.cli.options import Json, Memory, console, print_json
from tradespace.errors import InputError


def register(bench: typer.Typer) -> None:
    bench.command("tiles")(tiles)


def tiles(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A zoo model, a folder, a file or a hub id: its shapes decide. Weights are drawn at random.")],
    weights: Annotated[str | None, typer.Option("--weights", help="Weight format, e.g. int4-g128. Default: the planner's for this card.")] = None,
    rows: Annotated[list[int] | None, typer.Option("--rows", min=1, max=64, help="Tokens in a step; may be given several times. [1, 16, 64]")] = None,
    device: Annotated[str, typer.Option("--device", help="cuda or cuda:N.")] = "cuda",
    memory: Memory = None,
    again: Annotated[bool, typer.Option("--again", help="Also those that were measured before.")] = False,
    json: Json = False,
) -> None:
    """Measures tile sizes of a model's decode products on this card and keeps them for every later run. Done by itself on cards that none ship for.

    Example: tradespace bench tiles llama-2-70b --weights int4-g128 --rows 1
    """
    from rich.table import Table

    from tradespace import api, tile_search
    from tradespace.choosing import choose_plan
    from tradespace.llm_cuda import device_spec, find_place
    from tradespace.progress import steps_bar

    place = find_place(device)
    if place is None:
        raise InputError(f"--device {device}: tile sizes are those of CUDA kernels. Give cuda or cuda:N")
    card, spec = device_spec(place), api.find_spec(model)
    plan = choose_plan(spec, card, api.budget_bytes(memory, card), None, 64, "throughput", weights, None, stored=None)
    with steps_bar("measuring tiles", show=not json) as tell:
        found = tile_search.search(plan, spec, index=place, tell=tell, again=again, rows=rows or ())
    if json:
        print_json(found)
        return
    if not found:
        console().print(f"All tile sizes of {spec.name} in {plan.weights.default} are known on this card. --again measures them once more.")
        return
    table = Table("product", "tokens", "microseconds", "before", "GB/s", "tiles")
    for row in found:
        sizes = " ".join(f"{name} {value}" for name, value in row["tiles"].items())
        speed = row["read_bytes"] / row["seconds"] / 1e9
        before = "did not fit" if row["before_s"] is None else f"{row['before_s'] * 1e6:.1f}"
        table.add_row(row["name"], str(row["rows"]), f"{row['seconds'] * 1e6:.1f}", before, f"{speed:,.0f}", sizes)
    console().print(table)
