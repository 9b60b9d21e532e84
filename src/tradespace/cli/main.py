"""The `tradespace` command: one typer app, thin over `import tradespace as ts`. Exit codes: 0 good, 1 our failure, 2 usage, 3 the budget cannot be met.

Before typer sees a command line, flags of other tools are answered (`neighbours.py`), and TRADESPACE_* variables and a YAML file become defaults
(`settings.py`).
"""

from __future__ import annotations

import os
import sys
import traceback
from functools import cache
from importlib import import_module
from typing import Annotated, Any

import typer

import tradespace
from tradespace import light_torch
from tradespace.cli.neighbours import check_neighbours
from tradespace.cli.options import error_dict, print_json
from tradespace.cli.settings import read_config, read_variables, take_config, words_of
from tradespace.errors import TradespaceError

EXIT_FAILURE, EXIT_INTERRUPTED = 1, 130

# the commands that each module registers, in the order of the help
MODULES = {
    "doctor": ("doctor",),
    "pull": ("pull", "models"),
    "plan": ("plan",),
    "fit": ("fit",),
    "run": ("run",),
    "serve": ("serve",),
    "quantize": ("quantize",),
    "train": ("train", "finetune", "distill"),
    "evaluate": ("eval",),
    "chat": ("chat",),
    "demo": ("demo",),
    "bench": ("bench",),
    "lab": ("lab",),
}
RUNS_MODELS = ("run", "chat", "serve", "demo")  # and does nothing else with torch


def _version(asked: bool) -> None:
    if asked:
        print(f"tradespace {tradespace.__version__}")
        raise typer.Exit


def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
    config: Annotated[str | None, typer.Option("--config", help="YAML with flags as keys; may stand anywhere on the line.")] = None,
) -> None:
    """State a memory budget; get the plan, the text, and the proof."""


@cache
def app_of(*modules: str) -> typer.Typer:
    """The command line with the commands of these modules alone, which are all that is imported; without any, the whole one."""
    app = typer.Typer(
        name="tradespace",
        help="State a memory budget; get the plan, the text, and the proof.\n\nExample: tradespace run smollm2-135m --memory 900MiB 'Why is the sky blue?'\n\n"
        "Every flag can also come from TRADESPACE_<FLAG> or from a YAML file: --config FILE. Shell completion: tradespace --install-completion\n\n"
        "Exit codes: 0 good, 1 our failure, 2 usage, 3 the budget cannot be met.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(options)
    for module in modules or MODULES:
        import_module(f"tradespace.cli.{module}").register(app)
    return app


def module_of(arguments: list[str]) -> tuple[str, ...]:
    """The module of the command that the line begins with: most of a command's start is importing, so the others' modules stay where they are."""
    return tuple(module for module, commands in MODULES.items() if arguments[:1] and arguments[0] in commands)


def _say(error: BaseException, exit_code: int, *, as_json: bool) -> None:
    if as_json:
        print_json(error_dict(error, exit_code))
    print(f"error: {error}", file=sys.stderr)


def run_app(arguments: list[str]) -> None:
    """Settings, then other tools' flags, then typer."""
    arguments, config = take_config(arguments)
    if arguments[:1] and arguments[0] in RUNS_MODELS:
        light_torch.begin()
    # a file of settings may speak of every command
    app_command = typer.main.get_command(app_of(*module_of(arguments)) if config is None else app_of())
    commands = getattr(app_command, "commands", {})
    read_variables(commands)
    defaults = read_config(config, commands) if config is not None else {}
    name, command, rest = "", app_command, arguments
    inner: dict[str, Any] = commands
    while rest and rest[0] in inner:
        command, name, rest = inner[rest[0]], f"{name} {rest[0]}".strip(), rest[1:]
        inner = getattr(command, "commands", {})
    if name and not hasattr(command, "commands"):
        check_neighbours(name, rest, words_of(command))
    app_command(args=arguments, prog_name="tradespace", standalone_mode=True, default_map=defaults)


def main() -> None:
    """Runs the command line and turns every error into one line and an exit code; a traceback means a bug of ours."""
    as_json = "--json" in sys.argv
    try:
        run_app(sys.argv[1:])
    except TradespaceError as error:
        _say(error, error.exit_code, as_json=as_json)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if ended.code == EXIT_INTERRUPTED:  # typer has caught the interrupt, and says nothing
            print("interrupted", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # the reader (head, less) has gone: nothing is left to say, and the interpreter must not try to flush either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILURE)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "tokenizers", "jinja2"):
            raise
        missing = TradespaceError(f"this command runs models and needs {error.name}, which is not installed. Run: pip install 'tradespace[engine]'")
        _say(missing, EXIT_FAILURE, as_json=as_json)
        sys.exit(EXIT_FAILURE)
    except MemoryError as error:
        _say(TradespaceError(f"the system refused memory ({error or 'no detail'}): state a smaller --memory"), EXIT_FAILURE, as_json=as_json)
        sys.exit(EXIT_FAILURE)
    except OSError as error:
        refused = TradespaceError(f"the system refused: {error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        _say(refused, EXIT_FAILURE, as_json=as_json)
        sys.exit(EXIT_FAILURE)
    except Exception as error:
        traceback.print_exc()
        _say(TradespaceError(f"a bug of ours: {type(error).__name__}: {error}. Please report it with the lines above"), EXIT_FAILURE, as_json=as_json)
        sys.exit(EXIT_FAILURE)


if __name__ == "__main__":
    main()
