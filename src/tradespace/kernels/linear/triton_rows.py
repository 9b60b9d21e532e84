"""Products of few rows (1 … 128) with packed weights: y = x @ W.T, and what surrounds it in a layer: bias, residual, gated activation, RMS norm.

An RMS norm needs no kernel of its own. Who writes the residual stream also writes it times the next norm's weight, and sums of squares of each 32 columns;
who reads that multiplies its product by 1 / rms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from tradespace.errors import UnsupportedError
from tradespace.kernels.attention.triton_interpreter import interprets
from tradespace.kernels.linear.levels import LEVELS
from tradespace.kernels.linear.packed import PackedWeight
from tradespace.kernels.linear.scratch import Scratch
from tradespace.kernels.linear.stream_row import stream_row, takes
from tradespace.kernels.linear.triton_rows_kernel import rows_kernel
from tradespace.kernels.linear.triton_rows_tiles import RowTiles, edition, find_tiles
from tradespace.kernels.triton_launch import ceil_div, launch, padded, present
from tradespace.spec.cuda import CODED_PASS, Layout, squares_tiles

AHEAD = 2  # chunks of coded weights that are asked for early: 1.4% of an int8 decode step on an H100; rows that lie as they are gain nothing
SHARED_SHARE = 208 / 227  # of a program's shared memory that its tiles may take while they come
H100_SHARED_BYTES = 227 * 1024  # of a program
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class NextNorm:
    """What a product writes beside the residual stream for the RMS norm that follows: x_TR = out · weight_R, and squares_TS (fp32, S = squares_tiles(R, T))."""

    weight_R: Tensor
    x_TR: Tensor
    squares_TS: Tensor


@lru_cache(maxsize=8)
def shared_bytes(device: torch.device) -> int:
    """What the tiles of a program may take on this device; under the interpreter as on an H100."""
    found = H100_SHARED_BYTES
    if device.type == "cuda":
        found = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", H100_SHARED_BYTES)
    return round(found * SHARED_SHARE)


@lru_cache(maxsize=8)
def table_of(device: torch.device) -> Tensor:
    """fp32: nf4's 16 levels, then the 256 levels of its nested scales."""
    return torch.tensor([*LEVELS, *dynamic_levels()], dtype=torch.float32, device=device)


