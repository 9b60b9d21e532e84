"""Checkpoints that bitsandbytes itself quantized and transformers saved, on the CPU: read back to the values that its own function dequantizes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from loading.quantized_models import Checkpoint, V, dense_logits, linear_modules, logits, tiny_config, tiny_model, weight_of
from tradespace.errors import UnsupportedError
from tradespace.loading.quantized import stored_formats
from tradespace.spec.families import model_spec_from_config

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the oracle bitsandbytes is not installed")
pytest.importorskip("accelerate", reason="transformers loads bitsandbytes checkpoints with accelerate, which is not installed")
TOKENS = torch.arange(0, 40) * 5 % V


def config_of(**changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
    } | changes


@pytest.fixture(scope="module", params=[True, False], ids=["nested", "plain"])
def saved(request, tmp_path_factory) -> tuple[Checkpoint, transformers.PreTrainedModel]:
    folder = tmp_path_factory.mktemp("bnb")
    tiny_model(tiny_config("qwen2")).save_pretrained(folder / "dense")
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=request.param, bnb_4bit_compute_dtype=torch.float32
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "dense", quantization_config=quantization, dtype=torch.float32, device_map="cpu", attn_implementation="eager"
    )
    values = {}
    for name, module in linear_modules(model).items():
        weight = module.weight
        values[name] = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).clone()
    assert len(values) == 14
    model.save_pretrained(folder / "quantized")
    return Checkpoint(folder / "quantized", values), model


def test_values_are_those_of_bitsandbytes(saved):
    found, _ = saved
    nested = found.config["quantization_config"]["bnb_4bit_use_double_quant"]
    model = found.ours()
    for layer in range(2):
        where = f"model.layers.{layer}"
        q, k, v = (found.values[f"{where}.self_attn.{part}_proj"] for part in "qkv")
        # q, k, v have an offset each: together they keep plain scales
        for name, fmt, need in (
            ("attn.qkv", "nf4-plain", torch.cat([q, k, v])),
            ("attn.out", "nf4" if nested else "nf4-plain", found.values[f"{where}.self_attn.o_proj"]),
            ("ffn.down", "nf4" if nested else "nf4-plain", found.values[f"{where}.mlp.down_proj"]),
        ):
            weight = weight_of(model, f"layers.{layer}.{name}")
            assert weight.fmt.name == fmt
            # a compiler may fuse the offset's addition: one rounding
            torch.testing.assert_close(weight.dense_rows(0, len(need)), need, rtol=3e-7, atol=0)
    # their own product rounds to 16 bits on a CPU that can; the values are what is compared
    assert (logits(model, TOKENS) - dense_logits(found, TOKENS)).abs().max() < 1e-4


def test_the_plan_without_the_files(saved):
    found, _ = saved
    nested = found.config["quantization_config"]["bnb_4bit_use_double_quant"]
    plan = stored_formats(found.config, found.spec)
    assert plan == found.plan
    assert {plan.exceptions.get(role, plan.default) for role in ("qkv", "gate_up")} == {"nf4-plain"}
    assert {plan.exceptions.get(role, plan.default) for role in ("attn_out", "down")} == {"nf4" if nested else "nf4-plain"}


def _rewritten(found: Checkpoint, folder, change) -> Checkpoint:
    tensors = load_file(found.folder / "model.safetensors")
    change(tensors)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(found.config))
    return Checkpoint(folder, {})


STATE = "model.layers.0.mlp.down_proj.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("field", "value"), [("blocksize", 128), ("quant_type", "fp4"), ("shape", [384, 256]), ("dtype", "int8"), ("news", 1), ("blocksize", "64")]
)
def test_the_state_beside_a_weight_is_read_to_the_letter(field, value, saved, tmp_path):
    def change(tensors):
        state = json.loads(bytes(tensors[STATE].tolist())) | {field: value}
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    with pytest.raises(UnsupportedError, match=rf"down_proj.weight.quant_state.{field}"):
        _rewritten(saved[0], tmp_path, change).ours()


def test_another_table_of_levels_is_refused(saved, tmp_path):
    def change(tensors):
        tensors["model.layers.0.mlp.down_proj.weight.quant_map"][3] += 0.01

    with pytest.raises(UnsupportedError, match=r"quant_map.*another table"):
        _rewritten(saved[0], tmp_path, change).ours()


FIELDS: dict[str, tuple[Any, ...]] = {
    "load_in_4bit": (False, 1),
    "load_in_8bit": (True,),
    "bnb_4bit_quant_type": ("fp4", None),
    "bnb_4bit_use_double_quant": ("yes",),
    "bnb_4bit_quant_storage": ("bfloat16",),
    "bnb_4bit_compute_dtype": ("float64", 3),
    "llm_int8_skip_modules": ("lm_head", [1]),
    "bnb_4bit_novelty": (1,),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values])
def test_a_field_that_cannot_be_honoured_is_named(field, value):
    config = tiny_config().to_dict() | {"quantization_config": config_of() | {field: value}}
    with pytest.raises(UnsupportedError, match=rf"quantization_config.{field}"):
        stored_formats(config, model_spec_from_config(config, "tiny"))


def test_a_skipped_module_that_is_quantized_is_a_contradiction(saved):
    found, _ = saved
    config = found.config
    config["quantization_config"]["llm_int8_skip_modules"] = ["down_proj"]
    with pytest.raises(UnsupportedError, match=r"llm_int8_skip_modules names model.layers.0.mlp.down_proj"):
        stored_formats(config, found.spec, found.source)
