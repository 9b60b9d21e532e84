"""What many families share: sizes, rotary positions, activations, windows, the format that a checkpoint is published in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from tradespace.spec.families.reader import MAX_CONTEXT, MAX_EXPERTS, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, ConfigReader, shown
from tradespace.spec.mixers import Rope, RopeScaling
from tradespace.spec.model import Activation, ModelSpec

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "relu2": "relu2",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "half": "fp16", "float": "fp32", "float8_e4m3fn": "fp8"}
FULL, SLIDING = "full_attention", "sliding_attention"


def activation(config: ConfigReader, *keys: str, default: str) -> Activation:
    name = config.text(*keys, default=default)
    if name not in ACTIVATIONS:
        raise config.unsupported(keys[0], name, f"is an unknown activation. Known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The numbers that every decoder has."""

    D: int
    L: int
    V: int
    N: int
    K: int
    H: int
    context: int


def read_sizes(
    config: ConfigReader, *, context: int, kv_heads: int | None = None, head_size: int | None = None, absent: Mapping[str, int] | None = None
) -> Sizes:
    """Width, depth, vocabulary and heads under their usual names.

    `context`, `kv_heads` and `head_size` are what the family's configuration class assumes where the config is silent (None: as many as query heads; width
    over heads). `absent` holds such values for sizes that published configs of the family do leave out; without it a missing size is an error.
    """
    absent = absent or {}
    D = config.integer("hidden_size", default=absent.get("hidden_size"))
    L = config.integer("num_hidden_layers", default=absent.get("num_hidden_layers"), high=MAX_LAYERS)
    V = config.integer("vocab_size", default=absent.get("vocab_size"), high=MAX_VOCAB)
    N = config.integer("num_attention_heads", default=absent.get("num_attention_heads"), high=MAX_HEADS)
    silent = "num_key_value_heads" not in config.values  # null means: as many as query heads
    K = config.integer("num_key_value_heads", default=kv_heads if silent and kv_heads else N, high=MAX_HEADS)
    H = config.optional_integer("head_dim") or head_size or even_split(config, D, N)
    check_heads(config, N, K)
    return Sizes(D=D, L=L, V=V, N=N, K=K, H=H, context=config.integer("max_position_embeddings", default=context, high=MAX_CONTEXT))


def even_split(config: ConfigReader, D: int, N: int, key: str = "num_attention_heads") -> int:
    if D % N:
        raise config.wrong(key, f"({N}) does not divide the width of {D}, and no head size is given")
    return D // N


def check_heads(config: ConfigReader, N: int, K: int, key: str = "num_key_value_heads") -> None:
    if N % K:
        raise config.wrong(key, f"({K}) does not divide the {N} query heads")


# ---------------------------------------------------------------------------------------------------------------- rotary positions

_SCALING_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "longrope": {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"},
}


def read_rope(config: ConfigReader, H: int, context: int, *, theta: float = 10_000.0, partial: float = 1.0, interleaved: bool = False) -> Rope:
    """Rotary positions out of `rope_theta`, `partial_rotary_factor` and `rope_scaling` (old) or `rope_parameters` (new); `theta` and `partial` are defaults."""
    top_theta = config.number("rope_theta", default=theta, low=1e-6)
    top_partial = config.number("partial_rotary_factor", default=partial, low=1e-6, high=1.0)
    params = config.raw("rope_scaling")
    newer = config.raw("rope_parameters")
    key = "rope_scaling" if params else "rope_parameters"
    params = params or newer or {}
    original = config.optional_integer("original_max_position_embeddings", high=MAX_CONTEXT)
    if not isinstance(params, Mapping):
        raise config.wrong(key, f"must be a dictionary; it is {shown(params)}")
    return rope_from(config, key, params, H=H, context=context, original=original, theta=top_theta, partial=top_partial, interleaved=interleaved)


def rope_from(
    config: ConfigReader,
    key: str,
    params: Mapping[str, Any],
    *,
    H: int,
    context: int,
    original: int | None = None,
    theta: float,
    partial: float,
    interleaved: bool = False,
) -> Rope:
    """One dictionary of rotary parameters; what it leaves out comes from `theta`, `partial` and `original` (the trained context)."""
    reader = ConfigReader(params, name=config.name, family=config.family, path=f"{config.path}{key}.")
    kind = reader.text("rope_type", "type", default="default")
    if config.family.startswith("phi3") and kind in ("su", "yarn"):
        kind = "longrope"  # the names it had in Phi-3's first configs
    if kind not in _SCALING_KEYS:
        raise reader.unsupported("rope_type", kind, f"is an unknown rotary scaling. Known: {', '.join(_SCALING_KEYS)}")
    for extra in params:
        if extra not in {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_SCALING_KEYS[kind]} and params[extra] is not None:
            raise reader.unsupported(str(extra), params[extra], f"does not belong to rotary scaling '{kind}'")
    theta = reader.number("rope_theta", default=theta, low=1e-6)
    dims = int(H * reader.number("partial_rotary_factor", default=partial, low=1e-6, high=1.0))
    if dims < 2 or dims % 2:
        raise reader.wrong("partial_rotary_factor", f"leaves {dims} of {H} dimensions to rotate; an even number of at least 2 is needed")
    return Rope(theta=theta, dims=dims, scaling=_scaling(reader, kind, dims, context, original), interleaved=interleaved)


