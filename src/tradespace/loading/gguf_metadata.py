"""ModelSpec → what a GGUF file says of the model: keys, and small tensors of rotary factors. Needs no weights.

What is written is read back by `spec.gguf_config` and must give the same model, rotary frequencies included; a model for which it does not is refused, since
llama.cpp would compute another. What our reader would take and llama.cpp does not know is refused by name before that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import pi
from pathlib import Path
from typing import Any

import torch

from tradespace.errors import TradespaceError, UnsupportedError
from tradespace.kernels.rope import inverse_frequencies
from tradespace.loading.names import Piece, gguf_pieces
from tradespace.spec.gguf_config import ARCHITECTURES, model_spec_from_gguf
from tradespace.spec.mixers import Attention, Rope
from tradespace.spec.model import DenseFFN, LayerSpec, ModelSpec

# family → general.architecture
FAMILIES = {
    "llama": "llama",
    "mistral": "llama",
    "smollm3": "smollm3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "falcon": "falcon",
    "gpt_bigcode": "starcoder",
    "gpt2": "gpt2",
}
# where llama.cpp reads biases of projections that the architecture may lack, and a head of its own
MAY_HAVE_BIASES = ("llama", "gpt2", "starcoder")
NEVER_UNTIED = ("gemma2",)
# which architectures take tensors of rotary factors there
TAKE_FACTORS = {"llama3": ("llama",), "longrope": ("llama", "phi3")}


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A GGUF file before its weights: `stored_spec` is the model as the file tells it (pairs of rotary rows side by side, say), `factors` small F32 tensors."""

    architecture: str
    metadata: Mapping[str, Any]
    stored_spec: ModelSpec
    factors: Mapping[str, tuple[float, ...]]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return gguf_pieces(self.stored_spec, self.architecture)


def outline(spec: ModelSpec) -> Outline:
    """For a model out of a Hugging Face folder, tokenizer left aside. Raises UnsupportedError for what its architecture cannot say."""
    if spec.family not in FAMILIES:
        raise UnsupportedError(f"{spec.name}: GGUF's architectures that run here have none for family {spec.family}. Written: {', '.join(FAMILIES)}")
    name = FAMILIES[spec.family]
    _check_known(spec, name)
    own = _sizes(spec, name) | _attention(spec, name)
    ropes = [mixer.rope for mixer in _mixers(spec) if mixer.rope is not None]
    # sliding layers of Gemma 3 rotate with a base of their own, which is the architecture's default
    rope = next((mixer.rope for mixer in _mixers(spec) if mixer.rope is not None and mixer.window is None), ropes[0] if ropes else None)
    factors: dict[str, tuple[float, ...]] = {}
    if rope is not None:
        own |= {"rope.freq_base": float(rope.theta), "rope.dimension_count": rope.dims} | _scaling(spec, rope)
        factors = _factors(spec, name, rope)
        near = next((mixer.rope for mixer in _mixers(spec) if mixer.rope is not None and mixer.window is not None), rope)
        if near.theta != rope.theta and near.theta != ARCHITECTURES[name].local_theta:
            own["rope.freq_base_swa"] = float(near.theta)
    metadata = {"general.architecture": name, "general.name": Path(spec.name).name or spec.name} | {f"{name}.{key}": value for key, value in own.items()}
    found = Outline(architecture=name, metadata=metadata, stored_spec=_as_stored(spec, name), factors=factors)
    _check_read_back(spec, found)
    return found


def _mixers(spec: ModelSpec) -> list[Attention]:
    return [layer.mixer for layer in spec.layers if isinstance(layer.mixer, Attention)]


