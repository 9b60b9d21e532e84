"""`tradespace eval` on a tiny model: its figures against transformers, both ways of reading a reference, tasks, a sweep that goes on, and every bad input."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

import tradespace as ts
from cli.tiny_model import ROOMY, TEXTS, oracle
from tradespace import comparing
from tradespace.errors import InputError
from tradespace.lab import sweep as sweep_module

TEXT = " ".join(TEXTS * 6)
EVAL = ("--memory", ROOMY, "--context", "32")
CHOICE = {"query": "Question: why is the sky blue?", "choices": ["light", "the lazy dog"], "gold": 0}


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def tasks(tmp_path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [CHOICE, CHOICE | {"gold": 1}] * 3
    (folder / "arc_easy.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "lambada_openai.jsonl").write_text(json.dumps({"context": "the quick brown", "continuation": "fox"}), encoding="utf-8")
    return folder


def test_perplexity_is_transformers(cli, folder, text):
    found = cli("eval", folder, "--text", text, "--weights", "fp32", "--json", *EVAL).json["perplexity"]
    ids = _ids(folder)
    lost: list[torch.Tensor] = []
    for start in range(0, len(ids), 31):  # with BOS, windows of 32 hold 31 tokens of the text
        window = torch.tensor([1, *ids[start : start + 31]])
        with torch.inference_mode():
            logits = oracle()(window[None]).logits[0, :-1].float()
        lost.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    nats = torch.cat(lost).double()
    assert found["num_tokens"] == len(ids) == len(nats)
    assert found["nats_per_token"] == pytest.approx(float(nats.mean()), abs=1e-4)
    assert found["error"] == pytest.approx(math.exp(float(nats.mean())) * float(nats.std()) / math.sqrt(len(nats)), rel=1e-3)
    assert found["num_bytes"] == len(TEXT.encode())
    assert found["bits_per_byte"] == pytest.approx(float(nats.sum()) / math.log(2) / len(TEXT.encode()), rel=1e-4)
    assert "BOS" in found["protocol"]


def _ids(folder: Path) -> list[int]:
    from tradespace.loading.resolve import resolve
    from tradespace.loading.tokenizer import Tokenizer

    return Tokenizer.from_files(resolve(str(folder))).encode(TEXT, add_special_tokens=False)


def test_tables_are_narrow_and_complete(cli, folder, text, tasks):
    ran = cli("eval", folder, "--text", text, "--weights", "bf16", "--against", "self", "--tasks", "arc_easy,lambada_openai", "--task-data", tasks, *EVAL)
    assert ran.code == 0, ran.err
    for words in ("per token", "bits per byte", "tokens scored in", "mean KL", "same top token", "RMS Δp", "acc_norm", "in fp32, read beside", "(kept)"):
        assert words in ran.out, words
    tables = [line for line in ran.out.splitlines() if line[:1] in "┏┃┡│├└"]
    assert tables and max(map(len, tables)) <= 100


def test_a_model_does_not_differ_from_itself(cli, folder, gguf_file, text):
    found = cli("eval", folder, "--text", text, "--weights", "fp32", "--against", "self", "--json", *EVAL).json["divergence"]
    assert (found["mean_kl"], found["top1_agreement"], found["rms_dp"]) == (0.0, 1.0, 0.0)
    other = cli("eval", gguf_file, "--text", text, "--weights", "fp32", "--against", folder, "--json", *EVAL).json["divergence"]
    assert other["mean_kl"] < 1e-8 and other["num_tokens"] == found["num_tokens"]
    lossy = cli("eval", folder, "--text", text, "--weights", "bf16", "--against", "self", "--json", *EVAL).json["divergence"]
    assert 1e-8 < lossy["mean_kl"] < lossy["p99_kl"] <= lossy["max_kl"]


def test_a_reference_on_the_disk_says_the_same(folder, text, home, monkeypatch):
    monkeypatch.setenv("TRADESPACE_HOME", str(home))
    asked = {"text": text, "against": "self", "weights": "bf16", "context": 32, "stride": 16, "memory": ROOMY}
    beside = ts.evaluate(folder, **asked)
    _apart(monkeypatch)
    seen: list[tuple[str, int, int]] = []
    apart = ts.evaluate(folder, **asked, on_progress=lambda *told: seen.append(told))
    assert beside.divergence is not None and apart.divergence is not None
    assert beside.reference is not None and apart.reference is not None
    assert "beside" in beside.reference and "16 bits" in apart.reference
    assert apart.divergence.mean_kl == pytest.approx(beside.divergence.mean_kl, rel=0.01)
    assert apart.divergence.perplexity == beside.divergence.perplexity
    assert not list(home.glob("reference-*")), "what waited on the disk is removed"
    total = beside.divergence.num_tokens
    assert [told for told in seen if told[1] == told[2]] == [("reference", total, total), ("text", total, total)]


def _apart(monkeypatch) -> None:
    """Every pair is read as if it did not fit together."""
    together = comparing.Pairing.of.__func__  # type: ignore[attr-defined]
    from dataclasses import replace

    monkeypatch.setattr(comparing.Pairing, "of", classmethod(lambda cls, *given: replace(together(cls, *given), together=False)))


def test_tasks_as_json(cli, folder, tasks):
    results = cli("eval", folder, "--tasks", "arc_easy", "--task-data", tasks, "--limit", "4", "--weights", "fp32", "--json", *EVAL).json["tasks"]
    (result,) = results
    assert result["num_examples"] == 4
    # two questions, each once with the one answer right and once with the other
    assert result["metrics"]["acc"] == {"value": 0.5, "error": pytest.approx(math.sqrt(0.25 / 3))}


def test_a_sweep_goes_on_where_it_was(cli, folder, text, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("plotly")
    output = tmp_path / "sweep"
    asked = ("eval", folder, "--sweep", "--text", text, "--methods", "rtn", "-o", output, *EVAL)
    first = cli(*asked, "--formats", "int8,bf16", "--json")
    assert first.code == 0, first.err
    assert {row["format"]: row["mean_kl"] > 0 for row in first.json["rows"]} == {"int8": True, "bf16": True}
    assert first.json["rows"][0]["format"] == "int8", "by size"
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")
    page = (output / "sweep.html").read_text(encoding="utf-8")
    assert "int8" in page and len(page) < 5_000_000
    assert "<script src" not in page and "<link" not in page, "nothing is fetched to show it"
    assert not list(output.glob("*.logprobs"))
    measured: list[str] = []
    measure = sweep_module._measure
    monkeypatch.setattr(sweep_module, "_measure", lambda sweep, compared, fmt, *rest: (measured.append(fmt), measure(sweep, compared, fmt, *rest))[1])
    again = cli(*asked, "--formats", "int8,bf16,fp16")
    assert again.code == 0, again.err
    assert measured == ["fp16"]
    assert "2 of 3 points are there already" in again.err
    assert all(name in again.out for name in ("int8", "bf16", "fp16"))


def test_a_sweep_goes_through_the_quantizers(cli, folder, text, tmp_path, monkeypatch):
    """What a quantizer writes is evaluated as the folder that it is, and removed; one that refuses a format is left out with its reason."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("plotly")
    asked: list[tuple[str, str, str, Path, int]] = []
    quantize = sweep_module.quantize

    def seen(model, output, **given):
        asked.append(tuple(given[name] for name in ("format", "method", "embed", "calibrate", "samples")))
        return quantize(model, output, **given)

    monkeypatch.setattr(sweep_module, "quantize", seen)
    pairs = [("int4-g32", "rtn"), ("int4-g32", "gptq"), ("int4-g32", "awq"), ("e8", "gptq"), ("q4_k", "gptq")]
    monkeypatch.setattr(sweep_module, "choose_pairs", lambda *given, **stated: pairs)
    output = tmp_path / "sweep"
    ran = cli("eval", folder, "--sweep", "--text", text, "--calibrate", text, "--samples", "2", "-o", output, "--json", *EVAL)
    assert ran.code == 0, ran.err
    assert asked == [(fmt, method, fmt, text, 2) for fmt, method in pairs if method != "rtn"]
    found = {(row["format"], row["method"]): row for row in ran.json["rows"]}
    assert set(found) == set(pairs[:-1])
    assert found["int4-g32", "gptq"]["bytes"] == found["int4-g32", "rtn"]["bytes"], "run as they were written, in the same format"
    assert "left out q4_k by gptq" in ran.json["notes"]
    assert not list(output.glob("quantized-*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["--text", "--tasks"]),
        (("--against", "self"), ["--text", "--tasks"]),
        (("--against", "self", "--tasks", "arc_easy", "--task-data", "."), ["--against", "--text"]),
        (("--text", "nowhere.txt"), ["nowhere.txt", "No such file"]),
        (("--text", "."), ["directory"]),
        (("--tasks", "arc_hard", "--task-data", "."), ["arc_hard", "arc_easy"]),
        (("--tasks", "piqa", "--task-data", "nowhere"), ["nowhere", "no folder"]),
        (("--text", "TEXT", "--reference-dtype", "int8"), ["int8", "fp32"]),
        (("--text", "TEXT", "--tokens", "100000"), ["--tokens 100000", "tokens"]),
        (("--text", "TEXT", "--stride", "33", "--context", "32"), ["--stride 33", "1 … 31"]),
        (("--text", "LONG", "--context", "9000"), ["9000", "8192"]),
        (("--text", "TEXT", "--context", "8000"), ["one window of 8000 needs 7999"]),
        (("--text", "TEXT", "--context", "32", "--weights", "int5"), ["int5"]),
        (("--text", "TEXT", "--context", "32", "--kv-store", "int5"), ["int5"]),
        (("--text", "TEXT", "--formats", "int8"), ["--formats", "--sweep"]),
        (("--text", "TEXT", "--sweep"), ["-o DIR"]),
        (("--text", "TEXT", "--sweep", "-o", "sweep", "--tasks", "piqa"), ["--tasks", "--sweep"]),
        (("--text", "TEXT", "--sweep", "-o", "sweep", "--formats", "int5"), ["int5"]),
        (("--text", "TEXT", "--sweep", "-o", "sweep", "--methods", "guess"), ["guess", "rtn"]),
        (("--text", "TEXT", "--sweep", "-o", "sweep", "--methods", "gptq"), ["gptq", "--calibrate"]),
        (("--text", "TEXT", "--sweep", "-o", "TEXT"), ["is a file"]),
    ],
)
def test_bad_input_is_one_clear_line(cli, folder, text, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "LONG").write_text(TEXT * 40)
    given = [str(text) if argument == "TEXT" else argument for argument in arguments]
    cli("eval", folder, "--memory", ROOMY, *given).failed(2, *words)


