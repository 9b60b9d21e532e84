"""What we write as compressed-tensors, its own package decompresses to the same values, transformers runs to the same logits, and we read back code by code."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loading.quantized_models import (
    AFFINE,
    Checkpoint,
    V,
    build_fp32,
    dense_logits,
    draw_codes,
    linear_modules,
    logits,
    save,
    tiny_config,
    tiny_model,
    weight_of,
    write_checkpoint,
)
from tradespace.errors import UnsupportedError
from tradespace.formats import decode
from tradespace.loading.compressed_tensors import export_tensors, quantization_config
from tradespace.spec.weights import WeightPlan

compressed_tensors = pytest.importorskip("compressed_tensors", reason="the oracle compressed-tensors is not installed")
from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationConfig  # noqa: E402

TENSORS = ("int8", "int8-tensor", "w8a8", "fp8", "fp8-tensor", "fp8-block", *AFFINE)
TOKENS = torch.arange(0, 48) * 7 % V


def export(folder, config, format_of, *, head: bool = False):
    names = list(linear_modules(tiny_model(config), head=head))
    formats = {name: format_of(name) or "fp32" for name in names}
    quantization = quantization_config(formats | {"model.embed_tokens": "fp32"})
    return write_checkpoint(folder, config, format_of, lambda name, codes, shape: export_tensors(name, formats[name], codes, shape), quantization, head=head)


def oracle(folder, *, dequantize: bool = False) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(folder)
    config.quantization_config["dequantize"] = dequantize
    config._attn_implementation = "eager"
    return transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


@torch.inference_mode()
def oracle_logits(folder, *, activations: bool = True, dequantize: bool = False) -> Tensor:
    model = oracle(folder, dequantize=dequantize)
    for module in model.modules():
        module.quantization_enabled = activations
    return model(TOKENS[None]).logits[0]


@pytest.mark.parametrize("name", TENSORS)
def test_their_package_decompresses_to_our_values(name):
    rows, columns = 256, 384
    codes = draw_codes(name, rows, columns, 1)
    scheme = next(iter(QuantizationConfig.model_validate(quantization_config({"m": name})).config_groups.values()))
    stored = {key.removeprefix("m."): tensor for key, tensor in export_tensors("m", name, codes, (rows, columns)).items()}
    # scales in fp32, so that their product is not rounded
    stored["weight_scale"] = stored["weight_scale"].float()
    theirs = BaseCompressor.get_value_from_registry(scheme.format).decompress(stored, scheme)["weight"]
    assert torch.equal(theirs, decode(name, codes))


@pytest.mark.parametrize("name", AFFINE)
def test_their_package_compresses_our_values_to_our_tensors(name):
    rows, columns = 200, 256
    codes = draw_codes(name, rows, columns, 2)
    scheme = next(iter(QuantizationConfig.model_validate(quantization_config({"m": name})).config_groups.values()))
    ours = {key.removeprefix("m."): tensor for key, tensor in export_tensors("m", name, codes, (rows, columns)).items()}
    given = {"weight": decode(name, codes), "weight_scale": codes.scale_RG}
    if codes.zero_RG is not None:
        given["weight_zero_point"] = (codes.zero_RG.short() - 2 ** (scheme.weights.num_bits - 1)).to(torch.int8)
    theirs = BaseCompressor.get_value_from_registry(scheme.format).compress(given, scheme)
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[key].to(ours[key].dtype), ours[key]) for key in ours)


@pytest.mark.parametrize("name", TENSORS)
def test_round_trip(name, tmp_path):
    found = export(tmp_path, tiny_config("qwen2" if "-zp" in name else "llama"), lambda _: name)
    model = found.ours()
    again = logits(model, TOKENS)
    weight = weight_of(model, "layers.1.ffn.down")
    assert weight.fmt.name == name
    assert torch.equal(weight.dense_rows(0, 256), found.values["model.layers.1.mlp.down_proj"])
    dense = logits(found.ours(WeightPlan(default="fp32")), TOKENS)
    if name.endswith("-zp"):
        # transformers 5.23 prepares unpacked zero points and then finds packed ones, whoever wrote them, unless it may dequantize: in the fp16 of the scales
        assert (again - dense).abs().max() < 1e-4
        assert (again - oracle_logits(tmp_path, dequantize=True)).abs().max() < 2e-2
        return
    theirs = oracle_logits(tmp_path, activations=False)
    assert (dense - theirs).abs().max() < 1e-4
    if name != "w8a8":
        assert (again - theirs).abs().max() < 1e-4
        return
    # int8 activations are rounded by either side in its own way (theirs divides by 127.5, ours by 127): no matter of the file, and no more than rounding costs
    rounded = oracle_logits(tmp_path)
    cost = (rounded - theirs).square().mean().sqrt()
    assert cost > 1e-3
    assert (again - rounded).square().mean().sqrt() < 1.6 * cost


MIXTURES = {
    "by layer": lambda name: "int4-g128-zp" if "layers.0" in name else "int8",
    "by role": lambda name: "fp8" if "mlp" in name else "int3-g64",
    "some dense": lambda name: None if "down_proj" in name else "int4-g32",
    "head too": lambda name: "int8" if name == "lm_head" else "int4-g64",
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixtures(mixture, tmp_path):
    found = export(tmp_path, tiny_config("qwen3"), MIXTURES[mixture], head=mixture == "head too")
    config = found.config["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert len(config["config_groups"]) == (1 if mixture == "some dense" else 2)
    plan = found.plan
    for layer in range(2):
        for role, module in (("qkv", "self_attn.q_proj"), ("down", "mlp.down_proj")):
            held = plan.exceptions.get(f"{layer}:{role}") or plan.exceptions.get(role) or plan.default
            assert held == (MIXTURES[mixture](f"model.layers.{layer}.{module}") or "fp32")
    theirs = oracle_logits(tmp_path) if mixture != "by layer" else dense_logits(found, TOKENS)
    assert (logits(found.ours(), TOKENS) - theirs).abs().max() < 1e-4


def test_tied_head_stays_dense(tmp_path):
    found = export(tmp_path, tiny_config(tied=True), lambda _: "int4-g64")
    assert "lm_head" in found.config["quantization_config"]["ignore"]
    assert (logits(found.ours(), TOKENS) - oracle_logits(tmp_path)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["nf4-plain", "nf4"])
def test_what_they_have_no_word_for_is_our_own_convention(name, tmp_path):
    found = export(tmp_path, tiny_config(), lambda module: name if "mlp" in module else "int4-g64-zp")
    assert found.config["quantization_config"]["quant_method"] == "tradespace"
    model = found.ours()
    for layer in range(2):
        for role, parts in {"ffn.gate_up": ("mlp.gate_proj", "mlp.up_proj"), "ffn.down": ("mlp.down_proj",), "attn.out": ("self_attn.o_proj",)}.items():
            weight = weight_of(model, f"layers.{layer}.{role}")
            need = torch.cat([found.values[f"model.layers.{layer}.{part}"] for part in parts])
            assert torch.equal(weight.dense_rows(0, len(need)), need)
    # gate and up were nested each for itself: together they keep plain scales
    assert weight_of(model, "layers.0.ffn.gate_up").fmt.name == "nf4-plain"
    assert weight_of(model, "layers.0.ffn.down").fmt.name == name


def test_a_nested_matrix_written_in_parts_comes_back_nested(tmp_path):
    """q, k, v cut out of one matrix whose scales were quantized together: the same 4.127 bits again."""
    config = tiny_config()
    sizes = {"q_proj": 256, "k_proj": 128, "v_proj": 128}
    whole = draw_codes("nf4", 512, 256, 3)

    def store(name, codes, shape):
        part = name.rpartition(".")[2]
        if part not in sizes:
            return export_tensors(name, "nf4", codes, shape)
        start = list(sizes).index(part) and (256 if part == "k_proj" else 384)
        return export_tensors(name, "nf4", whole[start : start + sizes[part]], shape)

    quantization = quantization_config(dict.fromkeys(linear_modules(tiny_model(config)), "nf4"))
    found = write_checkpoint(tmp_path, config, lambda _: "nf4", store, quantization)
    assert found.plan.exceptions.get("qkv", found.plan.default) == "nf4"
    weight = weight_of(found.ours(), "layers.0.attn.qkv")
    again = weight.get_rows(0, 512)
    assert torch.equal(again.nested_RG, whole.nested_RG) and torch.equal(again.scale_RG, whole.scale_RG) and again.offset == whole.offset
    assert torch.equal(decode("nf4", again), decode("nf4", whole))


def test_widths_that_are_no_whole_groups_are_refused_by_name():
    codes = draw_codes("int4-g128", 8, 576, 0)
    with pytest.raises(UnsupportedError, match=r"m: .*group_size 128 must divide the width 576. Use groups that do"):
        export_tensors("m", "int4-g128", codes, (8, 576))
    with pytest.raises(UnsupportedError, match="block_structure 128x128 must divide the width 576"):
        export_tensors("m", "fp8-block", draw_codes("fp8-block", 8, 576, 0), (8, 576))
    blocks = draw_codes("fp8-block", 256, 128, 0)
    with pytest.raises(UnsupportedError, match=r"straddle.*block_structure"):
        export_tensors("m", "fp8-block", blocks[64:192], (128, 128))


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_embedding_is_our_own_convention(tied, tmp_path):
    """transformers cannot build an embedding from packed codes; we look rows up in it, and multiply with it where it is the head as well."""
    config = tiny_config(tied=tied)
    model = tiny_model(config)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "model.embed_tokens.weight" and not (tied and name == "lm_head.weight")}
    codes = draw_codes("int8", V, 256, 5)
    formats = dict.fromkeys(linear_modules(model), "fp32") | {"model.embed_tokens": "int8"}
    quantization = quantization_config(formats)
    assert quantization["quant_method"] == "tradespace"
    save(tmp_path, config, tensors | export_tensors("model.embed_tokens", "int8", codes, (V, 256)), quantization)
    found = Checkpoint(tmp_path, {"model.embed_tokens": decode("int8", codes)})
    assert found.plan.exceptions["embed"] == "int8"
    model.model.embed_tokens.weight.data.copy_(decode("int8", codes))
    with torch.inference_mode():
        assert (logits(found.ours(), TOKENS) - model(TOKENS[None]).logits[0]).abs().max() < 1e-4


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 6), st.sampled_from([2, 3, 4]), st.integers(0, 2**31))
def test_packing_is_theirs_for_any_shape(columns, rows, bits, seed):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    from tradespace.loading.checkpoint_tensors import pack_words, unpack_words

    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    signed = (codes.short() - 2 ** (bits - 1)).to(torch.int8)
    packed = pack_words(codes, bits)
    assert torch.equal(packed, pack_to_int32(signed, bits))
    assert torch.equal(unpack_words(packed, bits, columns), codes)
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), signed)


def test_their_version_is_one_that_packs_three_bits_densely():
    assert tuple(int(part) for part in compressed_tensors.__version__.split(".")[:2]) >= (0, 14)


def test_build_fp32_keeps_formats(tmp_path):
    found = export(tmp_path, tiny_config(), lambda _: "int2-g32")
    assert build_fp32(found.spec, found.plan).get_submodule("layers.0.attn.out").fmt.name == "int2-g32"
