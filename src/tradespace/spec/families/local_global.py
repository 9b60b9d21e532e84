"""Local and global layers with different heads, priced and not yet run: Gemma 4 (dense, and experts beside a dense feed-forward), MiMo-V2-Flash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tradespace.spec.families.llama import dense_ffn, rms_model
from tradespace.spec.families.moe import ROUTED, ROUTING, routed, top_k
from tradespace.spec.families.parts import (
    SLIDING,
    Sizes,
    activation,
    layer_windows,
    num_experts,
    quantization,
    read_sizes,
    rope_from,
    sliding_window,
    stored_dtype,
    under_eyes,
)
from tradespace.spec.families.reader import MAX_CONTEXT, MAX_EXPERTS, MAX_HEADS, ConfigReader
from tradespace.spec.mixers import Attention, Rope
from tradespace.spec.model import DenseFFN, LayerSpec, ModelSpec, RoutedFFN


def _rope(config: ConfigReader, kind: str, H: int, context: int, theta: float, partial: float) -> Rope:
    """Gemma 4's rotation of one kind of layer. "proportional" turns the first share of pairs at the frequencies of the whole head."""
    every = config.raw("rope_parameters") or {}
    params = every.get(kind) or {} if isinstance(every, Mapping) else None
    if not isinstance(params, Mapping):
        raise config.wrong("rope_parameters", "must hold a dictionary per kind of layer")
    plain = {key: value for key, value in params.items() if value != "proportional"}
    return rope_from(config, f"rope_parameters.{kind}", plain, H=H, context=context, theta=theta, partial=partial)


def _gemma4_mixers(config: ConfigReader, sizes: Sizes) -> list[Attention]:
    window = sliding_window(config) or 512
    windows = layer_windows(config, sizes.L, window, lambda i: (i + 1) % 6 != 0 and i + 1 < sizes.L)
    shares = config.flag("attention_k_eq_v", default=False)
    wide_K = config.optional_integer("num_global_key_value_heads", high=MAX_HEADS)
    far = Attention(
        N=sizes.N,
        K=wide_K if shares and wide_K else sizes.K,
        H=(wide := config.integer("global_head_dim", default=512)),
        rope=_rope(config, "full_attention", wide, sizes.context, 1e6, 0.25),
        scale=1.0,
        qk_norm="head",
        value_from_keys=shares,
    )
    near = Attention(N=sizes.N, K=sizes.K, H=sizes.H, rope=_rope(config, SLIDING, sizes.H, sizes.context, 1e4, 1.0), window=window, scale=1.0, qk_norm="head")
    if far.N % far.K:
        raise config.wrong("num_global_key_value_heads", f"({far.K}) does not divide the {far.N} query heads")
    return [far if w is None else near for w in windows]


def _gemma4_text(config: ConfigReader) -> ModelSpec:
    sizes = read_sizes(config, context=131_072, kv_heads=4, head_size=256)
    for key in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        if config.integer(key, default=256 if key.startswith("hidden") else 0, low=0):
            raise config.unsupported(key, config.values.get(key, 256), "is a mechanism that is not priced yet")
    config.require("use_double_wide_mlp", False)
    config.require("attention_bias", False)
    F, act = config.integer("intermediate_size"), activation(config, "hidden_activation", default="gelu_pytorch_tanh")
    ffn: DenseFFN | RoutedFFN = DenseFFN(F=F, activation=act)
    extra = sizes.L  # a scalar on each layer's output
    if config.flag("enable_moe_block", default=False):
        E, expert_F = num_experts(config, "num_experts", default=128), config.integer("moe_intermediate_size", "expert_intermediate_size")
        keep = config.integer("top_k_experts", default=8, high=MAX_EXPERTS)
        ffn = RoutedFFN(E=E, top_k=keep, F=expert_F, activation=act, shared_F=F)
        extra += sizes.L * (4 * sizes.D + E)  # three norms around the experts, the router's scale, a scale per expert
    mixers = _gemma4_mixers(config, sizes)
    return ModelSpec(
        name=config.name,
        family="gemma4_text",
        D=sizes.D,
        V=sizes.V,
        layers=tuple(LayerSpec(mixer=mixer, ffn=ffn, arrangement="sandwich") for mixer in mixers),
        max_context=sizes.context,
        norm_eps=config.number("rms_norm_eps", default=1e-6, high=1.0),
        embed_scale=sizes.D**0.5,
        tied=config.flag("tie_word_embeddings", default=True),
        logit_softcap=config.optional_number("final_logit_softcapping", low=1e-6),
        stored_dtype=stored_dtype(config),
        quantization=quantization(config),
        plan_only="values taken from keys and rotations in proportion have no implementation yet",
        extra_parameters=(("scales and norms beside the usual ones", extra),),
    )


