"""`tradespace quantize` as a user meets it: tables, JSON, errors with exit codes, and that the written folder is a model for the other commands."""

from __future__ import annotations

from pathlib import Path

import pytest

WORDS = "the quick brown fox jumps over the lazy dog "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 400)
    return path


def test_a_table_of_what_was_written(cli, folder: Path, text: Path, tmp_path: Path):
    out = tmp_path / "out"
    ran = cli(
        "quantize", str(folder), "-o", str(out), "--format", "int4", "--group-size", "32", "--calibrate", str(text), "--samples", "4", "-c", "32", "-m", "8GiB"
    )
    assert ran.code == 0, ran.err
    for word in ("gptq", "int4-g32", "bits a parameter", "output error", "kept"):
        assert word in ran.out
    assert (out / "config.json").is_file() and (out / "model.safetensors.index.json").is_file()


def test_json_of_a_budget(cli, folder: Path, text: Path, tmp_path: Path):
    ran = cli(
        *("quantize", str(folder), "-o", str(tmp_path / "out"), "--bits", "6", "--formats", "int3-g32,int4-g32,int8", "--json"),
        *("--calibrate", str(text), "--samples", "4", "-c", "32", "-m", "8GiB", "--method", "rtn-search"),
    )
    assert ran.code == 0, ran.err
    found = ran.json
    assert found["bits_per_weight"] <= 6 and found["expected_kl"] > 0 and len(found["sensitivities"]) == 30
    assert 0 < found["peak_bytes"] <= found["memory_bytes"]


@pytest.mark.parametrize(
    ("code", "words", "arguments"),
    [
        (2, ("one of --format",), ()),
        (2, ("--calibrate",), ("--format", "int8", "--method", "gptq")),
        (2, ("unknown weight format", "int9"), ("--format", "int9")),
        (2, ("--to onnx",), ("--format", "int8", "--to", "onnx")),
        (2, ("--group-size 64 goes with --format",), ("--bits", "6", "--group-size", "64", "--calibrate", "TEXT")),
        (2, ("--embed int8 goes with --format",), ("--bits", "6", "--embed", "int8", "--calibrate", "TEXT")),
        (2, ("--formats is what a budget is spent on",), ("--format", "int8", "--formats", "int4-g32")),
        (2, ("--formats names no format",), ("--bits", "6", "--formats", ",", "--calibrate", "TEXT")),
        (2, ("--alpha 0.5 is the balance of --method smoothquant; gptq has none",), ("--format", "int8", "--alpha", "0.5", "--calibrate", "TEXT")),
        (2, ("--format int4-g32 says its group already",), ("--format", "int4-g32", "--group-size", "64")),
        (2, ("too short", "--samples"), ("--format", "int8", "--method", "gptq", "--samples", "4000", "-c", "32", "--calibrate", "TEXT")),
        (3, ("Fits with --memory",), ("--format", "int8", "--method", "rtn", "-m", "64MiB")),
        (3, ("State --bytes",), ("--bytes", "1KiB", "--samples", "4", "-c", "32", "--calibrate", "TEXT", "--formats", "int8", "-m", "8GiB")),
    ],
)
def test_errors_are_one_line(cli, folder: Path, text: Path, tmp_path: Path, code: int, words: tuple[str, ...], arguments: tuple[str, ...]):
    out = tmp_path / "out"
    given = [str(text) if word == "TEXT" else word for word in arguments]
    cli("quantize", str(folder), "-o", str(out), *given).failed(code, *words)
    assert not out.exists() and not out.with_name("out.partial").exists()


def test_an_output_inside_of_a_file(cli, folder: Path, text: Path):
    cli("quantize", str(folder), "-o", str(text / "out"), "--format", "int8").failed(2, "cannot be written", "text.txt is a file, not a folder")
