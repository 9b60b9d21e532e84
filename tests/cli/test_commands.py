"""The command line as a whole: every command explains itself with an example, speaks JSON, keeps to 100 columns, and ends with the right code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from tradespace.cli.main import MODULES, app_of, module_of

WIDTH = 100


def commands() -> Iterator[tuple[list[str], click.Command]]:
    def walk(command: click.Command, path: list[str]) -> Iterator[tuple[list[str], click.Command]]:
        children = getattr(command, "commands", None)
        if children is None:
            yield path, command
        else:
            for name, child in children.items():
                yield from walk(child, [*path, name])

    yield from walk(typer.main.get_command(app_of()), [])


COMMANDS = [pytest.param(path, command, id=" ".join(path)) for path, command in commands()]


def widest(text: str) -> int:
    return max((len(line.rstrip()) for line in text.splitlines()), default=0)


def test_all_the_commands_of_the_issue_are_there():
    assert {path[0] for path, _ in commands()} >= {"doctor", "pull", "models", "plan", "run", "chat", "demo", "lab"}


@pytest.mark.parametrize("module", MODULES)
def test_each_module_registers_the_commands_that_the_table_says(module):
    alone = typer.main.get_command(app_of(module))
    assert tuple(alone.commands) == MODULES[module]  # pyright: ignore[reportAttributeAccessIssue]
    assert all(module_of([command, "--help"]) == (module,) for command in MODULES[module])


def test_a_command_imports_its_own_module_alone(shell):
    done = shell(
        "models", "--json", before="import atexit, sys; atexit.register(lambda: print(sorted(m for m in sys.modules if m.startswith('tradespace.cli.'))))"
    )
    assert done.code == 0
    imported = done.out.splitlines()[-1]
    assert "'tradespace.cli.pull'" in imported and "'tradespace.cli.doctor'" not in imported and "'tradespace.cli.run'" not in imported


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_help_shows_an_example_that_parses(cli, path, command):
    done = cli(*path, "--help")
    assert done.code == 0
    assert "--json" in done.out
    example = next(line.split("Example:", 1)[1].strip(" │") for line in (command.help or "").splitlines() if "Example:" in line)
    assert example.split()[: 1 + len(path)] == ["tradespace", *path]
    assert " ".join(example.split()[:3]) in " ".join(done.out.split())


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_json_is_an_option_and_short_help_works(cli, path, command):
    assert any("--json" in option.opts for option in command.params)
    assert cli(*path, "-h").code == 0


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_an_unknown_flag_is_a_usage_error(cli, path, command):
    assert cli(*path, "--no-such-flag").code == 2


def test_the_command_alone_shows_its_help_and_its_version(cli):
    assert "tradespace run" in cli("--help").out
    assert cli("--version").out.startswith("tradespace 0.")
    assert cli("no-such-command").code == 2


JSON = [
    ("doctor",),
    ("models",),
    ("lab", "list"),
    ("plan", "llama-2-7b", "--memory", "16GB", "--device", "rtx-4090"),
    ("plan", "llama-2-70b", "--memory", "40GB", "--device", "a100-40gb", "--what-if", "layers=40,width=8192"),
]


@pytest.mark.parametrize("arguments", JSON, ids=" ".join)
def test_json_is_one_document_and_the_tables_keep_their_width(cli, arguments):
    done = cli(*arguments, "--json")
    assert done.code == 0
    assert done.json
    assert done.err == ""
    shown = cli(*arguments)
    assert shown.code == 0
    assert shown.out.strip()
    assert widest(tables(shown.out) if arguments[0] == "plan" else shown.out) <= WIDTH


def tables(text: str) -> str:
    """The output without its headline, which is one line of prose."""
    return "\n".join(text.splitlines()[1:])


@pytest.mark.parametrize("model", ["llama-2-70b", "gemma-3-27b", "gpt-2"])
def test_wide_plans_keep_to_100_columns(cli, model):
    done = cli("plan", model, "--memory", "40GB", "--device", "a100-40gb")
    assert done.code in (0, 3)
    assert widest(tables(done.out)) <= WIDTH


def test_plan_json_says_what_the_tables_say(cli):
    found = cli("plan", "llama-2-70b", "--memory", "40GB", "--device", "a100-40gb", "--json").json
    assert found["memory_bytes"] == 40 * 10**9
    assert found["best"]["ledger"]["lines"]
    assert found["pareto"]
    assert found["why_not"]
    assert found["alternatives"]


def test_plan_of_a_model_on_disk(cli, folder, gguf_file):
    for model in (folder, folder / "config.json", gguf_file):
        done = cli("plan", model, "--memory", "1GiB", "--runnable", "--json")
        assert done.code == 0, done.err
        assert done.json["best"]["ledger"]


def test_an_error_is_json_when_json_was_asked_for(cli):
    done = cli("plan", "llama-2-70b", "--memory", "banana", "--device", "a100-40gb", "--json")
    done.failed(2, "banana")
    assert done.json["exit_code"] == 2
    assert done.json["error"] == "InputError"
    assert "700MiB" in done.json["message"]


def test_a_budget_that_nothing_fits_is_exit_3_with_need_and_have(cli):
    done = cli("plan", "gpt-2", "--memory", "1MiB", "--device", "a100-40gb")
    done.failed(3, "needs at least", "1.00 MiB", "--memory")
    assert "why not" in done.out


def test_that_error_as_json_is_one_document(cli):
    done = cli("plan", "gpt-2", "--memory", "1MiB", "--device", "a100-40gb", "--json")
    done.failed(3, "needs at least")
    assert done.json["have_bytes"] == 2**20
    assert done.json["need_bytes"] > 2**20
    assert done.json["exit_code"] == 3
    assert done.json["best"] is None


def test_save_writes_a_plan_that_reads_back(cli, tmp_path):
    from tradespace.choosing import read_plan

    path = tmp_path / "plan.yaml"
    done = cli("plan", "gpt-2", "--memory", "16GB", "--device", "rtx-4090", "--save", path)
    assert done.code == 0
    assert str(path) in done.out.replace("\n", "")
    assert read_plan(path).device == "rtx-4090"
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_names_suggest_what_is_at_hand(cli, folder, monkeypatch):
    cli("plan", "smolm2-135", "--memory", "1GiB", "--device", "rtx-4090").failed(2, "smollm2-135m")
    monkeypatch.chdir(folder.parent)
    cli("plan", f"{folder.name}x", "--memory", "1GiB", "--device", "rtx-4090").failed(2, folder.name)
    cli("run", f"{folder.name}x", "why", "--memory", "1GiB").failed(2, f"Did you mean {folder.name}")


def test_one_need_everywhere(cli):
    """The error, the document and the rejections name one least budget: what the engine leaves free is in it."""
    done = cli("plan", "gpt-2", "--memory", "20MiB", "--device", "xeon-platinum-8480", "--json")
    if done.code == 2:  # no such processor in the zoo: any other will do
        done = cli("plan", "gpt-2", "--memory", "20MiB", "--json")
    done.failed(3, "needs at least")
    needs = [row["need_bytes"] for row in done.json["why_not"] if row["family"].startswith("weights ") and row["need_bytes"]]
    assert min(needs) == done.json["need_bytes"]


def test_save_to_a_folder_or_an_unwritable_path(cli, tmp_path):
    arguments = ("plan", "gpt-2", "--memory", "16GB", "--device", "rtx-4090", "--save")
    cli(*arguments, tmp_path).failed(2, "is a folder")
    cli(*arguments, Path("/proc/no/such/plan.yaml")).failed(2, "plan.yaml")
    (tmp_path / "file").write_text("")
    cli(*arguments, tmp_path / "file" / "plan.yaml").failed(2, "plan.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_budget_error_saves_nothing(cli, tmp_path):
    cli("plan", "gpt-2", "--memory", "1MiB", "--device", "a100-40gb", "--save", tmp_path / "plan.yaml").failed(3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "llama-2-7bb", "--device", "a100-40gb"), ("llama-2-7b", "did you mean")),
        (("plan", "llama-2-7b", "--device", "a100-40g"), ("a100-40gb",)),
        (("plan", "llama-2-7b", "--device", "a100-40gb", "--weights", "int5"), ("int5", "int4")),
        (("plan", "llama-2-7b", "--device", "a100-40gb", "--kv-store", "int5"), ("int5", "int4")),
        (("plan", "llama-2-7b", "--device", "a100-40gb", "--attention", "flesh"), ("flesh", "flash")),
        (("plan", "llama-2-7b", "--device", "a100-40gb", "--kv-layout", "pages"), ("pages", "paged")),
        (("plan", "llama-2-7b", "--device", "a100-40gb", "--what-if", "layer=40"), ("layer", "layers")),
        (("plan", "llama-2-7b", "--device", "a100-40gb", "--context", "1000000000"), ("4096",)),
        (("plan", "llama-2-7b", "--device", "a100-40gb", "--context", "0"), ("--context",)),
        (("plan", "llama-2-7b", "--device", "a100-40gb", "--context", "128", "--prompt", "4000"), ("128",)),
        (("plan", "llama-2-7b", "--device", "a100-40gb", "--context", "128", "--output", "4000"), ("128",)),
        (("plan", "llama-2-7b", "--device", "a100-40gb", "--concurrency", "0"), ("--concurrency",)),
        (("plan", "llama-2-7b", "--device", "a100-40gb", "--goal", "speed"), ("latency",)),
        (("plan", "llama-2-7b", "--device", "a100-40gb", "--memory", "-1GiB"), ("-1GiB",)),
        (("plan", "llama-2-7b", "--device", "a100-40gb", "--memory", "0"), ("0",)),
        (("plan", "llama-2-7b", "--device", "a100-40gb", "--memory", "150%"), ("150%",)),
        (("plan", "llama-2-7b", "--device", "a100-40gb", "--host-memory", "banana"), ("banana",)),
        (("lab", "run", "no-such-experiment"), ("memory",)),
        (("lab", "run"), ("name",)),
        (("pull", "smollm2-153m", "--offline"), ("smollm2-135m",)),
    ],
)
def test_wrong_words_and_numbers_are_named(cli, arguments, words):
    cli(*arguments).failed(2, *words)


def test_what_if_at_equal_parameters(cli):
    rows = cli("plan", "llama-2-7b", "--device", "a100-40gb", "--what-if", "width=8192", "--equal-parameters", "--json").json
    assert len(rows) == 2
    assert rows[1]["parameters"] == pytest.approx(rows[0]["parameters"], rel=0.05)
