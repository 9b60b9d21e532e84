"""Gemma 2 and 3 (text): sandwich norms stored as w and applied as 1 + w, scaled embeddings, local and global layers alternating, soft caps, head norms.

arXiv:2408.00118 (Gemma 2), arXiv:2503.19786 (Gemma 3). Gemma 3's local layers rotate with their own, unscaled base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tradespace.spec.families.parts import (
    FULL,
    SLIDING,
    Sizes,
    activation,
    layer_windows,
    quantization,
    read_rope,
    read_sizes,
    rope_from,
    sliding_window,
    stored_dtype,
)
from tradespace.spec.families.reader import ConfigReader, shown
from tradespace.spec.families.vision import siglip_parameters
from tradespace.spec.mixers import Attention, Rope
from tradespace.spec.model import DenseFFN, LayerSpec, ModelSpec

# Google's own configs of Gemma 3 with eyes leave out whatever equals the class's default
_ABSENT = {"vocab_size": 262_208, "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "intermediate_size": 9216}


def _attention_scale(config: ConfigReader) -> float:
    return config.number("query_pre_attn_scalar", default=256.0, low=1e-6) ** -0.5


def _window(config: ConfigReader) -> int | None:
    return sliding_window(config) if "sliding_window" in config.values else 4096


def _frame(config: ConfigReader, sizes: Sizes, mixers: list[Attention], softcap: float | None, tied: bool | None) -> ModelSpec:
    F = config.integer("intermediate_size", default=_ABSENT["intermediate_size"] if config.family == "gemma3_text" else None)
    ffn = DenseFFN(F=F, activation=activation(config, "hidden_activation", default="gelu_pytorch_tanh"))
    # Gemma 2's first configs carry hidden_act "gelu" beside hidden_activation; only the latter is used
    config.require("use_bidirectional_attention", False)
    own_tied = config.flag("tie_word_embeddings", default=True)
    return ModelSpec(
        name=config.name,
        family=config.family,
        D=sizes.D,
        V=sizes.V,
        layers=tuple(LayerSpec(mixer=mixer, ffn=ffn, arrangement="sandwich") for mixer in mixers),
        max_context=sizes.context,
        norm_eps=config.number("rms_norm_eps", default=1e-6, high=1.0),
        norm_plus_one=True,
        embed_scale=sizes.D**0.5,
        tied=own_tied if tied is None else tied,
        logit_softcap=softcap,
        stored_dtype=stored_dtype(config),
        quantization=quantization(config),
    )


def _softcap(config: ConfigReader, key: str, default: float | None) -> float | None:
    """A config that is silent gets the class's default; null switches the cap off."""
    return config.optional_number(key, low=1e-6) if key in config.values else default


def gemma2(config: ConfigReader) -> ModelSpec:
    sizes = read_sizes(config, context=8192, kv_heads=4, head_size=256)
    windows = layer_windows(config, sizes.L, _window(config), lambda i: i % 2 == 0)
    rope, scale, bias = read_rope(config, sizes.H, sizes.context), _attention_scale(config), config.flag("attention_bias", default=False)
    cap = _softcap(config, "attn_logit_softcapping", 50.0)
    mixers = [Attention(N=sizes.N, K=sizes.K, H=sizes.H, rope=rope, window=w, scale=scale, logit_softcap=cap, qkv_bias=bias, out_bias=bias) for w in windows]
    model = _frame(config, sizes, mixers, _softcap(config, "final_logit_softcapping", 30.0), None)
    config.finish(harmless=("hidden_act", "sliding_window_size"))
    return model


def _gemma3_ropes(config: ConfigReader, sizes: Sizes) -> dict[str, Rope]:
    """One rotation for global layers (which `rope_scaling` stretches), one for local layers."""
    nested = config.raw("rope_parameters")
    if nested is not None and not isinstance(nested, Mapping):
        raise config.wrong("rope_parameters", f"must be a dictionary; it is {shown(nested)}")
    nested = dict(nested or {})
    for key in nested:
        if key not in (FULL, SLIDING):
            raise config.unsupported("rope_parameters", key, f"is not one of Gemma 3's kinds of layer ({FULL}, {SLIDING})")
    stretched = config.raw("rope_scaling")
    if stretched is not None:
        if not isinstance(stretched, Mapping):
            raise config.wrong("rope_scaling", f"must be a dictionary; it is {shown(stretched)}")
        nested[FULL] = {**(nested.get(FULL) or {}), **stretched}
    bases = {FULL: config.number("rope_theta", default=1e6, low=1e-6), SLIDING: config.number("rope_local_base_freq", default=1e4, low=1e-6)}
    ropes = {}
    for kind, theta in bases.items():
        params = nested.get(kind) or {}
        if not isinstance(params, Mapping):
            raise config.wrong(f"rope_parameters.{kind}", f"must be a dictionary; it is {shown(params)}")
        ropes[kind] = rope_from(config, f"rope_parameters.{kind}", params, H=sizes.H, context=sizes.context, theta=theta, partial=1.0)
    return ropes


def _gemma3_text(config: ConfigReader, tied: bool | None) -> ModelSpec:
    sizes = read_sizes(config, context=131_072, kv_heads=4, head_size=256, absent=_ABSENT)
    pattern = config.integer("sliding_window_pattern", "_sliding_window_pattern", default=6)
    windows = layer_windows(config, sizes.L, _window(config), lambda i: (i + 1) % pattern != 0)
    ropes, scale, bias = _gemma3_ropes(config, sizes), _attention_scale(config), config.flag("attention_bias", default=False)
    cap = _softcap(config, "attn_logit_softcapping", None)
    mixers = [
        Attention(
            N=sizes.N,
            K=sizes.K,
            H=sizes.H,
            rope=ropes[FULL if w is None else SLIDING],
            window=w,
            scale=scale,
            logit_softcap=cap,
            qk_norm="head",
            qkv_bias=bias,
            out_bias=bias,
        )
        for w in windows
    ]
    return _frame(config, sizes, mixers, _softcap(config, "final_logit_softcapping", None), tied)


def gemma3_text(config: ConfigReader) -> ModelSpec:
    model = _gemma3_text(config, None)
    config.finish(harmless=("hidden_act",))
    return model


def gemma3(config: ConfigReader) -> ModelSpec:
    """The text decoder of a Gemma 3 with eyes; the eyes are counted as an extra and not run."""
    text = config.nested("text_config", family="gemma3_text", harmless=("hidden_act", "model_type"))
    tied = config.optional_flag("tie_word_embeddings")
    model = _gemma3_text(text, tied)
    eyes = siglip_parameters(config.nested("vision_config"), model.D)
    config.finish(harmless=("mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"))
    return replace(
        model,
        stored_dtype=stored_dtype(config, model.stored_dtype),
        quantization=quantization(config),
        extra_parameters=(("vision tower and projector", eyes),),
    )
