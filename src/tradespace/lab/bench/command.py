"""What `tradespace bench` does: the file, the cells, the record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tradespace.errors import InputError
from tradespace.kernels.native.compiler import compile_library, find_compiler
from tradespace.lab.bench.models import RANDOM, prepare
from tradespace.lab.bench.peers import PEERS
from tradespace.lab.bench.rounds import Cell, Say, Tell, measure_cell
from tradespace.lab.bench.tables import figures_of, rows_of
from tradespace.lab.bench.task import Kind, Task
from tradespace.lab.common import command_line
from tradespace.llm_cuda import device_spec, find_place
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Record, new_record
from tradespace.spec.device import DeviceSpec


def run_bench(
    kind: Kind,
    model: str,
    *,
    against: Sequence[str] | None,
    prompts: Sequence[int],
    tokens: int,
    sequences: int,
    rounds: int,
    threads: int | None,
    file_format: str | None,
    weights: str | None,
    plan: str | None,
    memory: str | None,
    device: str | None,
    offline: bool,
    on_progress: Tell,
    say: Say,
) -> tuple[Record, list[Cell]]:
    """A cell for each length of prompt, and the record of them all. `against` None: every peer of the table; ["none"]: ours alone."""
    names, place = check_peers(against), find_place(device)
    path = prepare(model, file_format=file_format, offline=offline, say=say)
    machine = ready_machine()
    cells = []
    for prompt in prompts:
        task = Task(
            kind=kind,
            path=str(path),
            prompt=prompt,
            tokens=tokens,
            sequences=sequences,
            threads=threads or machine.cores or 1,
            memory=memory,
            weights=weights,
            plan=plan,
            device="cpu" if place is None else f"cuda:{place}",
        )
        cells.append(measure_cell(task, names, rounds=rounds, tell=on_progress, say=say))
    shown = model if model.startswith(RANDOM) or not Path(model).exists() else Path(model).name
    return record_of(cells, f"bench-{kind}", shown, file_format, machine if place is None else device_spec(place), rounds), cells


def check_peers(names: Sequence[str] | None) -> list[str]:
    """Peers by name, each once. Raises InputError for one that the table lacks."""
    if names is None:
        return list(PEERS)
    wanted = list(dict.fromkeys(name for name in names if name != "none"))
    for name in wanted:
        if name not in PEERS:
            raise InputError(f"--against {name}: known are {', '.join(PEERS)}, and none")
    return wanted


def ready_machine() -> DeviceSpec:
    """This machine, measured, with the native kernels compiled: neither may count as anybody's start-up."""
    device = this_machine()
    if not device.no_native and find_compiler() is not None:
        compile_library()
    return device


def record_of(cells: Sequence[Cell], experiment: str, model: str, file_format: str | None, device: DeviceSpec, rounds: int) -> Record:
    figures = {name: figure for cell in cells for name, figure in figures_of(cell).items()}
    rows = [row for cell in cells for row in rows_of(cell, model=model, file_format=file_format)]
    notes = "interleaved rounds, order rotated, the first one not counted; ratios of the same round; a process for each engine; fresh random prompts"
    return new_record(experiment, command=command_line(), device=device, repeats=rounds, figures=figures, rows=rows, notes=notes)
