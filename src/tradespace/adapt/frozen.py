"""A product with a weight that does not learn, with gradients through it: dx = dy @ W, W decoded again tile by tile into the shared workspace.

Nothing is kept for the backward pass but the codes that are there anyway. arXiv:2305.14314
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tradespace.errors import UnsupportedError
from tradespace.formats import DenseWeight, NativeWeight, QuantizedWeight, Weight
from tradespace.spec.weights import tile_rows


@runtime_checkable
class Transposable(Protocol):
    """A weight that multiplies by its transpose in its own way."""

    def linear(self, x_TC: Tensor, bias_R: Tensor | None = None) -> Tensor: ...
    def transposed(self, dy_TR: Tensor) -> Tensor: ...


def frozen_product(weight: Weight, x_TC: Tensor) -> Tensor:
    """x @ W.T + bias in memory of its own. Gradients reach x alone."""
    if isinstance(weight, NativeWeight):
        raise UnsupportedError("weights packed for the native kernels take no adapters. Plan with --attention sdpa")
    if isinstance(weight, DenseWeight) or not (x_TC.requires_grad and torch.is_grad_enabled()):
        return weight.linear(x_TC, weight.bias)
    return _ThroughCodes.apply(x_TC, weight)  # pyright: ignore[reportReturnType]


class _ThroughCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, weight: QuantizedWeight | Transposable) -> Tensor:
        ctx.weight = weight
        return weight.linear(x_TC.detach(), weight.bias)  # pyright: ignore[reportAttributeAccessIssue]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return transposed_product(ctx.weight, gradients[0]), None


def transposed_product(weight: QuantizedWeight | Transposable, dy_TR: Tensor) -> Tensor:
    """dx_TC = dy @ W."""
    if isinstance(weight, Transposable):
        return weight.transposed(dy_TR)
    assert weight.workspace is not None, "a weight that was multiplied has a workspace"
    num_rows, num_columns = weight.shape[-2:]
    dx_TC: Tensor | None = None
    step = tile_rows(num_rows, num_columns)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        tile_RC = weight.workspace.tile(stop - start, num_columns)
        scale_R1 = weight._decode_tile(start, tile_RC)
        part_TR = dy_TR[:, start:stop]
        if scale_R1 is not None:
            part_TR = part_TR * scale_R1[:, 0].to(part_TR.dtype)
        if dx_TC is None:
            dx_TC = part_TR @ tile_RC
        else:
            dx_TC.addmm_(part_TR, tile_RC)
    assert dx_TC is not None, "a matrix without rows"
    return dx_TC if weight.rotation is None else weight.rotation.undo(dx_TC)
