"""int4 and int2 in groups: neighbouring elements of a token and head share a scale and a minimum, both fp16; codes packed, the lowest bits first.

x ≈ minimum + code · scale, codes 0 … 2^bits - 1. bits + 1 an element for groups of 32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tradespace.kv.store.codec import zeros

TINY = 6e-8


def pack(codes_XW: Tensor, bits: int) -> Tensor:
    """uint8 codes (X, W) → bytes (X, ceil(W · bits / 8))."""
    per_byte = 8 // bits
    codes_XBP = pad(codes_XW, (0, -codes_XW.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    packed_XB = codes_XBP[..., 0].clone()
    for place in range(1, per_byte):
        packed_XB |= codes_XBP[..., place] << (place * bits)
    return packed_XB


def unpack(packed_XB: Tensor, bits: int, width: int) -> Tensor:
    """The codes again, (X, width)."""
    shifts_P = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed_XB.device)
    return ((packed_XB[..., None] >> shifts_P) & (2**bits - 1)).flatten(1)[:, :width]


def affine_codes(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8, scale, minimum) of x in fp32, one scale and minimum along `dim` (kept with size 1), both as fp16 holds them."""
    low, high = x.amin(dim, keepdim=True).half(), x.amax(dim, keepdim=True)
    scale = ((high - low.float()) / (2**bits - 1)).clamp_min(0).half()
    codes = ((x - low.float()) / scale.float().clamp_min(TINY)).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, low


@dataclass(frozen=True, slots=True)
class Grouped:
    """Planes: packed codes (slots, heads, W·bits/8), scales and minima (slots, heads, 2·groups)."""

    bits: int
    group: int

    def allocate(self, num_slots: int, heads: int, width: int, device: torch.device | str) -> tuple[Tensor, ...]:
        codes = zeros((num_slots, heads, -(-width * self.bits // 8)), torch.uint8, device)
        return codes, zeros((num_slots, heads, 2 * -(-width // self.group)), torch.float16, device)

    def encode(self, x_XW: Tensor) -> tuple[Tensor, ...]:
        X, W = x_XW.shape
        # a last group that is not full repeats its last element, which moves neither minimum nor maximum
        short = -W % self.group
        x_XW = x_XW.float()
        if short:
            x_XW = torch.cat((x_XW, x_XW[:, -1:].expand(X, short)), dim=1)
        codes_XGC, scale_XG1, low_XG1 = affine_codes(x_XW.unflatten(1, (-1, self.group)), self.bits, 2)
        return pack(codes_XGC.flatten(1)[:, :W], self.bits), torch.cat((scale_XG1[..., 0], low_XG1[..., 0]), dim=1)

    def decode(self, parts: tuple[Tensor, ...], width: int, dtype: torch.dtype) -> Tensor:
        codes_XW = unpack(parts[0], self.bits, width)
        scale_XG, low_XG = parts[1].float().chunk(2, dim=1)
        if width % self.group == 0:
            groups_XGC = codes_XW.unflatten(1, (-1, self.group)).float()
            return groups_XGC.mul_(scale_XG[..., None]).add_(low_XG[..., None]).flatten(1).to(dtype)
        scale_XW, low_XW = (x.repeat_interleave(self.group, dim=1)[:, :width] for x in (scale_XG, low_XG))
        return (codes_XW.float() * scale_XW + low_XW).to(dtype)
