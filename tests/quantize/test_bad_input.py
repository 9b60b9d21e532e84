"""What `quantize` is given wrongly: each case says what is wrong, with names and sizes, and leaves no output behind."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tradespace as ts
from cli.tiny_model import make_home, save_folder, save_gguf
from tradespace.errors import BudgetError, InputError, UnsupportedError
from tradespace.quantize import shards


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_folder(folder / "hub")
    save_gguf(folder / "tiny.gguf")
    make_home(folder / "home")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 200)
    return folder


@pytest.fixture(autouse=True)
def _home(places: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRADESPACE_HOME", str(places / "home"))


def quantize(places: Path, out: Path, **how) -> ts.Quantized:
    return ts.quantize(str(places / "hub"), out, **{"memory": "8GiB", "method": "rtn", "samples": 4, "context": 32, **how})


CASES = {
    "short text": (InputError, r"the calibration text is too short: 4 samples of 32 tokens need [\d,]+ tokens; it has \d+\. Give a longer text, or --context",
                   {"format": "int8", "method": "gptq", "calibrate": "short.txt"}),
    "group of no size": (InputError, "--format int4 has no --group-size 48: int4, int3 and int2 come in groups of 32, 64 and 128",
                         {"format": "int4", "group_size": 48}),
    "group wider than rows": (UnsupportedError, r"self_attn.q_proj: compressed-tensors' group_size 64 must divide the width 32", {"format": "int4-g64"}),
    "blocks wider than rows": (InputError, "multiple of 256", {"format": "q4_k", "to": "gguf"}),
    "format": (InputError, r"unknown weight format 'int5'\. Closest: int", {"format": "int5"}),
    "method": (InputError, "unknown method 'gtpq'. Closest: gptq", {"format": "int8", "method": "gtpq"}),
    "target": (InputError, "--to ggml: write compressed-tensors or gguf", {"format": "int8", "to": "ggml"}),
    "formats of another target": (InputError, "--to gguf has no int3-g32", {"bits": 5.0, "formats": ["int3-g32"], "calibrate": "text.txt", "to": "gguf"}),
    "small budget of bytes": (BudgetError, r"State --bytes", {"bytes": "4KiB", "formats": ["int4-g32"], "calibrate": "text.txt"}),
    "small memory": (BudgetError, r"layer by layer needs .* the budget is 100 MiB. Fits with --memory \d+MiB", {"format": "int8", "memory": "100MiB"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_said_before_anything_is_written(case, places, tmp_path):
    error, words, how = CASES[case]
    (tmp_path / "short.txt").write_text("only a few words")
    if "calibrate" in how:
        folder = tmp_path if how["calibrate"] == "short.txt" else places
        how = how | {"calibrate": folder / how["calibrate"]}
    with pytest.raises(error, match=words):
        quantize(places, tmp_path / "out", **how)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
@pytest.mark.parametrize("to", ["compressed-tensors", "gguf"])
def test_what_is_not_finite_is_named(value, name, to, places, tmp_path):
    shutil.copytree(places / "hub", tmp_path / "bad")
    stored = load_file(tmp_path / "bad" / "model.safetensors")
    stored[name].view(-1)[7] = value
    save_file(stored, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"tensor '?{name}'? holds NaN or infinity. The checkpoint is damaged, or training had diverged"):
        ts.quantize(str(tmp_path / "bad"), tmp_path / "out", format="int4-g32" if to != "gguf" else "q8_0", method="rtn", to=to, memory="8GiB")
    assert not list(tmp_path.glob("out*")), "no run could go on from there"


@pytest.mark.parametrize("taken", ["empty folder", "folder", "file"])
def test_an_output_that_is_there_is_left_alone(taken, places, tmp_path):
    out = tmp_path / "out"
    if taken == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        if taken == "folder":
            (out / "mine").write_text("mine")
    with pytest.raises(InputError, match=r"out exists already. Give another -o, or remove it first"):
        quantize(places, out, format="int8")
    assert taken == "empty folder" or (out if taken == "file" else out / "mine").read_text() == "mine"


def test_a_disk_that_is_too_small(places, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100_000, 90_000, 10_000))
    with pytest.raises(BudgetError, match=r"writing .*out needs .* of disk; 9.77 KiB are free under .* Give -o on another disk, or free some"):
        quantize(places, tmp_path / "out", format="int8")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("to", ["compressed-tensors", "gguf"])
def test_a_disk_that_fills_up(to, places, tmp_path, monkeypatch):
    """In the middle of a file, with nothing but an error from the system: no output, and the run goes on once there is room."""
    fmt, real, left = ("int8", "q8_0")[to == "gguf"], shards._bytes, 12

    def full(tensor):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(tensor)

    quantize(places, tmp_path / "whole", format=fmt, to=to)
    with monkeypatch.context() as patched:
        patched.setattr(shards, "_bytes", full)
        with pytest.raises(InputError, match=r"the disk is full \(No space left on device\); .*out was not written. Free some space. What is finished waits"):
            quantize(places, tmp_path / "out", format=fmt, to=to)
    assert not (tmp_path / "out").exists()
    assert quantize(places, tmp_path / "out", format=fmt, to=to).resumed

    def contents(path: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in sorted(path.iterdir())} if path.is_dir() else {"": path.read_bytes()}

    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_model_with_experts_is_refused_by_name(places, tmp_path):
    shutil.copytree(places / "hub", tmp_path / "routed")
    config = json.loads((places / "hub" / "config.json").read_text())
    config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
    kept = ("model_type", "architectures", "num_local_experts", "num_experts_per_tok", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size",
            "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")  # fmt: skip
    (tmp_path / "routed" / "config.json").write_text(json.dumps({key: config[key] for key in kept if key in config}))
    with pytest.raises(UnsupportedError, match="routes tokens to experts; no such model runs here yet, and none is quantized"):
        ts.quantize(str(tmp_path / "routed"), tmp_path / "out", format="int4-g32", memory="8GiB")
    assert not list(tmp_path.glob("out*"))
