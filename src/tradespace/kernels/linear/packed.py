"""Weights as the CUDA kernels read them: chunks of 32 rows, one after the other along the columns, then the next 32 rows. Byte counts: `spec/cuda.py`.

A chunk's row is 16-bit elements. Of four-bit codes element i holds those of columns i, n + i, 2n + i and 3n + i from its lowest bits up, n a quarter of the
chunk's columns; of bytes those of columns i and n + i, n half of them. What pads has the value zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from tradespace.spec.cuda import CHUNK_ROWS, FORMATS, Layout, held

DTYPES = {1: torch.uint8, 2: torch.float16, 4: torch.float32}
PLAIN = {"bf16": torch.bfloat16, "w8a8": torch.int8, "f8a8": torch.float8_e4m3fn}
_PADDING = {"int4": 8, "nf4": 7, "int8": 0, "fp8": 0}  # codes of the value zero


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A packed matrix (R, C).

    codes           uint8 (R / 32 rounded up, chunks, 32, bytes of a chunk's row); of bf16, w8a8 and fp8-a8 the matrix itself, bf16, int8 or e4m3
    scale, zero     (words, R, groups of a word): group g of row r at [g // W, r, g % W]; one word where a scale belongs to a whole row
    nested, offset  fp32, what the uint8 scales of nf4 refer to: scale g of row r to nested[(r · G + g) // 256]
    first_row       where it begins in the stack whose views these tensors are
    """

    format_name: str
    rows: int
    columns: int
    codes: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    nested: Tensor | None = None
    offset: Tensor | None = None
    first_row: int = 0

    @property
    def layout(self) -> Layout:
        return FORMATS[self.format_name]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scale, self.zero, self.nested, self.offset) if part is not None)

    def part(self, start: int, stop: int) -> PackedWeight:
        """Rows start … stop - 1, as views; `start` is a multiple of 32 unless rows lie as they are."""
        codes = self.codes[start:stop] if self.layout.plain else self.codes[start // CHUNK_ROWS : -(-stop // CHUNK_ROWS)]
        assert self.layout.plain or start % CHUNK_ROWS == 0, f"row {start} is inside a chunk"
        scale, zero = (None if x is None else x[:, start:stop] for x in (self.scale, self.zero))
        return replace(self, rows=stop - start, codes=codes, scale=scale, zero=zero, first_row=self.first_row + start)


def allocate(format_name: str, shape: tuple[int, ...], device: torch.device | str) -> PackedWeight:
    """An unfilled weight; a stack's matrices lie one after the other."""
    layout, rows, columns = FORMATS[format_name], prod(shape[:-1]), shape[-1]
    groups = layout.groups(columns)

    def words(nbytes: int) -> Tensor:
        per_word = 4 // nbytes
        return torch.zeros((held(groups, nbytes) // per_word, rows, per_word), dtype=DTYPES[nbytes], device=device)

    if layout.plain:
        codes = torch.empty((rows, columns), dtype=PLAIN[layout.kind], device=device)
    else:
        codes = torch.zeros((-(-rows // CHUNK_ROWS), layout.chunks(columns), CHUNK_ROWS, layout.chunk_row_bytes), dtype=torch.uint8, device=device)
    return PackedWeight(
        format_name=format_name,
        rows=rows,
        columns=columns,
        codes=codes,
        scale=words(layout.scale_bytes) if layout.scale_bytes else None,
        zero=words(layout.zero_bytes) if layout.zero_bytes else None,
        nested=torch.empty(-(-rows * groups // layout.nested), device=device) if layout.nested else None,
        offset=torch.empty(1, device=device) if layout.nested else None,
    )


def pack_rows(codes_RC: Tensor, layout: Layout) -> Tensor:
    """uint8 codes (four-bit numbers, or bytes) of whole rows → (R, chunks, bytes of a chunk's row)."""
    rows, columns = codes_RC.shape
    short = -columns % layout.columns
    if short:
        codes_RC = torch.nn.functional.pad(codes_RC, (0, short), value=_PADDING[layout.kind])
    runs_RXJI = codes_RC.view(rows, -1, 16 // layout.bits, layout.columns * layout.bits // 16)
    if layout.bits == 8:
        packed = runs_RXJI.transpose(2, 3)
    else:
        packed = torch.stack([runs_RXJI[:, :, j] | runs_RXJI[:, :, j + 1] << 4 for j in (0, 2)], dim=3)
    return packed.reshape(rows, -1, layout.chunk_row_bytes)


def unpack_rows(packed_RXB: Tensor, layout: Layout, columns: int) -> Tensor:
    """The inverse: uint8 (R, columns)."""
    rows = len(packed_RXB)
    pairs_RXI2 = packed_RXB.unflatten(2, (-1, 2))
    if layout.bits == 8:
        return pairs_RXI2.transpose(2, 3).reshape(rows, -1)[:, :columns]
    parts = [part for byte in (0, 1) for part in (pairs_RXI2[..., byte] & 15, pairs_RXI2[..., byte] >> 4)]
    return torch.stack(parts, dim=2).reshape(rows, -1)[:, :columns]


@torch.no_grad()
def fill(weight: PackedWeight, rows: slice | Tensor, codes_RC: Tensor, parts: Mapping[str, Tensor]) -> None:
    """Writes whole rows: `codes_RC` as `formats.Codes` has them, `parts` scale_RG and zero_RG."""
    layout, device = weight.layout, weight.codes.device
    ids = torch.arange(weight.rows, device=device)[rows] if isinstance(rows, slice) else rows.to(device)
    if layout.plain:
        values_RC = codes_RC.to(device, weight.codes.dtype).contiguous()
        weight.codes.view(torch.uint8).index_copy_(0, ids, values_RC.view(torch.uint8))  # as bytes: e4m3 has no index_copy_
    else:
        weight.codes[ids // CHUNK_ROWS, :, ids % CHUNK_ROWS] = pack_rows(codes_RC.to(device).contiguous().view(torch.uint8), layout)
    for name, part_RG in parts.items():
        _fill_words(getattr(weight, name), ids, part_RG)


def fill_scales(weight: PackedWeight, ids: Tensor, scale_RG: Tensor) -> None:
    """Writes the scales of these rows alone."""
    assert weight.scale is not None, f"{weight.format_name} has no scales"
    _fill_words(weight.scale, ids, scale_RG)


def _fill_words(held_WRP: Tensor, ids: Tensor, part_RG: Tensor) -> None:
    part_RG = part_RG.to(held_WRP.device, held_WRP.dtype)
    padded = torch.nn.functional.pad(part_RG, (0, held_WRP.shape[0] * held_WRP.shape[2] - part_RG.shape[1]))
    held_WRP[:, ids] = padded.view(len(ids), held_WRP.shape[0], held_WRP.shape[2]).transpose(0, 1)


def codes_of(weight: PackedWeight, rows: slice | Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(codes uint8 (R, columns), scale_RG, zero_RG) of whole rows, as `fill` was given them."""
    layout = weight.layout
    ids = torch.arange(weight.rows, device=weight.codes.device)[rows] if isinstance(rows, slice) else rows
    groups = layout.groups(weight.columns)
    scale, zero = (None if x is None else x[:, ids].transpose(0, 1).reshape(len(ids), -1)[:, :groups] for x in (weight.scale, weight.zero))
    codes = (
        weight.codes.view(torch.uint8)[ids].view(weight.codes.dtype)
        if layout.plain
        else unpack_rows(weight.codes[ids // CHUNK_ROWS, :, ids % CHUNK_ROWS], layout, weight.columns)
    )
    return codes, scale, zero
