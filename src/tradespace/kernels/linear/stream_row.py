"""One row of activations times packed weights on Hopper cards and later ones: `stream_row.cu`, which says how. Same meaning as `triton_rows.rows_linear`."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tradespace.kernels.cuda_module import RESERVED_SHARED, Function, find_kernel
from tradespace.kernels.linear.packed import PackedWeight
from tradespace.kernels.linear.scratch import Scratch
from tradespace.spec.cuda import COUNTERS, squares_tiles

if TYPE_CHECKING:
    from tradespace.kernels.linear.triton_rows import NextNorm

SOURCE = Path(__file__).with_name("stream_row.cu")
KINDS = {"int8": "INT8", "fp8": "FP8", "int4": "INT4"}  # of codes, as the source calls them
COLUMNS = {"int8": 128, "fp8": 128, "int4": 256}  # of a unit
ROWS, UNIT_BYTES, SCALE_BYTES, WARPS = 16, 2048, 256, 8  # as in the source
LEAST_SLOTS, MOST_SLOTS = 2, 6  # of a warp's ring
BESIDE_BYTES = 16 * 1024  # of a multiprocessor's shared memory that are left to attention (`attention/one_query.py`)
WINDOW_TILES = 16  # tiles whose sums are held at once
SPLIT_BYTES = 48 * 1024  # of weights that a multiprocessor reads while sums of split rows are put together: parts of whole rows may be so much uneven
ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "relu2": 5}


class _Product(ctypes.Structure):
    """`Product` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "x", "squares", "bias", "residual", "next_weight")),
        *((name, ctypes.c_void_p) for name in ("out", "next_x", "next_squares", "partial", "counters")),
        *((name, ctypes.c_uint32) for name in ("block_bytes", "scale_words")),
        *((name, ctypes.c_int) for name in ("columns", "num_squares", "groups", "whole", "gated", "wide", "window")),
        ("eps", ctypes.c_float),
    )


def kernel_of(kind: str, slots: int) -> tuple[str, str]:
    """Its name in the source, and the line that makes it."""
    return f"row_{KINDS[kind]}_{slots}", f"ROW({KINDS[kind]}, {slots})"


def _kernel(weight: PackedWeight, slots: int) -> Function | None:
    return find_kernel(SOURCE, *kernel_of(weight.layout.kind, slots), weight.codes.device)


@lru_cache(maxsize=8)
def room(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory of which two blocks find room on one)."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, (properties.shared_memory_per_multiprocessor - BESIDE_BYTES) // 2 - RESERVED_SHARED


def takes(
    weight: PackedWeight,
    x_TC: Tensor,
    *,
    gated: str | None,
    bias_R: Tensor | None = None,
    residual_1R: Tensor | None = None,
    next_norm: NextNorm | None = None,
) -> bool:
    """Whether this kernel computes such a product: one row of bf16, int8 or fp8 of scales a row or int4 of groups of 128, whole tiles of rows."""
    if any(part is not None and part.dtype != torch.bfloat16 for part in (bias_R, residual_1R)):
        return False
    if next_norm and (next_norm.weight_R.dtype != torch.float32 or next_norm.squares_TS.shape[1] != squares_tiles(weight.rows, 1)):
        return False
    if len(x_TC) != 1 or x_TC.dtype != torch.bfloat16 or x_TC.data_ptr() % 16:
        return False
    return fits(weight, gated=gated)


def fits(weight: PackedWeight, *, gated: str | None) -> bool:
    """Whether this kernel multiplies with such a weight on the device where it lies."""
    layout, groups = weight.layout, weight.rows // ROWS // (2 if gated else 1)
    if weight.codes.device.type != "cuda" or layout.kind not in KINDS or gated not in ACTIVATIONS or weight.columns % 8 or weight.codes.nbytes >= 2**32:
        return False
    if weight.zero is not None or (layout.kind == "int4" and layout.group != 128) or weight.rows % (ROWS * (2 if gated else 1)):
        return False
    shape = _shape(weight, gated is not None)
    return shape.slots >= LEAST_SLOTS and (shape.whole or groups <= COUNTERS) and _kernel(weight, shape.slots) is not None


@dataclass(frozen=True, slots=True)
class Shape:
    """Blocks of threads, whether each takes whole rows, slots of a warp's ring, groups of rows whose sums are held at once, bytes of shared memory."""

    blocks: int
    whole: bool
    slots: int
    window: int
    shared_bytes: int


