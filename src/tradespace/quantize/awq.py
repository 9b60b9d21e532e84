"""Activation-aware weights: the columns that meet large inputs are scaled up before rounding, so that they keep more of their precision (arXiv:2306.00978).

s_j = mean|x_j|^α, normalized; α of a grid of 20 is chosen per fold by the error of the outputs, tr(Δ H Δᵀ) over the linears that share the inputs. The
division is folded into what feeds them (`folds.py`), so nothing is left to do at run time. Clipping (`clip.py`) follows, on the scaled weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tradespace.quantize.folds import Fold, Tensors, apply_fold, layer_folds, shared_scales
from tradespace.quantize.gram import Gram, output_error
from tradespace.spec.model import LayerSpec

ALPHAS = tuple(step / 20 for step in range(20))


def awq_scales(mean_abs_C: Tensor, alpha: float) -> Tensor:
    """mean|x|^α with its largest and smallest around 1; 1 for channels that never move."""
    scale_C = mean_abs_C.clamp_min(1e-4).pow(alpha)
    scale_C = scale_C / (scale_C.max() * scale_C.min()).sqrt()
    return torch.where(mean_abs_C > 0, scale_C, 1.0)


def fold_awq(
    tensors: Tensors,
    prefix: str,
    layer: LayerSpec,
    grams: Mapping[str, Gram],
    rounded: Callable[[str, Tensor], Tensor | None],
    *,
    round_norm: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Applies the best scales of every fold to `tensors` and, so that they stay those of the new inputs, to `grams`. Returns α by the folds' first linear.

    rounded(stem, weight_RC)  the values that quantizing this linear plainly would leave; None where it is not quantized
    """
    chosen: dict[str, float] = {}
    for fold in layer_folds(layer):
        found = _search(tensors, prefix, layer, fold, grams[fold.linears[0]], rounded)
        if found is None:
            continue
        chosen[fold.linears[0]], scale_C = found
        used_C = apply_fold(tensors, prefix, fold, layer, scale_C, round_norm=round_norm)
        for linear in fold.linears:
            rescale(grams[linear], used_C)
    return chosen


def rescale(gram: Gram, scale_C: Tensor) -> None:
    """The statistics of inputs that are divided by `scale_C`. Idempotent sharing is the caller's care: linears with the same inputs may share one Gram."""
    gram.gram_CC.div_(scale_C[:, None]).div_(scale_C)
    gram.sum_abs_C.div_(scale_C)
    gram.max_abs_C.div_(scale_C)


def _search(
    tensors: Tensors, prefix: str, layer: LayerSpec, fold: Fold, gram: Gram, rounded: Callable[[str, Tensor], Tensor | None]
) -> tuple[float, Tensor] | None:
    best: tuple[float, float, Tensor] | None = None
    for alpha in ALPHAS:
        scale_C = shared_scales(fold, layer, awq_scales(gram.mean_abs_C, alpha))
        error = 0.0
        for linear in fold.linears:
            weight_RC = tensors[f"{prefix}{linear}.weight"]
            values_RC = rounded(linear, weight_RC * scale_C)
            if values_RC is None:
                return None
            error += output_error(values_RC.div_(scale_C).sub_(weight_RC), gram.gram_CC)
        if best is None or error < best[0]:
            best = (error, alpha, scale_C)
    assert best is not None
    return best[1], best[2]
