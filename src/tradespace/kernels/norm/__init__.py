"""RMS norm (arXiv:1910.07467) and layer norm (arXiv:1607.06450) over the last dimension, fp32 inside, in the input's dtype outside.

The weight is what multiplies: a family that stores w for 1 + w has the 1 added by the loader, exactly, in fp32.
"""

from collections.abc import Callable

from torch import Tensor

from tradespace.kernels.norm import reference, torch

Norm = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]

# (kernel, kind) → norm(x, weight, bias, eps); an RMS norm has no bias
NORMS: dict[tuple[str, str], Norm] = {
    ("torch", "rms"): torch.rms_norm,
    ("torch", "layer"): torch.layer_norm,
    ("reference", "rms"): reference.rms_norm,
    ("reference", "layer"): reference.layer_norm,
}
