"""Rounding with feedback: what rounding a column did to the outputs is made good by the columns that are still to come.

With H = Σ x xᵀ and H⁻¹ = Uᵀ U (U upper), after columns B have become Q_B the rest changes by  W_rest -= (W_B - Q_B) U_BB⁻¹ U_B,rest.  One column at a time
that is GPTQ (arXiv:2210.17323); eight at a time, for a codebook of 8-vectors, it is QuIP#'s block LDLQ (arXiv:2402.04396). C³ operations for U, R·C² for
the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tradespace.errors import EngineError

LAZY_COLUMNS = 128  # the rest is updated once for so many columns: one product instead of many thin ones
MOST_DAMPING = 10.0


@dataclass(frozen=True)
class Factor:
    """U of the Gram matrix whose columns were put in `order_C` (None: as they are). Made once for all matrices with the same inputs."""

    upper_CC: Tensor
    order_C: Tensor | None

    def on_host(self) -> Factor:
        """The same, in the host's memory."""
        return Factor(self.upper_CC.cpu(), None if self.order_C is None else self.order_C.cpu())


def factorize(gram_CC: Tensor, *, damping: float = 0.01, order_C: Tensor | None = None) -> Factor:
    """U_CC, upper, with (H + λ·mean(diag H)·I)⁻¹ = Uᵀ U, λ = `damping`, raised tenfold where H stays singular.

    H = V Vᵀ with V upper is the Cholesky factor of H read from its last row and column backwards, and U = V⁻¹: no inverse of H is formed.
    Raises EngineError where no damping up to 10 helps: the inputs hold NaN or infinity.
    """
    columns = len(gram_CC)
    mean = float(gram_CC.diagonal().mean()) or 1.0
    backwards = torch.arange(columns - 1, -1, -1) if order_C is None else order_C.flip(0)
    while damping <= MOST_DAMPING:
        flipped_CC = gram_CC[backwards][:, backwards]
        flipped_CC.diagonal().add_(damping * mean)
        lower_CC, info = torch.linalg.cholesky_ex(flipped_CC)
        del flipped_CC
        if int(info) == 0 and bool(lower_CC.diagonal().isfinite().all()):
            return Factor(torch.linalg.solve_triangular(lower_CC.flip(0, 1), torch.eye(columns), upper=True), order_C)
        damping = max(damping, 1e-4) * 10
    raise EngineError(f"the inputs of a linear with {columns} columns give no usable Gram matrix (mean of its diagonal {mean:g}): the activations overflow")


def round_with_feedback(weight_RC: Tensor, factor: Factor, quantize: Callable[[int, Tensor], Tensor], *, width: int = 1) -> None:
    """Calls `quantize(first, values_RW)` for `width` columns at a time, those at positions first … first + width - 1 of the factor's order.

    It gets what the columns should be by then, keeps its codes, and returns the values that they stand for. `weight_RC` is left as it is.
    """
    columns, upper_CC = weight_RC.shape[1], factor.upper_CC
    assert columns % width == 0 and LAZY_COLUMNS % width == 0, f"{columns} columns in steps of {width}"
    if factor.order_C is not None:
        weight_RC = weight_RC[:, factor.order_C]
    rest_CR = weight_RC.T.clone(memory_format=torch.contiguous_format)  # columns as rows: each lies in one piece
    for start in range(0, columns, LAZY_COLUMNS):
        stop = min(start + LAZY_COLUMNS, columns)
        errors_BR = torch.empty(stop - start, weight_RC.shape[0])
        for first in range(start, stop, width):
            here = slice(first, first + width)
            difference_WR = rest_CR[here] - quantize(first, rest_CR[here].T).T
            corner_WW = upper_CC[here, here]
            if width == 1:
                error_WR = difference_WR.div_(corner_WW)
            else:  # (W_B - Q_B) U_BB⁻¹, transposed
                error_WR = torch.linalg.solve_triangular(corner_WW.T, difference_WR, upper=False)
            rest_CR[first + width : stop].addmm_(upper_CC[here, first + width : stop].T, error_WR, alpha=-1)
            errors_BR[first - start : first - start + width] = error_WR
        rest_CR[stop:].addmm_(upper_CC[start:stop, stop:].T, errors_BR, alpha=-1)
