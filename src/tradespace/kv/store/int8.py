"""int8 with one fp16 scale per token and head: codes -127 … 127, symmetric. 8 + 16/H bits an element."""

from __future__ import annotations

import torch
from torch import Tensor

from tradespace.kv.store.codec import zeros

TINY = 6e-8  # the least positive fp16 number: a vector smaller than 127 of those is held as zero


class Int8:
    """Planes: codes (slots, heads, W), scales (slots, heads, 1)."""

    def allocate(self, num_slots: int, heads: int, width: int, device: torch.device | str) -> tuple[Tensor, ...]:
        return zeros((num_slots, heads, width), torch.int8, device), zeros((num_slots, heads, 1), torch.float16, device)

    def encode(self, x_XW: Tensor) -> tuple[Tensor, ...]:
        x_XW = x_XW.float()
        scale_X1 = (x_XW.abs().amax(-1, keepdim=True) / 127).to(torch.float16)
        # codes belong to the scale as it is held, not as it was computed
        codes_XW = (x_XW / scale_X1.float().clamp_min(TINY)).round_().clamp_(-127, 127)
        return codes_XW.to(torch.int8), scale_X1

    def decode(self, parts: tuple[Tensor, ...], width: int, dtype: torch.dtype) -> Tensor:
        return (parts[0].float() * parts[1].float()).to(dtype)