@lru_cache(maxsize=1)
def dynamic_levels() -> tuple[float, ...]:
    """The 256 values of an 8-bit dynamic code (arXiv:1511.04561), ascending: 0, 1, and of each sign seven decades of 1, 2, 4 … 64 steps' middles."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10 ** (decade - 6)).tolist()
        found += [*middles, *(-middle for middle in middles)]
    return tuple(torch.tensor(sorted(found), dtype=torch.float32).tolist())


def rows_linear(
    x_TC: Tensor,
    weight: PackedWeight,
    scratch: Scratch,
    *,
    x_scale_T: Tensor | None = None,
    out_TR: Tensor | None = None,
    bias_R: Tensor | None = None,
    residual_TR: Tensor | None = None,
    gated: str | None = None,
    squares_TS: Tensor | None = None,
    eps: float = 0.0,
    next_norm: NextNorm | None = None,
    tiles: RowTiles | None = None,
    streamed: bool = True,
    pdl: bool = False,
) -> Tensor:
    """out_TR = x @ W.T (· 1/rms from `squares_TS`) (+ bias) (+ residual), or act(gate) · up of it where `gated` names the activation (R is then half of W's).

    streamed: one row may take the kernel of `stream_row.py`. `out_TR` may be the residual itself. w8a8 and fp8-a8 take activations as codes with their scales
    (`triton_codes.quantize_rows`). Raises UnsupportedError for more than 128 rows.
    """
    T, C = x_TC.shape
    R = weight.rows // 2 if gated else weight.rows
    if T > CODED_PASS:
        raise UnsupportedError(f"products of few rows take at most {CODED_PASS}, not {T}; use kernels.linear.large")
    assert weight.columns == C and x_TC.stride(1) == 1, f"activations of {C} columns, weights of {weight.columns}"
    eight = {"w8a8": torch.int8, "f8a8": torch.float8_e4m3fn}.get(weight.layout.kind)
    assert (x_scale_T is None) == (eight is None) and eight in (None, x_TC.dtype), "8-bit activations and their scales go with w8a8 and fp8-a8 alone"
    out = torch.empty((T, R), dtype=torch.bfloat16 if x_scale_T is not None else x_TC.dtype, device=x_TC.device) if out_TR is None else out_TR
    if T == 0:
        return out
    if streamed and pdl and tiles is None and takes(weight, x_TC, gated=gated, bias_R=bias_R, residual_1R=residual_TR, next_norm=next_norm):
        return stream_row(
            x_TC, weight, scratch, out, bias_R=bias_R, residual_1R=residual_TR, gated=gated, squares_1S=squares_TS, eps=eps, next_norm=next_norm, pdl=pdl
        )
    layout = weight.layout
    grouped = layout.group is not None and layout.group > 0
    found = _settings(
        layout, weight.zero is not None, weight.rows, C, max(8, padded(T)), gated or "none", bias_R is not None, residual_TR is not None,
        0 if squares_TS is None else squares_TS.shape[1], None if next_norm is None else next_norm.squares_TS.shape[1], x_TC.dtype, pdl, weight.codes.device,
        tiles, edition(),
    )  # fmt: skip
    codes = weight.codes if layout.plain else weight.codes.view(torch.int16)
    if found.bare:
        codes, x_TC = codes.view(torch.uint8), x_TC.view(torch.uint8)
    scale, zero = (x.view(torch.int32) if grouped and x is not None else x for x in (weight.scale, weight.zero))
    none = x_TC
    launch(
        rows_kernel, found.grid, x_TC,
        x_TC, present(x_scale_T, none), codes, present(scale, none), present(zero, none), present(weight.nested, none), table_of(x_TC.device),
        present(weight.offset, none), present(bias_R, none), present(residual_TR, none), present(squares_TS, none), out,
        *((none, none, none) if next_norm is None else (next_norm.weight_R, next_norm.x_TR, next_norm.squares_TS)),
        scratch.partial, scratch.counters,
        T, R, C, x_TC.stride(0), codes.stride(0), 0 if scale is None else scale.stride(0), out.stride(0),
        0 if residual_TR is None else residual_TR.stride(0), 0 if next_norm is None else next_norm.x_TR.stride(0), weight.first_row,
        found.groups, R, found.grid[1], 0 if squares_TS is None else squares_TS.shape[1], eps,
        **found.flags, pdl=pdl, same=found,
    )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True, eq=False)
class _Settings:
    """What of a launch follows from shapes and kinds alone. bare: 8-bit floats go as bytes, which Triton's interpreter has no other name for."""

    grid: tuple[int, int]
    groups: int
    bare: bool
    flags: dict[str, Any]


@lru_cache(maxsize=4096)
def _settings(
    layout: Layout, zero: bool, rows: int, C: int, M: int, gated: str, bias: bool, residual: bool, squares: int, next_squares: int | None,
    dtype: torch.dtype, pdl: bool, device: torch.device, tiles: RowTiles | None, edition: int,
) -> _Settings:  # fmt: skip
    """Found once for each kind of product: finding it takes longer than a launch, and a prompt's step has hundreds of products.

    rows: of the weight, both halves; M: tokens, padded; squares, next_squares: partial sums of squares that are read and written; edition: of the tiles.
    """
    R, halves = rows // (1 if gated == "none" else 2), gated != "none"
    grouped = layout.group is not None and layout.group > 0
    tiles, K, split = _tiling(layout, R, C, M, gated=halves, tiles=tiles, device=device)
    eight = layout.kind in ("w8a8", "f8a8")
    flags: dict[str, Any] = {
        "KIND": layout.kind,
        "BYTES": layout.scale_bytes if grouped else 0,
        "NESTED": max(1, layout.nested),
        "ZERO": zero,
        "GROUPS": layout.columns // layout.group if grouped and layout.group else 1,
        "M": M,
        "N": tiles.N,
        "K": K,
        "SPLIT": split > 1,
        "GATED": gated,
        "BIAS": bias,
        "RESIDUAL": residual,
        "SQUARES": padded(squares) if squares else 0,
        "NEXT": 0 if next_squares is None else 1,
        "HALVES": next_squares is not None and next_squares > squares_tiles(R),
        "EVEN": C % K == 0,
        "FAST": (dtype == torch.bfloat16 or eight) and not interprets(),
        "TYPE": TYPES[torch.bfloat16 if eight else dtype],
        "STAGES": tiles.stages,
        "AHEAD": AHEAD if pdl and not layout.plain else 0,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    return _Settings((ceil_div(R, tiles.N), split), layout.groups(C), layout.kind == "f8a8" and interprets(), flags)


def _tiling(layout: Layout, R: int, C: int, M: int, *, gated: bool, tiles: RowTiles | None, device: torch.device) -> tuple[RowTiles, int, int]:
    """(tiles, columns of a step, splits) of a product of M rows, padded."""
    tiles = tiles or find_tiles(layout.kind, layout.group or 0, M, R, C, gated=gated, device=device)
    K = tiles.K if layout.plain else layout.columns
    bytes_of_step = K * (tiles.N * layout.bits // 8 * (2 if gated else 1) + M * (1 if layout.kind in ("w8a8", "f8a8") else 2))
    stages = max(1, min(tiles.stages, shared_bytes(device) // bytes_of_step))
    return replace(tiles, stages=stages), K, tiles.split_for(R, C, K, M, gated=gated)
