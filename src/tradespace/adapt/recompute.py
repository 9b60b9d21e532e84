"""Activation checkpointing: what the backward pass needs is kept, or computed again from less. Gradients are the same bits either way. arXiv:1604.06174

none        everything is kept
norms       norms are computed again from the stream; everything else is kept
selective   outputs of matrix products are kept; what lies between them is computed again, attention included
full        k layers together keep their input
offload     the same, with the input in host memory
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tradespace.errors import InputError, UnsupportedError
from tradespace.kernels.rope import RopeRows
from tradespace.kernels.view import StepBatch
from tradespace.model.layer import Layer, run
from tradespace.model.transformer import Transformer
from tradespace.spec.mixers import Rope
from tradespace.spec.training import BY_LAYER, Segment, selective_refusal


def recompute(model: Transformer, segments: Sequence[Segment]) -> Transformer:
    """`model` with its layers checkpointed as `segments` say. Raises InputError where they do not cover its layers."""
    if sum(segment.layers for segment in segments) != model.spec.L:
        raise InputError(f"segments of {sum(segment.layers for segment in segments)} layers; {model.spec.name} has {model.spec.L}")
    start = 0
    for segment in segments:
        for index in range(start, start + segment.layers):
            layer = model.layers[index]
            assert isinstance(layer, Layer), "layers are checkpointed as they were built"
            if segment.kind in ("norms", "selective") and (reason := selective_refusal(model.spec.layers[index])) is not None:
                raise UnsupportedError(f"{segment.kind} checkpointing of layer {index}: {reason}. Use full")
            layer.around_norms = again if segment.kind in ("norms", "selective") else run
            layer.around_rest = again if segment.kind == "selective" else run
        start += segment.layers
    model.recompute = None if all(segment.kind in BY_LAYER for segment in segments) else Segmented(tuple(segments))
    return model


def again(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), of which only the inputs are kept. It is run again up to the last tensor that the backward pass needs: a last product is not."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]


class Segmented:
    """Runs a model's layers segment by segment."""

    def __init__(self, segments: tuple[Segment, ...]):
        self.segments = segments

    def __call__(self, model: Transformer, h_TD: Tensor, ropes: dict[Rope, RopeRows], batch: StepBatch) -> Tensor:
        start = 0
        for segment in self.segments:
            which = range(start, start + segment.layers)
            if segment.kind in BY_LAYER:
                h_TD = model.run_layers(h_TD, which, ropes, batch)
            else:
                with _inputs_on_host(h_TD) if segment.kind == "offload" else nullcontext():
                    h_TD = again(lambda h_TD, which=which: model.run_layers(h_TD, which, ropes, batch), h_TD)
            start += segment.layers
        return h_TD


def _inputs_on_host(like: Tensor) -> AbstractContextManager[object]:
    """What is kept within goes to host memory, pinned where it comes from a device."""
    return torch.autograd.graph.save_on_cpu(pin_memory=like.device.type == "cuda")
