"""AdamW's step of one parameter in one kernel (Triton): gradient, moments and master are read once and written once, the 16-bit parameter beside them.

Bytes of a 16-bit parameter with fp32 moments and master: 2 + 12 read and 12 + 2 written for each number, where operators one after the other also write the
gradient widened, and read the master again to narrow it. Reference: `torch._fused_adamw_`. arXiv:1711.05101
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tradespace.kernels.triton_launch import ceil_div, launch

BLOCK = 2048


@triton.jit(do_not_specialize=["lr", "beta1", "beta2", "eps", "decay", "bias1", "bias2"])
def adamw_kernel(parameter, held, gradient, m, v, n, lr, beta1, beta2, eps, decay, bias1, bias2, MASTER: tl.constexpr, BLOCK: tl.constexpr):
    """`bias1` and `bias2`: what the moments are divided by."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    slope = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(held + at, mask=inside, other=0.0)
    first = tl.load(m + at, mask=inside, other=0.0)
    second = tl.load(v + at, mask=inside, other=0.0)
    first += (1.0 - beta1) * (slope - first)
    second = beta2 * second + (1.0 - beta2) * slope * slope
    p -= lr * decay * p
    p -= lr / bias1 * first / (tl.sqrt(second / bias2) + eps)
    tl.store(m + at, first, mask=inside)
    tl.store(v + at, second, mask=inside)
    tl.store(held + at, p, mask=inside)
    if MASTER:
        tl.store(parameter + at, p.to(parameter.dtype.element_ty), mask=inside)


def adamw(
    parameter: Tensor,
    master: Tensor | None,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    number: int,
) -> None:
    """Step `number` (from 1) of one parameter, in place: fp32 by itself, or 16-bit with its fp32 `master`. m and v are fp32; all of one shape and dense."""
    held = parameter if master is None else master
    count = held.numel()
    beta1, beta2 = betas
    if count:
        launch(
            adamw_kernel, (ceil_div(count, BLOCK),), held,
            parameter, held, gradient.contiguous(), m, v, count, lr, beta1, beta2, eps, decay, 1.0 - beta1**number, 1.0 - beta2**number,
            MASTER=master is not None, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
