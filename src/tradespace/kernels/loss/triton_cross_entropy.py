"""Cross entropy of 16-bit logits, their gradient written over them (Triton): two reads and one write of the logits, fp32 inside, nothing else held.

The idea is that of the fused losses of arXiv:2410.10989 and 2411.09009.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tradespace.kernels.triton_launch import launch, padded

BLOCK = 8192


@triton.jit(do_not_specialize=["scale"])
def cross_entropy_kernel(logits, targets, losses, scale, width, stride, IGNORED: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row: an online sum of exponentials, then (softmax - one at the target) · scale in place."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    at = logits + row * stride
    if target == IGNORED:
        tl.store(losses + row, 0.0)
        for start in range(0, width, BLOCK):
            v = start + tl.arange(0, BLOCK)
            tl.store(at + v, tl.zeros([BLOCK], tl.float32).to(logits.dtype.element_ty), mask=v < width)
    else:
        top = float("-inf")
        total = 0.0
        for start in range(0, width, BLOCK):
            v = start + tl.arange(0, BLOCK)
            x = tl.load(at + v, mask=v < width, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
            top = higher
        logsum = top + tl.log(total)
        tl.store(losses + row, logsum - tl.load(at + target).to(tl.float32))
        for start in range(0, width, BLOCK):
            v = start + tl.arange(0, BLOCK)
            x = tl.load(at + v, mask=v < width, other=float("-inf")).to(tl.float32)
            slope = (tl.exp(x - logsum) - tl.where(v == target, 1.0, 0.0)) * scale
            tl.store(at + v, slope.to(logits.dtype.element_ty), mask=v < width)


def cross_entropy_(logits_CV: Tensor, targets_C: Tensor, *, scale: float, ignored: int) -> Tensor:
    """losses_C in fp32, unscaled; the logits become `scale` times the gradient of their sum. Rows whose target is `ignored` count nothing."""
    C, V = logits_CV.shape
    losses_C = torch.empty(C, device=logits_CV.device)
    if C:
        block = min(BLOCK, padded(V))
        launch(
            cross_entropy_kernel, (C,), logits_CV, logits_CV, targets_C, losses_C, scale, V, logits_CV.stride(0), IGNORED=ignored, BLOCK=block,
            num_warps=min(16, max(1, block // 256)),
        )  # fmt: skip
    return losses_C
