"""fp8 checkpoints with scales per 128 x 128, as DeepSeek and Qwen publish them: the values that transformers dequantizes, its logits, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from loading.quantized_models import Checkpoint, V, dense_logits, logits, tiny_config, weight_of, write_checkpoint
from tradespace.errors import BudgetError, CorruptFileError, UnsupportedError
from tradespace.formats import Codes
from tradespace.loading.quantized import stored_formats
from tradespace.spec.families import model_spec_from_config

TOKENS = torch.arange(0, 40) * 5 % V


def config_of(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]} | changes


def store(name: str, codes: Codes, shape: tuple[int, int]) -> dict[str, Tensor]:
    return {f"{name}.weight": codes.codes_RC, f"{name}.weight_scale_inv": codes.need_scale()[::128]}


def store_powers(name: str, codes: Codes, shape: tuple[int, int]) -> dict[str, Tensor]:
    return {f"{name}.weight": codes.codes_RC, f"{name}.weight_scale_inv": codes.need_scale()[::128].to(torch.float8_e8m0fnu)}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Checkpoint:
    return write_checkpoint(tmp_path_factory.mktemp("fp8"), tiny_config("qwen3"), lambda _: "fp8-block", store, config_of())


def test_values_and_logits(found):
    model = found.ours()
    q, k, v = (found.values[f"model.layers.0.self_attn.{part}_proj"] for part in "qkv")
    for name, need in (("attn.qkv", torch.cat([q, k, v])), ("ffn.down", found.values["model.layers.0.mlp.down_proj"])):
        weight = weight_of(model, f"layers.0.{name}")
        assert weight.fmt.name == "fp8-block"
        assert torch.equal(weight.dense_rows(0, len(need)), need)
    assert (logits(model, TOKENS) - dense_logits(found, TOKENS)).abs().max() < 1e-4
    assert any("unquantized activations" in note for note in found.load(model))


@torch.no_grad()
def test_transformers_dequantizes_to_the_same_logits(found):
    quantization = transformers.FineGrainedFP8Config(dequantize=True)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        found.folder, quantization_config=quantization, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert (logits(found.ours(), TOKENS) - oracle(TOKENS[None]).logits[0]).abs().max() < 1e-4


def test_blocks_that_straddle_q_k_v_are_held_as_floats(tmp_path):
    """Heads of 64: v begins at row 320, in the middle of a block of ours."""
    found = write_checkpoint(tmp_path, tiny_config("qwen3", kv_heads=1), lambda _: "fp8-block", store, config_of())
    plan = found.plan
    assert (plan.default, plan.exceptions["qkv"]) == ("fp8-block", "fp32")
    assert (logits(found.ours(), TOKENS) - dense_logits(found, TOKENS)).abs().max() < 1e-4


def test_scales_that_are_powers_of_two_in_one_byte(tmp_path):
    def powers(*args) -> Codes:
        from loading.quantized_models import draw_codes

        codes = draw_codes(*args)
        return Codes(codes.codes_RC, 2.0 ** codes.need_scale().log2().round())

    found = write_checkpoint(tmp_path, tiny_config("qwen3"), lambda _: "fp8-block", store_powers, config_of(scale_fmt="ue8m0"), draw=powers)
    assert torch.equal(weight_of(found.ours(), "layers.1.attn.out").dense_rows(0, 256), found.values["model.layers.1.self_attn.o_proj"])


def test_staging_that_cannot_hold_a_row_is_a_budget_error(found):
    with pytest.raises(BudgetError, match=r"one row of .* codes needs .* of staging"):
        found.ours(staging_bytes=1200)


def test_a_scale_of_another_shape_is_corrupt(tmp_path):
    def wrong(name: str, codes: Codes, shape: tuple[int, int]) -> dict[str, Tensor]:
        return store(name, codes, shape) | {f"{name}.weight_scale_inv": codes.need_scale()}

    found = write_checkpoint(tmp_path, tiny_config("qwen3"), lambda _: "fp8-block", wrong, config_of())
    with pytest.raises(CorruptFileError, match=r"weight_scale_inv.* must be \[2, 2\] as F32"):
        found.ours()


FIELDS: dict[str, tuple[Any, ...]] = {
    "fmt": ("e5m2", 4),
    "activation_scheme": ("static", 1),
    "weight_block_size": ([64, 128], 128, "128x128"),
    "scale_fmt": ("bf16",),
    "expert_dtype": ("fp4",),
    "dequantize": (True,),
    "modules_to_convert": (["embed_tokens"],),
    "modules_to_not_convert": ("lm_head", [1]),
    "extra": (True,),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values])
def test_a_field_that_cannot_be_honoured_is_named(field, value):
    config = tiny_config().to_dict() | {"quantization_config": config_of() | {field: value}}
    with pytest.raises(UnsupportedError, match=rf"quantization_config.{field}"):
        stored_formats(config, model_spec_from_config(config, "tiny"))
