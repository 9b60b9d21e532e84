"""File → model, one stored tensor at a time, in row chunks straight into the rows where they belong. Peak beside the model: `staging_bytes`.

Every tensor of the model is filled exactly once, and every stored tensor is used or known to be harmless: all of that is checked against the files' headers
before the first byte of data is read. How a row becomes codes is the business of `fill`, a quantizer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tradespace.errors import BudgetError, CorruptFileError, InputError
from tradespace.formats import Codes, CudaWeight, DenseWeight, ScaledWeight, Weight
from tradespace.formats.ggml_blocks import finite_blocks
from tradespace.formats.ggml_widen import INSIDE_Q8_0, widen_to_q8_0
from tradespace.loading.dequantize import iter_raw_rows, iter_rows, plain_dtype
from tradespace.loading.gguf import GGUFFile, GGUFTensor
from tradespace.loading.names import Piece, gguf_pieces, hugging_face_pieces, is_harmless
from tradespace.loading.rawfile import shown
from tradespace.loading.safetensors import SafetensorsFile
from tradespace.spec.formats import FORMATS
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import model_tensors
from tradespace.units import format_bytes

Source = GGUFFile | SafetensorsFile


class Fill(Protocol):
    """Writes float rows (which it may overwrite) into a weight: from row `rows` on, or at the rows that an index tensor names."""

    def __call__(self, weight: Weight, rows: int | Tensor, values_RC: Tensor, *, name: str) -> None: ...


def load_weights(
    model: nn.Module,
    source: Source,
    spec: ModelSpec,
    *,
    fill: Fill,
    staging_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fills `model` (whose tensors are named as `model_tensors(spec)`) from an open GGUF file or a folder of safetensors.

    progress  called with (stored bytes read, of how many) after each tensor.
    Raises CorruptFileError for a missing, surplus or misshapen tensor (name, need, have), InputError for NaN or infinity in weights, BudgetError where
    `staging_bytes` cannot hold a row.
    """
    pieces = check_pieces(source, spec)
    total_bytes = sum(source.tensors[piece.source].nbytes for piece in pieces)
    done_bytes = 0
    for _, parts in groupby(pieces, key=lambda piece: piece.target):
        parts = tuple(parts)
        observe_pieces(model, source, parts, staging_bytes)
        for piece in parts:
            load_piece(model, source, piece, fill, staging_bytes)
            done_bytes += source.tensors[piece.source].nbytes
            if progress is not None:
                progress(done_bytes, total_bytes)


def observe_pieces(model: nn.Module, source: Source, pieces: Iterable[Piece], staging_bytes: int) -> None:
    """Reads all `pieces` of one tensor once before they are loaded, where its format has scales that span rows (per matrix, per block): those must see all."""
    for piece in pieces:
        module = None if piece.is_vector else model.get_submodule(piece.target.rsplit(".", 1)[0])
        if isinstance(module, ScaledWeight) and module.spans_rows:
            for rows, values_RC in _row_chunks(source, piece, staging_bytes, torch.float32):
                module.observe(slice(rows, rows + len(values_RC)) if isinstance(rows, int) else rows, values_RC)


def stored_formats(source: Source, spec: ModelSpec) -> dict[str, str | None]:
    """For each matrix of the model, by name, the format in which the file's own bytes can be held unchanged; None where there is none.

    GGUF blocks and floats are; a fused tensor (q, k and v; gate and up) only where all of its parts are stored alike. Raises as `check_pieces`.
    """
    found: dict[str, str | None] = {}
    for target, parts in groupby(check_pieces(source, spec), key=lambda piece: piece.target):
        pieces = tuple(parts)
        if pieces[0].is_vector:
            continue
        names = {stored_format(source, piece) for piece in pieces}
        found[target] = names.pop() if len(names) == 1 else None
    return found


_FLOAT_FORMATS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


def stored_format(source: Source, piece: Piece) -> str | None:
    """The format in which the bytes of one stored matrix can be held unchanged; None where there is none."""
    stored = source.tensors[piece.source]
    type_name = stored.type_name if isinstance(stored, GGUFTensor) else stored.dtype
    name = _FLOAT_FORMATS.get(type_name, type_name.lower() if isinstance(stored, GGUFTensor) else "")
    if name in FORMATS and (name in _FLOAT_FORMATS.values() or not piece.transposed):
        return name
    return None


def check_pieces(source: Source, spec: ModelSpec) -> tuple[Piece, ...]:
    """The pieces of `source` that make up the model, held against the headers. Raises CorruptFileError (name, need, have)."""
    if isinstance(source, GGUFFile):
        pieces = gguf_pieces(spec, source.metadata.get("general.architecture", ""))
    else:
        pieces = hugging_face_pieces(spec, source.tensors)
    filled: dict[str, int] = {}
    for piece in pieces:
        check_piece(source, piece, spec)
        filled[piece.target] = filled.get(piece.target, 0) + piece.num_rows
    for tensor in model_tensors(spec):
        assert filled.get(tensor.name) == tensor.shape[0], f"{tensor.name}: {filled.get(tensor.name)} of {tensor.shape[0]} rows have a source"
    check_surplus(source, {piece.source for piece in pieces}, spec)
    return pieces


def check_piece(source: Source, piece: Piece, spec: ModelSpec) -> None:
    """Raises CorruptFileError where the stored tensor of `piece` is missing or has another shape."""
    stored = source.tensors.get(piece.source)
    if stored is None:
        raise CorruptFileError(
            f"{source.path}: tensor {shown(piece.source)} {list(piece.source_shape)} of {spec.name} is missing; there are {len(source.tensors)} others. "
            "The file is incomplete, or its configuration belongs to another model"
        )
    if tuple(stored.shape) != piece.source_shape:
        raise CorruptFileError(
            f"{source.path}: tensor {shown(piece.source)} must have shape {list(piece.source_shape)} for {spec.name}, has {list(stored.shape)}. "
            "The file is damaged, or its configuration belongs to another model"
        )


