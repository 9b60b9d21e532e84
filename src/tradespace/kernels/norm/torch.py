"""The library's fused norms, fed in fp32; what learns on a CUDA device, by one kernel each way (Triton)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """As `reference.rms_norm`."""
    if bias is None and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return LeanRMS.apply(x, weight, eps)  # pyright: ignore[reportReturnType]
    # both operands in fp32: a mixed pair falls back to a slower kernel
    normed = F.rms_norm(x.float(), weight.shape, weight, eps)
    return (normed if bias is None else normed + bias).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """As `reference.layer_norm`."""
    return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(x.dtype)


class LeanRMS(torch.autograd.Function):
    """An RMS norm that keeps its input alone, as it came, for the backward pass: autograd's own keeps an fp32 copy and what it made of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        if x.is_cuda:
            from tradespace.kernels.norm.triton_add_norm import add_norm

            flat = x.flatten(0, -2)
            return add_norm(flat, weight, None, eps, "rms", out_TD=torch.empty(flat.shape, dtype=x.dtype, device=x.device)).view(x.shape)
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        if x.is_cuda:
            from tradespace.kernels.norm.triton_rms_backward import rms_backward as in_one

            flat, dflat = x.flatten(0, -2), gradients[0].flatten(0, -2)
            dx, dweight = in_one(flat, weight, dflat, ctx.eps, weight_too=ctx.needs_input_grad[1])
            return dx.view(x.shape), dweight, None
        dx, dweight = rms_backward(x, weight, gradients[0], ctx.eps, weight_too=ctx.needs_input_grad[1])
        return dx, dweight, None


def rms_backward(x: Tensor, weight: Tensor, dout: Tensor, eps: float, *, weight_too: bool) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight) with r = 1/√(mean x² + eps), n = r·x, g = dout·weight: dx = r·(g - n·mean(g·n)), dweight = Σ dout·n."""
    wide = x.float()
    r = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    normed = wide.mul_(r) if wide is not x else wide * r
    dout = dout.float()
    dweight = (dout * normed).flatten(0, -2).sum(dim=0) if weight_too else None
    g = dout * weight
    return (g - normed * (g * normed).mean(dim=-1, keepdim=True)).mul_(r).to(x.dtype), dweight
