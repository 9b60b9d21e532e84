"""SmoothQuant's scales channel by channel, by descent on the error that int8 is expected to make: no α, and tokens decide that a maximum over them all hides.

A token's activations are rounded in steps of max_j|x_tj / s_j| / 127.5, so their error in the outputs is that step squared / 12 · Σ_j s_j² |w_j|²; a row's
weights are rounded in steps of max_j|w_rj s_j| / 127. Both errors are taken relative to the outputs of their token. log s descends by Adam from the best s of
α's grid, and whichever then errs least when inputs and weights are really rounded is taken. Every fold of `folds.py` has scales of its own: also those into
the down projection and out of attention. SAMPLED inputs a linear are held: 4 · SAMPLED · C bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tradespace.formats.w8a8 import HALF_RANGE
from tradespace.quantize.folds import Tensors, apply_fold, layer_folds, shared_scales
from tradespace.quantize.gram import fake_int8, tap
from tradespace.quantize.smoothquant import smooth_scales
from tradespace.quantize.stream import HiddenStates, LayerRunner

SAMPLED = 4096
ALPHAS = tuple(step / 10 for step in range(2, 10))
STEPS = 150
RATE = 0.03
WEIGHT_RANGE = 127


def fold_searched(
    runner: LayerRunner, index: int, tensors: Tensors, hidden: HiddenStates, *, round_norm: Callable[[Tensor], Tensor] = lambda x: x
) -> dict[str, float]:
    """Applies searched scales of every fold to a layer's `tensors`. Returns by the folds' first linear how much of the error without scales is left."""
    prefix, layer = f"layers.{index}.", runner.spec.layers[index]
    folds = layer_folds(layer)
    inputs = _sampled(runner, index, tensors, hidden, sorted({linear for fold in folds for linear in fold.linears}))
    left: dict[str, float] = {}
    for fold in folds:
        x_TC = inputs[fold.linears[0]]
        weights = [tensors[f"{prefix}{linear}.weight"] for linear in fold.linears]
        scale_C, left[fold.linears[0]] = search_scales(x_TC, weights, lambda s_C, fold=fold: shared_scales(fold, layer, s_C))
        used_C = apply_fold(tensors, prefix, fold, layer, scale_C, round_norm=round_norm)
        for linear in fold.linears:
            inputs[linear] = inputs[linear] / used_C
    return left


def search_scales(x_TC: Tensor, weights: Sequence[Tensor], share: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
    """(scales, their error by that of no scales) for inputs and the matrices [R, C] that they go into; `share` makes scales such as the feeder can take."""
    weight_RC = torch.cat(list(weights))
    max_x_C, max_weight_C = x_TC.abs().amax(0), weight_RC.abs().amax(0)
    tried = [torch.ones_like(max_x_C), *(share(smooth_scales(max_x_C, max_weight_C, alpha)) for alpha in ALPHAS)]
    errors = [rounded_error(x_TC, weight_RC, scale_C) for scale_C in tried]
    best = min(range(len(tried)), key=errors.__getitem__)
    found_C = _descend(x_TC, weight_RC, tried[best], share)
    error = rounded_error(x_TC, weight_RC, found_C)
    scale_C, least = (found_C, error) if error < errors[best] else (tried[best], errors[best])
    return scale_C, least / max(errors[0], 1e-30)


def rounded_error(x_TC: Tensor, weight_RC: Tensor, scale_C: Tensor) -> float:
    """Squared error of the outputs by their squares, each token's share counting the same, with inputs and weights in int8."""
    wanted_TR, scaled_RC = x_TC @ weight_RC.T, weight_RC * scale_C
    step_R1 = (scaled_RC.abs().amax(1, keepdim=True) / WEIGHT_RANGE).clamp_min_(1e-30)
    rounded_RC = (scaled_RC / step_R1).round_().mul_(step_R1)
    off_TR = (fake_int8(x_TC / scale_C) @ rounded_RC.T).sub_(wanted_TR)
    return float((off_TR.square_().sum(1) / wanted_TR.square().sum(1).clamp_min_(1e-12)).mean())


@torch.inference_mode(False)
@torch.enable_grad()
def _descend(x_TC: Tensor, weight_RC: Tensor, start_C: Tensor, share: Callable[[Tensor], Tensor]) -> Tensor:
    """Scales of the least expected error that Adam met."""
    x_TC, weight_RC = x_TC.clone().detach(), weight_RC.clone().detach()
    token_T = 1 / (len(x_TC) * (x_TC @ weight_RC.T).square_().sum(1).clamp_min_(1e-12))
    column_C, energy_C = weight_RC.square().sum(0), (x_TC.square() * token_T[:, None]).sum(0)
    x_TC, weight_RC = x_TC.abs_(), weight_RC.abs_()
    log_C = start_C.clone().detach().log_().requires_grad_()
    best, best_C = float("inf"), start_C
    optimizer = torch.optim.Adam([log_C], lr=RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        scale_C = share(log_C.exp())
        inputs = (token_T * (x_TC / scale_C).amax(1).square()).sum() / HALF_RANGE**2 * (scale_C.square() * column_C).sum()
        rounding = (weight_RC * scale_C).amax(1).square().sum() / WEIGHT_RANGE**2 * (energy_C / scale_C.square()).sum()
        loss = (inputs + rounding).log()
        if (now := float(loss.detach())) < best:
            best, best_C = now, scale_C.detach().clone()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return best_C


def _sampled(runner: LayerRunner, index: int, tensors: Tensors, hidden: HiddenStates, stems: Sequence[str]) -> dict[str, Tensor]:
    """At most SAMPLED inputs of each of these linears, evenly out of all windows."""
    layer, kept = runner.build(index, tensors), {stem: [] for stem in stems}
    each = max(1, SAMPLED // hidden.num_windows)

    def keep(stem: str) -> Callable[[Tensor, int | None], Tensor]:
        def see(x_TC: Tensor, expert: int | None) -> Tensor:
            step = max(1, -(-len(x_TC) // each))
            kept[stem].append(x_TC[::step].clone())
            return x_TC

        return see

    for stem in stems:
        tap(layer, stem, keep(stem))
    for window in range(min(hidden.num_windows, SAMPLED)):
        runner.run(index, layer, hidden.read(window))
    return {stem: torch.cat(found) for stem, found in kept.items()}
