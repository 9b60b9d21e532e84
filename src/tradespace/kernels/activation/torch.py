"""The library's activations, over all rows at once; SwiGLU that learns on a CUDA device, by one kernel each way (Triton)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),  # arXiv:2109.08668
}


def activate(x: Tensor, name: str, gated: bool) -> Tensor:
    """hidden (…, F) of x (…, F), or of gate and up side by side (…, 2F) where `gated`."""
    function = FUNCTIONS[name]
    if not gated:
        return function(x)
    if name == "silu" and x.requires_grad and torch.is_grad_enabled():
        return SwiGLU.apply(x)  # pyright: ignore[reportReturnType]
    gate, up = x.chunk(2, dim=-1)
    return function(gate) * up


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up that keeps its input alone for the backward pass: 2·F numbers a token, where autograd's own would keep silu(gate), too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        if x.is_cuda:
            from tradespace.kernels.activation.triton_swiglu import swiglu

            return swiglu(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,), dout = ctx.saved_tensors, gradients[0]
        if x.is_cuda:
            from tradespace.kernels.activation.triton_swiglu import swiglu

            return swiglu(x, dout)
        return _swiglu_backward(x, dout)


def _swiglu_backward(x: Tensor, dout: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    dx = torch.empty_like(x)
    dgate, dup = dx.chunk(2, dim=-1)
    torch.mul(F.silu(gate), dout, out=dup)
    dgate.copy_(torch.ops.aten.silu_backward(dout * up, gate))
    return dx


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap): bounded by ±cap, near the identity around 0."""
    return torch.tanh(x / cap) * cap
