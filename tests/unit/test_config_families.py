"""What each runnable family's config.json means: published values, by hand."""

import pytest

from tradespace.errors import InputError, UnsupportedError
from tradespace.spec.families import FAMILIES, RUNNABLE, model_spec_from_config
from tradespace.spec.mixers import Attention, Rope
from tradespace.spec.tensors import num_parameters
from unit.config_samples import FALCON, GEMMA2, GEMMA3, GPT2, LLAMA, MISTRAL, PHI3, QWEN2, QWEN3, SAMPLES, SMOLLM3

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def mixer(config: dict, layer: int = 0) -> Attention:
    found = model_spec_from_config(config, "m").layers[layer].mixer
    assert isinstance(found, Attention)
    return found


def rope(config: dict, layer: int = 0) -> Rope:
    found = mixer(config, layer).rope
    assert found is not None
    return found


@pytest.mark.parametrize("family", sorted(SAMPLES))
def test_every_runnable_family_has_a_sample_that_runs(family):
    model = model_spec_from_config(SAMPLES[family], "m")
    assert model.plan_only is None and model.family == family and family in RUNNABLE


def test_old_and_new_rope_forms_agree():
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}
    new = {key: value for key, value in LLAMA.items() if key != "rope_scaling"} | {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}}
    assert model_spec_from_config(old, "m") == model_spec_from_config(new, "m")
    scaling = rope(old).scaling
    assert scaling is not None and (scaling.kind, scaling.factor, scaling.original_context) == ("llama3", 8.0, 8192)


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_linear_and_dynamic_scaling_in_the_oldest_form(kind):
    scaling = rope(LLAMA | {"rope_scaling": {"type": kind, "factor": 2.0}}).scaling
    assert scaling is not None and (scaling.kind, scaling.factor, scaling.original_context) == (kind, 2.0, 4096)


def test_yarn_takes_its_factor_from_the_contexts_where_it_has_none():
    params = {"rope_type": "yarn", "original_max_position_embeddings": 1024, "attention_factor": 1.1, "truncate": False}
    scaling = rope(LLAMA | {"rope_scaling": params}).scaling
    assert scaling is not None
    assert (scaling.factor, scaling.original_context, scaling.attention_factor, scaling.truncate, scaling.beta_fast) == (4.0, 1024, 1.1, False, 32.0)


def test_longrope_under_its_first_name():
    scaling = rope(PHI3).scaling
    assert scaling is not None and (scaling.kind, scaling.factor, scaling.original_context) == ("longrope", 32.0, 4096)
    assert scaling.short_factor == (1.0,) * 48 and scaling.long_factor == (2.0,) * 48
    with pytest.raises(InputError, match=r"short_factor.*48 numbers"):
        model_spec_from_config(PHI3 | {"rope_scaling": PHI3["rope_scaling"] | {"short_factor": [1.0] * 47}}, "m")


def test_phi3_was_trained_at_4096_where_the_config_is_silent():
    silent = {key: value for key, value in PHI3.items() if key != "original_max_position_embeddings"}
    assert model_spec_from_config(silent, "m") == model_spec_from_config(PHI3, "m")


def test_gpt_oss_stretches_as_its_class_does_where_the_config_is_silent():
    config = {"model_type": "gpt_oss", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 4, "vocab_size": 5}
    scaling = rope(config).scaling
    assert scaling is not None and (scaling.kind, scaling.factor, scaling.original_context, scaling.truncate) == ("yarn", 32.0, 4096, False)
    assert [mixer(config, layer).window for layer in (0, 1)] == [128, None]


def test_mistral_window_null_is_none_and_absent_is_4096():
    silent = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    assert [mixer(config).window for config in (MISTRAL | {"sliding_window": None}, silent, MISTRAL | {"sliding_window": 64})] == [None, 4096, 64]


def test_qwen2_slides_above_max_window_layers_only_when_told_to():
    windowed = QWEN2 | {"use_sliding_window": True}
    assert (mixer(windowed, 27).window, mixer(windowed, 28).window, mixer(QWEN2, 28).window) == (None, 131072, None)
    assert mixer(QWEN2).qkv_bias and not mixer(QWEN2).out_bias
    with pytest.raises(InputError, match="sliding_window"):
        model_spec_from_config(QWEN2 | {"layer_types": ["sliding_attention"] * 32}, "m")


def test_qwen3_has_head_norms_and_a_default_head_size():
    config = {key: value for key, value in QWEN3.items() if key != "head_dim"} | {"hidden_size": 1024, "num_attention_heads": 16}
    assert (mixer(config).H, mixer(config).qk_norm, mixer(config).qkv_bias) == (128, "head", False)


