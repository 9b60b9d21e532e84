"""Random weights for training from scratch: normal with σ = 0.02, products that write to the stream scaled by 1/√(2L) (GPT-2), norms 1, biases 0."""

from __future__ import annotations

import torch

from tradespace.model.transformer import Transformer
from tradespace.spec.tensors import model_tensors
from tradespace.train.shards import Shards

SIGMA = 0.02


@torch.no_grad()
def init(model: Transformer, seed: int, shards: Shards | None = None) -> None:
    """Fills every parameter: the same numbers for the same seed and shape, whatever the device, the dtype and the ranks (`shards`) that hold parts of them."""
    generator = torch.Generator().manual_seed(seed)
    shards = shards or Shards(model.spec)
    held = shards.find(model)
    for tensor in model_tensors(shards.spec):
        if tensor.role in ("norm", "bias"):
            value = 1.0 if tensor.role == "norm" and not tensor.name.endswith(".bias") else 0.0
            shards.put(held[tensor.name], tensor.name, torch.full(tensor.shape, value))
        else:
            sigma = SIGMA / (2 * shards.spec.L) ** 0.5 if tensor.role in ("attn_out", "down") else SIGMA
            shards.put(held[tensor.name], tensor.name, torch.randn(tensor.shape, generator=generator) * sigma)
