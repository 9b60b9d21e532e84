"""`tradespace eval`: perplexity, divergence from a reference, and tasks, inside the budget; `--sweep`: bytes against divergence over formats and methods."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tradespace.cli.options import AttentionPattern, Json, Memory, Model, Offline, console, print_json
from tradespace.errors import InputError
from tradespace.units import format_bytes

if TYPE_CHECKING:
    from tradespace.comparing import OnProgress, ReferenceDtype
    from tradespace.evaluating import Evaluation
    from tradespace.quality.divergence import Divergence
    from tradespace.quality.perplexity import Perplexity

REFERENCE_DTYPES = ("fp32", "bf16", "fp16")
TextFile = Annotated[Path | None, typer.Option("--text", help="A UTF-8 text file to predict.")]
Against = Annotated[
    str | None, typer.Option("--against", help="A reference to compare with: another model, or 'self' for this one's own weights, dequantized.")
]


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    model: Model,
    text: TextFile = None,
    against: Against = None,
    reference_dtype: Annotated[str, typer.Option("--reference-dtype", help="How the reference is held: fp32, bf16 or fp16.")] = "fp32",
    context: Annotated[int | None, typer.Option("--context", "-c", min=2, help="Tokens of a window. Default: 2048, or what the model takes.")] = None,
    stride: Annotated[int | None, typer.Option("--stride", min=1, help="Tokens from one window to the next. Default: no overlap.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=2, help="Only the first so many tokens of the text.")] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="arc_easy, piqa, winogrande, lambada_openai: one, or several with commas.")] = None,
    task_data: Annotated[Path | None, typer.Option("--task-data", help="Folder with TASK.jsonl. Default: the evaluation data beside a checkout.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first so many examples of each task.")] = None,
    weights: Annotated[str | None, typer.Option("--weights", help="Evaluate the model in this format, quantized as it is loaded.")] = None,
    kv_store: Annotated[str | None, typer.Option("--kv-store", help="Evaluate the cache in this store. Default with --weights: exact.")] = None,
    attention_pattern: AttentionPattern = None,
    memory: Memory = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Many formats and methods: bytes against KL to 'self', drawn and recorded in -o.")] = False,
    formats: Annotated[str | None, typer.Option("--formats", help="With --sweep: these formats, with commas. Default: all that run.")] = None,
    methods: Annotated[str | None, typer.Option("--methods", help="With --sweep: these methods, with commas. Default: all there are.")] = None,
    calibrate: Annotated[Path | None, typer.Option("--calibrate", help="With --sweep: the text that gptq, awq and their like learn from.")] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="With --calibrate: so many windows of that text. Default: 128.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="With --sweep: the folder for sweep.png, sweep.html and sweep.json.")] = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """How well MODEL predicts a text, how far it lies from a reference, and how it answers tasks: what a format or a plan costs in quality.

    Example: tradespace eval smollm2-135m --weights int8 --against self --text wiki.test.raw --tokens 8192

    Tasks:   tradespace eval smollm2-135m --tasks arc_easy,lambada_openai --limit 200

    Sweep:   tradespace eval smollm2-135m --sweep --text wiki.test.raw --tokens 4096 -o sweep/
    """
    dtype = checked_dtype(reference_dtype)
    notes = console(stderr=True)
    say = (lambda line: None) if json else (lambda line: notes.print(escape(line), style="dim", soft_wrap=True))
    only_sweep = {"--formats": formats, "--methods": methods, "--calibrate": calibrate, "--samples": samples, "--output": output}
    if sweep:
        unfit = {
            "--tasks": tasks,
            "--task-data": task_data,
            "--limit": limit,
            "--weights": weights,
            "--kv-store": kv_store,
            "--attention-pattern": attention_pattern,
            "--against": against if against != "self" else None,
        }
        refuse(unfit, "does not go with --sweep, which measures a text in every format against the model itself")
        if text is None or output is None:
            raise InputError("--sweep needs a text and a folder for what it finds: --text FILE -o DIR")
        from tradespace.lab.sweep import SAMPLES, run_sweep, sweep_table

        with progress_bar(show=not json) as on_progress:
            record = run_sweep(
                model,
                text=text,
                output=output,
                formats=listed(formats),
                methods=listed(methods),
                reference_dtype=dtype,
                context=context,
                stride=stride,
                tokens=tokens,
                calibrate=calibrate,
                samples=SAMPLES if samples is None else samples,
                memory=memory,
                offline=offline,
                on_progress=on_progress,
                say=say,
            )
        print_json(record) if json else console().print(sweep_table(record))
        return
    refuse(only_sweep, "goes with --sweep alone")
    import tradespace as ts

    with progress_bar(show=not json) as on_progress:
        found = ts.evaluate(
            model,
            text=text,
            against=against,
            reference_dtype=dtype,
            context=context,
            stride=stride,
            tokens=tokens,
            tasks=listed(tasks) or (),
            task_data=task_folder(task_data) if tasks else None,
            limit=limit,
            weights=weights,
            kv_store=kv_store,
            pattern=attention_pattern,
            memory=memory,
            offline=offline,
            on_progress=on_progress,
            say=say,
        )
    if json:
        print_json(found)
        return
    for part in views(found):
        console().print(part, soft_wrap=isinstance(part, str))


def checked_dtype(name: str) -> ReferenceDtype:
    for known in REFERENCE_DTYPES:
        if name == known:
            return known
    raise InputError(f"--reference-dtype {name}: a reference is held in {', '.join(REFERENCE_DTYPES)}")


def refuse(flags: dict[str, object], why: str) -> None:
    """Raises InputError for the first of these flags that was given."""
    for flag, value in flags.items():
        if value is not None:
            raise InputError(f"{flag} {why}. Leave it away")


def task_folder(stated: Path | None) -> Path:
    """Where the tasks' examples lie."""
    from tradespace.lab.common import DATA

    folder = DATA / "tasks" if stated is None else stated
    if not folder.is_dir():
        if stated is None:
            raise InputError("the tasks' examples are no part of the package, and none lie beside this checkout. Give --task-data FOLDER with TASK.jsonl")
        raise InputError(f"--task-data {stated} is no folder. Give the one that holds TASK.jsonl")
    return folder