@pytest.mark.parametrize(("raw", "words"), [(b"", ["empty", "0 bytes"]), (b"abc \xff", ["UTF-8", "0xff", "offset 4"]), (b"ab", ["needs"])])
def test_texts_that_are_none(cli, folder, tmp_path, raw, words):
    path = tmp_path / "bad.txt"
    path.write_bytes(raw)
    cli("eval", folder, "--text", path, *EVAL).failed(2, *words)


def test_a_text_cut_in_a_character_is_still_text(folder, tmp_path, monkeypatch, home):
    """With --tokens only the start of a file is read: the cut must not fall inside of a character."""
    from tradespace.quality import text as text_module

    path = tmp_path / "long.txt"
    path.write_text("é" * 3000, encoding="utf-8")
    monkeypatch.setattr(text_module, "LEAST_READ_BYTES", 1)
    monkeypatch.setattr(text_module, "BYTES_PER_TOKEN", 5)
    assert text_module.read_text(path, 201) == "é" * 100
    monkeypatch.setenv("TRADESPACE_HOME", str(home))
    found = ts.evaluate(folder, text=path, tokens=99, context=32, weights="fp32", memory=ROOMY)
    assert found.perplexity is not None and found.perplexity.num_tokens == 99


def test_other_vocabularies_cannot_be_compared(cli, folder, broken, text):
    other = broken()
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = "t", "e"
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    cli("eval", folder, "--text", text, "--against", other, *EVAL).failed(2, "different vocabularies", "bits per byte")


