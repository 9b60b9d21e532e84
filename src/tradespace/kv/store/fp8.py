"""fp8 e4m3 without a scale: one byte an element, 3 bits of mantissa, up to ±448. Keys and values lie well within that. arXiv:2209.05433"""

from __future__ import annotations

import torch
from torch import Tensor

from tradespace.kv.store.codec import zeros

LARGEST = 448.0  # beyond it e4m3 has nothing but NaN


class Fp8:
    """Bytes, because few operations on fp8 tensors exist."""

    def allocate(self, num_slots: int, heads: int, width: int, device: torch.device | str) -> tuple[Tensor, ...]:
        return (zeros((num_slots, heads, width), torch.uint8, device),)

    def encode(self, x_XW: Tensor) -> tuple[Tensor, ...]:
        return (x_XW.float().clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8),)

    def decode(self, parts: tuple[Tensor, ...], width: int, dtype: torch.dtype) -> Tensor:
        return parts[0].contiguous().view(torch.float8_e4m3fn).to(dtype)
