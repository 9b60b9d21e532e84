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

INT_ROWS = 1024  # tokens that the int8 product takes at once: its sums take 4 bytes each
INT_MM_ROWS = 17  # torch's int8 product takes no fewer rows


def large_linear(x_TC: Tensor, weight: PackedWeight, room: Tensor, bias_R: Tensor | None = None, out_TR: Tensor | None = None) -> Tensor:
    """out_TR = x @ W.T (+ bias). `room`: elements of x's dtype that a tile of the matrix is dequantized into (where rows lie as they are it stays unused)."""
    T, C = x_TC.shape
    out = torch.empty((T, weight.rows), dtype=x_TC.dtype, device=x_TC.device) if out_TR is None else out_TR
    if weight.layout.kind in ("w8a8", "f8a8"):
        codes_TC, scale_T = torch.empty((T, C), dtype=weight.codes.dtype, device=x_TC.device), torch.empty(T, device=x_TC.device)
        quantize_rows(x_TC, codes_TC, scale_T)
        return quantized_linear(codes_TC, scale_T, weight, out, bias_R)
    if weight.layout.kind == "bf16":
        torch.mm(x_TC, weight.codes.T, out=out)
    else:
        step = min(weight.rows, room.numel() // C // CHUNK_ROWS * CHUNK_ROWS or room.numel() // C)
        assert step > 0, f"a row of {C} columns needs as many elements of room; there are {room.numel()}"
        for start in range(0, weight.rows, step):
            rows = min(step, weight.rows - start)
            tile_RC = unpack_into(weight, room[: rows * C].view(rows, C), first=start)
            torch.mm(x_TC, tile_RC.T, out=out[:, start : start + rows])
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


def quantized_linear(codes_TC: Tensor, scale_T: Tensor, weight: PackedWeight, out_TR: Tensor, bias_R: Tensor | None = None) -> Tensor:
    """out_TR = (codes · scale) @ W.T (+ bias) for 8-bit codes with a scale per token, on 8-bit tensor cores: e4m3 by torch's scaled product, int8 by its
    integer product, INT_ROWS tokens at a time, as that writes sums of 32 bits.
    """
    assert weight.scale is not None, "an 8-bit matrix has a scale for each row"
    scale_R = weight.scale.view(-1)
    if weight.layout.kind == "f8a8":
        scaled_linear(codes_TC, scale_T, weight.codes, scale_R, out_TR)
    else:
        for start in range(0, len(codes_TC), INT_ROWS):
            part_TC, part_T, part_TR = (x[start : start + INT_ROWS] for x in (codes_TC, scale_T, out_TR))
            short = INT_MM_ROWS - len(part_TC)
            sums_TR = torch.ops.aten._int_mm(torch.nn.functional.pad(part_TC, (0, 0, 0, short)) if short > 0 else part_TC, weight.codes.T)[: len(part_TC)]
            part_TR.copy_(sums_TR.mul(part_T[:, None]).mul_(scale_R))
    return out_TR if bias_R is None else out_TR.add_(bias_R)


def scaled_linear(codes_TC: Tensor, scale_T: Tensor, weight_RC: Tensor, weight_scale_R: Tensor, out_TR: Tensor) -> Tensor:
    """out_TR = e4m3 activations (a scale per token) times an e4m3 matrix (a scale per row, row-major), on fp8 tensor cores: torch's scaled product."""
    if not codes_TC.is_cuda or out_TR.dtype == torch.float32:  # only CUDA has the product, and not with fp32 results for scales per row
        return out_TR.copy_((codes_TC.float() * scale_T[:, None]) @ (weight_RC.float() * weight_scale_R[:, None]).T)
    return torch.ops.aten._scaled_mm.out(
        codes_TC, weight_RC.T, scale_T[:, None], weight_scale_R[None, :], out_dtype=out_TR.dtype, use_fast_accum=True, out=out_TR
    )
