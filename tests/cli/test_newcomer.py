"""Typical mistakes of a newcomer, one row each: what they type, the exit code, and words without which they could not go on. No weights, no
network, no torch."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

FOUR = "--device rtx-4090"
MISTAKES = [
    # what is typed                                                   exit  what the answer must say
    ("plan lama-2-7b --memory 16GB", 2, ["llama-2-7b"]),
    ("plan llama2 70b --memory 16GB", 2, ["unexpected extra argument", "70b"]),
    (f"plan llama-2-7b --memory 16 {FOUR}", 2, ["16", "GiB"]),
    (f"plan llama-2-7b --memory 16QB {FOUR}", 2, ["16QB", "GiB"]),
    (f"plan llama-2-7b --memory 150% {FOUR}", 2, ["150%"]),
    (f"plan llama-2-7b --memory -4GB {FOUR}", 2, ["-4GB"]),
    ("plan llama-2-7b --memory 16GB --device rtx4091", 2, ["rtx-4090"]),
    (f"plan llama-2-7b --memory 16GB {FOUR} --context 100000", 2, ["4096"]),
    (f"plan llama-2-7b --memory 16GB {FOUR} --context 0", 2, ["--context"]),
    (f"plan llama-2-7b --memory 16GB {FOUR} --context 1024 --prompt 1000 --output 500", 2, ["1500", "--context"]),
    (f"plan llama-2-7b --memory 16GB {FOUR} --weights int5", 2, ["int4", "int5"]),
    (f"plan llama-2-7b --memory 16GB {FOUR} --kv-store int9", 2, ["int8"]),
    ("plan llama-2-70b --memory 1GB --device ryzen-7950x", 3, ["needs at least", "budget", "smaller model"]),
    (f"plan llama-2-7b --memry 16GB {FOUR}", 2, ["--memory"]),
    (f"plan llama-2-7b --gpu-memory-utilization 0.9 {FOUR}", 2, ["vLLM", "--memory 90%"]),
    (f"plan llama-2-7b --max-model-len 2048 {FOUR}", 2, ["--context 2048"]),
    ("plan llama-2-7b --load-in-4bit", 2, ["--weights nf4"]),
    ("plan llama-2-7b -ngl 99 -c 2048", 2, ["--memory", "llama.cpp", "-c 2048"]),
    ("plan llama-2-7b --tensor-parallel-size 2", 2, ["--device '2x NAME'"]),
    ("run -m ./model.gguf 'hello there'", 2, ["model is an argument", "tradespace run ./model.gguf 'hello there'"]),
    ("run smollm2-135m -p 'hello there' --n-predict 5", 2, ["tradespace run smollm2-135m 'hello there' --max-tokens 5"]),
    ("run llama-2-70b hello", 2, ["names no weights", "org/name"]),
    ("run ./no-such-file.gguf hello", 2, ["does not exist"]),
    ("run {empty} hello", 2, ["config.json"]),
    ("run {pickled} hello", 2, ["pickled", "safetensors"]),
    ("plan {strange} --memory 16GB", 2, ["model_type 'lama'", "llama"]),
    ("run smollm2-135m --plan nowhere.yaml hello", 2, ["nowhere.yaml"]),
    (f"plan llama-2-7b --memory 16GB {FOUR} --what-if layer=40", 2, ["layers"]),
    (f"plan llama-2-7b --memory 16GB {FOUR} --export tgi", 2, ["vllm", "ollama"]),
    (f"plan llama-2-7b --memory 16GB {FOUR} --plot picture.pdf", 2, [".html"]),
    ("plan llama-2-7b --config nowhere.yaml", 2, ["no such file"]),
    ("plann llama-2-7b", 2, ["plan"]),
    ("run smollm2-135m --temperature hot hello", 2, ["--temperature", "is not a valid"]),
    ("fit --memory 100MB --device rtx-4090", 3, ["smollm2-135m"]),
]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / name for name in ("empty", "pickled", "strange")}
    for path in found.values():
        path.mkdir()
    (found["pickled"] / "config.json").write_text('{"model_type": "llama"}')
    (found["pickled"] / "pytorch_model.bin").write_bytes(b"\x80")
    (found["strange"] / "config.json").write_text('{"model_type": "lama"}')
    return found


@pytest.mark.parametrize(("typed", "code", "words"), MISTAKES, ids=[typed for typed, _, _ in MISTAKES])
def test_the_answer_lets_them_go_on(cli, folders, tmp_path, monkeypatch, typed, code, words):
    monkeypatch.chdir(tmp_path)
    cli(*shlex.split(typed.format(**folders))).failed(code, *words)


def test_a_flag_that_is_ours_stays_ours(cli):
    assert cli("plan", "smollm2-135m", "-c", 512, "-np", 2, "--kv-cache-dtype", "bf16", "-m", "1GB", "--device", "ryzen-7950x", "--json").json["best"]


def test_settings_from_file_and_variables_and_who_wins(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text("memory: 1GB\nplan:\n  device: ryzen-7950x\n  context: 512\n  kv-store: bf16\n")
    ask = ["plan", "smollm2-135m", "--json"]

    def asked(*more: str):
        found = cli(*ask, *more).json
        return found["memory_bytes"], found["best"]["plan"]["max_context"]

    assert asked("--config", "t.yaml") == (10**9, 512)
    monkeypatch.setenv("TRADESPACE_CONFIG", "t.yaml")
    monkeypatch.setenv("TRADESPACE_CONTEXT", "640")
    assert asked() == (10**9, 640)
    monkeypatch.setenv("TRADESPACE_PLAN_CONTEXT", "768")
    assert asked() == (10**9, 768)
    assert asked("--context", "1024", "--memory", "2GB") == (2 * 10**9, 1024)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("memroy: 1GB", ["memroy", "memory"]),
        ("plan: {devise: l4}", ["plan", "device"]),
        ("plan: 3", ["command"]),
        ("- memory", ["list"]),
        ("memory: [1GB", ["not YAML"]),
        ("memory: {a: 1}", ["mapping"]),
        ("context: many", ["--context"]),
    ],
)
def test_a_wrong_file_is_named(cli, tmp_path, text, words):
    (tmp_path / "t.yaml").write_text(text)
    cli("plan", "smollm2-135m", "--config", tmp_path / "t.yaml", "--device", "l4").failed(2, *words)


def test_every_neighbour_has_an_answer(cli):
    """Given to every command: either it is that command's own, or the answer names the tool."""
    from typer.main import get_command

    from tradespace.cli.main import app_of
    from tradespace.cli.neighbours import NEIGHBOURS, check_neighbours
    from tradespace.cli.settings import leaves, words_of
    from tradespace.errors import InputError

    for name, command in leaves(get_command(app_of()).commands).items():  # pyright: ignore[reportAttributeAccessIssue]
        own = words_of(command)
        for flag, neighbour in NEIGHBOURS.items():
            if flag in own:
                check_neighbours(name, [flag, "7"], own)
                continue
            with pytest.raises(InputError) as found:
                check_neighbours(name, ["MODEL", flag, "7", "--json"], own)
            assert neighbour.tool in str(found.value)
            # what is proposed holds no foreign flag any more
            check_neighbours(name, shlex.split(str(found.value).split(f"tradespace {name} ")[-1]), own)


def test_json_errors_are_json(cli):
    found = cli("plan", "llama-2-7b", "--max-model-len", 5, "--json")
    assert json.loads(found.out)["exit_code"] == found.code == 2


def test_completion_is_there(cli, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # a test's parents need not be a shell
    assert "_TRADESPACE_COMPLETE" in cli("--show-completion", "bash").out
