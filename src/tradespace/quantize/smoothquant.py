"""SmoothQuant: activations whose outlier channels are divided away can be held in int8; the weights take the factor (arXiv:2211.10438).

s_j = max|x_j|^α / max|w_j|^(1-α), α one number for the model: given, or the one of a small grid whose layers, run in int8 on calibration text, differ least
from themselves in fp32 (the sum over layers of the relative squared error of what the layer adds). Folded as `folds.py` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tradespace.quantize.awq import rescale
from tradespace.quantize.folds import Tensors, apply_fold, layer_folds, shared_scales
from tradespace.quantize.gram import Gram
from tradespace.spec.model import LayerSpec

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def smooth_scales(max_abs_C: Tensor, max_weight_C: Tensor, alpha: float) -> Tensor:
    """s_C; 1 for channels without an input or without a weight."""
    scale_C = max_abs_C.clamp_min(1e-5).pow(alpha) / max_weight_C.clamp_min(1e-5).pow(1 - alpha)
    return torch.where((max_abs_C > 0) & (max_weight_C > 0), scale_C, 1.0)


def fold_smooth(tensors: Tensors, prefix: str, layer: LayerSpec, grams: Mapping[str, Gram], alpha: float, *, round_norm: Callable[[Tensor], Tensor]) -> None:
    """Applies the scales of every fold of the layer to `tensors` and `grams`."""
    for fold in layer_folds(layer):
        gram = grams[fold.linears[0]]
        max_weight_C = torch.stack([tensors[f"{prefix}{linear}.weight"].abs().amax(0) for linear in fold.linears]).amax(0)
        scale_C = shared_scales(fold, layer, smooth_scales(gram.max_abs_C, max_weight_C, alpha))
        used_C = apply_fold(tensors, prefix, fold, layer, scale_C, round_norm=round_norm)
        for linear in fold.linears:
            rescale(grams[linear], used_C)
