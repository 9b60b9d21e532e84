"""What a store does with vectors, whatever they are vectors of: planes of a slot each, numbers in, numbers out. One file per way of holding them beside
this.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tradespace.kernels.pages import huge_zeros
from tradespace.spec.kv_workspace import DECODE_ROWS


class Codec(Protocol):
    """X vectors of W elements as `parts` of one row each. Equal vectors have equal parts, whatever lies beside them."""

    def allocate(self, num_slots: int, heads: int, width: int, device: torch.device | str) -> tuple[Tensor, ...]:
        """Planes (num_slots, heads, …), zeroed and touched; their bytes are `spec.kv_stores.Store.nbytes`."""
        ...

    def encode(self, x_XW: Tensor) -> tuple[Tensor, ...]: ...

    def decode(self, parts: tuple[Tensor, ...], width: int, dtype: torch.dtype) -> Tensor:
        """x_XW in `dtype`."""
        ...


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Touched now, so that the peak comes at build."""
    return huge_zeros(shape, dtype, device, purpose="cache").zero_()


def write(codec: Codec, planes: tuple[Tensor, ...], slots_T: Tensor, x_TKW: Tensor) -> None:
    """Puts T tokens of all heads into their slots."""
    T, K, W = x_TKW.shape
    for plane, part in zip(planes, codec.encode(x_TKW.reshape(T * K, W)), strict=True):
        plane.index_copy_(0, slots_T, part.view(T, K, -1))


def write_vectors(codec: Codec, planes: tuple[Tensor, ...], rows_X: Tensor, x_XW: Tensor) -> None:
    """Puts vectors into rows slot · heads + head: other slots for every head."""
    for plane, part in zip(planes, codec.encode(x_XW), strict=True):
        plane.view(-1, plane.shape[-1]).index_copy_(0, rows_X, part)


def read_into(codec: Codec, planes: tuple[Tensor, ...], rows: Tensor | slice, out_SKW: Tensor) -> None:
    """Decodes these slots into `out`, DECODE_ROWS at a time."""
    S, K, W = out_SKW.shape
    for start in range(0, S, DECODE_ROWS):
        stop = min(start + DECODE_ROWS, S)
        if isinstance(rows, slice):
            found = tuple(plane[rows.start + start : rows.start + stop] for plane in planes)
        else:
            found = tuple(plane.index_select(0, rows[start:stop]) for plane in planes)
        parts = tuple(part.reshape((stop - start) * K, -1) for part in found)
        out_SKW[start:stop] = codec.decode(parts, W, out_SKW.dtype).view(stop - start, K, W)
