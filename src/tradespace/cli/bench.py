"""`tradespace bench`: our engine beside others on the same file, in one interleaved run on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from tradespace.cli import bench_serve, bench_tiles
from tradespace.cli.evaluate import progress_bar
from tradespace.cli.options import Device, Json, Memory, Offline, console, print_json
from tradespace.errors import InputError

if TYPE_CHECKING:
    from tradespace.lab.bench.task import Kind

bench = typer.Typer(no_args_is_help=True, help="Our engine beside others, interleaved in one run.\n\nExample: tradespace bench decode smollm2-135m")
BenchModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="As for run; or random:NAME, a zoo model's shape with random weights, e.g. random:llama-3.2-1b.")
]
Against = Annotated[
    list[str] | None, typer.Option("--against", help="llama.cpp, openvino or transformers; may be given several times, or none. Default: all that are here.")
]
Prompts = Annotated[list[int] | None, typer.Option("--prompt", "-c", min=1, help="Tokens of the prompt; may be given several times.")]
Tokens = Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens that are generated and timed in a round, for each sequence.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Rounds in which each engine runs once, beside one that is not counted.")]
Threads = Annotated[int | None, typer.Option("--threads", "-t", min=1, help="For every engine. Default: the cores that may be used.")]
FileFormat = Annotated[
    str | None, typer.Option("--file-format", help="Re-make the model as a GGUF file in this format first: q4_0, q4_1, q8_0 … For all engines.")
]
OurWeights = Annotated[str | None, typer.Option("--weights", help="Weight format of our engine alone. Default: as the file has them, or the planner's.")]
Plan = Annotated[str | None, typer.Option("--plan", help="A plan for our engine, from `tradespace plan --save`.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Where to write the record, e.g. results/bench.json.")]
bench_serve.register(bench)
bench_tiles.register(bench)


def register(app: typer.Typer) -> None:
    app.add_typer(bench, name="bench")


@bench.command("decode")
def decode(
    model: BenchModel,
    against: Against = None,
    prompt: Prompts = None,
    tokens: Tokens = 64,
    rounds: Rounds = 7,
    threads: Threads = None,
    file_format: FileFormat = None,
    weights: OurWeights = None,
    plan: Plan = None,
    memory: Memory = None,
    device: Device = None,
    output: Output = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Tokens a second of one sequence after a prompt, bytes moved, and the share of the read bandwidth that is (MBU).

    Example: tradespace bench decode smollm2-135m --file-format q4_0 --prompt 128 --prompt 2048 --against llama.cpp
    """
    _run("decode", model, against, prompt or [128], tokens, 1, rounds, threads, file_format, weights, plan, memory, device, output, offline, json)


@bench.command("prefill")
def prefill(
    model: BenchModel,
    against: Against = None,
    prompt: Prompts = None,
    rounds: Rounds = 7,
    threads: Threads = None,
    file_format: FileFormat = None,
    weights: OurWeights = None,
    plan: Plan = None,
    memory: Memory = None,
    device: Device = None,
    output: Output = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Tokens a second of reading a prompt that nobody has seen before, and the share of the matmul rate that is (MFU).

    Example: tradespace bench prefill smollm2-135m --prompt 512 --prompt 2048
    """
    _run("prefill", model, against, prompt or [512], 0, 1, rounds, threads, file_format, weights, plan, memory, device, output, offline, json)


@bench.command("batch")
def batch(
    model: BenchModel,
    sequences: Annotated[int, typer.Option("--sequences", "-s", min=2, help="Sequences that decode together.")] = 16,
    against: Against = None,
    prompt: Prompts = None,
    tokens: Tokens = 32,
    rounds: Rounds = 7,
    threads: Threads = None,
    file_format: FileFormat = None,
    weights: OurWeights = None,
    plan: Plan = None,
    memory: Memory = None,
    device: Device = None,
    output: Output = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Tokens a second of many sequences decoding together.

    Example: tradespace bench batch smollm2-135m --sequences 16 --against llama.cpp
    """
    _run("batch", model, against, prompt or [128], tokens, sequences, rounds, threads, file_format, weights, plan, memory, device, output, offline, json)


def _run(
    kind: Kind,
    model: str,
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
    output: Path | None,
    offline: bool,
    json: bool,
) -> None:
    from tradespace.lab.bench.command import run_bench
    from tradespace.lab.bench.tables import cell_table, notes_of
    from tradespace.measure.record import write_record

    if output is not None and output.is_dir():
        raise InputError(f"--output {output} is a folder. Give a file name in it")
    notes = console(stderr=True)
    with progress_bar(show=not json) as on_progress:
        record, cells = run_bench(
            kind,
            model,
            against=against,
            prompts=prompts,
            tokens=tokens,
            sequences=sequences,
            rounds=rounds,
            threads=threads,
            file_format=file_format,
            weights=weights,
            plan=plan,
            memory=memory,
            device=device,
            offline=offline,
            on_progress=on_progress,
            say=(lambda line: None) if json else (lambda line: notes.print(escape(line), style="dim", soft_wrap=True)),
        )
    if output is not None:
        write_record(output, record)
    if json:
        print_json(record)
        return
    for cell in cells:
        console().print(cell_table(cell))
        for note in notes_of(cell):
            console().print(note, style="dim", soft_wrap=True)
