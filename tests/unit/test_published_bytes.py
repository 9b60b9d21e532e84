"""The bytes of a checkpoint by its config: formats, the lists of what stays as it is in three dialects, and what is not understood."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tradespace.spec.families import model_spec_from_config
from tradespace.spec.tensors import QUANTIZABLE_ROLES, model_tensors, num_parameters

D, F, L, V, N, K, H = 256, 512, 2, 1000, 4, 2, 64
DENSE = {"model_type": "qwen3", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": N, "num_key_value_heads": K}
DENSE |= {"head_dim": H, "vocab_size": V, "max_position_embeddings": 2048, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
QKV, OUT, WIDE, DOWN = (N + 2 * K) * H * D, D * N * H, 2 * F * D, D * F  # elements of a layer's matrices
LINEAR = L * (QKV + OUT + WIDE + DOWN)
REST = 2 * V * D + L * (2 * D + 2 * H) + D  # embedding, head, norms
NVFP4 = {"weights": {"num_bits": 4, "group_size": 16, "type": "float"}, "targets": ["Linear"]}
MATRICES = L * (3 + 1 + 2 + 1)


def nbytes(**settings: Any) -> int | None:
    model = model_spec_from_config(DENSE | {"quantization_config": settings}, "m")
    assert num_parameters(model) == LINEAR + REST
    return model.published_bytes


def modelopt(*ignore: str) -> int | None:
    return nbytes(quant_method="modelopt", quant_algo="NVFP4", config_groups={"group_0": NVFP4}, ignore=list(ignore))


def test_fp8_in_blocks():
    scales = L * sum(-(-rows // 128) * (columns // 128) for rows, columns in ((512, D), (D, 256), (2 * F, D), (D, F)))
    assert nbytes(quant_method="fp8", weight_block_size=[128, 128]) == LINEAR + 4 * scales + 2 * REST


def test_nvfp4_and_its_head():
    coded = LINEAR // 2 + LINEAR // 16 + 8 * MATRICES
    assert modelopt("lm_head") == coded + 2 * REST
    assert modelopt() == coded + 2 * (REST - V * D) + V * D // 2 + V * D // 16 + 8  # a head that the list does not leave out is a matrix like the others


@pytest.mark.parametrize(
    "entries",
    [
        ["model.layers.0.self_attn*", "model.layers.1.self_attn*"],
        ["*.self_attn.*"],
        ["re:.*self_attn.*"],
        [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(L) for name in "qkvo"],
        ["self_attn"],
        ["model.language_model.layers.0.self_attn*", "model.language_model.layers.1.self_attn*"],
    ],
)
def test_what_stays_as_it_is_in_every_dialect(entries):
    kept = L * (QKV + OUT)
    ffn = LINEAR - kept
    assert modelopt("lm_head", *entries) == ffn // 2 + ffn // 16 + 8 * L * 3 + 2 * kept + 2 * REST


def test_groups_that_name_their_modules():
    wide = [f"model.layers.{layer}.mlp.{name}_proj" for layer in range(L) for name in ("gate", "up", "down")]
    eight = {"weights": {"num_bits": 8, "type": "float"}, "targets": ["re:.*self_attn.*"]}
    found = nbytes(quant_method="modelopt", quant_algo="MIXED_PRECISION", config_groups={"a": eight, "b": NVFP4 | {"targets": wide}}, ignore=[])
    ffn = L * (WIDE + DOWN)
    assert found == L * (QKV + OUT) + 8 * L * 4 + ffn // 2 + ffn // 16 + 8 * L * 3 + 2 * REST


def test_packed_integers():
    weights = {"num_bits": 4, "group_size": 32, "type": "int", "symmetric": True, "strategy": "group"}
    found = nbytes(
        quant_method="compressed-tensors", format="pack-quantized", config_groups={"a": {"weights": weights, "targets": ["Linear"]}}, ignore=["lm_head"]
    )
    assert found == LINEAR // 2 + 2 * LINEAR // 32 + 16 * MATRICES + 2 * REST


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "modelopt", "config_groups": {"a": {"weights": {"num_bits": 6, "type": "float"}}}},
        {"quant_method": "modelopt", "config_groups": {"a": None}},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": "lm_head"},
    ],
)
def test_what_is_not_understood_is_unknown(settings):
    assert nbytes(**settings) is None


def test_a_config_without_quantization_names_no_bytes():
    assert model_spec_from_config(DENSE, "m").published_bytes is None


@given(st.sets(st.sampled_from([f"model.layers.{layer}.{part}" for layer in range(L) for part in ("self_attn", "mlp", "mlp.down_proj")])))
def test_leaving_more_out_never_takes_less(entries):
    least, found = modelopt("lm_head"), modelopt("lm_head", *entries)
    assert least is not None and found is not None and least <= found <= 2 * (LINEAR + REST)
    coded = [tensor for tensor in model_tensors(model_spec_from_config(DENSE, "m")) if tensor.role in QUANTIZABLE_ROLES]
    assert coded
