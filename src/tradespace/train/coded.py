"""A moment in 8 bits: dynamic codes, fine near zero, with one fp32 scale for each 256 numbers (arXiv:1511.04561, 2110.02861). 1.016 bytes a number.

Signed for first moments; unsigned for second ones, whose codes have a bit more of range instead of the sign.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tradespace.formats.nf4 import dynamic_levels
from tradespace.spec.training import BLOCK_8BIT


@lru_cache(maxsize=8)
def unsigned_levels(device: torch.device) -> Tensor:
    """256 values from 0 to 1, ascending: seven decades with 2, 4 … 128 steps, each step in its middle, 0 and 1."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + 1) + 1, dtype=torch.float32)
        found += ((edges[:-1] + edges[1:]) / 2 * 10 ** (decade - 6)).tolist()
    return torch.tensor(sorted(found), dtype=torch.float32, device=device)


@lru_cache(maxsize=8)
def edges(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 levels of a moment, ascending, and the 255 values between which they are the nearest."""
    levels = dynamic_levels(device) if signed else unsigned_levels(device)
    return levels, (levels[:-1] + levels[1:]) / 2


class Coded:
    """Views of a moment's codes and scales."""

    def __init__(self, codes_N: Tensor, scales_B: Tensor, *, signed: bool):
        self.codes_N, self.scales_B, self.signed = codes_N, scales_B, signed

    @staticmethod
    def zero(signed: bool) -> int:
        """The code of 0."""
        levels, _ = edges(signed, torch.device("cpu"))
        return int((levels == 0).nonzero()[0])

    def read(self) -> Tensor:
        """fp32 values."""
        levels, _ = edges(self.signed, self.codes_N.device)
        values = levels[self.codes_N.int()]
        return values.mul_(self.scales_B.repeat_interleave(BLOCK_8BIT)[: len(values)])

    def write(self, values_N: Tensor) -> None:
        """Rounded to the nearest code of their block's largest magnitude."""
        _, between = edges(self.signed, self.codes_N.device)
        count = len(values_N)
        padded_BG = torch.nn.functional.pad(values_N, (0, -count % BLOCK_8BIT)).view(-1, BLOCK_8BIT)
        self.scales_B.copy_(padded_BG.abs().amax(dim=1))
        unit_BG = padded_BG / self.scales_B.clamp(min=1e-38)[:, None]
        self.codes_N.copy_(torch.bucketize(unit_BG, between, out_int32=True).flatten()[:count].to(torch.uint8))
