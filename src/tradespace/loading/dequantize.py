"""Tensor data in bounded row chunks, dequantized: file → one staging buffer → float rows.

Weights are never mapped: mapped pages would count as the process's own. A chunk's rows are read into a buffer that is allocated once, and turned into
floats tile by tile, so what a chunk takes (stored rows + floats + temporaries) is known before anything is read and stays within `staging_bytes`.

The arithmetic is ggml's, operation by operation in float32 (no fused multiply-add), so results are bitwise those of the `gguf` package; the cast to
another dtype comes last. Block layouts: ggml-common.h and ggml-quants.c of the ggml project.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tradespace.errors import BudgetError, InputError, UnsupportedError
from tradespace.loading.gguf import GGML_TYPES, GGUFFile, GGUFTensor
from tradespace.loading.rawfile import open_weight_file, read_exactly, shown
from tradespace.loading.safetensors import SafetensorsFile, SafetensorsTensor
from tradespace.units import format_bytes

# a tile's floats and temporaries stay in the caches between its operations, and each operation is still long enough to pay for its call
TILE_ELEMENTS = 2**16
# beside the floats: the unpacked quants as bytes, their shifted high bits and the scales of a tile (measured: at most 1.7 a type; test_dequantize_rows)
TEMPORARY_BYTES_PER_ELEMENT = 3

PLAIN_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _halves(blocks_NB: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 at byte `start` of each block, as float32 [N, 1]."""
    return blocks_NB.view(torch.float16)[:, start // 2 : start // 2 + 1].float()


def _nibbles(packed_NB: torch.Tensor, out_NE: torch.Tensor) -> None:
    """Elements 0…15 of 32 are the low nibbles of 16 bytes, elements 16…31 the high ones."""
    out_NE[:, :16] = packed_NB & 15
    out_NE[:, 16:] = packed_NB >> 4


def _q4_0(blocks_NB: torch.Tensor, out_NE: torch.Tensor) -> None:
    _nibbles(blocks_NB[:, 2:], out_NE)
    out_NE.sub_(8).mul_(_halves(blocks_NB, 0))


def _q4_1(blocks_NB: torch.Tensor, out_NE: torch.Tensor) -> None:
    _nibbles(blocks_NB[:, 4:], out_NE)
    out_NE.mul_(_halves(blocks_NB, 0)).add_(_halves(blocks_NB, 2))


def _five_bits(packed_NB: torch.Tensor, high_NB: torch.Tensor) -> torch.Tensor:
    """Quants 0…31 of 32 elements: nibbles as in `_nibbles`, and bit e of four little-endian bytes as the fifth bit of element e. uint8 [N, 32]."""
    bits = torch.arange(8, dtype=torch.uint8)
    fifth_NE = (high_NB.unsqueeze(-1) >> bits).bitwise_and_(1).bitwise_left_shift_(4).flatten(1)
    fifth_NE[:, :16] |= packed_NB & 15
    fifth_NE[:, 16:] |= packed_NB >> 4
    return fifth_NE


def _q5_0(blocks_NB: torch.Tensor, out_NE: torch.Tensor) -> None:
    out_NE.copy_(_five_bits(blocks_NB[:, 6:], blocks_NB[:, 2:6])).sub_(16).mul_(_halves(blocks_NB, 0))


def _q5_1(blocks_NB: torch.Tensor, out_NE: torch.Tensor) -> None:
    out_NE.copy_(_five_bits(blocks_NB[:, 8:], blocks_NB[:, 4:8])).mul_(_halves(blocks_NB, 0)).add_(_halves(blocks_NB, 2))


def _q8_0(blocks_NB: torch.Tensor, out_NE: torch.Tensor) -> None:
    out_NE.copy_(blocks_NB[:, 2:].view(torch.int8)).mul_(_halves(blocks_NB, 0))


def _k_scales(blocks_NB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima of the 8 groups of a Q4_K or Q5_K block, float32 [N, 8, 1] each.

    12 bytes hold sixteen 6-bit numbers: scales 0…3 and minima 0…3 in the low 6 bits of bytes 0…7, whose top 2 bits belong to scales and minima 4…7;
    the low 4 bits of those are the low (scales) and high (minima) nibbles of bytes 8…11.
    """
    low_scales, low_minima, rest = blocks_NB[:, 4:8], blocks_NB[:, 8:12], blocks_NB[:, 12:16]
    scales_N8 = torch.cat([low_scales & 63, (rest & 15) | ((low_scales >> 2) & 48)], dim=1)
    minima_N8 = torch.cat([low_minima & 63, (rest >> 4) | ((low_minima >> 2) & 48)], dim=1)
    return (_halves(blocks_NB, 0) * scales_N8).unsqueeze(-1), (_halves(blocks_NB, 2) * minima_N8).unsqueeze(-1)


def _k_nibbles(packed_NB: torch.Tensor, out_N8G: torch.Tensor) -> None:
    """Of each 32 bytes, the low nibbles are one group of 32 and the high nibbles the next."""
    packed_N4G = packed_NB.unflatten(1, (4, 32))
    out_N8G[:, 0::2] = packed_N4G & 15
    out_N8G[:, 1::2] = packed_N4G >> 4


def _q4_k(blocks_NB: torch.Tensor, out_NE: torch.Tensor) -> None:
    scales_N81, minima_N81 = _k_scales(blocks_NB)
    out_N8G = out_NE.unflatten(1, (8, 32))
    _k_nibbles(blocks_NB[:, 16:], out_N8G)
    out_N8G.mul_(scales_N81).sub_(minima_N81)


def _q5_k(blocks_NB: torch.Tensor, out_NE: torch.Tensor) -> None:
    scales_N81, minima_N81 = _k_scales(blocks_NB)
    out_N8G = out_NE.unflatten(1, (8, 32))
    _k_nibbles(blocks_NB[:, 48:], out_N8G)
    for group in range(8):  # bit g of 32 bytes is the fifth bit of group g
        out_N8G[:, group] += ((blocks_NB[:, 16:48] >> group) & 1) << 4
    out_N8G.mul_(scales_N81).sub_(minima_N81)


def _q6_k(blocks_NB: torch.Tensor, out_NE: torch.Tensor) -> None:
    low_N22G, high_N2G = blocks_NB[:, :128].unflatten(1, (2, 2, 32)), blocks_NB[:, 128:192].unflatten(1, (2, 32))
    scales_N16 = blocks_NB[:, 192:208].view(torch.int8) * _halves(blocks_NB, 208)
    out_N24G = out_NE.unflatten(1, (2, 4, 32))
    # of each half block: groups 0, 1 are the low nibbles of 64 bytes, groups 2, 3 the high ones; 32 more bytes hold the top 2 bits of all four
    for group in range(4):
        nibbles_N2G = low_N22G[:, :, group % 2] & 15 if group < 2 else low_N22G[:, :, group % 2] >> 4
        out_N24G[:, :, group] = nibbles_N2G.bitwise_or_(((high_N2G >> (2 * group)) & 3) << 4)
    out_NE.sub_(32).unflatten(1, (16, 16)).mul_(scales_N16.unsqueeze(-1))


# GGML type → writes the float32 elements [N, block elements] of N blocks, uint8 [N, block bytes]
DEQUANTIZERS: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip


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
    file: GGUFFile | SafetensorsFile, tensor_name: str, *, staging_bytes: int, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (first row, rows [R, C] of `dtype`) over a tensor, in order, without gaps.

    **The rows are a view of a buffer that the next step overwrites**: copy them out before going on. C is the last dimension; a 1-D tensor is one row
    [1, C], a scalar [1, 1], and more than two dimensions are flattened to rows of the last. An empty tensor yields nothing.

    Everything that a chunk takes (stored rows, floats, temporaries) stays within `staging_bytes`, allocated once at the first step and released at the
    end. Raises at the call: InputError for an unknown tensor or dtype, UnsupportedError for a stored type without a dequantizer, BudgetError (need, have)
    where one row does not fit. Raises while iterating: CorruptFileError where the file has shrunk since its header was read.
    """
    tensor, plan = _row_plan(file, tensor_name, dtype)
    chunk_rows = plan.chunk_rows(staging_bytes)
    return _chunks(tensor, plan, min(chunk_rows, plan.num_rows), dtype)


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
