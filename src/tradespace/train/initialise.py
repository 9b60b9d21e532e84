"""Random weights for training from scratch: normal with σ = 0.02, products that write to the stream scaled by 1/√(2L) (GPT-2), norms 1, biases 0."""

from __future__ import annotations

import torch

from tradespace.model.transformer import Transformer
from tradespace.spec.tensors import model_tensors

SIGMA = 0.02


@torch.no_grad()
def init(model: Transformer, seed: int) -> None:
    """Fills every parameter: the same numbers for the same seed and shape, whatever the device and the dtype."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model_tensors(model.spec):
        parameter = model.get_parameter(tensor.name)
        if tensor.role == "norm":
            parameter.fill_(0.0 if tensor.name.endswith(".bias") else 1.0)
        elif tensor.role == "bias":
            parameter.zero_()
        else:
            sigma = SIGMA / (2 * model.spec.L) ** 0.5 if tensor.role in ("attn_out", "down") else SIGMA
            parameter.copy_(torch.randn(tensor.shape, generator=generator) * sigma)
