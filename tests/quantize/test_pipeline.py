"""Quantizing whole models: what is written, that other tools and we ourselves read it alike, that a kill at any moment loses nothing, and that a budget is
kept."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

import tradespace as ts
from cli.tiny_model import make_home, oracle, save_folder, save_gguf
from tradespace.errors import BudgetError, InputError, UnsupportedError
from tradespace.formats import decode
from tradespace.quantize.rtn import round_to_nearest

SOURCE = Path(__file__).resolve().parents[2] / "src"
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "because", "light", "is", "scattered", "and", "a", "plan", "run"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a folder and as a GGUF file, and a calibration text."""
    folder = tmp_path_factory.mktemp("models")
    save_folder(folder / "hub")
    save_gguf(folder / "tiny.gguf")
    draw = random.Random(0)
    (folder / "text.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(4000)))
    make_home(folder / "home")
    return folder


@pytest.fixture(autouse=True)
def _home(places: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRADESPACE_HOME", str(places / "home"))


def run(places: Path, out: Path, model: str = "hub", **how) -> ts.Quantized:
    learned = {"calibrate": places / "text.txt", "samples": 6, "context": 32} if how.pop("text", True) else {}
    return ts.quantize(str(places / model), out, **{"memory": "8GiB", **learned, **how})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(str(shard), "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_folder_that_transformers_opens(places: Path, tmp_path: Path):
    out = tmp_path / "out"
    found = run(places, out, format="int4", group_size=32, method="rtn")
    assert not out.with_name("out.partial").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = tensors(out)
    assert set(index["weight_map"]) == set(stored)
    assert found.stored_bytes == index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    pytest.importorskip("compressed_tensors")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    loaded(torch.tensor([[7, 8, 9]]))  # the first call decompresses
    original = oracle().model.layers[1].mlp.down_proj.weight.detach()
    wanted = decode("int4-g32", round_to_nearest("int4-g32", original))
    assert torch.equal(loaded.model.layers[1].mlp.down_proj.weight.detach(), wanted)


@pytest.mark.parametrize("method", ["gptq", "gptaq", "awq", "awq-gptq", "hadamard", "hadamard-gptq", "rtn-search"])
def test_every_method_keeps_the_model_close(method: str, places: Path, tmp_path: Path):
    # eight bits, so that what folds and rotations change shows, and not what rounding does to a random model
    found = run(places, tmp_path / "out", format="int8", method=method, embed="int8" if method == "awq" else None)
    assert found.method == method and not found.resumed
    assert 8 < found.bits_per_weight < 20
    text = torch.randint(6, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    pytest.importorskip("compressed_tensors")
    with torch.inference_mode():
        wanted = oracle()(text).logits.log_softmax(-1)
        if method != "awq":  # an embedding in int8 is our own convention
            logits = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(text).logits.log_softmax(-1)
            assert float((wanted.exp() * (wanted - logits)).sum(-1).mean()) < 0.02
    if "gptq" in method or method in ("awq", "gptaq"):
        assert set(found.errors) == {f"{layer}.{stem}" for layer in (0, 1) for stem in ("attn.qkv", "attn.out", "ffn.gate_up", "ffn.down")}
        assert all(0 < error < 1e-3 for error in found.errors.values())


def test_gguf_and_folder_give_the_same_codes(places: Path, tmp_path: Path):
    for name, model in (("a", "hub"), ("b", "tiny.gguf")):
        run(places, tmp_path / name, model=model, format="int4-g32", method="gptq", seed=3)
    first, second = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["model_type"] == "llama" and (tmp_path / "b" / "tokenizer.json").is_file()
    ids = [transformers.AutoTokenizer.from_pretrained(tmp_path / name)("the lazy dog")["input_ids"] for name in ("a", "b")]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(("fmt", "method"), [("q8_0", None), ("q4_0", "rtn"), ("q4_1", "awq"), ("bf16", "rtn")])
def test_gguf_files_keep_names_and_order(fmt: str, method: str | None, places: Path, tmp_path: Path):
    """The written file, read by the gguf package: every tensor close to the source's, in the source's row order, and exactly our own blocks."""
    import gguf

    found = run(places, tmp_path / "out.gguf", model="tiny.gguf", to="gguf", format=fmt, method=method, text=method == "awq")
    assert found.method == (method or "rtn")
    before, after = (gguf.GGUFReader(path) for path in (places / "tiny.gguf", tmp_path / "out.gguf"))
    assert [tensor.name for tensor in before.tensors] == [tensor.name for tensor in after.tensors]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        values = torch.tensor(gguf.dequantize(new.data, new.tensor_type)).flatten()
        wanted = torch.tensor(old.data).flatten()
        if method == "awq":  # folded: other numbers, and the same model
            continue
        assert torch.nn.functional.cosine_similarity(values, wanted, dim=0) > 0.99, old.name
        if "blk" in old.name and "norm" not in old.name:
            assert new.tensor_type.name == fmt.upper()
    assert {key for key in before.fields if not key.startswith("GGUF.")} <= set(after.fields)
    with pytest.raises(InputError, match="--to gguf has no int4"):
        run(places, tmp_path / "no", model="tiny.gguf", to="gguf", format="int4-g32")


def test_smoothquant_finds_alpha_and_folds(places: Path, tmp_path: Path):
    run(places, tmp_path / "searched", format="w8a8")
    run(places, tmp_path / "given", format="w8a8", alpha=0.5)
    run(places, tmp_path / "plain", format="w8a8", method="rtn")
    name = "model.layers.0.input_layernorm.weight"
    by_channel = run(places, tmp_path / "by channel", format="w8a8", method="smooth-search")
    assert set(by_channel.alphas) == {f"{layer}.{stem}" for layer in (0, 1) for stem in ("attn.qkv", "attn.out", "ffn.gate_up", "ffn.down")}
    norms = [tensors(tmp_path / folder)[name].float() for folder in ("searched", "given", "by channel", "plain")]
    assert not any(torch.equal(norm, norms[-1]) for norm in norms[:-1])
    config = json.loads((tmp_path / "given" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"


def test_a_budget_is_spent_within_it(places: Path, tmp_path: Path):
    names = ["int2-g32-zp", "int3-g32", "int4-g32", "int8", "bf16"]
    found = run(places, tmp_path / "out", bits=5.0, formats=names, method="gptq")
    assert found.bits_per_weight <= 5.0 and found.bits_per_weight > 4.5
    assert found.expected_kl is not None and found.expected_kl > 0
    kl = {(entry.tensor, entry.fmt): entry.kl for entry in found.sensitivities}
    assert len(kl) == 4 * (2 * 4 + 2)  # four formats; four matrices in two layers, embedding and head
    assert all(kl[tensor, "int2-g32-zp"] > kl[tensor, "int8"] >= 0 for tensor, _ in kl)
    again = run(places, tmp_path / "more", bits=9.0, formats=names, method="gptq")
    assert again.expected_kl is not None and again.expected_kl < found.expected_kl
    assert not list(tmp_path.glob("*.sensitivity")) and not list(tmp_path.glob("*.partial"))


_COMMAND = """
import sys, tradespace as ts
ts.quantize(sys.argv[1], sys.argv[2], calibrate=sys.argv[3], samples=6, context=32, memory="8GiB", **eval(sys.argv[4]))
"""


def in_process(places: Path, out: Path, how: dict, model: str = "hub") -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "TRADESPACE_HOME": str(places / "home"), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", _COMMAND, str(places / model), str(out), str(places / "text.txt"), repr(how)]
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE)


@pytest.mark.parametrize("how", [{"format": "int3-g32", "method": "gptq"}, {"bits": 6.0, "formats": ["int3-g32", "int8", "bf16"], "method": "gptq"}])
def test_killed_at_any_moment_it_goes_on_and_writes_the_same(how: dict, places: Path, tmp_path: Path):
    whole = tmp_path / "whole"
    began = time.monotonic()
    assert in_process(places, whole, how).wait() == 0
    duration = time.monotonic() - began
    draw, out = random.Random(str(how)), tmp_path / "out"
    kills = 0
    for attempt in range(12):
        process = in_process(places, out, how)
        # most of a run is starting up; its last third is where files are written
        try:
            process.wait(timeout=duration * draw.uniform(0.55, 1.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        if out.exists():
            break
        assert attempt < 11, "never finished"
    if kills < 2 and not out.exists():
        pytest.fail("no kill met a run")
    assert contents(out) == contents(whole)
    leftover = out.with_name("out.partial")
    assert not leftover.exists() or not (leftover / "checkpoint").exists()


@pytest.mark.parametrize(("method", "fmt"), [("gptq", "int4-g32"), ("gptaq", "int4-g32"), ("smooth-search", "w8a8")])
def test_a_step_at_a_time(method: str, fmt: str, places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same without chance: an error after each line of the journal, and the run after it goes on from there."""
    from tradespace.quantize.journal import Journal

    run(places, tmp_path / "whole", format=fmt, method=method)
    real = Journal.add
    steps = 0

    def add(self: Journal, line: dict) -> None:
        nonlocal steps
        real(self, line)
        steps += 1
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", add)
    resumed = []
    while not (tmp_path / "out").exists():
        before = steps
        try:
            resumed.append(run(places, tmp_path / "out", format=fmt, method=method).resumed)
        except KeyboardInterrupt:
            assert steps == before + 1
    assert steps == 6 and resumed == [True]  # embedded, two layers, embedding, head, the rest
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_job_in_the_same_place_starts_anew(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tradespace.quantize import pipeline

    with monkeypatch.context() as patched:
        patched.setattr(pipeline.Pipeline, "_around", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(places, tmp_path / "out", format="int4-g32", method="gptq")
    assert not run(places, tmp_path / "out", format="int8", method="gptq").resumed
    run(places, tmp_path / "fresh", format="int8", method="gptq")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_bad_input_says_what_is_wrong_before_anything_is_written(places: Path, tmp_path: Path):
    out, text = tmp_path / "out", places / "text.txt"
    short = tmp_path / "short.txt"
    short.write_text("only a few words")
    for error, words, how in (
        (InputError, "too short: 6 samples of 32 tokens need", {"format": "int8", "calibrate": short, "method": "gptq"}),
        (InputError, "no --group-size 48", {"format": "int4", "group_size": 48}),
        (InputError, "unknown weight format", {"format": "int5"}),
        (InputError, "unknown method", {"format": "int8", "method": "magic"}),
        (InputError, "one of --format", {}),
        (InputError, "one of --format", {"format": "int8", "bits": 3.0}),
        (InputError, "Give --calibrate", {"format": "int8", "method": "gptq", "text": False}),
        (InputError, "Give --calibrate", {"bits": 4.0, "text": False}),
        (InputError, "multiple of 256", {"format": "q4_k"}),
        (UnsupportedError, "not q8_0", {"format": "q8_0", "method": "gptq"}),
        (InputError, "give it --format w8a8", {"format": "int4-g32", "method": "smoothquant"}),
        (InputError, "smooth-search prepares activations", {"format": "int4-g32", "method": "smooth-search"}),
        (InputError, "at most 8192", {"format": "int8", "context": 9000}),
        (BudgetError, "State --bytes", {"bytes": "4KiB", "formats": ["int4-g32"]}),
        (BudgetError, "Fits with --memory", {"format": "int8", "memory": "100MiB"}),
        (UnsupportedError, "must divide the width 32", {"format": "int4-g64", "method": "rtn"}),
        (InputError, "cannot read the text", {"format": "int8", "calibrate": text.with_name("absent.txt")}),
    ):
        with pytest.raises(error, match=words.replace("(", r"\(")):
            run(places, out, **how)
        assert not out.exists()
    out.mkdir()
    with pytest.raises(InputError, match="exists already"):
        run(places, out, format="int8")


def test_nan_in_the_weights_is_named(places: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(places / "hub", tmp_path / "bad")
    stored = load_file(tmp_path / "bad" / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(stored, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp.*NaN or infinity"):
        ts.quantize(str(tmp_path / "bad"), tmp_path / "out", format="int4-g32", method="rtn", memory="8GiB")
    assert not (tmp_path / "out").exists()


def test_windows_are_drawn_alike_and_do_not_overlap():
    from tradespace.quantize.calibrate import sample_windows

    ids = list(range(10, 1010))
    windows = sample_windows(ids, samples=5, context=33, seed=1, bos_id=1)
    assert windows == sample_windows(ids, samples=5, context=33, seed=1, bos_id=1) != sample_windows(ids, samples=5, context=33, seed=2, bos_id=1)
    assert all(window[0] == 1 and window[1:] == list(range(window[1], window[1] + 32)) for window in windows)
    assert all(first[-1] < second[1] for first, second in pairwise(windows))
    whole = sample_windows(ids, samples=1000 // 32, context=32, seed=1)
    assert len(whole) == 31
    with pytest.raises(InputError, match=r"need 1,024 tokens; it has 1,000.*--samples 31"):
        sample_windows(ids, samples=32, context=32, seed=1)
