"""How tokens mix in a layer: softmax attention over keys and values. Other mechanisms live in `mixers_*.py`, one file per family.

A mixer knows three things that every cost needs: the tensors it holds (`spec/tensors.py` asks `tensors(D)`), the elements it caches per token, and
the bytes of state that it keeps per sequence whatever the length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from tradespace.spec.attention_pattern import Pattern


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies stretch beyond the trained context.

    linear: arXiv:2306.15595 · dynamic (NTK-aware, grows with the length) · yarn: arXiv:2309.00071 · llama3: Llama 3.1's three bands ·
    longrope: arXiv:2402.13753.
    """

    kind: Literal["linear", "dynamic", "yarn", "llama3", "longrope"]
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn, DeepSeek
    mscale_all_dim: float | None = None  # yarn, DeepSeek
    attention_factor: float | None = None  # yarn, longrope: multiplies cos and sin; None: the paper's default
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope
    long_factor: tuple[float, ...] = ()  # longrope


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions (arXiv:2104.09864) on the first `dims` of each head, halves paired (i, i + dims/2)."""

    theta: float = 10_000.0
    dims: int
    scaling: RopeScaling | None = None
    interleaved: bool = False  # pairs (2i, 2i+1) instead of halves


@dataclass(frozen=True)
class TensorShape:
    """A tensor relative to its layer: dotted name, role (see `spec/tensors.py`), shape with the output dimension first."""

    name: str
    role: str
    shape: tuple[int, ...]


@runtime_checkable
class Mixer(Protocol):
    """What every mechanism that mixes tokens states about itself."""

    @property
    def cache_elements_per_token(self) -> int: ...

    @property
    def state_bytes_per_sequence(self) -> int: ...

    @property
    def window(self) -> int | None: ...

    def tensors(self, D: int) -> tuple[TensorShape, ...]: ...


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Softmax attention: N query heads share K heads of keys and values (MHA K = N; MQA K = 1, arXiv:1911.02150; GQA, arXiv:2305.13245).

    `window` w lets position t see t-w+1 … t (sliding); with `chunked` it sees its own chunk of w tokens (Llama 4). `pattern` says what
    else narrows or widens a query's view (None: nothing). `sinks` are learned logits that join the softmax and carry no value (gpt-oss).
    `scale` multiplies q·k; None is H**-0.5. `qk_norm` is an RMS norm of each head ("head", Qwen3, Gemma 3) or of the whole projection ("full", OLMo 2,
    MiniMax) before the rotation.
    """

    N: int
    K: int
    H: int
    rope: Rope | None = None
    value_H: int | None = None
    window: int | None = None
    chunked: bool = False
    pattern: Pattern | None = None
    scale: float | None = None
    logit_softcap: float | None = None
    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    output_gate: bool = False  # a sigmoid gate per head on the output (Qwen3.5), from a projection as wide as the queries
    sinks: bool = False
    alibi: bool = False  # linear position biases (BLOOM)
    value_from_keys: bool = False  # no projection of its own for the values: they are the keys' projection under another norm (Gemma 4's global layers)
    head_gate: bool = False  # a sigmoid gate per head on the output, from one row per query head (Step 3.5)

    @property
    def Hv(self) -> int:
        return self.H if self.value_H is None else self.value_H

    @property
    def G(self) -> int:
        """Query heads per key-value head."""
        return self.N // self.K

    @property
    def softmax_scale(self) -> float:
        return self.H**-0.5 if self.scale is None else self.scale

    @property
    def cache_elements_per_token(self) -> int:
        return self.K * (self.H + self.Hv)  # keys and values

    @property
    def state_bytes_per_sequence(self) -> int:
        return 0

    def tensors(self, D: int) -> tuple[TensorShape, ...]:
        qkv_rows = self.N * self.H + self.K * (self.H + (0 if self.value_from_keys else self.Hv))  # q, then k, then v
        found = [TensorShape("attn.qkv.weight", "qkv", (qkv_rows, D))]
        if self.qkv_bias:
            found.append(TensorShape("attn.qkv.bias", "bias", (qkv_rows,)))
        if self.output_gate:
            found.append(TensorShape("attn.gate.weight", "qkv", (self.N * self.Hv, D)))
        if self.head_gate:
            found.append(TensorShape("attn.gate.weight", "qkv", (self.N, D)))
        if self.qk_norm == "head":
            found += [TensorShape("attn.q_norm.weight", "norm", (self.H,)), TensorShape("attn.k_norm.weight", "norm", (self.H,))]
        elif self.qk_norm == "full":
            found += [TensorShape("attn.q_norm.weight", "norm", (self.N * self.H,)), TensorShape("attn.k_norm.weight", "norm", (self.K * self.H,))]
        if self.sinks:
            found.append(TensorShape("attn.sinks", "bias", (self.N,)))
        found.append(TensorShape("attn.out.weight", "attn_out", (D, self.N * self.Hv)))
        if self.out_bias:
            found.append(TensorShape("attn.out.bias", "bias", (D,)))
        return tuple(found)
