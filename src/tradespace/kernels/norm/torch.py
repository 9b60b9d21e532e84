"""The library's fused norms, fed in fp32."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """As `reference.rms_norm`."""
    # both operands in fp32: a mixed pair falls back to a slower kernel
    normed = F.rms_norm(x.float(), weight.shape, weight, eps)
    return (normed if bias is None else normed + bias).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """As `reference.layer_norm`."""
    return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(x.dtype)
