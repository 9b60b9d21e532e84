"""Activations in fp32, row by row (`kernels/rows.py`): the functions are the library's, the tile is fixed."""

from torch import Tensor

from tradespace.kernels.activation.torch import FUNCTIONS
from tradespace.kernels.activation.torch import softcap as softcap_rows
from tradespace.kernels.rows import each_row


def activate(x: Tensor, name: str, gated: bool) -> Tensor:
    """hidden (…, F) of x (…, F), or of gate and up side by side (…, 2F) where `gated`; computed in fp32, rounded once."""
    function = FUNCTIONS[name]
    if not gated:
        return each_row(function, x.float()).to(x.dtype)
    gate, up = x.float().chunk(2, dim=-1)
    return each_row(lambda gate_row, up_row: function(gate_row) * up_row, gate, up).to(x.dtype)


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap), in fp32."""
    return each_row(lambda row: softcap_rows(row, cap), x.float()).to(x.dtype)
