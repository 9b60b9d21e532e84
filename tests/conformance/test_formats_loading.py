"""Formats through the loader: chunks change nothing, GGUF's blocks are held as stored, scales that span rows see all of them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from model.family_models import make_pair
from tradespace.errors import DownloadError, InputError
from tradespace.formats import FORMATS, ScaledWeight, decode
from tradespace.loading.gguf import read_gguf
from tradespace.loading.pull import pull
from tradespace.loading.safetensors import read_sharded
from tradespace.loading.weights import load_weights, stored_formats
from tradespace.model.transformer import Transformer
from tradespace.quantize.rtn import fill_rtn
from tradespace.spec.formats import ALIASES, refusal
from tradespace.spec.formats import FORMATS as SPECS
from tradespace.spec.gguf_config import model_spec_from_gguf
from tradespace.spec.tensors import QUANTIZABLE_ROLES, model_tensors
from tradespace.spec.weights import WeightPlan

NAMES = sorted(set(FORMATS) - set(ALIASES))


def _plan(spec, name: str) -> WeightPlan:
    """`name` wherever the width allows, int8 elsewhere."""
    exceptions = {}
    for tensor in model_tensors(spec):
        if tensor.role in QUANTIZABLE_ROLES and refusal(SPECS[name], tensor.shape[-1]):
            exceptions[tensor.role if tensor.layer < 0 else f"{tensor.layer}:{tensor.role}"] = "int8"
    return WeightPlan(default=name, exceptions=exceptions)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "falcon"])
def test_chunks_do_not_change_what_is_loaded(family, tmp_path):
    """A staging buffer of a few rows fills the same bits as one that takes the whole model, in every format; fused tensors and reordered rows included."""
    pair = make_pair(family, 2, tmp_path)
    source = read_sharded(tmp_path)
    for name in NAMES:
        found = []
        for staging_bytes in (3000, 2**24):
            model = Transformer(pair.spec, _plan(pair.spec, name), max_context=8)
            load_weights(model, source, pair.spec, fill=fill_rtn, staging_bytes=staging_bytes)
            found.append(model.state_dict())
        for key in found[0]:
            assert torch.equal(found[0][key].view(torch.uint8), found[1][key].view(torch.uint8)), (name, key)


def test_a_scale_of_a_fused_matrix_spans_its_parts(tmp_path):
    pair = make_pair("qwen2", 0, tmp_path)
    models = {}
    for name in ("fp32", "fp8-tensor", "int8-tensor"):
        models[name] = Transformer(pair.spec, WeightPlan(default=name), max_context=8)
        load_weights(models[name], read_sharded(tmp_path), pair.spec, fill=fill_rtn, staging_bytes=2**14)
    exact = models["fp32"].get_submodule("layers.0.attn.qkv").rows_RC
    for name, largest in (("fp8-tensor", 448), ("int8-tensor", 127)):
        weight = models[name].get_submodule("layers.0.attn.qkv")
        assert isinstance(weight, ScaledWeight) and weight.scale.numel() == 1
        assert float(weight.scale) == float(exact.abs().max() / largest)


def _real(alias: str):
    try:
        path = Path(pull(alias, progress=False))
    except DownloadError as error:
        pytest.skip(f"the weights of {alias} cannot be fetched: {error}")
    found = [path] if path.is_file() else sorted(path.rglob("*.gguf"))
    source = read_gguf(found[0])
    return source, model_spec_from_gguf(source.metadata, {name: tensor.shape for name, tensor in source.tensors.items()}, alias)


def _plan_as_stored(spec, formats) -> WeightPlan:
    exceptions = {}
    for tensor in model_tensors(spec):
        if tensor.role in QUANTIZABLE_ROLES:
            exceptions[tensor.role if tensor.layer < 0 else f"{tensor.layer}:{tensor.role}"] = formats[tensor.name] or "int8"
    return WeightPlan(exceptions=exceptions)


@pytest.mark.weights
@pytest.mark.parametrize(("alias", "types", "apart"), [("smollm2-135m", {"q4_1", "q8_0"}, 0), ("gemma3-270m", {"q4_k", "q5_0", "q6_k", "q8_0"}, 9)])
def test_real_files_are_held_as_stored(alias, types, apart):
    """Every matrix whose parts are stored alike is held in the file's own bytes, and stands for the very values that the loader decodes."""
    source, spec = _real(alias)
    formats = stored_formats(source, spec)
    assert set(formats.values()) - {None} == types
    assert sum(name is None for name in formats.values()) == apart
    held = Transformer(spec, _plan_as_stored(spec, formats), max_context=8)
    load_weights(held, source, spec, fill=fill_rtn, staging_bytes=2**20)
    dense = Transformer(spec, WeightPlan(default="fp32"), max_context=8)
    load_weights(dense, source, spec, fill=fill_rtn, staging_bytes=2**20)
    stored_bytes = sum(tensor.nbytes for tensor in source.tensors.values())
    held_bytes = sum(held.get_submodule(name.removesuffix(".weight")).nbytes for name, fmt in formats.items() if fmt)
    assert held_bytes <= stored_bytes and (apart or held_bytes > 0.99 * stored_bytes)
    for name, fmt in formats.items():
        if fmt is None:
            continue
        weight, exact = held.get_submodule(name.removesuffix(".weight")), dense.get_submodule(name.removesuffix(".weight"))
        for start in range(0, exact.rows_RC.shape[0], 8192):
            stop = min(start + 8192, exact.rows_RC.shape[0])
            assert torch.equal(decode(fmt, weight.get_rows(start, stop)), exact.rows_RC[start:stop])
            assert torch.equal(weight.dense_rows(start, stop), exact.rows_RC[start:stop].bfloat16())


def test_an_infinite_scale_in_a_block_is_refused_by_name(tmp_path):
    """Blocks are not decoded on the way in, and their scales are looked at all the same."""
    source, spec = _tiny_gguf(tmp_path, spoil=False)
    assert set(stored_formats(source, spec).values()) == {"q8_0"}
    model = Transformer(spec, WeightPlan(default="q8_0"), max_context=8)
    load_weights(model, source, spec, fill=fill_rtn, staging_bytes=2**14)
    source, spec = _tiny_gguf(tmp_path, spoil=True)
    with pytest.raises(InputError, match=r"blk\.0\.ffn_down\.weight"):
        load_weights(model, source, spec, fill=fill_rtn, staging_bytes=2**14)


def _tiny_gguf(folder: Path, *, spoil: bool):
    """One layer of a llama, 64 wide, all matrices in q8_0."""
    path = folder / f"tiny-{spoil}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    shapes = {"token_embd": (40, 64), "output": (40, 64)} | {
        f"blk.0.{name}": shape
        for name, shape in {
            "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64),
            "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96),
        }.items()
    }  # fmt: skip
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        blocks = gguf.quants.quantize(rng.standard_normal(shape, dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
        if spoil and name == "blk.0.ffn_down":
            blocks[7, 34:36] = (0, 0x7C)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = read_gguf(path)
    return source, model_spec_from_gguf(source.metadata, {name: tensor.shape for name, tensor in source.tensors.items()}, "tiny")
