"""`tradespace lab kv-cache`: caches from n to √n to constant on a real model, with the picture and the page; and the published simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown
from rich.markup import escape

from tradespace.cli.options import Json, console, print_json
from tradespace.errors import InputError


def register(lab: typer.Typer) -> None:
    lab.command("kv-cache")(kv_cache)


def kv_cache(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="A model that runs here.")] = "smollm2-135m",
    lengths: Annotated[str | None, typer.Option("--lengths", help="Tokens, by commas; clipped to the model's context. [512,1024,2048,4096,8192]")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for record, results, picture and page.")] = Path("results"),
    text: Annotated[Path | None, typer.Option("--text", help="What is read (UTF-8). Default: WikiText-2's test set beside the checkout.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="512 and 1,024 tokens, few of them timed: to see that it works, not to quote.")] = False,
    published_simulation: Annotated[
        bool, typer.Option("--published-simulation", help="Only the published toy: keys and values projected afresh at every step, and really cached.")
    ] = False,
    json: Json = False,
) -> None:
    """Bytes, speed and quality as the cache of a model shrinks from n to √n to constant: windows, exact rebuilding, fewer bits.

    Example: tradespace lab kv-cache smollm2-135m --lengths 512,2048 --output results

    The toy: tradespace lab kv-cache --published-simulation
    """
    from tradespace.lab.experiments import EXPERIMENTS, KV_PARTS
    from tradespace.lab.kv_cache import markdown, run
    from tradespace.lab.kv_cache_files import write_files
    from tradespace.lab.sweep_plot import require_plotters

    if text is not None and not text.is_file():
        raise InputError(f"--text {text}: no such file. Give a UTF-8 text")
    require_plotters()
    experiment = EXPERIMENTS["kv-cache"]
    only = ("simulation",) if published_simulation else KV_PARTS
    notes = console(stderr=True)
    record = run(
        quick=quick,
        say=lambda line: notes.print(escape(line), style="dim", soft_wrap=True),
        only=only,
        model=model,
        lengths=parse_lengths(lengths),
        text=text,
    )
    written = write_files(experiment, record, only, output)
    if json:
        print_json(record)
        return
    console().print(Markdown(markdown(record)))
    notes.print(f"wrote {', '.join(map(str, written))}", soft_wrap=True)


def parse_lengths(text: str | None) -> list[int] | None:
    """Whole numbers of tokens. Raises InputError for anything else.

    >>> parse_lengths("512,1024")
    [512, 1024]
    """
    if text is None:
        return None
    words = [word.strip().replace("_", "") for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise InputError(f"--lengths {text}: write numbers of tokens, by commas, as in 512,1024,2048")
    return [int(word) for word in words]
