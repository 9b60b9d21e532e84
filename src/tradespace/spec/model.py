"""A model as a tuple of layers: the numbers that decide bytes, operations and mathematics. No torch, no weights.

Models are not uniform (alternating windows, routed and dense feed-forwards, layers without rotary positions), so every layer is its own
`LayerSpec` and every cost is a sum over layers. The tensors that a model holds are enumerated by `spec/tensors.py`: parameter counts, weight
bytes, the built module's parameters and the loader's targets all come from that one list.

Dimension letters as in the design: D model width · F feed-forward width · N query heads · K key-value heads · H head size · V vocabulary ·
L layers · E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Literal

from tradespace.spec.mixers import Attention, Mixer, Rope, RopeScaling

__all__ = ["Attention", "DenseFFN", "LayerSpec", "Mixer", "ModelSpec", "Rope", "RopeScaling", "RoutedFFN"]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]

# Where the norms stand in a layer, h the layer's input:
#   pre        h += attn(norm(h)); h += ffn(norm(h))                         Llama, GPT-2
#   sandwich   h += norm(attn(norm(h))); h += norm(ffn(norm(h)))             Gemma 2 and 3
#   post       h += norm(attn(h)); h += norm(ffn(h))                         OLMo 2
#   parallel   n = norm(h); h += attn(n) + ffn(n)                            Falcon-7B, Phi-2
#   parallel2  h += attn(norm_a(h)) + ffn(norm_b(h))                         Falcon-40B
Arrangement = Literal["pre", "sandwich", "post", "parallel", "parallel2"]


@dataclass(frozen=True, kw_only=True)
class DenseFFN:
    """down(act(gate(x)) * up(x)) where gated (SwiGLU, arXiv:2002.05202), else down(act(up(x)))."""

    F: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class RoutedFFN:
    """`top_k` of `E` expert feed-forwards per token, beside `shared_F` that every token uses (mixture of experts, arXiv:1701.06538).

    `router_bias` is a learned bias of the router's logits; `score_bias` a correction that only selects (DeepSeek-V3, arXiv:2412.19437).
    """

    E: int
    top_k: int
    F: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    shared_F: int = 0
    shared_gate: bool = False  # a scalar gate on the shared expert (Qwen2-MoE)
    router_bias: bool = False
    score_bias: bool = False
    latent_D: int = 0  # experts work in a projected width (Nemotron-3 Super/Ultra); 0: in D itself


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer: how tokens mix, how features mix, and where the norms stand. Either part may be absent (hybrids interleave them)."""

    mixer: Mixer | None
    ffn: DenseFFN | RoutedFFN | None
    arrangement: Arrangement = "pre"
    residual_scale: float = 1.0  # Granite-style multiplier on what is added to the stream


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only language model. `plan_only` holds the reason why our engine cannot run it yet; None: it runs."""

    name: str
    family: str  # config.json's model_type, or GGUF's general.architecture mapped on to it
    D: int
    V: int
    layers: tuple[LayerSpec, ...]
    max_context: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_plus_one: bool = False  # Gemma stores w and multiplies by 1 + w
    norm_bias: bool = False
    embed_scale: float = 1.0
    embed_norm: bool = False  # BLOOM normalizes the embeddings
    learned_positions: int = 0  # rows of a learned position table; 0: none
    position_offset: int = 0  # OPT's table starts two rows in
    final_norm: bool = True
    tied: bool = True
    lm_head_bias: bool = False
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    stored_dtype: str = "bf16"  # what the published checkpoint holds, before any quantization
    quantization: str | None = None  # the format that the published config names, e.g. "fp8-128x128", "nvfp4", "mxfp4"
    published_bytes: int | None = None  # of the decoder in that format (`spec/published.py`); None: the config names none
    plan_only: str | None = None
    imposed: str = ""  # an attention pattern that is not the model's own (`attention_imposed.py`); '': none
    extra_parameters: tuple[tuple[str, int], ...] = field(default=())  # (what, count) outside of the decoder: vision towers, MTP heads
    left_out: tuple[str, ...] = ()  # what the checkpoint holds beside the decoder that nobody counted

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # over all layers: a search looks models up thousands of times
        return hash(tuple(getattr(self, part.name) for part in fields(self)))

    def __getstate__(self) -> dict[str, object]:  # another process hashes strings otherwise
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    @property
    def L(self) -> int:
        return len(self.layers)

    @cached_property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers that keep keys and values (or a latent) per token."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.mixer is not None and layer.mixer.cache_elements_per_token > 0)

    @property
    def cache_elements_per_token(self) -> int:
        """Elements that the cache holds for one token over all layers (before any window bounds how many tokens stay)."""
        return sum(layer.mixer.cache_elements_per_token for layer in self.layers if layer.mixer is not None)

    def uniform(self) -> LayerSpec | None:
        """The one layer that all layers equal, or None where they differ."""
        return self.layers[0] if self.layers and all(layer == self.layers[0] for layer in self.layers) else None