def _check_known(spec: ModelSpec, name: str) -> None:
    """Raises UnsupportedError for what llama.cpp passes over in silence, or refuses only when it loads."""
    arch, mixers = ARCHITECTURES[name], _mixers(spec)
    if len(mixers) != spec.L or any(not isinstance(layer.ffn, DenseFFN) for layer in spec.layers):
        raise UnsupportedError(f"{spec.name}: only dense models with attention in all layers are written to GGUF")
    windows = {mixer.window for mixer in mixers if mixer.window is not None and mixer.window < spec.max_context}
    if windows and not arch.global_every:  # Phi-3's has a key, and llama.cpp passes it over
        raise UnsupportedError(f"{spec.name}: sliding windows have no key in GGUF's {name}, so llama.cpp would attend to everything")
    biased = [mixer.out_bias or (mixer.qkv_bias and name != "qwen2") for mixer in mixers] + [layer.ffn.bias for layer in spec.layers if layer.ffn is not None]
    if name not in MAY_HAVE_BIASES and any(biased):
        raise UnsupportedError(f"{spec.name}: biases of its projections have no tensors in llama.cpp's {name}")
    if name in NEVER_UNTIED and not spec.tied:
        raise UnsupportedError(f"{spec.name}: a head of its own has no tensor in llama.cpp's {name}, whose head is the embedding")


def _sizes(spec: ModelSpec, name: str) -> dict[str, Any]:
    ffn = spec.layers[0].ffn
    assert isinstance(ffn, DenseFFN), "checked before"
    eps = "attention.layer_norm_rms_epsilon" if ARCHITECTURES[name].norm == "rms" else "attention.layer_norm_epsilon"
    return {
        "block_count": spec.L,
        "context_length": spec.max_context,
        "embedding_length": spec.D,
        "feed_forward_length": ffn.F,
        eps: float(spec.norm_eps),
        "vocab_size": spec.V,
    } | ({} if spec.logit_softcap is None else {"final_logit_softcapping": float(spec.logit_softcap)})


def _attention(spec: ModelSpec, name: str) -> dict[str, Any]:
    first = _mixers(spec)[0]
    found: dict[str, Any] = {"attention.head_count": first.N, "attention.head_count_kv": first.K}
    found |= {"attention.key_length": first.H, "attention.value_length": first.Hv}
    window = next((mixer.window for mixer in _mixers(spec) if mixer.window is not None), None)
    if window is not None and ARCHITECTURES[name].global_every:
        found["attention.sliding_window"] = window
    if first.logit_softcap is not None:
        found["attn_logit_softcapping"] = float(first.logit_softcap)
    return found