def test_missing_plotters_are_named_before_anything_is_measured(cli, folder, text, tmp_path, monkeypatch):
    from tradespace.lab import sweep_plot

    def absent(name: str):
        raise ImportError(name)

    monkeypatch.setattr(sweep_plot.importlib, "import_module", absent)
    cli("eval", folder, "--sweep", "--text", text, "-o", tmp_path / "out", *EVAL).failed(2, "matplotlib", "tradespace[lab]")
    assert not (tmp_path / "out").exists()


def test_a_budget_that_holds_no_model_is_a_budget_error(cli, folder, text):
    cli("eval", folder, "--text", text, "--memory", "40MiB", "--context", "32").failed(3)


def test_the_library_says_what_it_lacks(folder):
    with pytest.raises(InputError, match="nothing to evaluate on"):
        ts.evaluate(folder)
    with pytest.raises(InputError, match="--task-data"):
        ts.evaluate(folder, tasks=["piqa"])


@pytest.mark.skipif(os.name == "nt", reason="memory of the process tree is read from /proc")
def test_the_peak_stays_inside_the_budget(shell, folder, text):
    ran = shell("eval", folder, "--text", text, "--weights", "bf16", "--against", "self", "--memory", "700MiB", "--context", "32", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["peak_bytes"] <= ran.json["memory_bytes"] == 700 * 2**20