_GEMMA4_INERT = (
    "vocab_size_per_layer_input",
    "num_experts",
    "top_k_experts",
    "moe_intermediate_size",
    "expert_intermediate_size",
    "num_global_key_value_heads",
)


def gemma4_text(config: ConfigReader) -> ModelSpec:
    config.require("use_bidirectional_attention", "vision")
    model = _gemma4_text(config)
    config.finish(harmless=_GEMMA4_INERT)
    return model


def gemma4(config: ConfigReader) -> ModelSpec:
    text = config.nested("text_config", family="gemma4_text", harmless=(*_GEMMA4_INERT, "model_type"))
    text.require("use_bidirectional_attention", "vision")  # only pictures look both ways
    model = _gemma4_text(text)
    return under_eyes(config, model, harmless=("vision_soft_tokens_per_image",))


def mimo_v2_flash(config: ConfigReader) -> ModelSpec:
    """Five local layers to one global; local ones have twice the KV heads and learned sinks; experts without a shared one."""
    sizes = read_sizes(config, context=131_072, kv_heads=4, head_size=192)
    for key, want in (("swa_num_attention_heads", sizes.N), ("swa_head_dim", sizes.H), ("n_shared_experts", 0), ("add_full_attention_sink_bias", False)):
        config.require(key, want)
    value_H = config.integer("v_head_dim", default=128)
    config.require("swa_v_head_dim", value_H)
    partial = config.number("partial_rotary_factor", default=0.334, low=1e-6, high=1.0)
    theta, near_theta = config.number("rope_theta", default=5e6, low=1e-6), config.number("swa_rope_theta", default=1e4, low=1e-6)
    far_rope, near_rope = (
        rope_from(config, "rope_parameters", {}, H=sizes.H, context=sizes.context, theta=base, partial=partial) for base in (theta, near_theta)
    )
    window = config.optional_integer("sliding_window_size", high=MAX_CONTEXT)
    window = window + 1 if window else config.integer("sliding_window", default=129, high=MAX_CONTEXT)  # that many before, and the token itself
    slides = config.per_layer("hybrid_layer_pattern", sizes.L, int) or [int(i and (i + 1) % 6 != 0) for i in range(sizes.L)]
    frequency = config.per_layer("moe_layer_freq", sizes.L, int) or [int(i > 0) for i in range(sizes.L)]
    F = config.integer("moe_intermediate_size", default=2048)
    moe = routed(config, E=num_experts(config, "n_routed_experts", default=256), top_k=top_k(config, 8), F=F, score_bias=True)
    bias = config.flag("attention_bias", default=False)
    near_K = config.integer("swa_num_key_value_heads", default=2 * sizes.K, high=MAX_HEADS)
    sinks = config.flag("add_swa_attention_sink_bias", default=True)
    far = Attention(N=sizes.N, K=sizes.K, H=sizes.H, value_H=value_H, rope=far_rope, qkv_bias=bias)
    near = Attention(N=sizes.N, K=near_K, H=sizes.H, value_H=value_H, rope=near_rope, window=window, sinks=sinks, qkv_bias=bias)
    dense = dense_ffn(config)
    layers = [LayerSpec(mixer=near if slide else far, ffn=moe if flag else dense) for slide, flag in zip(slides, frequency, strict=True)]
    model = rms_model(config, sizes, layers, eps=1e-5)
    config.finish(harmless=(*ROUTING, "attention_value_scale", "attention_chunk_size", "sliding_window"))
    return replace(model, plan_only=ROUTED, left_out=("multi-token prediction modules",))
