"""GPTQ checkpoints: packed here word by word as the published layout says, read back as those codes; act-order, both conventions of zero points, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loading.quantized_models import Checkpoint, D, F, build_fp32, draw_codes, tiny_config, weight_of, write_checkpoint
from tradespace.errors import CorruptFileError, UnsupportedError
from tradespace.formats import Codes
from tradespace.loading.quantized import load_quantized, stored_formats
from tradespace.quantize.rtn import fill_rtn
from tradespace.spec.families import model_spec_from_config
from tradespace.spec.weights import WeightPlan


def config_of(bits: int, group: int, **changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": True, "true_sequential": True, "damp_percent": 0.01} | changes


def pack_down(numbers_NC: np.ndarray, bits: int) -> Tensor:
    """Numbers packed along their first axis, one bit after another: (N, C) → int32 (N · bits / 32, C)."""
    words = np.zeros((len(numbers_NC) * bits // 32, numbers_NC.shape[1]), dtype=np.uint32)
    for row, line in enumerate(numbers_NC.astype(np.uint32)):
        for bit in range(bits):
            place = row * bits + bit
            words[place // 32] |= ((line >> np.uint32(bit)) & np.uint32(1)) << np.uint32(place % 32)
    return torch.from_numpy(words.view(np.int32).copy())


def store(bits: int, group: int, *, v2: bool = False, order: Tensor | None = None):
    """A function that writes a module's codes; `order` scatters the columns: stored column i is column order[i]'s codes, with that one's group."""

    def write(name: str, codes: Codes, shape: tuple[int, int]) -> dict[str, Tensor]:
        values_RC, (rows, columns) = codes.codes_RC.numpy(), shape
        width = columns if group == -1 else group
        if bits == 8:
            values_RC = values_RC.astype(np.int16) + 128
        zeros_RG = np.full((rows, -(-columns // width)), 2 ** (bits - 1)) if codes.zero_RG is None else codes.zero_RG.numpy()
        scale = codes.need_scale()
        if group == -1:
            zeros_RG, scale = zeros_RG[:, :1], scale[:, :1]
        elif group == 96:
            scale = scale[:, ::3]
        index = torch.arange(columns, dtype=torch.int32) // width
        if order is not None:
            index, values_RC = index[order[:columns]], values_RC[:, order[:columns].numpy()]
        return {
            f"{name}.qweight": pack_down(values_RC.T, bits),
            f"{name}.qzeros": pack_down(zeros_RG - (0 if v2 else 1), bits).T.contiguous(),
            f"{name}.scales": scale.T if bits == 8 else scale.T.half(),
            f"{name}.g_idx": index,
        }

    return write


def checkpoint(folder, fmt: str, bits: int, group: int, *, v2: bool = False, draw: Callable[..., Codes] = draw_codes, **changes: Any) -> Checkpoint:
    return write_checkpoint(folder, tiny_config(), lambda _: fmt, store(bits, group, v2=v2), config_of(bits, group, **changes), draw=draw)


def assert_holds(found: Checkpoint, fmt: str) -> None:
    model = found.ours()
    q, k, v = (found.values[f"model.layers.0.self_attn.{part}_proj"] for part in "qkv")
    for name, need in (("attn.qkv", torch.cat([q, k, v])), ("ffn.down", found.values["model.layers.0.mlp.down_proj"])):
        weight = weight_of(model, f"layers.0.{name}")
        assert weight.fmt.name == fmt
        assert torch.equal(weight.dense_rows(0, len(need)), need)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_symmetric(bits, group, tmp_path):
    assert_holds(checkpoint(tmp_path, f"int{bits}-g{group}", bits, group), f"int{bits}-g{group}")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_of_the_second_convention(bits, tmp_path):
    fmt = f"int{bits}-g64-zp"
    assert_holds(checkpoint(tmp_path, fmt, bits, 64, v2=True, sym=False, checkpoint_format="gptq_v2"), fmt)


def test_zero_points_of_the_first_convention(tmp_path):
    """One less is stored than is meant; a zero point of 0 has no place there."""

    def positive(*args) -> Codes:
        codes = draw_codes(*args)
        assert codes.zero_RG is not None
        return Codes(codes.codes_RC, codes.scale_RG, codes.zero_RG.clamp(min=1))

    assert_holds(checkpoint(tmp_path, "int4-g64-zp", 4, 64, draw=positive, sym=False), "int4-g64-zp")


def test_a_zero_point_beyond_the_codes_is_refused(tmp_path):
    found = checkpoint(tmp_path, "int4-g64-zp", 4, 64, v2=True, sym=False)  # written as the second convention, read as the first
    with pytest.raises(UnsupportedError, match="checkpoint_format"):
        found.ours()


def test_symmetric_is_checked(tmp_path):
    found = checkpoint(tmp_path, "int4-g64-zp", 4, 64, v2=True, sym=True, checkpoint_format="gptq_v2")
    with pytest.raises(CorruptFileError, match="sym is true"):
        found.ours()


def test_large_groups_and_whole_rows_are_repeated(tmp_path):
    def whole(*args) -> Codes:
        codes = draw_codes(*args)
        return Codes(codes.codes_RC, codes.need_scale()[:, :1].expand(-1, codes.need_scale().shape[1]).contiguous())

    assert_holds(checkpoint(tmp_path / "row", "int4-g128", 4, -1, draw=whole), "int4-g128")
    assert_holds(checkpoint(tmp_path / "large", "int4-g32", 4, 96, draw=in_threes, group_size=96), "int4-g32")
    assert_holds(checkpoint(tmp_path / "eight", "int8", 8, -1), "int8")


def in_threes(*args) -> Codes:
    """Three of our groups of 32 with one scale, as a group of 96 has it; the last one of a row is short."""
    codes = draw_codes(*args)
    scale = codes.need_scale()
    return Codes(codes.codes_RC, scale[:, ::3].repeat_interleave(3, dim=1)[:, : scale.shape[1]])


@pytest.mark.parametrize("bits", [3, 4])
def test_act_order_is_held_as_floats_and_says_so(bits, tmp_path):
    order = torch.randperm(D, generator=torch.Generator().manual_seed(1))
    fmt = f"int{bits}-g64"
    longer = torch.cat([order, torch.arange(D, F)])  # of the down projection

    def scattered(name, codes, shape):
        return store(bits, 64, order=order if shape[1] == D else longer)(name, codes, shape)

    found = write_checkpoint(tmp_path, tiny_config(), lambda _: fmt, scattered, config_of(bits, 64, desc_act=True))
    assert stored_formats(found.config, found.spec) == WeightPlan(default="fp32"), "without its files, act-order is taken at its word"
    plan = found.plan
    assert (plan.default, plan.exceptions) == ("fp16", {"embed": "fp32", "lm_head": "fp32"})
    model = build_fp32(found.spec, plan)
    notes = found.load(model)
    assert any("act-order" in note for note in notes)
    need = found.values["model.layers.1.mlp.gate_proj"][:, order].half()
    held = weight_of(model, "layers.1.ffn.gate_up")
    assert held.weight.dtype == torch.float16
    assert torch.equal(held.dense_rows(0, 384), need)


def test_act_order_with_columns_in_place_is_held_as_codes(tmp_path):
    assert_holds(checkpoint(tmp_path, "int4-g64", 4, 64, desc_act=True), "int4-g64")


def test_q_k_v_of_different_kinds_are_held_as_floats(tmp_path):
    """`modules_in_block_to_quantize` leaves v alone: the matrix that holds all three is dense."""
    only = [["self_attn.k_proj", "self_attn.q_proj"], ["mlp.up_proj", "mlp.gate_proj"], ["mlp.down_proj"]]
    writer = store(4, 64)
    named = [part for group in only for part in group]
    found = write_checkpoint(
        tmp_path,
        tiny_config(),
        lambda name: "int4-g64" if name.endswith(tuple(named)) else None,
        writer,
        config_of(4, 64, modules_in_block_to_quantize=only),
    )
    plan = found.plan
    assert (plan.exceptions["qkv"], plan.exceptions["attn_out"], plan.default) == ("fp32", "fp32", "int4-g64")
    model = found.ours()
    assert torch.equal(weight_of(model, "layers.1.attn.qkv").dense_rows(0, 256), found.values["model.layers.1.self_attn.q_proj"])


FIELDS: dict[str, tuple[Any, ...]] = {
    "bits": (5, "4", None, 4.0, True),
    "group_size": (0, 100, -2, "128", 16),
    "desc_act": (1, "yes"),
    "sym": (0, "true"),
    "checkpoint_format": ("gptq_v3", 2, "marlin"),
    "format": ("gptq_v2",),
    "lm_head": ("yes",),
    "dynamic": ({"+:.*": {"bits": 8}},),
    "pack_dtype": ("int16",),
    "is_marlin_format": (True,),
    "modules_in_block_to_quantize": ("all", [3]),
    "new_field": (1, False),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values])
def test_a_field_that_cannot_be_honoured_is_named(field, value):
    config = tiny_config().to_dict() | {"quantization_config": config_of(4, 64, checkpoint_format="gptq") | {field: value}}
    spec = model_spec_from_config(config, "tiny")
    with pytest.raises(UnsupportedError, match=rf"quantization_config.({field}|checkpoint_format)"):
        stored_formats(config, spec)


def test_parts_are_checked(tmp_path):
    found = checkpoint(tmp_path, "int4-g64", 4, 64)
    wrong = found.config | {"quantization_config": config_of(3, 64)}
    with pytest.raises(CorruptFileError, match=r"qweight.*must be"):
        load_quantized(build_fp32(found.spec, found.plan), found.source, found.spec, config=wrong, fill=fill_rtn, staging_bytes=1 << 20)