def listed(names: str | None) -> list[str] | None:
    """Names with commas between them; None where nothing was given."""
    return None if names is None else [name.strip() for name in names.split(",") if name.strip()]


@contextmanager
def progress_bar(*, show: bool) -> Iterator[OnProgress]:
    """A bar with the time that is left, on standard error, where that is a terminal."""
    if not (show and sys.stderr.isatty()):
        yield lambda what, done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        known: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in known:
                known[what] = bar.add_task(escape(what), total=total)
            bar.update(known[what], completed=done, total=total)

        yield tell


def views(found: Evaluation) -> Iterator[Table | str]:
    """Tables of at most 100 columns, and the sentences that say what they hold for."""
    yield escape(f"{found.model} · weights {found.weights}, {format_bytes(found.weight_bytes)} · {found.plan}")
    if found.perplexity is not None:
        yield perplexity_view(found.perplexity)
        yield f"protocol: {found.perplexity.protocol}"
    if found.divergence is not None and found.reference is not None:
        yield divergence_view(found.divergence)
        yield escape(f"reference: {found.reference}")
    if found.tasks:
        from tradespace.quality.tasks import describe

        table = Table("task", title="tasks, zero-shot, asked as lm-eval asks them", title_justify="left")
        for column in ("examples", "metric", "value ± standard error"):
            table.add_column(column, justify="right")
        for row in describe(found.tasks):
            table.add_row(*row)
        yield table
        cut = sum(result.truncated for result in found.tasks)
        if cut:
            yield f"note: {cut} examples lost the start of their context, which is longer than the model's window"
    kept = "kept" if found.peak_bytes <= found.memory_bytes else "EXCEEDED"
    yield f"memory: peak {format_bytes(found.peak_bytes)} of {format_bytes(found.memory_bytes)} ({kept})"


def perplexity_view(found: Perplexity) -> Table:
    table = Table("", title="perplexity", title_justify="left")
    table.add_column("value ± standard error", justify="right")
    table.add_row("per token", f"{found.perplexity:.4f} ± {found.error:.4f}")
    table.add_row("nats per token", f"{found.nats_per_token:.5f} ± {found.error / found.perplexity:.5f}")
    table.add_row("per byte", f"{found.byte_perplexity:.5f}")
    table.add_row("bits per byte", f"{found.bits_per_byte:.5f}")
    table.add_row("tokens scored, bytes", f"{found.num_tokens:,}, {found.num_bytes:,}")
    return table


def divergence_view(found: Divergence) -> Table:
    """The columns that users of llama-perplexity --kl-divergence know."""
    from tradespace.quality.divergence import QUANTILES

    table = Table("", title="divergence from the reference", title_justify="left")
    table.add_column("value ± standard error", justify="right")
    kl, dp = dict(zip(QUANTILES, found.kl_quantiles, strict=True)), dict(zip(QUANTILES, found.dp_quantiles, strict=True))
    table.add_row("perplexity of the reference", f"{found.reference_perplexity:.4f} ± {found.reference_perplexity_error:.4f}")
    table.add_row("ln(perplexity / reference's)", f"{found.log_ratio:.6f} ± {found.log_ratio_error:.6f}")
    if found.correlation is not None:
        table.add_row("correlation of both models' nats", f"{found.correlation:.2%}")
    table.add_section()
    table.add_row("mean KL, nats per token", f"{found.mean_kl:.6f} ± {found.kl_error:.6f}")
    table.add_row("KL: median, 90%, 95%", ", ".join(f"{kl[q]:.6f}" for q in (0.5, 0.9, 0.95)))
    table.add_row("KL: 99%, 99.9%, maximum", ", ".join(f"{kl[q]:.6f}" for q in (0.99, 0.999, 1.0)))
    table.add_section()
    table.add_row("same top token", f"{found.top1_agreement:.3%} ± {found.top1_error:.3%}")
    table.add_row("RMS Δp", f"{found.rms_dp:.3%} ± {found.rms_dp_error:.3%}")
    table.add_row("mean Δp", f"{found.mean_dp:.3%} ± {found.dp_error:.3%}")
    table.add_row("Δp: minimum, 1%, 5%, 25%", ", ".join(f"{dp[q]:.3%}" for q in (0.0, 0.01, 0.05, 0.25)))
    table.add_row("Δp: median, 75%, 95%, 99%, maximum", ", ".join(f"{dp[q]:.3%}" for q in (0.5, 0.75, 0.95, 0.99, 1.0)))
    return table
