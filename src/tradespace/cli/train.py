"""`tradespace train`, `finetune` and `distill`: training inside a stated memory, with a live line, a log and a curve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from tradespace.cli.options import Json, Model, console, print_json
from tradespace.cli.training_options import with_settings
from tradespace.errors import InputError
from tradespace.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from tradespace.tuning import Progress, Run, Settings

Data = Annotated[list[Path], typer.Option("--data", "-d", help="A UTF-8 text, or a .jsonl file of conversations; may be repeated.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the run: checkpoints, log.jsonl, loss.png and the result.")]


def register(app: typer.Typer) -> None:
    app.command("train")(with_settings(train))
    app.command("finetune")(with_settings(finetune))
    app.command("distill")(with_settings(distill))


def train(
    model: Annotated[str, typer.Argument(metavar="CONFIG|SHAPE", help="A config.json, a name, or a shape: layers=6,width=256,heads=4,vocab=4096.")],
    data: Data,
    output: Output,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="The model whose tokenizer to use. Default: one is trained on the data.")] = None,
    *,
    settings: Settings,
    json: Json = False,
) -> None:
    """Train a model from random weights.

    Example: tradespace train layers=6,width=256,heads=4,vocab=4096 --data books.txt -o run --memory 2GiB --steps 1000
    """
    import tradespace as ts

    with _live(json) as (on_progress, say):
        found = ts.train(model, data, output, tokenizer=tokenizer, settings=settings, on_progress=on_progress, say=say)
    _show(found, json)


def finetune(
    model: Model,
    data: Data,
    output: Output,
    method: Annotated[str | None, typer.Option("--method", help="full, lora or qlora. Default: as much as the memory allows.")] = None,
    rank: Annotated[int, typer.Option("--rank", "-r", min=1, help="Of adapters.")] = 16,
    alpha: Annotated[float | None, typer.Option("--alpha", help="Adapters count alpha/rank times. Default: 2 · rank.")] = None,
    *,
    settings: Settings,
    json: Json = False,
) -> None:
    """Train MODEL's weights, or adapters beside them, on your text or conversations.

    Example: tradespace finetune smollm2-135m --data chats.jsonl -o run --method qlora --rank 16 --memory 1500MiB
    """
    import tradespace as ts

    with _live(json) as (on_progress, say):
        found = ts.finetune(model, data, output, method=method, rank=rank, alpha=alpha, settings=settings, on_progress=on_progress, say=say)
    _show(found, json)


def distill(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="An alias, a folder, a .gguf file or a hub id.")],
    data: Data,
    output: Output,
    student: Annotated[str, typer.Option("--student", help="A shape, a model, or drop:N for N of the teacher's layers.")],
    kl: Annotated[str, typer.Option("--kl", help="forward or reverse.")] = "forward",
    temperature: Annotated[float, typer.Option("--temperature", help="Of both distributions.")] = 2.0,
    share: Annotated[float, typer.Option("--share", min=0.0, max=1.0, help="Of the divergence in the loss; the rest is plain cross entropy.")] = 0.7,
    written: Annotated[int, typer.Option("--written", min=0, help="Sequence level: the teacher first writes so many texts from the data's beginnings.")] = 0,
    *,
    settings: Settings,
    json: Json = False,
) -> None:
    """Train a smaller model on TEACHER's distributions.

    Example: tradespace distill smollm2-135m --student layers=8,width=384,heads=6 --data books.txt -o run --memory 4GiB --steps 500
    """
    import tradespace as ts
    from tradespace.train.distill import Distillation

    choice = Distillation(direction=kl, temperature=temperature, share=share)
    with _live(json) as (on_progress, say):
        sources = [_written(teacher, data, output, written, settings)] if written else data
        found = ts.distill(teacher, student, sources, output, choice=choice, settings=settings, on_progress=on_progress, say=say)
    _show(found, json)


def _written(teacher: str, data: list[Path], output: Path, count: int, settings: Settings) -> Path:
    """Beside the run's folder, so that a resumed run finds it."""
    from tradespace.train.reading import read_text
    from tradespace.tuning import write_with_teacher

    path = output.with_name(output.name + ".written.jsonl")
    if path.exists():
        return path
    paragraphs = [part.strip() for source in data for part in read_text(source).split("\n\n") if len(part.strip()) > 60]
    if len(paragraphs) < count:
        raise InputError(f"--written {count}: the data have {len(paragraphs)} paragraphs to begin from. Give at most that many")
    step = len(paragraphs) // count
    prompts = [paragraphs[number * step][:200] for number in range(count)]
    return write_with_teacher(teacher, prompts, path, tokens=settings.context // 2, memory=settings.memory, offline=settings.offline, seed=settings.seed)


@contextmanager
def _live(as_json: bool) -> Iterator[tuple[Callable[[Progress], None], Callable[[str], None]]]:
    """What shows a run's progress: one line that is overwritten on a terminal, a line every 10 steps elsewhere."""
    notes = console(stderr=True)

    def say(line: str) -> None:
        notes.print(escape(line), style="dim", soft_wrap=True)

    if as_json:
        yield (lambda progress: None), (lambda line: None)
        return
    if not notes.is_terminal:
        yield (lambda progress: say(_line(progress)) if progress.step % 10 == 0 or progress.step in (1, progress.steps) else None), say
        return
    with Live(console=notes, transient=True, refresh_per_second=4) as live:
        yield (lambda progress: live.update(_line(progress))), say


def _line(progress: Progress) -> str:
    mfu = "" if progress.mfu is None else f" · MFU {progress.mfu:.0%}"
    memory = f"{format_bytes(progress.memory_bytes)} of {format_bytes(progress.budget_bytes)}"
    speed = f"{progress.tokens_per_s:,.0f} tok/s{mfu}"
    return f"step {progress.step}/{progress.steps} · loss {progress.loss:.4f} · {speed} · {memory} · {format_seconds(progress.eta_s)} left"


def _show(found: Run, as_json: bool) -> None:
    if found.rank:  # rank 0 speaks for all
        return
    if as_json:
        print_json(found)
        return
    table = Table(title=f"{escape(found.model)} → {escape(found.result)}", title_justify="left", show_header=False)
    table.add_row("ended", f"{found.ended} at step {found.steps}" + (f", resumed from {found.resumed_from}" if found.resumed_from is not None else ""))
    last = found.losses[-20:]
    table.add_row("loss", f"{found.losses[0]:.4f} at first, {sum(last) / len(last):.4f} over the last {len(last)} steps" if last else "no step was taken")
    table.add_row("speed", f"{found.tokens_per_s:,.0f} tok/s" + ("" if found.mfu is None else f", MFU {found.mfu:.1%}"))
    kept = "kept" if found.peak_bytes <= found.budget_bytes else "EXCEEDED"
    table.add_row(
        "memory",
        f"{format_bytes(found.peak_bytes)} at the peak, {format_bytes(found.predicted_bytes)} predicted, budget {format_bytes(found.budget_bytes)} ({kept})",
    )
    for line in found.ledger["lines"]:
        table.add_row(f"  {line['name']}", format_bytes(line["bytes"]))
    if found.ledger.get("host_bytes"):
        table.add_row("  in the host's memory", f"{format_bytes(found.ledger['host_bytes'])}, beside the budget: what is offloaded or paged")
    for number, each in enumerate(found.ranks):
        table.add_row(f"  rank {number}", f"{format_bytes(each['peak_bytes'])} at the peak, {format_bytes(each['predicted_bytes'])} predicted")
    table.add_row("time", format_seconds(found.seconds))
    console().print(table)
