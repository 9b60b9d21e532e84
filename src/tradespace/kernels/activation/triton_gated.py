"""act(gate) · up of gate and up side by side, one pass (Triton). Few rows have it inside their product (`linear/triton_rows.py`)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tradespace.kernels.activation.triton_functions import activation
from tradespace.kernels.triton_launch import ceil_div, launch

BLOCK = 1024


@triton.jit
def gated_kernel(gate_up, out, width, in_stride, out_stride, NAME: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row and BLOCK columns of the result."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * in_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * in_stride + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, (activation(gate, NAME) * up).to(out.dtype.element_ty), mask=inside)


def gated(gate_up_T2F: Tensor, name: str, out_TF: Tensor) -> Tensor:
    """out_TF = act(gate) · up, in fp32, rounded once."""
    T, F = out_TF.shape
    if T == 0:
        return out_TF
    launch(gated_kernel, (T, ceil_div(F, BLOCK)), out_TF, gate_up_T2F, out_TF, F, gate_up_T2F.stride(0), out_TF.stride(0), NAME=name, BLOCK=BLOCK, num_warps=4)
    return out_TF
