"""Loading: every tensor filled once and nothing left over, from both containers; what does not fit is named before a byte of data is read."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.family_models import FP32, make_pair, packed_logits
from tradespace.errors import BudgetError, CorruptFileError, InputError, UnsupportedError
from tradespace.loading.safetensors import read_sharded
from tradespace.loading.weights import load_weights
from tradespace.model.transformer import Transformer
from tradespace.quantize.rtn import fill_rtn
from tradespace.spec.weights import WeightPlan


def _rewritten(pair, change) -> None:
    tensors = load_file(pair.folder / "model.safetensors")
    change(tensors)
    save_file(tensors, pair.folder / "model.safetensors")


@pytest.fixture
def pair(tmp_path):
    return make_pair("qwen2", 0, tmp_path)


def test_a_missing_tensor_is_named(pair):
    _rewritten(pair, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias"))
    with pytest.raises(CorruptFileError, match=r"model\.layers\.1\.self_attn\.k_proj\.bias.*missing"):
        pair.ours(max_context=8)


def test_a_surplus_tensor_is_named(pair):
    _rewritten(pair, lambda tensors: tensors.update({"model.layers.0.self_attn.o_proj.bias": torch.zeros(4)}))
    with pytest.raises(CorruptFileError, match=r"model\.layers\.0\.self_attn\.o_proj\.bias.*no such tensor"):
        pair.ours(max_context=8)


def test_a_wrong_shape_is_named_with_need_and_have(pair):
    _rewritten(pair, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(5)}))
    with pytest.raises(CorruptFileError, match=rf"model\.norm\.weight.*must have shape \[{pair.spec.D}\].*has \[5\]"):
        pair.ours(max_context=8)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_nan_is_refused_by_name(pair, name):
    def spoil(tensors):
        tensors[name].view(-1)[3] = float("nan")

    _rewritten(pair, spoil)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        pair.ours(max_context=8)


def test_harmless_tensors_are_left_out(pair):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        if pair.spec.tied:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    before = packed_logits(pair.ours(max_context=8), [torch.arange(8)])[0]
    _rewritten(pair, add)
    assert torch.equal(packed_logits(pair.ours(max_context=8), [torch.arange(8)])[0], before)


def test_the_bare_decoders_names_load_too(pair):
    """A checkpoint of the decoder alone has no prefix; GPT-2's published one is like that."""

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    before = packed_logits(pair.ours(max_context=8), [torch.arange(8)])[0]
    _rewritten(pair, strip)
    assert torch.equal(packed_logits(pair.ours(max_context=8), [torch.arange(8)])[0], before)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "falcon"])
@pytest.mark.parametrize("default", ["fp32", "bf16", "int8"])
def test_chunks_do_not_change_what_is_loaded(family, default, tmp_path):
    """A staging buffer of a few rows fills the same bits as one that takes the whole model; progress ends where it says."""
    pair = make_pair(family, 2, tmp_path)
    found, reports = [], []
    for staging_bytes in (3000, 2**24):
        model = Transformer(pair.spec, WeightPlan(default=default), max_context=8)
        load_weights(
            model, read_sharded(tmp_path), pair.spec, fill=fill_rtn, staging_bytes=staging_bytes, progress=lambda done, total: reports.append((done, total))
        )
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    first = [done for done, _ in reports[: len(reports) // 2]]
    assert first == sorted(first) and first[-1] == reports[-1][0] == reports[-1][1] > 0


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_a_staging_buffer_below_one_row_is_a_budget_error(family, tmp_path):
    pair = make_pair(family, 0, tmp_path)
    model = Transformer(pair.spec, FP32, max_context=8)
    with pytest.raises(BudgetError):
        load_weights(model, read_sharded(tmp_path), pair.spec, fill=fill_rtn, staging_bytes=64)


def test_a_family_without_names_is_refused(pair):
    spec = pair.spec
    other = dataclasses.replace(spec, family="unheard-of")
    with pytest.raises(UnsupportedError, match="unheard-of"):
        load_weights(Transformer(spec, FP32, max_context=8), read_sharded(pair.folder), other, fill=fill_rtn, staging_bytes=4096)
