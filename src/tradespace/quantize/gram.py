"""What calibration text says about a linear's inputs: the Gram matrix Σ x xᵀ, and each column's mean and largest magnitude.

The output error of a weight that changes by Δ is Σ |Δ x|² = tr(Δ H Δᵀ) with H = Σ x xᵀ: every quantizer that uses data minimizes it, and none needs the inputs
themselves. 4·C² bytes a linear.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tradespace.formats.w8a8 import quantize_tokens
from tradespace.kernels.view import StepBatch


class Gram:
    """Statistics of inputs (T, C), added up chunk by chunk in fp32."""

    def __init__(self, columns: int):
        self.gram_CC = torch.zeros(columns, columns)
        self.sum_abs_C = torch.zeros(columns)
        self.max_abs_C = torch.zeros(columns)
        self.num_rows = 0

    def add(self, x_TC: Tensor) -> None:
        """Counts these inputs."""
        x_TC = x_TC.float()
        self.gram_CC.addmm_(x_TC.T, x_TC)
        magnitudes_TC = x_TC.abs()
        self.sum_abs_C += magnitudes_TC.sum(0)
        torch.maximum(self.max_abs_C, magnitudes_TC.amax(0), out=self.max_abs_C)
        self.num_rows += len(x_TC)

    @property
    def mean_abs_C(self) -> Tensor:
        return self.sum_abs_C / max(1, self.num_rows)

    @property
    def nbytes(self) -> int:
        return self.gram_CC.nbytes + self.sum_abs_C.nbytes + self.max_abs_C.nbytes


def output_error(delta_RC: Tensor, gram_CC: Tensor) -> float:
    """tr(Δ H Δᵀ): the squared error of the outputs, summed over the calibration tokens."""
    return float((delta_RC @ gram_CC).mul_(delta_RC).sum(dtype=torch.float64))


class Tapped(nn.Module):
    """A weight whose inputs are shown to `see(x_TC, expert)` (None: an ordinary linear) before they are multiplied; what `see` returns is multiplied
    instead."""

    def __init__(self, inner: nn.Module, see: Callable[[Tensor, int | None], Tensor]):
        super().__init__()
        self.inner, self.see = inner, see
        self.bias = inner.bias

    def linear(self, x_TC: Tensor, bias_R: Tensor | None = None, *, expert: int | None = None) -> Tensor:
        return self.inner.linear(self.see(x_TC, expert), bias_R, expert=expert)  # pyright: ignore[reportCallIssue]

    def adapted(self, x_TC: Tensor, batch: StepBatch) -> Tensor:
        """As `linear`, for a layer whose weights may have adapters: a model that is being quantized has none."""
        return self.linear(x_TC, self.bias)  # pyright: ignore[reportArgumentType]


def tap(module: nn.Module, name: str, see: Callable[[Tensor, int | None], Tensor]) -> None:
    """Replaces the weight called `name` (dotted) inside `module` by a `Tapped` one."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent) if parent else module
    setattr(owner, leaf, Tapped(getattr(owner, leaf), see))


def fake_int8(x_TC: Tensor) -> Tensor:
    """Activations as w8a8 multiplies them: int8 per token, symmetric."""
    codes_TC, scale_T1 = quantize_tokens(x_TC)
    return (codes_TC * scale_T1).to(x_TC.dtype)
