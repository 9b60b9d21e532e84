"""The activations of a feed-forward inside other kernels, in fp32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Through a sigmoid: exact at both ends."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def activation(x, NAME: tl.constexpr):
    """`kernels/activation` by name."""
    if NAME == "silu":
        y = x * tl.sigmoid(x)
    elif NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif NAME == "relu":
        y = tl.maximum(x, 0.0)
    else:
        tl.static_assert(NAME == "relu2", "no such activation")
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    return y
