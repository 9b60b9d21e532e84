"""AdamW's step of one parameter whose moments are 8-bit codes, in one kernel (Triton): decoded, moved, and coded again in registers.

A program takes whole blocks of 256 numbers, each with a scale of its own, so that a block's largest magnitude is known where it is needed. The nearest code is
found by bisection among the edges between levels. Reference: `train/coded.py` around `torch._fused_adamw_`. arXiv:2110.02861
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tradespace.kernels.triton_launch import ceil_div, launch

BLOCKS = 4  # of a program


@triton.jit
def nearest_code(x, edges):
    """How many of the 255 `edges` lie below x."""
    found = tl.zeros(x.shape, tl.int32)
    for step in tl.static_range(8):
        tried = found + (128 >> step)
        found = tl.where(tl.load(edges + tried - 1) < x, tried, found)
    return found


@triton.jit(do_not_specialize=["lr", "beta1", "beta2", "eps", "decay", "bias1", "bias2"])
def adamw8_kernel(
    parameter, held, gradient, m_codes, m_scales, v_codes, v_scales, m_levels, m_edges, v_levels, v_edges,
    n, lr, beta1, beta2, eps, decay, bias1, bias2, MASTER: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """`bias1` and `bias2`: what the moments are divided by."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside, known = at < n, block * SIZE < n
    slope = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(held + at, mask=inside, other=0.0)
    first = tl.load(m_levels + tl.load(m_codes + at, mask=inside, other=0).to(tl.int32)) * tl.load(m_scales + block, mask=known, other=0.0)[:, None]
    second = tl.load(v_levels + tl.load(v_codes + at, mask=inside, other=0).to(tl.int32)) * tl.load(v_scales + block, mask=known, other=0.0)[:, None]
    first += (1.0 - beta1) * (slope - first)
    second = beta2 * second + (1.0 - beta2) * slope * slope
    p -= lr * decay * p
    p -= lr / bias1 * first / (tl.sqrt(second / bias2) + eps)
    tl.store(held + at, p, mask=inside)
    if MASTER:
        tl.store(parameter + at, p.to(parameter.dtype.element_ty), mask=inside)
    first, second = tl.where(inside, first, 0.0), tl.where(inside, second, 0.0)
    m_scale, v_scale = tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1)
    tl.store(m_scales + block, m_scale, mask=known)
    tl.store(v_scales + block, v_scale, mask=known)
    tl.store(m_codes + at, nearest_code(first / tl.maximum(m_scale, 1e-38)[:, None], m_edges).to(tl.uint8), mask=inside)
    tl.store(v_codes + at, nearest_code(second / tl.maximum(v_scale, 1e-38)[:, None], v_edges).to(tl.uint8), mask=inside)


def adamw8(
    parameter: Tensor,
    master: Tensor | None,
    gradient: Tensor,
    m: tuple[Tensor, Tensor],
    v: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    block: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    number: int,
) -> None:
    """Step `number` (from 1) of one parameter, in place: fp32 by itself, or 16-bit with its fp32 `master`.

    m and v: codes (uint8, one a number) and scales (fp32, one for `block` numbers, a power of two). tables: 256 levels and the 255 edges between them of the
    first moment, then of the second.
    """
    held = parameter if master is None else master
    count = held.numel()
    beta1, beta2 = betas
    if count:
        launch(
            adamw8_kernel, (ceil_div(count, BLOCKS * block),), held,
            parameter, held, gradient.contiguous(), *m, *v, *tables, count,
            lr, beta1, beta2, eps, decay, 1.0 - beta1**number, 1.0 - beta2**number,
            MASTER=master is not None, BLOCKS=BLOCKS, SIZE=block, num_warps=4,
        )  # fmt: skip
