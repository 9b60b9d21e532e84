"""silu(gate) · up and its backward pass, one kernel each (Triton), fp32 inside. arXiv:2002.05202. Reference: `torch.SwiGLU`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tradespace.kernels.triton_launch import ceil_div, launch

BLOCK = 1024


@triton.jit
def swiglu_kernel(x, dout, out, width, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row and BLOCK columns of the gate. Forward: out (T, F). Backward: out (T, 2F) is the gradient of x."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < width
    gate = tl.load(x + row * 2 * width + f, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + f, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gate))
    if BACKWARD:
        slope = tl.load(dout + row * width + f, mask=inside, other=0.0).to(tl.float32)
        dgate = slope * up * share * (1.0 + gate * (1.0 - share))
        tl.store(out + row * 2 * width + f, dgate.to(out.dtype.element_ty), mask=inside)
        tl.store(out + row * 2 * width + width + f, (slope * gate * share).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + row * width + f, (gate * share * up).to(out.dtype.element_ty), mask=inside)


def swiglu(x_T2F: Tensor, dout_TF: Tensor | None = None) -> Tensor:
    """hidden_TF of gate and up side by side; with `dout_TF` the gradient dx_T2F."""
    x_T2F = x_T2F.contiguous()
    T, F = len(x_T2F), x_T2F.shape[1] // 2
    out = torch.empty((T, F if dout_TF is None else 2 * F), dtype=x_T2F.dtype, device=x_T2F.device)
    if T:
        dout = x_T2F if dout_TF is None else dout_TF.contiguous()
        launch(swiglu_kernel, (T, ceil_div(F, BLOCK)), x_T2F, x_T2F, dout, out, F, BACKWARD=dout_TF is not None, BLOCK=BLOCK, num_warps=4)
    return out
