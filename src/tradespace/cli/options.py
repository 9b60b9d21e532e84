"""Flags that several commands share, under the names that users of vLLM, llama.cpp and the Hugging Face tools know."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from tradespace.errors import BudgetError, InputError

WIDTH = 100  # every table fits this many columns

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="An alias (smollm2-135m, gemma3-270m), a folder, a .gguf file, org/name or org/name:FILE.gguf from the hub."),
]
PlannedModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="A zoo name such as llama-2-70b, a folder, a config.json, a .gguf file, or a hub id. No weights are needed.")
]
Memory = Annotated[str | None, typer.Option("--memory", "-m", help="Budget: 700MiB, 6GiB, 6G (= GiB), 6GB (decimal), 80%. Default: 80% of what is free.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Context = Annotated[int | None, typer.Option("--context", "-c", min=1, help="Most tokens of one sequence, prompt and answer together.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never touch the network; use what is on this machine.")]
PlanFile = Annotated[str | None, typer.Option("--plan", help="A plan that `tradespace plan --save` wrote; it is obeyed to the letter.")]
Device = Annotated[
    str | None, typer.Option("--device", help="Where it computes: cpu, cuda or cuda:N. Default: the first CUDA device that can be used, else the CPU.")
]
Attention = Annotated[str | None, typer.Option("--attention", help="Attention kernel: native, sdpa, chunked or reference; paged (CUDA).")]
PrefixSharing = Annotated[
    bool | None,
    typer.Option("--prefix-sharing/--no-prefix-sharing", help="Prompts with equal beginnings share them in the cache. Default: where the plan allows it."),
]
AttentionPattern = Annotated[
    str | None,
    typer.Option(
        "--attention-pattern",
        help="Impose a pattern on layers that look at everything (lossy): sliding:W, block-sparse:local=4,leading=1,random=2, selected:share=0.25, prefix:P.",
    ),
]
Activations = Annotated[str | None, typer.Option("--activations", help="What the native kernels multiply by: auto (int8 for integer weights) or fp32 (exact).")]
WeightFormat = Annotated[str | None, typer.Option("--weights", help="Weight format: bf16, fp32, fp16, int8. Default: the planner's choice.")]
KVStore = Annotated[
    str | None,
    typer.Option("--kv-store", "--kv-cache-dtype", help="How the cache holds keys and values: bf16, fp8, int8, int4, int4c, int2, x-int8 …, or k=int8,v=int4."),
]
KVRetain = Annotated[
    str | None,
    typer.Option("--kv-retain", help="What the cache keeps: full, sliding:WINDOW[,SINKS], h2o:BUDGET, snapkv:BUDGET, recent:TOKENS (or sqrt)."),
]
Goal = Literal["latency", "throughput"]


def console(*, stderr: bool = False) -> Console:
    """A console no wider than 100 columns; plain where the output is not a terminal."""
    found = Console(stderr=stderr, soft_wrap=False, highlight=False)
    if found.width > WIDTH or not found.is_terminal:
        found = Console(stderr=stderr, soft_wrap=False, highlight=False, width=WIDTH)
    return found


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    json.dump(value, sys.stdout, indent=2, default=_plain, allow_nan=False)
    sys.stdout.write("\n")


def error_dict(error: BaseException, exit_code: int) -> dict[str, Any]:
    """An error as --json shows it; a budget that cannot be met with need and have."""
    body: dict[str, Any] = {"error": type(error).__name__, "message": str(error), "exit_code": exit_code}
    if isinstance(error, BudgetError):
        body |= {"need_bytes": error.need_bytes, "have_bytes": error.have_bytes}
    return body


def write_file(path: Path, text: str, flag: str) -> None:
    """Writes `text` where the user said, whole or not at all. Raises InputError naming `flag` where that is not a place for a file."""
    from tradespace.measure.record import write_atomically

    if path.is_dir():
        raise InputError(f"{flag} {path} is a folder. Give a file name in it")
    try:
        write_atomically(path, text)
    except OSError as error:
        raise InputError(f"{flag}: cannot write {path}: {error.strerror}. Give a path that you may write to") from error


def _plain(value: Any) -> Any:
    own = getattr(value, "to_dict", None)
    if own is not None:
        return own()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)