def _shape(weight: PackedWeight, gated: bool) -> Shape:
    return shape_of(weight.layout.kind, weight.rows, weight.columns, gated, *room(weight.codes.device))


@lru_cache(maxsize=256)
def shape_of(kind: str, rows: int, columns: int, gated: bool, multiprocessors: int, most: int) -> Shape:
    """For a matrix of these rows (gated: of both halves) on so many multiprocessors, `most` bytes of shared memory to a block."""
    units_of_tile, groups = -(-columns // COLUMNS[kind]), rows // ROWS // (2 if gated else 1)
    units_of_group = units_of_tile * (2 if gated else 1)
    blocks = min(multiprocessors, groups)
    uneven = (-(-groups // blocks) - groups / multiprocessors) * units_of_group * UNIT_BYTES
    whole = uneven <= SPLIT_BYTES
    if not whole:
        blocks = min(multiprocessors, groups * units_of_group)
    each = -(-groups // blocks) * units_of_group if whole else -(-groups * units_of_group // blocks)
    tiles = -(-each // units_of_tile) + (0 if whole else 1)  # that a block may have parts of
    held = -(-each // units_of_group) + (0 if whole else 1)
    window = min(held, max(1, WINDOW_TILES // (2 if gated else 1)))
    fixed = 128 + 2 * units_of_tile * COLUMNS[kind] + units_of_tile * COLUMNS[kind] // 16 + 4 * ROWS * (tiles + window * (2 if gated else 1) * WARPS + 2 * held)
    slot = UNIT_BYTES + (SCALE_BYTES if kind == "int4" else 0)
    slots = max(0, min(MOST_SLOTS, (most - fixed) // (WARPS * slot)))
    return Shape(blocks, whole, slots, window, fixed + WARPS * slots * slot)


def stream_row(
    x_1C: Tensor,
    weight: PackedWeight,
    scratch: Scratch,
    out_1R: Tensor,
    *,
    bias_R: Tensor | None = None,
    residual_1R: Tensor | None = None,
    gated: str | None = None,
    squares_1S: Tensor | None = None,
    eps: float = 0.0,
    next_norm: NextNorm | None = None,
    pdl: bool = False,
) -> Tensor:
    """`rows_linear` of one row; `takes` comes first."""
    shape = _shape(weight, gated is not None)
    kernel = _kernel(weight, shape.slots)
    assert kernel is not None, "takes() comes first"
    parameters = parameters_of(x_1C, weight, scratch, out_1R, shape, bias_R, residual_1R, gated, squares_1S, eps, next_norm)
    with torch.cuda.device(x_1C.device):
        stream = torch.cuda.current_stream().cuda_stream
        kernel((shape.blocks, 1), WARPS * 32, shape.shared_bytes, parameters, stream, pdl=pdl)
    return out_1R


def parameters_of(
    x_1C: Tensor,
    weight: PackedWeight,
    scratch: Scratch,
    out_1R: Tensor,
    shape: Shape,
    bias_R: Tensor | None,
    residual_1R: Tensor | None,
    gated: str | None,
    squares_1S: Tensor | None,
    eps: float,
    next_norm: NextNorm | None,
) -> ctypes.Structure:
    """What the kernel is given."""
    assert weight.scale is not None, "codes have scales"

    def address(part: Tensor | None) -> int | None:
        return None if part is None else part.data_ptr()

    after = (None, None, None) if next_norm is None else (next_norm.weight_R, next_norm.x_TR, next_norm.squares_TS)
    return _Product(
        weight.codes.data_ptr(), weight.scale.data_ptr(), x_1C.data_ptr(), address(squares_1S), address(bias_R), address(residual_1R), address(after[0]),
        out_1R.data_ptr(), address(after[1]), address(after[2]), scratch.partial.data_ptr(), scratch.counters.data_ptr(),
        weight.codes.stride(0), weight.scale.stride(0) // 2 if weight.layout.kind == "int4" else 0,
        weight.columns, 0 if squares_1S is None else squares_1S.shape[1], weight.rows // ROWS // (2 if gated else 1), shape.whole, ACTIVATIONS[gated],
        out_1R.dtype == torch.float32, shape.window, eps,
    )  # fmt: skip