def check_surplus(source: Source, used: Collection[str], spec: ModelSpec) -> None:
    """Raises CorruptFileError for stored tensors that nothing uses and that are not known to be harmless."""
    surplus = [name for name in source.tensors if name not in used and not is_harmless(name, spec)]
    if surplus:
        names = ", ".join(shown(name) for name in surplus[:3]) + (f" and {len(surplus) - 3} more" if len(surplus) > 3 else "")
        raise CorruptFileError(f"{source.path}: {names}: {spec.name} has no such tensor. The file's configuration belongs to another model")


def load_piece(model: nn.Module, source: Source, piece: Piece, fill: Fill, staging_bytes: int) -> None:
    stem, kind = piece.target.rsplit(".", 1)
    module: Any = model.get_submodule(stem)
    if piece.is_vector:
        _load_vector(getattr(module, kind).data, source, piece, staging_bytes)
        return
    assert hasattr(module, "set_rows"), f"{piece.target} is no weight"
    if (stored_type := _held_as_stored(module, source, piece)) is not None:
        for row, raw_RB in iter_raw_rows(source, piece.source, staging_bytes=staging_bytes):
            if not finite_blocks(raw_RB, FORMATS[stored_type.lower()]):
                raise InputError(f"tensor {shown(piece.source)}: a block from row {row} on has a scale that is NaN or infinite. The checkpoint is damaged")
            rows = target_rows(piece, row, len(raw_RB))
            if module.format_name != stored_type.lower():
                raw_RB = widen_to_q8_0(raw_RB, stored_type)
            module.set_rows(slice(rows, rows + len(raw_RB)) if isinstance(rows, int) else rows, Codes(raw_RB))
        return
    # whole rows in the dtype in which they are kept need no second buffer; codes are computed in fp32, on a device from floats as they are stored
    dtype = module.weight.dtype if isinstance(module, DenseWeight) and not piece.transposed else torch.float32
    on_device = isinstance(module, CudaWeight) and not piece.transposed
    if on_device:
        dtype = plain_dtype(source.tensors[piece.source]) or dtype
    for rows, values_RC in _row_chunks(source, piece, staging_bytes, dtype, ahead=on_device):
        fill(module, rows, values_RC, name=shown(piece.source))


def _held_as_stored(module: Weight, source: Source, piece: Piece) -> str | None:
    """The file's block type where its blocks are the format's own, or become so without a change of value: then nothing is re-quantized. Else None."""
    stored = source.tensors[piece.source]
    if not isinstance(stored, GGUFTensor) or piece.transposed:
        return None
    fmt, name = FORMATS[module.format_name], stored.type_name.lower()
    if fmt.block is None or fmt.group is not None:
        return None
    return stored.type_name if fmt.name == name or (fmt.name == "q8_0" and name in INSIDE_Q8_0) else None


def _row_chunks(source: Source, piece: Piece, staging_bytes: int, dtype: torch.dtype, *, ahead: bool = False) -> Iterator[tuple[int | Tensor, Tensor]]:
    """(where the rows go, the rows as floats) over a stored matrix. The rows are a view of a buffer that the next step overwrites."""
    if piece.transposed:
        yield from _transposed_chunks(source, piece, staging_bytes)
        return
    for row, values_RC in iter_rows(source, piece.source, staging_bytes=staging_bytes, dtype=dtype, ahead=ahead):
        yield target_rows(piece, row, len(values_RC)), values_RC


def target_rows(piece: Piece, row: int, count: int) -> int | Tensor:
    if piece.order == "stacked":
        return piece.row_start + row
    return torch.tensor([piece.row_start + piece.target_row(stored) for stored in range(row, row + count)])


def _load_vector(target: Tensor, source: Source, piece: Piece, staging_bytes: int) -> None:
    """A norm or a bias: one stored row, sent to its places."""
    for _, values_1R in iter_rows(source, piece.source, staging_bytes=staging_bytes):
        values_R = values_1R[0]
        if not values_R.isfinite().all():
            raise InputError(f"tensor {shown(piece.source)} holds NaN or infinity. The checkpoint is damaged, or training had diverged")
        if piece.added:
            values_R = values_R.add_(piece.added)
        places = target_rows(piece, 0, piece.num_rows)
        if isinstance(places, int):
            target[places : places + piece.num_rows].copy_(values_R)
        else:
            target.index_copy_(0, places.to(target.device), values_R.to(target.device, target.dtype))


def _transposed_chunks(source: Source, piece: Piece, staging_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """Stored as (in, out): half of the staging holds as many of our rows as fit, the other half reads the whole file's tensor past them."""
    half_bytes = staging_bytes // 2
    tile_rows = min(piece.num_rows, half_bytes // (4 * piece.num_columns))
    if tile_rows < 1:
        need = 8 * piece.num_columns
        raise BudgetError(
            f"tensor {shown(piece.source)}: a transposed row needs {format_bytes(need)} of staging; it has {format_bytes(staging_bytes)}",
            need_bytes=need,
            have_bytes=staging_bytes,
        )
    tile_RC = torch.empty(tile_rows, piece.num_columns)
    for start in range(0, piece.num_rows, tile_rows):
        stop = min(start + tile_rows, piece.num_rows)
        for column, values_CR in iter_rows(source, piece.source, staging_bytes=half_bytes):
            tile_RC[: stop - start, column : column + len(values_CR)].copy_(values_CR[:, start:stop].T)
        yield piece.row_start + start, tile_RC[: stop - start]
