"""The library's activations, over all rows at once."""

from collections.abc import Callable

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
    gate, up = x.chunk(2, dim=-1)
    return function(gate) * up


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap): bounded by ±cap, near the identity around 0."""
    return torch.tanh(x / cap) * cap
