"""Blocks of one GGUF type as blocks of another that holds the same values exactly: q4_0 and q5_0 as q8_0, whose codes have room for theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from tradespace.formats.ggml_blocks import DEQUANTIZERS

# formats whose values q8_0 holds exactly: whole numbers below 128 times one scale per 32
INSIDE_Q8_0 = ("q4_0", "q5_0", "q8_0")
_BLOCK = 32


def widen_to_q8_0(raw_RB: Tensor, type_name: str) -> Tensor:
    """Rows of Q4_0 or Q5_0 blocks as rows of Q8_0 blocks with the same scales and the same values, bit for bit."""
    name = type_name.lower()
    if name == "q8_0":
        return raw_RB
    size = {"q4_0": 18, "q5_0": 22}[name]
    rows = len(raw_RB)
    blocks_NB = raw_RB.reshape(-1, size).clone()
    scale_N2 = blocks_NB[:, :2].clone()
    # a block with the scale 1 dequantizes to its codes
    blocks_NB[:, 0], blocks_NB[:, 1] = 0x00, 0x3C
    codes_NE = torch.empty(len(blocks_NB), _BLOCK)
    DEQUANTIZERS[type_name.upper()](blocks_NB, codes_NE)
    return torch.cat([scale_N2, codes_NE.to(torch.int8).view(torch.uint8)], dim=1).view(rows, -1)
