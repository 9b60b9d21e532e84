"""Dense stores: an element is a plain fp32, bf16 or fp16 number. Exact where the activations have that dtype, else one rounding on the way in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tradespace.kernels.pages import huge_zeros


@dataclass(frozen=True, slots=True)
class Dense:
    """Holds vectors of one width as they are, in `dtype`."""

    dtype: torch.dtype

    def allocate(self, num_slots: int, heads: int, width: int, device: torch.device | str) -> tuple[Tensor]:
        """One plane, codes_SKH for `num_slots` tokens, zeroed, so that every page is touched now and nothing in it is ever NaN by chance."""
        return (huge_zeros((num_slots, heads, width), self.dtype, device, purpose="cache").zero_(),)

    def write(self, codes_SKH: Tensor, slots_T: Tensor, x_TKH: Tensor) -> None:
        codes_SKH.index_copy_(0, slots_T, x_TKH.to(self.dtype))

    def read(self, codes_SKH: Tensor, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """x_SKH of `rows` in `dtype`: a view for a slice that needs no cast."""
        found_SKH = codes_SKH[rows] if isinstance(rows, slice) else codes_SKH.index_select(0, rows)
        return found_SKH.to(dtype)

    # as a codec (`kv/store/codec.py`), for views that hold keys and values in different ways

    def encode(self, x_XW: Tensor) -> tuple[Tensor, ...]:
        return (x_XW.to(self.dtype),)

    def decode(self, parts: tuple[Tensor, ...], width: int, dtype: torch.dtype) -> Tensor:
        return parts[0].to(dtype)