def test_smollm3_leaves_every_fourth_layer_without_positions():
    turns = [mixer(SMOLLM3, layer).rope is not None for layer in range(8)]
    assert turns == [True, True, True, False] * 2
    named = SMOLLM3 | {"no_rope_layers": [0, 1] * 16}
    assert [mixer(named, layer).rope is not None for layer in range(4)] == [False, True, False, True]


def test_gemma2_alternates_caps_and_scales():
    model = model_spec_from_config(GEMMA2, "m")
    assert [mixer(GEMMA2, layer).window for layer in range(4)] == [4096, None, 4096, None]
    assert (mixer(GEMMA2).scale, mixer(GEMMA2).logit_softcap, model.logit_softcap) == (256**-0.5, 50.0, 30.0)
    assert model.norm_plus_one and model.embed_scale == 48.0 and model.tied and model.layers[0].arrangement == "sandwich"
    assert mixer(GEMMA2 | {"attn_logit_softcapping": None}).logit_softcap is None


def test_gemma3_rotates_local_layers_with_their_own_base():
    config = GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    local, far = rope(config, 0), rope(config, 5)
    assert (local.theta, local.scaling, mixer(config, 0).window, mixer(config, 5).window) == (1e4, None, 512, None)
    assert far.theta == 1e6 and far.scaling is not None and far.scaling.factor == 8.0
    nested = {key: value for key, value in GEMMA3.items() if not key.startswith("rope")}
    nested["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert model_spec_from_config(nested, "m") == model_spec_from_config(config, "m")


def test_gemma3_with_eyes_plans_as_text_and_counts_the_eyes():
    """Google's config of the 4B leaves out what equals the class's defaults; the repository's total is 4,300,079,472."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024, "model_type": "gemma3_text"}
    text["rope_scaling"] = {"factor": 8.0, "rope_type": "linear"}
    eyes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14, "image_size": 896}
    eyes |= {"model_type": "siglip_vision_model", "vision_use_head": False}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": eyes, "mm_tokens_per_image": 256, "image_token_index": 262144}
    model = model_spec_from_config(config, "m")
    assert num_parameters(model) + dict(model.extra_parameters)["vision tower and projector"] == 4_300_079_472
    assert model.family == "gemma3_text" and model.plan_only is None


def test_falcon_arrangements():
    seven = model_spec_from_config(FALCON, "m").layers[0]
    forty = model_spec_from_config(FALCON | {"new_decoder_architecture": True, "hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8}, "m").layers[
        0
    ]
    assert (seven.arrangement, forty.arrangement) == ("parallel", "parallel2")
    assert isinstance(seven.mixer, Attention) and isinstance(forty.mixer, Attention) and (seven.mixer.K, forty.mixer.K) == (1, 8)
    plain = model_spec_from_config(FALCON | {"parallel_attn": False, "multi_query": False}, "m").layers[0]
    assert plain.arrangement == "pre" and isinstance(plain.mixer, Attention) and plain.mixer.K == 71
    assert "ALiBi" in (model_spec_from_config(FALCON | {"alibi": True}, "m").plan_only or "")


def test_gpt2_variants():
    assert mixer(GPT2).scale is None and mixer(GPT2 | {"scale_attn_weights": False}).scale == 1.0
    with pytest.raises(UnsupportedError, match="scale_attn_by_inverse_layer_idx"):
        model_spec_from_config(GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "m")
    with pytest.raises(UnsupportedError, match="add_cross_attention"):
        model_spec_from_config(GPT2 | {"add_cross_attention": True}, "m")


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast"])
def test_the_three_names_of_one_gelu(activation):
    ffn = model_spec_from_config(GPT2 | {"activation_function": activation}, "m").layers[0].ffn
    assert ffn is not None and ffn.activation == "gelu_tanh"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8-128x128"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "gptq", "bits": 4}, "gptq-4bit"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "pack-quantized"),
    ],
)
def test_published_quantization_is_named(settings, expected):
    assert model_spec_from_config(LLAMA | {"quantization_config": settings}, "m").quantization == expected


def test_unknown_families_are_named_with_the_closest():
    with pytest.raises(UnsupportedError, match=r"lama.*Closest known: llama"):
        model_spec_from_config(LLAMA | {"model_type": "lama"}, "m")
    with pytest.raises(UnsupportedError, match="compressed attention"):
        model_spec_from_config({"model_type": "deepseek_v4"}, "m")
    with pytest.raises(InputError, match="model_type"):
        model_spec_from_config({"hidden_size": 4}, "m")
    assert set(SAMPLES) | {"gemma3"} == set(RUNNABLE) and set(RUNNABLE) <= set(FAMILIES)
