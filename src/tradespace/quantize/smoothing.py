"""The α of SmoothQuant for a model: that of a small grid whose layers, computed in int8, add what differs least from what they should add to the stream."""

from __future__ import annotations

import torch
from torch import Tensor

from tradespace.quantize.gram import Gram
from tradespace.quantize.layer_passes import built, collect_grams
from tradespace.quantize.methods import METHODS, quantize_layer
from tradespace.quantize.smoothquant import ALPHAS
from tradespace.quantize.source import Weights
from tradespace.quantize.stream import HiddenStates, LayerRunner, read_layer
from tradespace.spec.weights import WeightPlan


def choose_alpha(runner: LayerRunner, weights: Weights, plan: WeightPlan, hidden: HiddenStates) -> float:
    """One pass over the layers, in the model's own precision, with every α tried in each: 2 + |ALPHAS| forward passes over `hidden`, which is overwritten."""
    errors = dict.fromkeys(ALPHAS, 0.0)
    for index in range(runner.spec.L):
        tensors = read_layer(weights, index)
        grams = collect_grams(runner, index, tensors, hidden)
        wanted = _outputs(runner, index, tensors, {}, hidden)
        for alpha in ALPHAS:
            own = {name: values.clone() for name, values in tensors.items()}
            done = quantize_layer(runner.spec, index, own, _copies(grams), plan, METHODS["smoothquant"], alpha=alpha)
            formats = {name: fmt for name, (fmt, _) in done.codes.items()}
            errors[alpha] += _relative_error(hidden, wanted, _outputs(runner, index, done.tensors, formats, hidden))
        hidden.write_all(iter(wanted))
    return min(ALPHAS, key=lambda alpha: errors[alpha])


def _outputs(runner: LayerRunner, index: int, tensors: dict[str, Tensor], formats: dict[str, str], hidden: HiddenStates) -> list[Tensor]:
    layer = built(runner, index, tensors, formats)
    return [runner.run(index, layer, hidden.read(window)) for window in range(hidden.num_windows)]


def _relative_error(hidden: HiddenStates, wanted: list[Tensor], found: list[Tensor]) -> float:
    off = sum(float((a - b).square().sum(dtype=torch.float64)) for a, b in zip(wanted, found, strict=True))
    added = sum(float((a - hidden.read(window)).square().sum(dtype=torch.float64)) for window, a in enumerate(wanted))
    return off / max(added, 1e-30)


def _copies(grams: dict[str, Gram]) -> dict[str, Gram]:
    found = {}
    for stem, gram in grams.items():
        found[stem] = Gram(len(gram.sum_abs_C))
        found[stem].gram_CC.copy_(gram.gram_CC)
        found[stem].sum_abs_C.copy_(gram.sum_abs_C)
        found[stem].max_abs_C.copy_(gram.max_abs_C)
        found[stem].num_rows = gram.num_rows
    return found
