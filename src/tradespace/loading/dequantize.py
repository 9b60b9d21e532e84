"""Tensor data in bounded row chunks, dequantized: file → one staging buffer → float rows.

Weights are never mapped: mapped pages would count as the process's own. A chunk's rows are read into a buffer that is allocated once, and turned into
floats tile by tile, so what a chunk takes (stored rows + floats + temporaries) is known before anything is read and stays within `staging_bytes`.

What a block's bytes mean is `formats/ggml_blocks.py`'s business: bitwise as the `gguf` package has it; the cast to another dtype comes last.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tradespace.errors import BudgetError, InputError, UnsupportedError
from tradespace.formats.ggml_blocks import DEQUANTIZERS as HELD_DEQUANTIZERS
from tradespace.formats.ggml_float_blocks import FLOAT_DEQUANTIZERS
from tradespace.loading.gguf import GGML_TYPES, GGUFFile, GGUFTensor
from tradespace.loading.rawfile import open_weight_file, read_exactly, shown
from tradespace.loading.read_ahead import read_ahead
from tradespace.loading.safetensors import SafetensorsFile, SafetensorsTensor
from tradespace.units import format_bytes

# a tile's floats and temporaries stay in the caches between its operations, and each operation is still long enough to pay for its call
TILE_ELEMENTS = 2**16
# beside the floats: the unpacked quants as bytes, their shifted high bits and the scales of a tile (measured: at most 1.7 a type; test_dequantize_rows)
TEMPORARY_BYTES_PER_ELEMENT = 3

# every stored type that can become floats: those that formats hold as they are, and those that can only be read
DEQUANTIZERS = HELD_DEQUANTIZERS | FLOAT_DEQUANTIZERS
PLAIN_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class _RowPlan:
    """A tensor as rows of its last dimension, and how many of them a chunk holds."""

    what: str
    type_name: str
    num_rows: int
    row_elements: int
    row_bytes: int
    # the stored bytes are already the wanted floats: one buffer serves as both
    in_place: bool
    row_out_bytes: int
    scratch_bytes_per_element: int

    def need_bytes(self, num_rows: int) -> int:
        """What a chunk of `num_rows` takes at its worst moment: stored rows, floats, and the temporaries of one tile."""
        tile_elements = min(num_rows * self.row_elements, TILE_ELEMENTS)
        return num_rows * (self.row_bytes + self.row_out_bytes) + tile_elements * self.scratch_bytes_per_element

    def chunk_rows(self, staging_bytes: int) -> int:
        """The most rows whose need fits. Raises BudgetError where not even one does."""
        if self.need_bytes(1) > staging_bytes:
            need, have = self.need_bytes(1), max(0, staging_bytes)
            raise BudgetError(
                f"{self.what}: one row of {self.row_elements} elements needs {format_bytes(need)} ({need} bytes) of staging; "
                f"the staging buffer has {format_bytes(have)} ({have} bytes). Give it at least that, and a multiple for speed",
                need_bytes=need,
                have_bytes=have,
            )
        low, high = 1, max(1, self.num_rows)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.need_bytes(middle) <= staging_bytes else (low, middle - 1)
        return low


def plain_dtype(tensor: GGUFTensor | SafetensorsTensor) -> torch.dtype | None:
    """The dtype of a tensor that is stored as floats of at most 32 bits; None for any other."""
    found = PLAIN_DTYPES.get(tensor.type_name if isinstance(tensor, GGUFTensor) else tensor.dtype)
    return None if found == torch.float64 else found


def _scratch_bytes_per_element(type_name: str, dtype: torch.dtype) -> int:
    if type_name in PLAIN_DTYPES:
        return 0  # one conversion, with nothing in between
    return TEMPORARY_BYTES_PER_ELEMENT + (0 if dtype == torch.float32 else 4)  # 4: the tile in float32, before the cast


def _row_plan(file: GGUFFile | SafetensorsFile, tensor_name: str, dtype: torch.dtype) -> tuple[GGUFTensor | SafetensorsTensor, _RowPlan]:
    tensor = file.tensors.get(tensor_name)
    if tensor is None:
        raise InputError(f"{file.path}: holds no tensor {shown(tensor_name)}; it holds {len(file.tensors)} others")
    if dtype not in PLAIN_DTYPES.values():
        raise InputError(f"{shown(tensor_name)}: weights become {', '.join(map(str, PLAIN_DTYPES.values()))}, not {dtype}")
    type_name = tensor.type_name if isinstance(tensor, GGUFTensor) else tensor.dtype
    what = f"{tensor.path}: tensor {shown(tensor_name)}"
    if type_name not in PLAIN_DTYPES and not (isinstance(tensor, GGUFTensor) and type_name in DEQUANTIZERS):
        known = [*PLAIN_DTYPES, *(DEQUANTIZERS if isinstance(tensor, GGUFTensor) else ())]
        raise UnsupportedError(f"{what} is stored as {type_name}, which cannot be read as weights yet. Readable: {', '.join(known)}")
    num_elements = math.prod(tensor.shape)
    row_elements = tensor.shape[-1] if tensor.shape else 1
    num_rows = 1 if len(tensor.shape) < 2 else num_elements // max(1, row_elements)
    in_place = PLAIN_DTYPES.get(type_name) == dtype
    return tensor, _RowPlan(
        what=what,
        type_name=type_name,
        num_rows=num_rows if num_elements else 0,
        row_elements=row_elements,
        row_bytes=tensor.nbytes // num_rows if num_elements else 0,
        in_place=in_place,
        row_out_bytes=0 if in_place else row_elements * dtype.itemsize,
        scratch_bytes_per_element=_scratch_bytes_per_element(type_name, dtype),
    )


def min_staging_bytes(file: GGUFFile | SafetensorsFile, tensor_name: str, *, dtype: torch.dtype = torch.float32) -> int:
    """The least `staging_bytes` with which `iter_rows` can read this tensor: what its single row takes. Raises as `iter_rows`."""
    return _row_plan(file, tensor_name, dtype)[1].need_bytes(1)


def iter_rows(
    file: GGUFFile | SafetensorsFile, tensor_name: str, *, staging_bytes: int, dtype: torch.dtype = torch.float32, ahead: bool = False
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (first row, rows [R, C] of `dtype`) over a tensor, in order, without gaps.

    **The rows are a view of a buffer that the next step overwrites**: copy them out before going on. C is the last dimension; a 1-D tensor is one row
    [1, C], a scalar [1, 1], and more than two dimensions are flattened to rows of the last. An empty tensor yields nothing.

    Everything that a chunk takes (stored rows, floats, temporaries) stays within `staging_bytes`, allocated once at the first step and released at the
    end. ahead: where the stored bytes are the wanted floats, the next chunk is read by several threads while this one is used (`read_ahead.py`), in half
    the staging each. Raises at the call: InputError for an unknown tensor or dtype, UnsupportedError for a stored type without a dequantizer, BudgetError
    (need, have) where one row does not fit. Raises while iterating: CorruptFileError where the file has shrunk since its header was read.
    """
    tensor, plan = _row_plan(file, tensor_name, dtype)
    if ahead and plan.in_place and plan.need_bytes(1) <= staging_bytes // 2:
        rows = plan.chunk_rows(staging_bytes // 2)
        pieces = [(tensor.offset_bytes + row * plan.row_bytes, min(rows, plan.num_rows - row) * plan.row_bytes) for row in range(0, plan.num_rows, rows)]
        read = read_ahead(tensor.path, pieces, plan.what)
        return ((index * rows, raw.view(dtype).view(-1, plan.row_elements)) for index, raw in enumerate(read))
    chunk_rows = plan.chunk_rows(staging_bytes)
    return _chunks(tensor, plan, min(chunk_rows, plan.num_rows), dtype)


def iter_raw_rows(file: GGUFFile | SafetensorsFile, tensor_name: str, *, staging_bytes: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (first row, stored bytes uint8 [R, row bytes]) as `iter_rows` does, undecoded. Raises as `iter_rows`."""
    tensor, plan = _row_plan(file, tensor_name, torch.float32)
    plan = replace(plan, row_elements=plan.row_bytes, in_place=True, row_out_bytes=0, scratch_bytes_per_element=0)
    return _chunks(tensor, plan, min(plan.chunk_rows(staging_bytes), plan.num_rows), torch.uint8)


def _chunks(tensor: GGUFTensor | SafetensorsTensor, plan: _RowPlan, chunk_rows: int, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    if not plan.num_rows:
        return
    raw = torch.empty(chunk_rows * plan.row_bytes, dtype=torch.uint8)
    raw_view = raw.numpy().data
    floats_RC = (raw.view(dtype) if plan.in_place else torch.empty(chunk_rows * plan.row_elements, dtype=dtype)).view(chunk_rows, plan.row_elements)
    with open_weight_file(tensor.path, buffering=0) as (file, _):
        for row in range(0, plan.num_rows, chunk_rows):
            num_rows = min(chunk_rows, plan.num_rows - row)
            num_bytes = num_rows * plan.row_bytes
            read_exactly(file, raw_view[:num_bytes], tensor.offset_bytes + row * plan.row_bytes, plan.what)
            if not plan.in_place:
                dequantize_into(raw[:num_bytes], plan.type_name, floats_RC[:num_rows])
            yield row, floats_RC[:num_rows]


def read_tensor(file: GGUFFile | SafetensorsFile, tensor_name: str, *, staging_bytes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A whole tensor in its own shape, beside the staging buffer: for the small ones (norms, biases). Raises as `iter_rows`."""
    chunks = iter_rows(file, tensor_name, staging_bytes=staging_bytes, dtype=dtype)  # raises before anything is allocated
    shape = file.tensors[tensor_name].shape
    whole = torch.empty(shape, dtype=dtype)
    rows_RC = whole.view(-1, shape[-1] if shape and shape[-1] else 1)
    for row, chunk_RC in chunks:
        rows_RC[row : row + len(chunk_RC)] = chunk_RC
    return whole


def dequantize_into(raw: torch.Tensor, type_name: str, out: torch.Tensor) -> None:
    """Turns the stored bytes of whole blocks, uint8 [n], into floats in `out`, contiguous, of any float dtype, with as many elements as the blocks hold.

    Beside its arguments it takes at most `TEMPORARY_BYTES_PER_ELEMENT` and, unless `out` is float32, 4 bytes for each of min(TILE_ELEMENTS, out.numel()).
    Raises UnsupportedError for a type that has no dequantizer, InputError where bytes and elements do not match.
    """
    floats = out.view(-1)
    if type_name not in PLAIN_DTYPES and type_name not in DEQUANTIZERS:
        raise UnsupportedError(f"no dequantizer for {shown(type_name)}; there are {', '.join([*PLAIN_DTYPES, *DEQUANTIZERS])}")
    _, block_elements, block_bytes = GGML_TYPES[type_name]
    if raw.numel() % block_bytes or raw.numel() // block_bytes * block_elements != floats.numel():
        raise InputError(f"{raw.numel()} bytes of {type_name} do not make {floats.numel()} elements: {block_elements} take {block_bytes} bytes")
    if type_name in PLAIN_DTYPES:
        floats.copy_(raw.view(PLAIN_DTYPES[type_name]))
        return
    blocks_NB, floats_NE = raw.view(-1, block_bytes), floats.view(-1, block_elements)
    tile_blocks = min(TILE_ELEMENTS // block_elements, len(blocks_NB))
    tile_NE = None if out.dtype == torch.float32 else torch.empty(tile_blocks, block_elements)
    for start in range(0, len(blocks_NB), max(1, tile_blocks)):
        here = slice(start, min(start + tile_blocks, len(blocks_NB)))
        if tile_NE is None:
            DEQUANTIZERS[type_name](blocks_NB[here], floats_NE[here])
        else:
            DEQUANTIZERS[type_name](blocks_NB[here], tile_NE[: here.stop - here.start])
            floats_NE[here] = tile_NE[: here.stop - here.start]
