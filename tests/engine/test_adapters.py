"""Adapters in the engine: nothing is merged, one batch holds several, and each request gets the tokens of its own merged model."""

from __future__ import annotations

import pytest
import torch

import tradespace as ts
from cli.tiny_model import ROOMY, make_home, oracle, save_folder
from tradespace.adapt.lora import Shape, adapter_parameters, lora, merge
from tradespace.adapt.peft_files import save_adapter
from tradespace.build_training import build_model, fill
from tradespace.cli.run import parse_adapters
from tradespace.engine.sharing import extend_names
from tradespace.errors import InputError, UnsupportedError
from tradespace.loading.resolve import resolve
from tradespace.loading.safetensors import read_sharded
from tradespace.quantize.source import with_halves
from tradespace.spec.weights import WeightPlan
from tradespace.tuning import opened
from tradespace.tuning_models import copy_tokenizer, save_model

PROMPTS = ("the quick brown fox", "a budget is stated, a plan is made", "why is the sky blue", "the quick brown fox")
CHOSEN = ("one", None, "two", "two")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny model; two adapters of it; and the two models that merging them makes."""
    assert oracle() is not None
    root = tmp_path_factory.mktemp("adapters")
    base = save_folder(root / "base")
    files = resolve(str(base))
    stored, _ = opened(files)
    found = {None: base}
    for number, name in enumerate(("one", "two")):
        model = build_model(with_halves(stored), WeightPlan(default="fp32"), context=64)
        fill(model, read_sharded(files.folder), stored)
        shape = Shape(rank=3 + number, alpha=6.0)
        lora(model, shape, learn=True, seed=number)
        for parameter in adapter_parameters(model).values():
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
        save_adapter(model, root / name, shape, base=str(base))
        merge(model)
        save_model(model, root / f"{name}-merged", dtype=torch.float32)
        copy_tokenizer(files, root / f"{name}-merged")
        found[name] = root / f"{name}-merged"
    return root, found


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TRADESPACE_HOME", str(make_home(tmp_path / "home")))


def _params(name=None):
    return ts.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, adapter=name)


@pytest.mark.parametrize("sharing", [True, False])
def test_a_mixed_batch_gives_each_its_merged_model(folders, sharing):
    root, merged = folders
    want = []
    for prompt, name in zip(PROMPTS, CHOSEN, strict=True):
        with ts.open(merged[name], memory=ROOMY, context=64, weights="fp32", attention="sdpa", kv_store="fp32") as llm:
            want.append(llm.generate([prompt], _params())[0].output_ids)
    adapters = {"one": root / "one", "two": root / "two"}
    with ts.open(merged[None], memory=ROOMY, context=64, weights="fp32", attention="sdpa", kv_store="fp32", adapters=adapters, prefix_sharing=sharing) as llm:
        for _ in range(2):  # the second time the cache knows the prompts, under their adapters' names
            found = [done.output_ids for done in llm.generate(list(PROMPTS), [_params(name) for name in CHOSEN])]
            assert found == want
        assert want[0] != want[3]  # the same prompt, another adapter: the test would see a mix-up
        with pytest.raises(InputError, match=r"no adapter 'three'\. This engine has one, two"):
            llm.generate(["x"], _params("three"))


def test_blocks_of_another_adapter_have_other_names():
    plain, other = [], []
    extend_names(plain, range(32), 16)
    extend_names(other, range(32), 16, root=b"one")
    assert not set(plain) & set(other)


def test_what_takes_no_adapters_says_so(folders, tmp_path):
    root, merged = folders
    with pytest.raises(InputError, match=r"holds no adapter_model\.safetensors"):
        ts.open(merged[None], memory=ROOMY, context=64, adapters={"none": tmp_path})
    with pytest.raises(UnsupportedError, match="computes keys and values again, without adapters"):
        ts.open(merged[None], memory=ROOMY, context=64, weights="fp32", kv_store="fp32", kv_retain="recent:8", attention="sdpa", adapters={"one": root / "one"})


def test_words_of_the_command_line():
    assert list(parse_adapters(["a=x", "b=y/z"], 2)) == ["a", "b"]
    for words, prompts, match in ((["a"], 1, "write NAME=DIR"), (["a=x", "a=y"], 2, "each name once"), (["a=x", "b=y"], 3, "2 adapters for 3 prompts")):
        with pytest.raises(InputError, match=match):
            parse_adapters(words, prompts)