def _scaling(spec: ModelSpec, rope: Rope) -> dict[str, Any]:
    scaling = rope.scaling
    if scaling is None or scaling.kind == "llama3":  # the latter lies in a tensor of factors
        return {}
    original = scaling.original_context or spec.max_context
    if scaling.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    if scaling.kind == "longrope":  # its factors lie in tensors
        _, magnitude = inverse_frequencies(rope, spec.max_context)
        return {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": float(magnitude)}
    defaults = (scaling.beta_fast, scaling.beta_slow, scaling.truncate) == (32.0, 1.0, True)
    if scaling.kind == "yarn" and defaults and scaling.attention_factor is None and scaling.mscale is None and scaling.mscale_all_dim is None:
        return {"rope.scaling.type": "yarn", "rope.scaling.factor": float(scaling.factor), "rope.scaling.original_context_length": original}
    raise UnsupportedError(f"{spec.name}: rotary scaling {scaling.kind} as this model has it is not written to GGUF")


def _factors(spec: ModelSpec, name: str, rope: Rope) -> dict[str, tuple[float, ...]]:
    """Tensors of what each frequency is divided by: Llama 3.1's three bands worked out, or Phi-3's two lists."""
    if rope.scaling is None or rope.scaling.kind not in ("llama3", "longrope"):
        return {}
    if name not in TAKE_FACTORS[rope.scaling.kind]:
        raise UnsupportedError(f"{spec.name}: rotary scaling {rope.scaling.kind} has no tensor in llama.cpp's {name}")
    if rope.scaling.kind == "llama3":
        return {"rope_freqs.weight": llama3_factors(rope)}
    return {"rope_factors_long.weight": rope.scaling.long_factor, "rope_factors_short.weight": rope.scaling.short_factor}


def llama3_factors(rope: Rope) -> tuple[float, ...]:
    """By what each frequency is divided: 1 where the wave is short, `factor` where it is long, between the two in proportion to 1 / wave (arXiv:2407.21783).

    >>> from tradespace.spec.mixers import RopeScaling
    >>> scaling = RopeScaling(kind="llama3", factor=8.0, original_context=8192)
    >>> [round(factor, 2) for factor in llama3_factors(Rope(theta=5e5, dims=128, scaling=scaling))][::9]
    [1.0, 1.0, 1.0, 1.0, 8.0, 8.0, 8.0, 8.0]
    """
    scaling = rope.scaling
    assert scaling is not None and scaling.kind == "llama3"
    low, high, found = scaling.low_freq_factor, scaling.high_freq_factor, []
    for pair in range(rope.dims // 2):
        turns = scaling.original_context * rope.theta ** (-2 * pair / rope.dims) / (2 * pi)  # within the original context
        if turns > high:
            found.append(1.0)
        elif turns < low:
            found.append(scaling.factor)
        else:
            smooth = (turns - low) / (high - low)
            found.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return tuple(found)


def _with_mixers(spec: ModelSpec, change: Any) -> tuple[LayerSpec, ...]:
    return tuple(replace(layer, mixer=change(layer.mixer)) if isinstance(layer.mixer, Attention) else layer for layer in spec.layers)


def _as_stored(spec: ModelSpec, name: str) -> ModelSpec:
    """The spec with the order of rotary rows that the architecture has, and norms that hold what multiplies."""

    def paired(mixer: Attention) -> Attention:
        return mixer if mixer.rope is None else replace(mixer, rope=replace(mixer.rope, interleaved=ARCHITECTURES[name].interleaved))

    return replace(spec, layers=_with_mixers(spec, paired), norm_plus_one=False)


def _check_read_back(spec: ModelSpec, found: Outline) -> None:
    shapes = {piece.source: piece.source_shape for piece in found.pieces} | {name: (len(values),) for name, values in found.factors.items()}
    try:
        again = model_spec_from_gguf(found.metadata, shapes, spec.name, read_factors=lambda name: found.factors[name])
    except TradespaceError as error:
        raise UnsupportedError(f"{spec.name} cannot be written as GGUF's {found.architecture}: {error}") from error
    if comparable(again) != comparable(spec):
        have, want = comparable(again), comparable(spec)
        differs = [field.name for field in fields(have) if getattr(have, field.name) != getattr(want, field.name)]
        raise UnsupportedError(f"{spec.name}: GGUF's {found.architecture} cannot say what this model's {', '.join(differs)} are")
    for layer, (mine, theirs) in enumerate(zip(_mixers(spec), _mixers(again), strict=True)):
        if mine.rope is None or theirs.rope is None:
            continue  # both, since the rest is equal
        ours, magnitude = inverse_frequencies(mine.rope, spec.max_context)
        others, their_magnitude = inverse_frequencies(theirs.rope, spec.max_context)
        if not torch.allclose(ours, others, rtol=1e-5, atol=0) or abs(magnitude - their_magnitude) > 1e-5:
            raise UnsupportedError(f"{spec.name}: GGUF's {found.architecture} cannot say how layer {layer} rotates")


def comparable(spec: ModelSpec) -> ModelSpec:
    """The spec without what a file states and its model's config does not, or says in another way, though both compute the same. Rotary scalings left out."""

    def same(mixer: Attention) -> Attention:
        rope = None if mixer.rope is None else replace(mixer.rope, scaling=None, interleaved=False)
        window = None if mixer.window is not None and mixer.window >= spec.max_context else mixer.window
        value_H = None if mixer.value_H == mixer.H else mixer.value_H
        return replace(mixer, scale=round(mixer.softmax_scale, 9), rope=rope, window=window, value_H=value_H)

    neutral: dict[str, Any] = {"name": "", "family": "", "norm_plus_one": False, "stored_dtype": "", "quantization": None}
    neutral |= {"extra_parameters": (), "left_out": (), "embed_scale": round(spec.embed_scale, 6)}
    return replace(spec, layers=_with_mixers(spec, same), **neutral)
