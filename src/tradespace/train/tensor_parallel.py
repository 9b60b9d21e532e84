"""Tensor parallelism: a rank has some heads and some columns of the feed-forward, and the stream whole. arXiv:1909.08053

Applied from outside by `torch.distributed.tensor.parallel.parallelize_module`: in each half of a layer the first product is cut by rows (its input's gradient
is summed over ranks), the last by columns (its output is summed). Cost: two sums of the stream a layer forward and two backward.
"""

from __future__ import annotations

from typing import Any

import torch.autograd
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from tradespace.formats import DenseWeight
from tradespace.kernels.view import StepBatch
from tradespace.model.feed_forward import FeedForward
from tradespace.model.layer import Layer
from tradespace.model.transformer import Transformer
from tradespace.train.ranks import Ranks


class _SumGradient(torch.autograd.Function):
    """The same on every rank; its gradient is summed over them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        found = gradients[0].contiguous()
        dist.all_reduce(found, group=ctx.group)  # a product's gradient by its input: nobody else holds it
        return found, None


class _SumOutput(torch.autograd.Function):
    """Summed over ranks, in place; its gradient is the same on every rank."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: dist.ProcessGroup) -> Tensor:
        dist.all_reduce(y, group=group)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _PartOf(nn.Module):
    """A weight of which this rank of `group` has a part."""

    def __init__(self, base: DenseWeight, group: dist.ProcessGroup):
        super().__init__()
        self.base, self.group = base, group

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base.bias


class RowsOf(_PartOf):
    """A weight of which this rank has some rows: it takes the whole input and gives its part of the output."""

    def adapted(self, x_TC: Tensor, batch: StepBatch) -> Tensor:
        return self.base.linear(_SumGradient.apply(x_TC, self.group), self.base.bias)  # pyright: ignore[reportArgumentType]


class ColumnsOf(_PartOf):
    """A weight of which this rank has some columns: it takes its part of the input and gives the whole output, with the bias added once."""

    def adapted(self, x_TC: Tensor, batch: StepBatch) -> Tensor:
        y_TR: Tensor = _SumOutput.apply(self.base.linear(x_TC), self.group)  # pyright: ignore[reportAssignmentType]
        return y_TR if self.base.bias is None else y_TR + self.base.bias


class CutProducts(ParallelStyle):
    """The first and the last product of a module, by the names of its weights."""

    def __init__(self, first: str, last: str):
        super().__init__()
        self.first, self.last = first, last

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group = device_mesh.get_group()
        for name, kind in ((self.first, RowsOf), (self.last, ColumnsOf)):
            base = getattr(module, name)
            assert isinstance(base, DenseWeight), "only floats are cut over ranks: `refusal` was asked"
            setattr(module, name, kind(base, group))
        return module


def cut_products(model: Transformer, ranks: Ranks) -> None:
    """Puts the sums into `model`, which was built as one rank's part (`spec.parallel.shard_spec`)."""
    styles: dict[str, ParallelStyle] = {}
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Layer) and isinstance(layer.ffn, FeedForward), "layers are cut as they were built"
        styles[f"layers.{index}.attn"] = CutProducts("qkv", "out")
        styles[f"layers.{index}.ffn"] = CutProducts(layer.ffn.wide, "down")
    parallelize_module(model, ranks.along("tensor"), styles)
