"""Residual and norm in one kernel (Triton): h = residual + x, out = norm(h), fp32 inside, a program per row. Reference: `reference.py` of the sum."""

from __future__ import annotations

from typing import Literal

import triton
import triton.language as tl
from torch import Tensor

from tradespace.kernels.triton_launch import follow, launch, padded


@triton.jit(do_not_specialize=["eps"])
def norm_kernel(x, residual, weight, bias, out, held, eps, width, x_stride, residual_stride, out_stride, held_stride,
                D: tl.constexpr, LAYER: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """What `residual` and `x` add up to is rounded before it is normed, as it is held."""
    row = tl.program_id(0).to(tl.int64)
    follow(PDL)
    d = tl.arange(0, D)
    inside = d < width
    h = tl.load(x + row * x_stride + d, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        h += tl.load(residual + row * residual_stride + d, mask=inside, other=0.0).to(tl.float32)
        rounded = h.to(held.dtype.element_ty)
        tl.store(held + row * held_stride + d, rounded, mask=inside)
        h = rounded.to(tl.float32)
    if LAYER:
        h = tl.where(inside, h - tl.sum(h, 0) / width, 0.0)
    h = h * tl.rsqrt(tl.sum(h * h, 0) / width + eps) * tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        h += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + d, h.to(out.dtype.element_ty), mask=inside)


def add_norm(
    x_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    kind: Literal["rms", "layer"],
    *,
    out_TD: Tensor,
    residual_TD: Tensor | None = None,
    residual_out_TD: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """out_TD = norm(x), or of residual + x, which is then written to `residual_out_TD` (None: over the residual)."""
    T, D = x_TD.shape
    if T == 0:
        return out_TD
    held = residual_TD if residual_out_TD is None else residual_out_TD
    none = x_TD
    block = padded(D)
    launch(
        norm_kernel, (T,), x_TD,
        x_TD, none if residual_TD is None else residual_TD, weight_D, none if bias_D is None else bias_D, out_TD, none if held is None else held, eps, D,
        x_TD.stride(0), 0 if residual_TD is None else residual_TD.stride(0), out_TD.stride(0), 0 if held is None else held.stride(0),
        D=block, LAYER=kind == "layer", RESIDUAL=residual_TD is not None, BIAS=bias_D is not None,
        num_warps=min(16, max(1, block // 512)), pdl=pdl, beside=True,
    )  # fmt: skip
    return out_TD