def _scaling(reader: ConfigReader, kind: str, dims: int, context: int, original: int | None) -> RopeScaling | None:
    if kind == "default":
        return None
    if kind in ("linear", "dynamic"):
        # the dynamic base grows with the length beyond the context that the config states
        return RopeScaling(kind=kind, factor=_factor(reader), original_context=context)
    own = reader.optional_integer("original_max_position_embeddings", high=MAX_CONTEXT)
    trained = original or own or context
    if kind == "llama3":
        low, high = (_needed(reader, f"{end}_freq_factor") for end in ("low", "high"))
        if low > high:
            raise reader.wrong("high_freq_factor", f"must not be below low_freq_factor; they are {high} and {low}")
        return RopeScaling(kind="llama3", factor=_factor(reader), original_context=trained, low_freq_factor=low, high_freq_factor=high)
    attention_factor = reader.optional_number("attention_factor")
    factor = reader.optional_number("factor", low=1e-6)
    factor = context / trained if factor is None else factor
    if kind == "longrope":
        short, long = (_factors(reader, name, dims // 2) for name in ("short_factor", "long_factor"))
        return RopeScaling(kind="longrope", factor=factor, original_context=trained, attention_factor=attention_factor, short_factor=short, long_factor=long)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context=trained,
        attention_factor=attention_factor,
        beta_fast=reader.number("beta_fast", default=32.0) or 32.0,
        beta_slow=reader.number("beta_slow", default=1.0) or 1.0,
        mscale=reader.optional_number("mscale"),
        mscale_all_dim=reader.optional_number("mscale_all_dim"),
        truncate=reader.flag("truncate", default=True),
    )


def _needed(reader: ConfigReader, key: str) -> float:
    value = reader.optional_number(key, low=1e-6)
    if value is None:
        raise reader.wrong(key, "is missing")
    return value


def _factor(reader: ConfigReader) -> float:
    return _needed(reader, "factor")


def _factors(reader: ConfigReader, key: str, count: int) -> tuple[float, ...]:
    values = reader.raw(key)
    if not isinstance(values, list) or len(values) != count:
        raise reader.wrong(key, f"must be a list of {count} numbers, one per rotated pair; it is {shown(values)}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value) or value <= 0:
            raise reader.wrong(key, f"must hold positive numbers; it holds {shown(value)}")
    return tuple(float(value) for value in values)


# ------------------------------------------------------------------------------------------------------------------------- windows


def layer_windows(config: ConfigReader, L: int, window: int | None, default: Callable[[int], bool]) -> tuple[int | None, ...]:
    """Per layer the sliding window or None, out of `layer_types`; where that is absent `default(i)` says whether layer i slides."""
    kinds = config.per_layer("layer_types", L, str)
    if kinds is None:
        slides = [default(i) for i in range(L)]
    else:
        for kind in kinds:
            if kind not in (FULL, SLIDING):
                raise config.unsupported("layer_types", kind, "is an unknown kind of layer")
        slides = [kind == SLIDING for kind in kinds]
    if any(slides) and window is None:
        raise config.wrong("sliding_window", "is missing or switched off, but layers slide")
    return tuple(window if slide else None for slide in slides)


def sliding_window(config: ConfigReader, *keys: str) -> int | None:
    return config.optional_integer(*(keys or ("sliding_window",)), high=MAX_CONTEXT)


def num_experts(config: ConfigReader, *keys: str, default: int) -> int:
    return config.integer(*keys, default=default, high=MAX_EXPERTS)


# --------------------------------------------------------------------------------------------------------------- published formats


def stored_dtype(config: ConfigReader, default: str = "bf16") -> str:
    name = config.raw("dtype", "torch_dtype")
    if name is None:
        return default
    if not isinstance(name, str) or name.removeprefix("torch.") not in DTYPES:
        raise config.wrong("torch_dtype", f"is {shown(name)}. Known: {', '.join(DTYPES)}")
    return DTYPES[name.removeprefix("torch.")]


def quantization(config: ConfigReader) -> str | None:
    """The format that `quantization_config` names, in one word, or None: "fp8-128x128", "nvfp4", "mxfp4", "gptq-4bit" …"""
    settings = config.raw("quantization_config", "compression_config")
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise config.wrong("quantization_config", f"must be a dictionary; it is {shown(settings)}")
    method = settings.get("quant_method")
    block, bits = settings.get("weight_block_size"), settings.get("bits")
    if method == "fp8" and isinstance(block, list):
        return f"fp8-{'x'.join(str(side) for side in block[:2])}"
    if method == "modelopt" or settings.get("quant_algo"):
        return str(settings.get("quant_algo") or method).lower()[:40]
    if method == "compressed-tensors":
        return str(settings.get("format") or method)[:40]
    if method in ("gptq", "awq") and isinstance(bits, int):
        return f"{method}-{bits}bit"
    return str(method or "unnamed")[:40]


def under_eyes(config: ConfigReader, model: ModelSpec, *, left_out: tuple[str, ...] = (), harmless: Iterable[str] = ()) -> ModelSpec:
    """The text decoder of a multimodal config, with what the outer dictionary says about it; the towers are left out, and named so."""
    towers = tuple(f"{what} tower" for what in ("vision", "audio") if config.raw(f"{what}_config") is not None)
    config.require("language_model_only", False, True)  # whether the towers were saved too
    found = replace(
        model,
        tied=config.flag("tie_word_embeddings", default=model.tied),
        stored_dtype=stored_dtype(config, model.stored_dtype),
        quantization=quantization(config) or model.quantization,
        left_out=(*towers, *model.left_out, *left_out),
    )
    kinds = ("image", "video", "audio", "boi", "eoi", "boa", "eoa", "vision_start", "vision_end", "media_placeholder")
    config.finish(harmless=(*harmless, *(f"{kind}_token_{what}" for kind in kinds for what in ("id", "index"))))
    return found
