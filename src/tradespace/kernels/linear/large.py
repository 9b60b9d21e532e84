"""Products of many rows on tensor cores: torch's own where weights are floats or 8-bit codes; else a tile of the matrix is dequantized once and multiplied.

The tile lies in the model's shared workspace (`formats/workspace.py`): as many rows as it has room for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tradespace.kernels.linear.packed import PackedWeight
from tradespace.kernels.linear.triton_codes import quantize_rows
from tradespace.kernels.linear.triton_unpack import unpack_into
from tradespace.spec.cuda import CHUNK_ROWS

INT_MM_ROWS = 17  # torch's int8 product takes no fewer rows


def large_linear(x_TC: Tensor, weight: PackedWeight, room: Tensor, bias_R: Tensor | None = None, out_TR: Tensor | None = None) -> Tensor:
    """out_TR = x @ W.T (+ bias). `room`: elements of x's dtype that a tile of the matrix is dequantized into (where rows lie as they are it stays unused)."""
    T, C = x_TC.shape
    out = torch.empty((T, weight.rows), dtype=x_TC.dtype, device=x_TC.device) if out_TR is None else out_TR
    if weight.layout.kind == "w8a8":
        codes_TC = torch.empty((max(T, INT_MM_ROWS), C), dtype=torch.int8, device=x_TC.device)
        scale_T = torch.empty(T, device=x_TC.device)
        quantize_rows(x_TC, codes_TC[:T], scale_T)
        assert weight.scale is not None
        sums_TR = torch.ops.aten._int_mm(codes_TC, weight.codes.T)[:T]
        torch.mul(sums_TR, scale_T[:, None] * weight.scale.view(1, -1), out=out) if out.dtype == torch.float32 else out.copy_(
            sums_TR * (scale_T[:, None] * weight.scale.view(1, -1))
        )
    elif weight.layout.kind == "f8a8":
        codes_TC, scale_T = torch.empty((T, C), dtype=torch.float8_e4m3fn, device=x_TC.device), torch.empty(T, device=x_TC.device)
        quantize_rows(x_TC, codes_TC, scale_T)
        assert weight.scale is not None
        out.copy_(scaled_linear(codes_TC, scale_T, weight.codes, weight.scale.view(-1), x_TC.dtype))
    elif weight.layout.kind == "bf16":
        torch.mm(x_TC, weight.codes.T, out=out)
    else:
        step = min(weight.rows, room.numel() // C // CHUNK_ROWS * CHUNK_ROWS or room.numel() // C)
        assert step > 0, f"a row of {C} columns needs as many elements of room; there are {room.numel()}"
        for start in range(0, weight.rows, step):
            rows = min(step, weight.rows - start)
            tile_RC = unpack_into(weight, room[: rows * C].view(rows, C), first=start)
            if rows == weight.rows:
                torch.mm(x_TC, tile_RC.T, out=out)
            else:
                out[:, start : start + rows] = torch.mm(x_TC, tile_RC.T)
    return out if bias_R is None else out.add_(bias_R)


def transposed_linear(dy_TR: Tensor, weight: PackedWeight, room: Tensor) -> Tensor:
    """dx_TC = dy @ W, tile by tile as `large_linear`."""
    C = weight.columns
    step = min(weight.rows, room.numel() // C // CHUNK_ROWS * CHUNK_ROWS or room.numel() // C)
    assert step > 0, f"a row of {C} columns needs as many elements of room; there are {room.numel()}"
    dx_TC: Tensor | None = None
    for start in range(0, weight.rows, step):
        rows = min(step, weight.rows - start)
        tile_RC = unpack_into(weight, room[: rows * C].view(rows, C), first=start)
        part_TR = dy_TR[:, start : start + rows]
        dx_TC = part_TR @ tile_RC if dx_TC is None else dx_TC.addmm_(part_TR, tile_RC)
    assert dx_TC is not None, "a matrix without rows"
    return dx_TC


def scaled_linear(codes_TC: Tensor, scale_T: Tensor, weight_RC: Tensor, weight_scale_R: Tensor, dtype: torch.dtype, bias_R: Tensor | None = None) -> Tensor:
    """e4m3 activations (a scale per token) times an e4m3 matrix (a scale per row, row-major), on fp8 tensor cores: torch's scaled product."""
    out = torch.ops.aten._scaled_mm(codes_TC, weight_RC.T, scale_T[:, None], weight_scale_R[None, :], out_dtype=dtype, use_fast_accum=True)
    return out if bias_R is None else out.add_(bias_R)
