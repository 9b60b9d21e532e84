"""The rotation of whole heads and its transpose in one kernel (Triton), for training: reads its strided heads once, writes them densely. arXiv:2104.09864.

Halves are partners. Reference: `rotate.rotate`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tradespace.kernels.triton_launch import launch, padded


@triton.jit
def rotate_kernel(
    x, cos, sin, out, num_heads, x_row, x_head, DIMS: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, NP: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """One program per token. out[i] = x[i]·cos[i] + x[p]·sin[i] with p the partner of i; transposed with sin[p]."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NP)
    h = tl.arange(0, HP)
    partner = tl.where(h < DIMS // 2, h + DIMS // 2, h - DIMS // 2)
    turned = h < DIMS
    partner = tl.where(turned, partner, h)
    inside = (n < num_heads)[:, None] & (h < H)[None, :]
    row = x + token * x_row + n[:, None] * x_head
    own = tl.load(row + h[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(row + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * DIMS + h, mask=turned, other=1.0).to(tl.float32)
    if TRANSPOSED:
        s = tl.load(sin + token * DIMS + partner, mask=turned, other=0.0).to(tl.float32)
    else:
        s = tl.load(sin + token * DIMS + h, mask=turned, other=0.0).to(tl.float32)
    found = own * c[None, :] + other * s[None, :]
    tl.store(out + token * num_heads * H + n[:, None] * H + h[None, :], found.to(out.dtype.element_ty), mask=inside)


def rotated(x_TNH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor, *, transposed: bool) -> Tensor:
    """x (any strides but the last one's 1) rotated, or by the transposed matrix."""
    if x_TNH.stride(-1) != 1:
        x_TNH = x_TNH.contiguous()
    T, N, H = x_TNH.shape
    out_TNH = torch.empty((T, N, H), dtype=x_TNH.dtype, device=x_TNH.device)
    if T:
        launch(
            rotate_kernel, (T,), x_TNH, x_TNH, cos_T1H.contiguous(), sin_T1H.contiguous(), out_TNH, N, x_TNH.stride(0), x_TNH.stride(1),
            DIMS=cos_T1H.shape[-1], H=H, HP=padded(H), NP=padded(N), TRANSPOSED=transposed, num_warps=8,
        )  # fmt: skip
    return out_TNH


class Rotation(torch.autograd.Function):
    """Keeps the angles alone."""

    @staticmethod
    def forward(ctx: Any, x_TNH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
        ctx.angles = (cos_T1H, sin_T1H)
        return rotated(x_TNH, cos_T1H, sin_T1H, transposed=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return rotated(gradients[0], *ctx.angles, transposed=True), None, None
