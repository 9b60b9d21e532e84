"""fp8 weights with a scale per row, and activations in fp8 (e4m3) with a scale per token, as the fp8 tensor cores multiply them (arXiv:2209.05433).

y = (x_codes @ w_codes.T) · x_scale · w_scale, x_scale = max|x| / 448 of each token. Here the codes are multiplied as the floats that they stand for, exactly
in every dtype of activations; on a CUDA device (`formats/cuda.py`) by its own instruction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tradespace.formats.scaled import ScaledWeight

LARGEST = 448.0


def round_tokens(x_TC: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 codes [T, C] as x's dtype, fp32 scales [T, 1]): each token by its own largest magnitude."""
    scale_T1 = x_TC.abs().amax(dim=1, keepdim=True).float() / LARGEST
    codes_TC = (x_TC.float() / scale_T1.masked_fill(scale_T1 == 0, torch.inf)).to(torch.float8_e4m3fn)
    return codes_TC.to(x_TC.dtype), scale_T1


class FP8A8Weight(ScaledWeight):
    """As `ScaledWeight`, of rounded activations."""

    def _product(self, x_TC: Tensor, first_row: int) -> Tensor:
        if not len(x_TC):
            return x_TC.new_empty(0, self.shape[-2])
        codes_TC, scale_T1 = round_tokens(x_TC)
        return (super()._product(codes_TC, first_row) * scale_T1).to(x_TC.dtype)
