"""What the tests of `quantize/` share: random models of several families on disk, read as the quantizers read them, and layers run over hidden states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from model.family_models import make_pair
from tradespace.loading.safetensors import read_sharded
from tradespace.quantize.source import StoredWeights, Weights
from tradespace.quantize.stream import LayerRunner, read_layer, read_norm

CONTEXT = 24
Tensors = dict[str, Tensor]


def stored(family: str, folder: Path, seed: int = 0) -> StoredWeights:
    pair = make_pair(family, seed, folder)
    return StoredWeights(read_sharded(folder), pair.spec)


def embedded(weights: Weights, seed: int = 3) -> Tensor:
    """Hidden states of random tokens before the first layer; positions left out."""
    rows = torch.cat([chunk.clone() for _, chunk in weights.row_chunks("embed.weight")])
    tokens = torch.randint(0, len(rows), (CONTEXT,), generator=torch.Generator().manual_seed(seed))
    return rows[tokens] * weights.spec.embed_scale


def through(weights: Weights, hidden_TD: Tensor, change: Callable[[int, Tensors], Tensors] = lambda index, tensors: tensors) -> Tensor:
    """All layers over hidden states, each layer's tensors changed first."""
    runner = LayerRunner(weights.spec, CONTEXT)
    for index in range(weights.spec.L):
        layer = runner.build(index, change(index, read_layer(weights, index)))
        hidden_TD = runner.run(index, layer, hidden_TD.clone())
    return hidden_TD


@torch.inference_mode()
def logits(weights: Weights, hidden_TD: Tensor) -> Tensor:
    norm = read_norm(weights, "final_norm")
    head = "embed.weight" if weights.spec.tied else "lm_head.weight"
    return norm(hidden_TD) @ torch.cat([chunk.clone() for _, chunk in weights.row_chunks(head)]).T * weights.spec.logit_scale
