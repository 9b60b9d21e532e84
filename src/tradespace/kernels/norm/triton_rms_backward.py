"""Backward pass of the RMS norm in one kernel (Triton): a program walks over rows and keeps its share of the weight's gradient in registers.

Read once: x and dout; written once: dx, and one row of partial sums a program. Reference: `torch.rms_backward`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tradespace.kernels.triton_launch import launch, padded

PROGRAMS = 528  # four for each multiprocessor of the largest device that this was made for


@triton.jit(do_not_specialize=["eps", "num_rows"])
def rms_backward_kernel(
    x, weight, dout, dx, partial, eps, num_rows, width, x_stride, dout_stride, dx_stride, D: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """Rows pid, pid + programs, …"""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    d = tl.arange(0, D)
    inside = d < width
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([D], tl.float32)
    for row in range(pid, num_rows, programs):
        at = tl.full([], 0, tl.int64) + row  # offsets beyond 2^31
        h = tl.load(x + at * x_stride + d, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(dout + at * dout_stride + d, mask=inside, other=0.0).to(tl.float32)
        root = tl.rsqrt(tl.sum(h * h, 0) / width + eps)
        normed = h * root
        g = slope * w
        found = (g - normed * (tl.sum(g * normed, 0) / width)) * root
        tl.store(dx + at * dx_stride + d, found.to(dx.dtype.element_ty), mask=inside)
        if WEIGHT:
            total += slope * normed
    if WEIGHT:
        tl.store(partial + pid * width + d, total, mask=inside)


def rms_backward(x_TD: Tensor, weight_D: Tensor, dout_TD: Tensor, eps: float, *, weight_too: bool) -> tuple[Tensor, Tensor | None]:
    """(dx_TD in x's dtype, dweight_D in fp32 or None) as `kernels.norm.torch.rms_backward`; rows lie densely along D."""
    T, D = x_TD.shape
    dx_TD = torch.empty((T, D), dtype=x_TD.dtype, device=x_TD.device)
    programs = min(T, PROGRAMS)
    partial_PD = torch.empty((programs, D), device=x_TD.device) if weight_too else None
    if T:
        block = padded(D)
        launch(
            rms_backward_kernel, (programs,), x_TD,
            x_TD, weight_D, dout_TD, dx_TD, x_TD if partial_PD is None else partial_PD, eps, T, D, x_TD.stride(0), dout_TD.stride(0), dx_TD.stride(0),
            D=block, WEIGHT=weight_too, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return dx_TD, None if partial_PD is None else partial_PD.sum(dim=0)
