"""Activations in 8 bits, a scale per token (Triton): int8 as `formats/w8a8.py` defines it (arXiv:2211.10438), or e4m3 (arXiv:2209.05433)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tradespace.kernels.attention.triton_interpreter import interprets
from tradespace.kernels.rope.triton_write import e4m3_bits, nearest
from tradespace.kernels.triton_launch import follow, launch, padded


@triton.jit
def codes_kernel(x, codes, scales, width, x_stride, codes_stride, C: tl.constexpr, FLOAT: tl.constexpr, FAST: tl.constexpr, PDL: tl.constexpr):
    """One program per token. int8: scale = max / 127.5, codes -128 … 127; e4m3: scale = max / 448. A row of zeros has codes of zero."""
    row = tl.program_id(0).to(tl.int64)
    follow(PDL)
    c = tl.arange(0, C)
    inside = c < width
    v = tl.load(x + row * x_stride + c, mask=inside, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(v), 0) / (448.0 if FLOAT else 127.5)
    scale = tl.where(scale > 0.0, scale, 1.0)
    v = tl.div_rn(v, scale)
    if FLOAT:
        if FAST:
            tl.store(codes + row * codes_stride + c, v.to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=inside)
        else:
            tl.store(codes + row * codes_stride + c, e4m3_bits(v).to(tl.uint8), mask=inside)
    else:
        tl.store(codes + row * codes_stride + c, tl.minimum(tl.maximum(nearest(v), -128.0), 127.0).to(tl.int8), mask=inside)
    tl.store(scales + row, scale)


def quantize_rows(x_TC: Tensor, codes_TC: Tensor, scale_T: Tensor, *, pdl: bool = False) -> None:
    """Fills `codes_TC` (int8 or float8_e4m3fn) and `scale_T` (fp32) from x."""
    T, C = x_TC.shape
    if T == 0:
        return
    is_float = codes_TC.dtype == torch.float8_e4m3fn
    block = padded(C)
    launch(
        codes_kernel, (T,), x_TC,
        x_TC, codes_TC.view(torch.uint8) if is_float else codes_TC, scale_T, C, x_TC.stride(0), codes_TC.stride(0), C=block, FLOAT=is_float,
        FAST=not interprets(), num_warps=min(16, max(1, block // 512)), pdl=pdl,
    )  # fmt: skip
