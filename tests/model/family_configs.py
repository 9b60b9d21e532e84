"""Random tiny configs of every runnable family, as transformers' own config objects: head ratios, biases, ties, windows, rotary scalings, soft caps."""

from __future__ import annotations

import random
from typing import Any

import transformers

V = 97
CONTEXT = 64


def _llama3() -> dict[str, Any]:
    return {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


# what the rotary tests and the families draw from; each at the context of 64 that the configs state
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": _llama3(),
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn_mscale": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn_whole": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.1, "truncate": False, "beta_fast": 8.0},
}


def _heads(rng: random.Random) -> dict[str, int]:
    K = rng.choice([1, 2, 3])
    return {"num_attention_heads": K * rng.choice([1, 2, 3]), "num_key_value_heads": K}


def _shape(rng: random.Random) -> dict[str, Any]:
    """A Llama-like's sizes; the head size is not D/N."""
    return {
        "vocab_size": V,
        "hidden_size": rng.choice([36, 72]),
        "intermediate_size": rng.choice([33, 56]),
        "num_hidden_layers": rng.choice([2, 3]),
        "max_position_embeddings": CONTEXT,
        "head_dim": rng.choice([8, 12, 16]),
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        **_heads(rng),
    }


def _rope(rng: random.Random) -> dict[str, Any]:
    return {"rope_theta": rng.choice([1e4, 5e5]), **SCALINGS[rng.choice(list(SCALINGS))]}


def _tied(rng: random.Random) -> dict[str, bool]:
    return {"tie_word_embeddings": rng.random() < 0.5}


def llama(rng: random.Random) -> transformers.PreTrainedConfig:
    biases = {"attention_bias": rng.random() < 0.5, "mlp_bias": rng.random() < 0.5}
    return transformers.LlamaConfig(**_shape(rng), **_tied(rng), **biases, rope_parameters=_rope(rng))


def mistral(rng: random.Random) -> transformers.PreTrainedConfig:
    return transformers.MistralConfig(**_shape(rng), **_tied(rng), sliding_window=rng.choice([None, 5, 8]), rope_parameters=_rope(rng))


def qwen2(rng: random.Random) -> transformers.PreTrainedConfig:
    shape = _shape(rng)
    shape.pop("head_dim")
    shape["hidden_size"] = shape["num_attention_heads"] * rng.choice([8, 12])
    windows = {"use_sliding_window": rng.random() < 0.5, "sliding_window": 6, "max_window_layers": 1}
    return transformers.Qwen2Config(**shape, **_tied(rng), **windows, rope_parameters=_rope(rng))


def qwen3(rng: random.Random) -> transformers.PreTrainedConfig:
    windows = {"use_sliding_window": rng.random() < 0.5, "sliding_window": 6, "max_window_layers": 1}
    return transformers.Qwen3Config(**_shape(rng), **_tied(rng), **windows, attention_bias=rng.random() < 0.5, rope_parameters=_rope(rng))


def smollm3(rng: random.Random) -> transformers.PreTrainedConfig:
    shape = _shape(rng)
    shape.pop("head_dim")
    shape["hidden_size"] = shape["num_attention_heads"] * 8
    rotates = [rng.choice([0, 1]) for _ in range(shape["num_hidden_layers"])]
    return transformers.SmolLM3Config(**shape, **_tied(rng), no_rope_layers=rotates, rope_parameters=_rope(rng), pad_token_id=0)


def gemma2(rng: random.Random) -> transformers.PreTrainedConfig:
    caps = {"attn_logit_softcapping": rng.choice([2.0, 50.0]), "final_logit_softcapping": rng.choice([None, 3.0])}
    return transformers.Gemma2Config(**_shape(rng), **caps, sliding_window=5, query_pre_attn_scalar=rng.choice([8, 20]), attention_bias=rng.random() < 0.3)


def gemma3_text(rng: random.Random) -> transformers.PreTrainedConfig:
    shape = _shape(rng) | {"num_hidden_layers": 4}
    kinds = [rng.choice(["sliding_attention", "full_attention"]) for _ in range(4)]
    ropes = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
    return transformers.Gemma3TextConfig(**shape, layer_types=kinds, sliding_window=6, query_pre_attn_scalar=rng.choice([8, 20]), rope_parameters=ropes)


def phi3(rng: random.Random) -> transformers.PreTrainedConfig:
    shape = _shape(rng)
    shape.pop("head_dim")
    shape["hidden_size"] = shape["num_attention_heads"] * 16
    partial = rng.choice([1.0, 0.75])
    pairs = int(16 * partial) // 2
    longrope = {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [2.0 + 0.5 * i for i in range(pairs)],
        "original_max_position_embeddings": rng.choice([16, CONTEXT]),
        "factor": 4.0,
    }
    scaling = rng.choice([{"rope_type": "default"}, longrope])
    own = {
        "original_max_position_embeddings": scaling.get("original_max_position_embeddings", CONTEXT),
        "sliding_window": rng.choice([None, 7]),
        "pad_token_id": 0,
    }
    return transformers.Phi3Config(**shape, **_tied(rng), **own, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": partial, **scaling})


def falcon(rng: random.Random) -> transformers.PreTrainedConfig:
    kind = rng.choice(
        [
            {"multi_query": True, "parallel_attn": True},
            {"multi_query": False, "parallel_attn": rng.random() < 0.5},
            {"new_decoder_architecture": True, "num_kv_heads": 2},
            {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        ]
    )
    return transformers.FalconConfig(
        vocab_size=V, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, bias=rng.random() < 0.5, alibi=False, max_position_embeddings=CONTEXT, **kind
    )


def gpt_bigcode(rng: random.Random) -> transformers.PreTrainedConfig:
    return transformers.GPTBigCodeConfig(vocab_size=V, n_positions=CONTEXT, n_embd=48, n_layer=2, n_head=4, n_inner=56, multi_query=rng.random() < 0.5)


def gpt2(rng: random.Random) -> transformers.PreTrainedConfig:
    return transformers.GPT2Config(vocab_size=V, n_positions=CONTEXT, n_embd=36, n_layer=3, n_head=3, n_inner=rng.choice([None, 50]))


FAMILIES = {
    "llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3, "smollm3": smollm3, "gemma2": gemma2, "gemma3_text": gemma3_text,
    "phi3": phi3, "falcon": falcon, "gpt_bigcode": gpt_bigcode, "gpt2": gpt2,
}  # fmt: skip
