"""Layers whose memory does not grow: a state of fixed size per sequence instead of a cache of keys and values.

Mamba-2 (arXiv:2405.21060), gated delta net (arXiv:2412.06464) with its channel-wise sibling KDA (Kimi Linear, arXiv:2510.26692), lightning attention
(arXiv:2405.17381). Each keeps the matrix state in `state_bytes` an element (fp32 unless a config says otherwise) and, where it has a short convolution,
the last inputs of it in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from tradespace.spec.mixers import TensorShape

CONV_ELEMENT_BYTES = 2  # the convolution's window holds activations


@dataclass(frozen=True, kw_only=True)
class _Recurrent:
    """What all of them share: nothing per token, no window."""

    state_bytes: int = 4  # of one element of the state

    @property
    def cache_elements_per_token(self) -> int:
        return 0

    @property
    def window(self) -> int | None:
        return None


@dataclass(frozen=True, kw_only=True)
class Mamba2(_Recurrent):
    """`N` heads of size `H` with states of `H × S`; `groups` share the input and output matrices B and C; a causal convolution of `conv` steps before."""

    N: int
    H: int
    S: int
    groups: int
    conv: int = 4
    conv_bias: bool = True
    bias: bool = False

    @property
    def conv_width(self) -> int:
        return self.N * self.H + 2 * self.groups * self.S  # x, B, C

    @property
    def state_bytes_per_sequence(self) -> int:
        return self.N * self.H * self.S * self.state_bytes + self.conv_width * (self.conv - 1) * CONV_ELEMENT_BYTES

    def tensors(self, D: int) -> tuple[TensorShape, ...]:
        inner = self.N * self.H
        rows = inner + self.conv_width + self.N  # gate, then x B C, then the step size
        found = [TensorShape("mamba.in.weight", "state", (rows, D))]
        if self.bias:
            found.append(TensorShape("mamba.in.bias", "bias", (rows,)))
        found.append(TensorShape("mamba.conv.weight", "bias", (self.conv_width, self.conv)))
        if self.conv_bias:
            found.append(TensorShape("mamba.conv.bias", "bias", (self.conv_width,)))
        found += [TensorShape(f"mamba.{name}", "bias", (self.N,)) for name in ("dt_bias", "A_log", "D")]
        found.append(TensorShape("mamba.norm.weight", "norm", (inner,)))
        found.append(TensorShape("mamba.out.weight", "state", (D, inner)))
        if self.bias:
            found.append(TensorShape("mamba.out.bias", "bias", (D,)))
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNet(_Recurrent):
    """`K` key heads of size `H` and `N` value heads of size `value_H`, one state of `H × value_H` per value head, decay and write strength per head."""

    N: int
    K: int
    H: int
    value_H: int
    conv: int = 4

    @property
    def conv_width(self) -> int:
        return 2 * self.K * self.H + self.N * self.value_H  # q, k, v

    @property
    def state_bytes_per_sequence(self) -> int:
        return self.N * self.H * self.value_H * self.state_bytes + self.conv_width * (self.conv - 1) * CONV_ELEMENT_BYTES

    def tensors(self, D: int) -> tuple[TensorShape, ...]:
        return (
            TensorShape("delta.qkv.weight", "state", (self.conv_width, D)),
            TensorShape("delta.gate.weight", "state", (self.N * self.value_H, D)),
            TensorShape("delta.beta_decay.weight", "state", (2 * self.N, D)),
            TensorShape("delta.conv.weight", "bias", (self.conv_width, self.conv)),
            TensorShape("delta.dt_bias", "bias", (self.N,)),
            TensorShape("delta.A_log", "bias", (self.N,)),
            TensorShape("delta.norm.weight", "norm", (self.value_H,)),
            TensorShape("delta.out.weight", "state", (D, self.N * self.value_H)),
        )


@dataclass(frozen=True, kw_only=True)
class KimiDeltaAttention(_Recurrent):
    """A delta net that decays every channel on its own: `N` heads of size `H`, decay and output gate through bottlenecks of rank `H`."""

    N: int
    H: int
    conv: int = 4

    @property
    def state_bytes_per_sequence(self) -> int:
        return self.N * self.H * self.H * self.state_bytes + 3 * self.N * self.H * (self.conv - 1) * CONV_ELEMENT_BYTES

    def tensors(self, D: int) -> tuple[TensorShape, ...]:
        width = self.N * self.H
        return (
            TensorShape("delta.qkv.weight", "state", (3 * width, D)),
            TensorShape("delta.decay_down.weight", "state", (self.H, D)),
            TensorShape("delta.decay_up.weight", "state", (width, self.H)),
            TensorShape("delta.gate_down.weight", "state", (self.H, D)),
            TensorShape("delta.gate_up.weight", "state", (width, self.H)),
            TensorShape("delta.beta.weight", "state", (self.N, D)),
            TensorShape("delta.conv.weight", "bias", (3 * width, self.conv)),
            TensorShape("delta.dt_bias", "bias", (width,)),
            TensorShape("delta.A_log", "bias", (self.N,)),
            TensorShape("delta.norm.weight", "norm", (self.H,)),
            TensorShape("delta.out.weight", "state", (D, width)),
        )


@dataclass(frozen=True, kw_only=True)
class LightningAttention(_Recurrent):
    """Linear attention with a fixed decay per head: `N` heads with states of `H × H`, gated output under one norm."""

    N: int
    H: int

    @property
    def state_bytes_per_sequence(self) -> int:
        return self.N * self.H * self.H * self.state_bytes

    def tensors(self, D: int) -> tuple[TensorShape, ...]:
        width = self.N * self.H
        return (
            TensorShape("lightning.qkv.weight", "state", (3 * width, D)),
            TensorShape("lightning.gate.weight", "state", (width, D)),
            TensorShape("lightning.norm.weight", "norm", (width,)),
            TensorShape("lightning.out.weight", "state", (D, width)),
        )
