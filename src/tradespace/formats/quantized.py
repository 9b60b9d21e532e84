"""A weight held as codes: the one module behind all formats that are not floats. What a code means is its codec's business (affine.py, scaled.py, nf4.py …).

A product never needs the whole matrix as floats: tiles of rows are decoded into the shared workspace, multiplied, and forgotten. Where a scale belongs to a
whole row, bare codes are multiplied and the product is scaled in its place: codes are exact in bf16, scaled weights would not be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor, nn

from tradespace.errors import EngineError
from tradespace.formats.codes import Codes
from tradespace.formats.hadamard import Rotation
from tradespace.formats.workspace import Workspace
from tradespace.kernels.linear import LINEAR, Linear
from tradespace.spec.formats import WeightFormat
from tradespace.spec.weights import tile_rows

# decoded at a time: a codec's temporaries (at most DECODE_BYTES_PER_ELEMENT each) stay in the cache between its operations
DECODE_ELEMENTS = 2**16
DECODE_BYTES_PER_ELEMENT = 24


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a format: so many columns of a dtype for every row, or for every `scale_rows` rows (0: for every matrix)."""

    dtype: torch.dtype
    columns: int
    scale_rows: int = 1


class Codec(Protocol):
    """How rows of codes lie in bytes, and what they mean. Stateless.

    row_scale   the scale is one number a row: `decode` leaves it out, since a product can be scaled afterwards
    rotation    what the values have been multiplied by along their columns; None: they lie as they are
    """

    @property
    def fmt(self) -> WeightFormat: ...
    @property
    def row_scale(self) -> bool: ...
    def rotation(self, columns: int) -> Rotation | None: ...
    def parts(self, columns: int) -> dict[str, Part]: ...
    def pack(self, codes: Codes) -> dict[str, Tensor]: ...
    def unpack(self, parts: Mapping[str, Tensor], columns: int) -> Codes: ...
    def decode(self, codes: Codes, out_RC: Tensor) -> None:
        """Writes values (rotated, and without the row's scale) to contiguous `out_RC`: fp32, or any float dtype where `row_scale`."""
        ...


def decode_values(codec: Codec, codes: Codes, columns: int) -> Tensor:
    """values_RC in fp32: scaled, rotated back. Takes the codec's temporaries for all of them at once."""
    values_RC = torch.empty(len(codes), columns, device=codes.codes_RC.device)
    codec.decode(codes, values_RC)
    if codec.row_scale:
        values_RC.mul_(codes.need_scale())
    rotation = codec.rotation(columns)
    return values_RC if rotation is None else rotation.undo(values_RC)


