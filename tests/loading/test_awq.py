"""AWQ checkpoints in AutoAWQ's order of nibbles: packed here, converted by compressed-tensors' own converter as the oracle, and read back as the very codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loading.quantized_models import draw_codes, tiny_config, weight_of, write_checkpoint
from tradespace.errors import CorruptFileError, UnsupportedError
from tradespace.formats import Codes, decode
from tradespace.loading.quantized import stored_formats
from tradespace.spec.families import model_spec_from_config

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def config_of(group: int = 64, **changes: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm", "modules_to_not_convert": None} | changes


def pack_across(numbers_NR: Tensor) -> Tensor:
    """Eight rows to a word: nibble i holds row ORDER[i]."""
    words = torch.zeros(numbers_NR.shape[0], numbers_NR.shape[1] // 8, dtype=torch.int64)
    for nibble, row in enumerate(ORDER):
        words |= numbers_NR[:, row::8].long() << 4 * nibble
    return torch.where(words >= 2**31, words - 2**32, words).int()


def store(name: str, codes: Codes, shape: tuple[int, int]) -> dict[str, Tensor]:
    assert codes.zero_RG is not None
    parts = {"qweight": pack_across(codes.codes_RC.T), "qzeros": pack_across(codes.zero_RG.T), "scales": codes.need_scale().T.half()}
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def test_the_packing_here_is_the_published_one():
    pytest.importorskip("compressed_tensors", reason="the oracle compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationScheme

    codes = draw_codes("int4-g64-zp", 64, 128, 3)
    converter = AutoAWQConverter(group_size=64)
    found = {name.removeprefix("model.m."): tensor for name, tensor in converter.process(store("model.m", codes, (64, 128))).items()}
    found["weight_scale"] = found["weight_scale"].float()
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 64}})
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").decompress(found, scheme)["weight"]
    assert torch.equal(theirs, decode("int4-g64-zp", codes))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_codes_come_back(group, tmp_path):
    fmt = f"int4-g{group}-zp"
    found = write_checkpoint(tmp_path, tiny_config("qwen2"), lambda _: fmt, store, config_of(group))
    model = found.ours()
    q, k, v = (found.values[f"model.layers.0.self_attn.{part}_proj"] for part in "qkv")
    for name, need in (("attn.qkv", torch.cat([q, k, v])), ("ffn.down", found.values["model.layers.0.mlp.down_proj"])):
        weight = weight_of(model, f"layers.0.{name}")
        assert weight.fmt.name == fmt
        assert torch.equal(weight.dense_rows(0, len(need)), need)


def test_a_chunk_may_begin_within_a_word(tmp_path):
    found = write_checkpoint(tmp_path, tiny_config(), lambda _: "int4-g64-zp", store, config_of())
    # 13 rows of the down projection at a time
    model = found.ours(staging_bytes=13 * (12 * 384 + 16 * 6))
    need = found.values["model.layers.0.mlp.down_proj"]
    assert torch.equal(weight_of(model, "layers.0.ffn.down").dense_rows(0, len(need)), need)


def test_modules_that_were_left_alone(tmp_path):
    left = ["down_proj", "model.layers.1.self_attn"]
    skipped = ("down_proj", "layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj", "layers.1.self_attn.v_proj", "layers.1.self_attn.o_proj")
    found = write_checkpoint(
        tmp_path, tiny_config(), lambda name: None if name.endswith(skipped) else "int4-g64-zp", store, config_of(modules_to_not_convert=left)
    )
    plan = found.plan
    assert plan.default == "int4-g64-zp"
    assert {key: name for key, name in plan.exceptions.items() if ":" in key or key == "down"} == {"down": "fp32", "1:qkv": "fp32", "1:attn_out": "fp32"}
    found.ours()


def test_a_module_that_the_files_lack_is_missed(tmp_path):
    found = write_checkpoint(tmp_path, tiny_config(), lambda name: None if name.endswith("up_proj") else "int4-g64-zp", store, config_of())
    with pytest.raises(CorruptFileError, match=r"up_proj.qweight.*missing"):
        found.ours()


FIELDS: dict[str, tuple[Any, ...]] = {
    "bits": (8, "4", None),
    "group_size": (0, 48, -2),
    "zero_point": (False, 1),
    "version": ("gemv", "marlin", 1),
    "backend": ("llm-awq",),
    "modules_to_not_convert": ("lm_head", [3], ["re:.*"]),
    "desc_act": (True,),
    "surprise": ({},),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values])
def test_a_field_that_cannot_be_honoured_is_named(field, value):
    config = tiny_config().to_dict() | {"quantization_config": config_of() | {field: value}}
    with pytest.raises(UnsupportedError, match=rf"quantization_config.{field}"):
        stored_formats(config, model_spec_from_config(config, "tiny"))
