"""Loading what is quantized already, whatever the convention: within its staging, whole or not at all, into other formats, and out to GGUF again."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from loading import test_awq, test_fp8_blocks, test_gptq
from loading.quantized_models import (
    Checkpoint,
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
from loading.test_dequantize_rows import allocator_peak_bytes
from tradespace.errors import CorruptFileError, InputError, UnsupportedError
from tradespace.formats import Codes, decode
from tradespace.formats.quantized import DECODE_BYTES_PER_ELEMENT
from tradespace.loading.compressed_tensors import export_tensors, quantization_config
from tradespace.loading.quantized import checkpoint_rows, load_quantized, read_convention, stored_formats
from tradespace.quantize.rtn import fill_rtn, round_to_nearest
from tradespace.spec.families import model_spec_from_config
from tradespace.spec.weights import WeightPlan

FORMATS = ("int4-g64-zp", "int3-g32", "int8", "int8-tensor", "w8a8", "fp8", "fp8-block", "nf4", "nf4-plain")
TOKENS = torch.arange(40) * 3 % 97


def ours(folder, fmt: str, config=None) -> Checkpoint:
    config = config or tiny_config()
    formats = dict.fromkeys(linear_modules(tiny_model(config)), fmt)
    return write_checkpoint(folder, config, lambda _: fmt, lambda name, codes, shape: export_tensors(name, fmt, codes, shape), quantization_config(formats))


def made(name: str, folder) -> Checkpoint:
    if name == "gptq":
        return test_gptq.checkpoint(folder, "int4-g64", 4, 64)
    if name == "awq":
        return write_checkpoint(folder, tiny_config(), lambda _: "int4-g64-zp", test_awq.store, test_awq.config_of())
    if name == "fp8 blocks":
        return write_checkpoint(folder, tiny_config("qwen3"), lambda _: "fp8-block", test_fp8_blocks.store, test_fp8_blocks.config_of())
    if name == "act-order":
        order = torch.randperm(384, generator=torch.Generator().manual_seed(0))

        def scattered(module, codes, shape):
            return test_gptq.store(4, 64, order=order[order < shape[1]])(module, codes, shape)

        return write_checkpoint(folder, tiny_config(), lambda _: "int4-g64", scattered, test_gptq.config_of(4, 64, desc_act=True))
    return ours(folder, name)


@pytest.mark.parametrize("name", ["gptq", "awq", "fp8 blocks", "act-order", *FORMATS])
def test_reading_and_decoding_rows_takes_what_is_stated(name, tmp_path):
    found = made(name, tmp_path)
    module, shape = "model.layers.0.mlp.down_proj", (256, 384)
    stored = read_convention(found.config, found.spec, found.source).stored(module, shape, whole=[module])

    def read(count: int) -> None:
        stored.read(0, count)

    def decoded(count: int) -> None:
        codes = stored.read(0, count)
        assert not isinstance(codes, Codes) or len(decode(stored.fmt, codes)) == count

    read(1)  # tables of levels are made once
    decoded(1)
    for count in (32, 256):
        assert allocator_peak_bytes(lambda count=count: read(count)) <= count * (stored.row_bytes + 4 * 384)
        assert allocator_peak_bytes(lambda count=count: decoded(count)) <= count * (stored.row_bytes + (4 + DECODE_BYTES_PER_ELEMENT) * 384)


def test_loading_stays_within_its_staging(tmp_path):
    found = made("int8", tmp_path)
    model = build_fp32(found.spec, found.plan)
    assert allocator_peak_bytes(lambda: found.load(model, 128 << 10)) <= 128 << 10


@pytest.mark.parametrize("name", ["gptq", "awq", "fp8 blocks", *FORMATS])
def test_a_chunk_may_begin_at_any_row(name, tmp_path):
    found = made(name, tmp_path)
    need = found.ours(staging_bytes=4 << 20)
    again = found.ours(staging_bytes=91_000)
    for layer in ("layers.0.attn.qkv", "layers.1.ffn.down", "layers.0.ffn.gate_up"):
        rows = weight_of(need, layer).shape[0]
        assert torch.equal(weight_of(need, layer).dense_rows(0, rows), weight_of(again, layer).dense_rows(0, rows))


@pytest.mark.parametrize("fmt", ["int4-g64-zp", "nf4", "fp8"])
def test_another_format_than_the_stored_one_is_the_plans_choice(fmt, tmp_path):
    found = ours(tmp_path, fmt)
    model = found.ours(WeightPlan(default="int8"))
    weight = weight_of(model, "layers.0.ffn.down")
    assert weight.fmt.name == "int8"
    need = found.values["model.layers.0.mlp.down_proj"]
    assert (weight.dense_rows(0, len(need)) - need).abs().max() <= need.abs().max() / 127
    exact = found.ours(WeightPlan(default="fp32"))
    assert (logits(exact, TOKENS) - dense_logits(found, TOKENS)).abs().max() < 1e-4


@pytest.mark.parametrize("fmt", FORMATS)
def test_progress_ends_at_the_whole(fmt, tmp_path):
    found, seen = ours(tmp_path, fmt), []
    load_quantized(
        build_fp32(found.spec, found.plan),
        found.source,
        found.spec,
        config=found.config,
        fill=fill_rtn,
        staging_bytes=1 << 20,
        progress=lambda done, of: seen.append((done, of)),
    )
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == sum(tensor.nbytes for tensor in found.source.tensors.values())


def changed(found: Checkpoint, folder, change) -> Checkpoint:
    tensors = load_file(found.folder / "model.safetensors")
    change(tensors)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(found.config))
    return Checkpoint(folder, found.values)


DOWN = "model.layers.1.mlp.down_proj"
DAMAGES = {
    "missing": (lambda t: t.pop(f"{DOWN}.weight_scale"), CorruptFileError, r"down_proj\.weight_scale.*is missing"),
    "shape": (lambda t: t.update({f"{DOWN}.weight_scale": torch.ones(5, 6)}), CorruptFileError, r"weight_scale.*must be \[256, 6\]"),
    "dtype": (lambda t: t.update({f"{DOWN}.weight_packed": t[f"{DOWN}.weight_packed"].float()}), CorruptFileError, "must be .* as I32"),
    "surplus": (lambda t: t.update({f"{DOWN}.weight_g_idx": torch.zeros(384, dtype=torch.int32)}), CorruptFileError, "weight_g_idx"),
    "said shape": (lambda t: t[f"{DOWN}.weight_shape"].fill_(7), CorruptFileError, r"weight_shape says \[7, 7\]"),
    "NaN": (lambda t: t[f"{DOWN}.weight_scale"][3].fill_(float("nan")), InputError, "scale is NaN or infinite"),
    "infinity": (lambda t: t[f"{DOWN}.weight_scale"][3].fill_(float("inf")), InputError, "scale is NaN or infinite"),
    "plain": (lambda t: t.update({f"{DOWN}.weight": torch.zeros(256, 384)}), CorruptFileError, r"down_proj\.weight'.*no such tensor"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named(case, tmp_path):
    damage, error, message = DAMAGES[case]
    found = ours(tmp_path / "whole", "int4-g64-zp")
    with pytest.raises(error, match=message):
        changed(found, tmp_path / "damaged", damage).ours()


def test_nan_codes_of_fp8_are_named(tmp_path):
    found = ours(tmp_path / "whole", "fp8")
    with pytest.raises(InputError, match=r"down_proj.*holds NaN"):
        changed(found, tmp_path / "damaged", lambda t: t[f"{DOWN}.weight"].view(torch.uint8)[3].fill_(0xFF)).ours()


def _scaled(dtype: torch.dtype, factor: float):
    def store(name, codes, shape):
        found = export_tensors(name, "int4-g64", codes, shape)
        found[f"{name}.weight_scale"] = (codes.need_scale() * factor).to(dtype)
        return found

    return store


def test_scales_in_bf16_and_fp32_that_fp16_can_hold(tmp_path):
    quantization = quantization_config(dict.fromkeys(linear_modules(tiny_model(tiny_config())), "int4-g64"))

    def coarse(*args):
        codes = draw_codes(*args)
        return Codes(codes.codes_RC, codes.need_scale().bfloat16().float())

    for dtype in (torch.bfloat16, torch.float32):
        found = write_checkpoint(tmp_path / str(dtype), tiny_config(), lambda _: "int4-g64", _scaled(dtype, 1.0), quantization, draw=coarse)
        need = found.values["model.layers.0.mlp.down_proj"]
        assert torch.equal(weight_of(found.ours(), "layers.0.ffn.down").dense_rows(0, 256), need)
    beyond = write_checkpoint(tmp_path / "beyond", tiny_config(), lambda _: "int4-g64", _scaled(torch.float32, 1.0 + 2**-15), quantization)
    with pytest.raises(UnsupportedError, match=r"weight_scale.*has no exact fp16 form"):
        beyond.ours()


def test_the_scale_of_weights_that_are_all_zero_does_not_matter(tmp_path):
    quantization = quantization_config(dict.fromkeys(linear_modules(tiny_model(tiny_config())), "int4-g64"))

    def store(name, codes, shape):
        found = export_tensors(name, "int4-g64", codes, shape)
        scale = codes.need_scale().clone()
        scale[:, 1] = 1e-12  # as a quantizer's epsilon has it
        return found | {f"{name}.weight_scale": scale}

    def zeros(*args):
        codes = draw_codes(*args)
        codes.codes_RC[:, 64:128] = 8
        return codes

    found = write_checkpoint(tmp_path, tiny_config(), lambda _: "int4-g64", store, quantization, draw=zeros)
    assert torch.equal(weight_of(found.ours(), "layers.0.ffn.down").dense_rows(0, 256), found.values["model.layers.0.mlp.down_proj"])


def test_transposed_matrices_are_refused(tmp_path):
    config = transformers.GPT2Config(vocab_size=97, n_embd=64, n_layer=1, n_head=2, n_positions=64)
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    values = config.to_dict() | {"quantization_config": quantization}
    spec = model_spec_from_config(values, "tiny")
    tensors = transformers.GPT2LMHeadModel(config).state_dict()
    save(tmp_path, config, {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}, quantization)
    found = Checkpoint(tmp_path, {})
    with pytest.raises(UnsupportedError, match=r"stored as \(in, out\)"):
        found.load(build_fp32(spec, WeightPlan(default="fp32")))


@pytest.mark.parametrize("fmt", ["q8_0", "q4_0", "q4_k", "e8"])
def test_blocks_in_our_own_convention(fmt, tmp_path):
    """Raw blocks of GGUF, and the lattice, in safetensors: the same codes again, and rows of them one by one."""
    config = tiny_config(hidden=512)
    formats = dict.fromkeys(linear_modules(tiny_model(config)), fmt)

    def draw(name, rows, columns, seed):
        return round_to_nearest(name, torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.06)

    found = write_checkpoint(
        tmp_path, config, lambda _: fmt, lambda name, codes, shape: export_tensors(name, fmt, codes, shape), quantization_config(formats), draw=draw
    )
    assert found.config["quantization_config"]["quant_method"] == "tradespace"
    assert stored_formats(found.config, found.spec).default == fmt
    weight = weight_of(found.ours(), "layers.0.ffn.gate_up")
    need = torch.cat([found.values[f"model.layers.0.mlp.{part}_proj"] for part in ("gate", "up")])
    torch.testing.assert_close(weight.dense_rows(0, 1024), need, rtol=0, atol=0 if fmt != "e8" else 1e-6)
    rows = checkpoint_rows(found.source, found.spec, found.config)
    within = rows("layers.0.ffn.gate_up.weight", 100, 150)
    across = rows("layers.0.ffn.gate_up.weight", 500, 530)
    assert isinstance(within, Codes) and isinstance(across, Codes)
    held = weight.get_rows(0, 1024)
    assert torch.equal(within.codes_RC, held.codes_RC[100:150]) and torch.equal(across.codes_RC, held.codes_RC[500:530])
    assert torch.equal(decode(fmt, across), decode(fmt, held[500:530]))
    norm = rows("layers.0.attn_norm.weight", 0, 256)
    assert torch.equal(norm, load_file(found.folder / "model.safetensors")["model.layers.0.input_layernorm.weight"])
