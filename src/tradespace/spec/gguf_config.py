"""GGUF metadata → ModelSpec. What config.json says in keys, GGUF says partly in keys, partly in which tensors there are, partly by the architecture's name.

Three things differ from the same model's config.json, because the file holds its weights so: Llama's and SmolLM3's query and key rows are ordered for pairs
(2i, 2i + 1), so their `Rope.interleaved` is true; Gemma's norms already have the one added, so `norm_plus_one` is false; rotary factors may lie in a tensor.
Every tensor of the file must be one that the model has, in its shape: the last check before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import isfinite
from typing import Any

from tradespace.errors import CorruptFileError, InputError, UnsupportedError
from tradespace.spec.families.parts import check_heads, even_split
from tradespace.spec.families.reader import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS, ConfigReader, shown
from tradespace.spec.mixers import Attention, Rope, RopeScaling
from tradespace.spec.model import Activation, Arrangement, DenseFFN, LayerSpec, ModelSpec
from tradespace.spec.tensors import model_tensors

ReadFactors = Callable[[str], Sequence[float]]
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_TENSORS_OF = {
    "embed.weight": ("token_embd.weight",),
    "positions.weight": ("position_embd.weight",),
    "final_norm.": ("output_norm.",),
    "lm_head.weight": ("output.weight",),
}
_PARTS_OF = {
    "attn_norm": ("attn_norm",),
    "attn.qkv": ("attn_q", "attn_k", "attn_v"),
    "attn.q_norm": ("attn_q_norm",),
    "attn.k_norm": ("attn_k_norm",),
    "attn.out": ("attn_output",),
    "attn_post_norm": ("post_attention_norm",),
    "ffn_norm": ("ffn_norm",),
    "ffn.gate_up": ("ffn_gate", "ffn_up"),
    "ffn.up": ("ffn_up",),
    "ffn.down": ("ffn_down",),
    "ffn_post_norm": ("post_ffw_norm",),
}


@dataclass(frozen=True, kw_only=True)
class _Architecture:
    """What the name of an architecture implies."""

    family: str
    norm: str = "rms"
    activation: Activation = "silu"
    gated: bool = True
    arrangement: Arrangement = "pre"
    rotates: bool = True
    interleaved: bool = False
    fused_qkv: bool = False
    fused_gate_up: bool = False
    head_norm: bool = False
    nope_every: int = 0  # every n-th layer does not rotate
    global_every: int = 0  # every n-th layer is global, the others slide; 0: all alike
    local_theta: float | None = None  # sliding layers rotate with this base, unscaled
    width_scaled_layers: int = 0  # a model of this depth scales by width over heads instead of the head size
    scaled_embedding: bool = False
    theta: float = 10_000.0


_GEMMA: dict[str, Any] = {"activation": "gelu_tanh", "arrangement": "sandwich", "scaled_embedding": True}
_GPT: dict[str, Any] = {"norm": "layer", "activation": "gelu_tanh", "gated": False, "rotates": False, "fused_qkv": True}
ARCHITECTURES: dict[str, _Architecture] = {
    "llama": _Architecture(family="llama", interleaved=True),
    "smollm3": _Architecture(family="smollm3", interleaved=True, nope_every=4),
    "qwen2": _Architecture(family="qwen2"),
    "qwen3": _Architecture(family="qwen3", head_norm=True),
    "gemma2": _Architecture(family="gemma2", global_every=2, width_scaled_layers=46, **_GEMMA),
    "gemma3": _Architecture(family="gemma3_text", global_every=6, width_scaled_layers=62, head_norm=True, local_theta=10_000.0, theta=1e6, **_GEMMA),
    "phi3": _Architecture(family="phi3", fused_qkv=True, fused_gate_up=True),
    "falcon": _Architecture(family="falcon", norm="layer", activation="gelu", gated=False, arrangement="parallel", fused_qkv=True),
    "starcoder": _Architecture(family="gpt_bigcode", **_GPT),
    "gpt2": _Architecture(family="gpt2", **_GPT),
}


def gguf_tensor_parts(model: ModelSpec, architecture: str) -> dict[str, tuple[str, ...]]:
    """Canonical tensor name → the GGUF tensors whose rows, one after the other, make it up."""
    arch, found = ARCHITECTURES[architecture], {}
    for tensor in model_tensors(model):
        stem, kind = tensor.name.rsplit(".", 1)
        if tensor.layer < 0:
            found[tensor.name] = _TENSORS_OF.get(tensor.name) or tuple(f"{name}{kind}" for name in _TENSORS_OF[f"{stem}."])
            continue
        part = stem.split(".", 2)[2]
        names = _PARTS_OF[part]
        if part == "attn.qkv" and arch.fused_qkv:
            names = ("attn_qkv",)
        elif part == "ffn.gate_up" and arch.fused_gate_up:
            names = ("ffn_up",)
        elif model.layers[tensor.layer].arrangement == "parallel2" and part.endswith("_norm"):
            names = ("attn_norm_2",) if part == "attn_norm" else ("attn_norm",)  # Falcon-40B's names, as llama.cpp has them
        found[tensor.name] = tuple(f"blk.{tensor.layer}.{name}.{kind}" for name in names)
    return found


def model_spec_from_gguf(
    metadata: Mapping[str, Any], tensor_shapes: Mapping[str, tuple[int, ...]], name: str, *, read_factors: ReadFactors | None = None
) -> ModelSpec:
    """The ModelSpec of a GGUF file out of its metadata and the shapes of its tensors (output dimension first, as numpy has them).

    read_factors  reads a small tensor of rotary factors (Llama 3.1's `rope_freqs.weight`, Phi-3's two); needed only where the file has one.

    Raises UnsupportedError for an unknown architecture, key or tensor, InputError for a value beyond sense, CorruptFileError where tensors do not fit the keys.
    """
    label = metadata.get("general.architecture")
    if not isinstance(label, str):
        raise CorruptFileError(f"{name}: metadata 'general.architecture' is missing or not text: {shown(label)}")
    if label not in ARCHITECTURES:
        close = get_close_matches(label[:64], ARCHITECTURES, n=2, cutoff=0.5)
        hint = f"Closest known: {', '.join(close)}" if close else f"Known: {', '.join(ARCHITECTURES)}"
        raise UnsupportedError(f"{name}: unknown GGUF architecture {shown(label)}. {hint}")
    arch = ARCHITECTURES[label]
    own = {key[len(label) + 1 :]: _scalar(value) for key, value in metadata.items() if key.startswith(f"{label}.")}
    config = ConfigReader(own, name=name, family=f"GGUF {label}", path=f"{label}.")
    model = _model(config, arch, tensor_shapes, read_factors)
    config.finish(harmless=("rope.scaling.finetuned", "tensor_data_layout", "vocab_size", "attention.causal"))
    _check_tensors(model, label, tensor_shapes, name)
    return model


def _scalar(value: Any) -> Any:
    """Newer files give one entry per layer where older ones give one number; entries all alike are that number again."""
    if isinstance(value, list) and value and len(value) <= MAX_LAYERS and all(entry == value[0] for entry in value):
        return value[0]
    return value


def _round(value: float) -> float:
    """1e-6 and not 9.999999974752427e-07: GGUF keeps floats in 32 bits, the configs behind them have few digits."""
    return float(f"{value:.7g}")


def _model(config: ConfigReader, arch: _Architecture, shapes: Mapping[str, tuple[int, ...]], read_factors: ReadFactors | None) -> ModelSpec:
    L = config.integer("block_count", high=MAX_LAYERS)
    D = config.integer("embedding_length")
    context = config.integer("context_length", high=MAX_CONTEXT)
    embedding = shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise CorruptFileError(f"{config.name}: tensor 'token_embd.weight' is missing or not a matrix")
    for key, inert in (("expert_count", 0), ("logit_scale", 1.0), ("residual_scale", 1.0), ("embedding_scale", 1.0), ("attention.scale", 0.0)):
        config.require(key, inert)
    config.require("attention.causal", True)
    eps = config.number("attention.layer_norm_rms_epsilon" if arch.norm == "rms" else "attention.layer_norm_epsilon", default=1e-5, high=1.0)
    ffn = DenseFFN(F=config.integer("feed_forward_length"), activation=arch.activation, gated=arch.gated, bias="blk.0.ffn_up.bias" in shapes)
    arrangement: Arrangement = "parallel2" if arch.arrangement == "parallel" and "blk.0.attn_norm_2.weight" in shapes else arch.arrangement
    cap = config.optional_number("final_logit_softcapping", low=1e-6)
    layers = tuple(LayerSpec(mixer=mixer, ffn=ffn, arrangement=arrangement) for mixer in _mixers(config, arch, L, D, context, shapes, read_factors))
    return ModelSpec(
        name=config.name,
        family=arch.family,
        D=D,
        V=embedding[0],
        layers=layers,
        max_context=context,
        norm="layer" if arch.norm == "layer" else "rms",
        norm_eps=_round(eps),
        norm_bias=arch.norm == "layer",
        embed_scale=D**0.5 if arch.scaled_embedding else 1.0,
        learned_positions=0 if arch.rotates else context,
        tied="output.weight" not in shapes,
        logit_softcap=None if cap is None else _round(cap),
        quantization="gguf",
    )


def _mixers(
    config: ConfigReader, arch: _Architecture, L: int, D: int, context: int, shapes: Mapping[str, tuple[int, ...]], read_factors: ReadFactors | None
) -> list[Attention]:
    N = config.integer("attention.head_count", high=MAX_HEADS)
    K = config.integer("attention.head_count_kv", default=N, high=MAX_HEADS)
    check_heads(config, N, K, "attention.head_count_kv")
    H = config.optional_integer("attention.key_length") or even_split(config, D, N, "attention.head_count")
    value_H = config.integer("attention.value_length", default=H)
    window = config.integer("attention.sliding_window", default=0, low=0, high=MAX_CONTEXT) or None
    if arch.global_every and window is None:
        raise config.wrong("attention.sliding_window", "is missing, but this architecture has sliding layers")
    config.require("attention.sliding_window_pattern", arch.global_every)
    cap = config.optional_number("attn_logit_softcapping", low=1e-6)
    base = Attention(
        N=N,
        K=K,
        H=H,
        value_H=None if value_H == H else value_H,
        window=window,
        scale=(D // N) ** -0.5 if arch.width_scaled_layers == L else None,
        logit_softcap=None if cap is None else _round(cap),
        qk_norm="head" if arch.head_norm else "none",
        qkv_bias="blk.0.attn_qkv.bias" in shapes or "blk.0.attn_q.bias" in shapes,
        out_bias="blk.0.attn_output.bias" in shapes,
    )
    if not arch.rotates:
        return [base] * L
    rope = _rope(config, arch, H, context, shapes, read_factors)
    local = rope if arch.local_theta is None else Rope(theta=config.number("rope.freq_base_swa", default=arch.local_theta, low=1.0), dims=rope.dims)
    mixers = []
    for i in range(L):
        far = arch.global_every and (i + 1) % arch.global_every == 0
        turn = None if arch.nope_every and (i + 1) % arch.nope_every == 0 else rope if far or not arch.global_every else local
        mixers.append(replace(base, rope=turn, window=None if far else window))
    return mixers


def _rope(config: ConfigReader, arch: _Architecture, H: int, context: int, shapes: Mapping[str, tuple[int, ...]], read_factors: ReadFactors | None) -> Rope:
    dims = config.integer("rope.dimension_count", default=H, high=H)
    if dims % 2:
        raise config.wrong("rope.dimension_count", f"({dims}) must be even")
    theta = _round(config.number("rope.freq_base", default=arch.theta, low=1e-6))
    present = [tensor for tensor in ROPE_TENSORS if tensor in shapes]
    kind = config.text("rope.scaling.type", default="none")
    factor = _round(config.number("rope.scaling.factor", "rope.scale_linear", default=1.0, low=1e-6))
    original = config.integer("rope.scaling.original_context_length", default=context, high=MAX_CONTEXT)
    attention_factor = config.optional_number("rope.scaling.attn_factor", low=1e-6)
    attention_factor = None if attention_factor is None else _round(attention_factor)
    scaling = None
    if present:
        if kind not in ("none", "longrope"):
            raise config.unsupported("rope.scaling.type", kind, f"beside a tensor of factors ({present[0]})")
        values = {tensor: _factors(config, tensor, dims // 2, read_factors) for tensor in present}
        short, long = (values.get("rope_freqs.weight") or values.get(f"rope_factors_{end}.weight") for end in ("short", "long"))
        if short is None or long is None:
            raise CorruptFileError(f"{config.name}: one of the tensors rope_factors_short and rope_factors_long is missing")
        if "rope_freqs.weight" in present:
            # Llama 3.1's bands, already worked out: the same division of every frequency at any length
            scaling = RopeScaling(kind="longrope", factor=1.0, original_context=context, attention_factor=1.0, short_factor=short, long_factor=long)
        else:
            scaling = RopeScaling(
                kind="longrope", factor=context / original, original_context=original, attention_factor=attention_factor, short_factor=short, long_factor=long
            )
    elif kind == "yarn":
        for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"):
            config.require(key, 1.0)
        fast, slow = config.number("rope.scaling.yarn_beta_fast", default=32.0), config.number("rope.scaling.yarn_beta_slow", default=1.0)
        scaling = RopeScaling(kind="yarn", factor=factor, original_context=original, beta_fast=fast, beta_slow=slow)
    elif kind == "linear" or (kind == "none" and factor != 1.0):
        scaling = RopeScaling(kind="linear", factor=factor, original_context=context)
    elif kind != "none":
        raise config.unsupported("rope.scaling.type", kind, "is an unknown rotary scaling. Known: none, linear, yarn, longrope")
    return Rope(theta=theta, dims=dims, scaling=scaling, interleaved=arch.interleaved)


def _factors(config: ConfigReader, tensor: str, count: int, read_factors: ReadFactors | None) -> tuple[float, ...]:
    if read_factors is None:
        raise InputError(f"{config.name}: its rotary factors lie in the tensor '{tensor}'; its values are needed to plan or run it, so open the file itself")
    values = tuple(float(value) for value in read_factors(tensor))
    if len(values) != count or any(not isfinite(value) or value <= 0 for value in values):
        raise CorruptFileError(f"{config.name}: tensor '{tensor}' must hold {count} positive factors; it holds {len(values)}: {shown(values[:8])}")
    return values


def _check_tensors(model: ModelSpec, architecture: str, shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Every tensor that the model needs is there, its rows add up, and there is none besides."""
    parts = gguf_tensor_parts(model, architecture)
    wanted: set[str] = set(ROPE_TENSORS)
    for tensor in model_tensors(model):
        rows = 0
        for part in parts[tensor.name]:
            wanted.add(part)
            if part not in shapes:
                raise CorruptFileError(f"{name}: tensor '{part}' is missing; its metadata promise one of {tensor.shape}")
            shape = tuple(shapes[part])
            if shape[1:] != tensor.shape[1:] or not shape:
                raise CorruptFileError(
                    f"{name}: tensor '{part}' has shape {shape}; {'with others it makes' if len(parts[tensor.name]) > 1 else ''} {tensor.shape}"
                )
            rows += shape[0]
        if rows != tensor.shape[0]:
            raise CorruptFileError(f"{name}: {', '.join(parts[tensor.name])} have {rows} rows together; the metadata say {tensor.shape[0]}")
    for extra in shapes:
        if extra not in wanted:
            raise UnsupportedError(
                f"{name}: tensor {shown(extra)} is not one that tradespace knows in a {architecture} model; refused, because it could change results"
            )