class QuantizedWeight(nn.Module):
    """A matrix (R, C), or a stack of experts' matrices (E, R, C), as the tensors that its codec names: `weight`, mostly `scale`. Never trainable."""

    bias: nn.Parameter | None
    weight: Tensor
    needs_workspace = True

    def __init__(
        self,
        codec: Codec,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        device: torch.device | str = "cpu",
        linear: str = "torch",
        workspace: Workspace | None = None,
    ):
        """Uninitialised; `dtype` is that of the activations. A product needs the `workspace`, a look-up does not."""
        super().__init__()
        self.codec, self.shape, self.dtype, self.workspace = codec, shape, dtype, workspace
        self.kernel: Linear = LINEAR[linear]
        self.parts = codec.parts(shape[-1])
        self.rotation = codec.rotation(shape[-1])
        self.register_parameter("bias", None)  # as DenseWeight's
        for name, part in self.parts.items():
            rows = -(-shape[-2] // part.scale_rows) if part.scale_rows else 1
            self.register_buffer(name, torch.empty((*shape[:-2], rows, part.columns), dtype=part.dtype, device=device))

    @property
    def fmt(self) -> WeightFormat:
        return self.codec.fmt

    @property
    def format_name(self) -> str:
        return self.fmt.name

    @property
    def num_rows(self) -> int:
        """Rows of all matrices of the stack."""
        return prod(self.shape[:-1])

    @property
    def rows_RC(self) -> Tensor:
        """The bare codes as they are stored, as rows of the last dimension, experts stacked."""
        return self.weight.view(-1, self.weight.shape[-1])

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.parts)

    def _places(self, part: Part, rows: slice | Tensor) -> slice | Tensor:
        """Where these rows (of all matrices) find theirs in a tensor of the format."""
        if part.scale_rows == 1:
            return rows
        R = self.shape[-2]
        ids = torch.arange(self.num_rows, device=self.weight.device)[rows]
        per_matrix, rows_each = (-(-R // part.scale_rows), part.scale_rows) if part.scale_rows else (1, R)
        return ids // R * per_matrix + ids % R // rows_each

    def _flat(self, name: str) -> Tensor:
        held = getattr(self, name)
        return held.view(-1, held.shape[-1])

    @torch.no_grad()
    def set_rows(self, rows: slice | Tensor, codes: Codes) -> None:
        """Fills whole rows (a slice, or indices) of the stack of matrices."""
        for name, values in self.codec.pack(codes).items():
            held_RC, places = self._flat(name), self._places(self.parts[name], rows)
            if isinstance(places, slice):
                held_RC[places].copy_(values)
            elif held_RC.dtype == torch.float8_e4m3fn:  # torch scatters no 8-bit floats
                held_RC.view(torch.uint8).index_copy_(0, places, values.to(held_RC.dtype).view(torch.uint8))
            else:
                held_RC.index_copy_(0, places, values.to(held_RC.dtype))

    def get_rows(self, start: int, stop: int) -> Codes:
        """What `set_rows` was given for rows start … stop - 1."""
        return self._codes(slice(start, stop))

    def _codes(self, rows: slice | Tensor) -> Codes:
        parts = {name: self._flat(name)[self._places(part, rows)] for name, part in self.parts.items()}
        return self.codec.unpack(parts, self.shape[-1])

    def linear(self, x_TC: Tensor, bias_R: Tensor | None = None, *, expert: int | None = None) -> Tensor:
        """y_TR = x @ W.T (+ bias), in x's dtype; of one matrix of the stack where `expert` names it."""
        if self.workspace is None:
            raise EngineError(f"a product in {self.fmt.name} needs a workspace to decode into; give the weight one")
        if x_TC.requires_grad:
            raise EngineError(f"{self.fmt.name} weights pass no gradient on; hold what lies above the trained parameters in bf16 or fp32")
        y_TR = self._product(x_TC, 0 if expert is None else expert * self.shape[-2])
        return y_TR if bias_R is None else y_TR.add_(bias_R)

    def _product(self, x_TC: Tensor, first_row: int) -> Tensor:
        """x @ W.T of the matrix whose rows begin at `first_row`, tile by tile."""
        assert self.workspace is not None, "checked by linear"
        num_rows, num_columns = self.shape[-2:]
        if self.rotation is not None:
            x_TC = self.rotation.apply(x_TC)
        tiles, step = [], tile_rows(num_rows, num_columns)
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            tile_RC = self.workspace.tile(stop - start, num_columns)
            scale_R1 = self._decode_tile(first_row + start, tile_RC)
            if scale_R1 is None:
                tiles.append(self.kernel(x_TC, tile_RC, None))
            elif x_TC.dtype == torch.float16:  # a product of bare codes could overflow: scale the weights
                tiles.append(self.kernel(x_TC, tile_RC.mul_(scale_R1), None))
            else:
                tiles.append(self.kernel(x_TC, tile_RC, None).mul_(scale_R1[:, 0]))
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1)

    def _decode_tile(self, first_row: int, tile_RC: Tensor) -> Tensor | None:
        """Decodes rows from `first_row` on into the tile; returns the scales that are still to be applied."""
        step = max(1, DECODE_ELEMENTS // tile_RC.shape[1])
        direct = self.codec.row_scale or tile_RC.dtype == torch.float32
        scratch_RC = None if direct else torch.empty(min(step, len(tile_RC)), tile_RC.shape[1], device=tile_RC.device)
        scales = []
        for start in range(0, len(tile_RC), step):
            stop = min(start + step, len(tile_RC))
            codes = self._codes(slice(first_row + start, first_row + stop))
            if scratch_RC is None:
                self.codec.decode(codes, tile_RC[start:stop])
            else:
                self.codec.decode(codes, scratch_RC[: stop - start])
                tile_RC[start:stop].copy_(scratch_RC[: stop - start])
            if self.codec.row_scale:
                scales.append(codes.need_scale())
        return torch.cat(scales) if scales else None

    def rows(self, ids_T: Tensor) -> Tensor:
        """The rows of these ids (T, C) as floats of the activations' dtype: an embedding's look-up."""
        return self._values(ids_T)

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Rows start … stop - 1 as floats of the activations' dtype."""
        return self._values(torch.arange(start, stop, device=self.weight.device))

    def _values(self, ids_T: Tensor) -> Tensor:
        """A few rows at a time, so that beside the result there is never more than a codec's temporaries for DECODE_ELEMENTS."""
        out_TC = torch.empty(len(ids_T), self.shape[-1], dtype=self.dtype, device=self.weight.device)
        step = max(1, DECODE_ELEMENTS // self.shape[-1])
        for start in range(0, len(ids_T), step):
            out_TC[start : start + step] = decode_values(self.codec, self._codes(ids_T[start : start + step]), self.shape[-1])
        return out_TC
