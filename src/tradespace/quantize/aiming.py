"""Linears that aim at what the model itself would have given: errors of what came before are made good where they can still be foreseen.

A plain quantizer keeps W x̂, with x̂ what the layers that are quantized already give it; so the errors in x̂ go on for ever. Here the model itself runs beside
the quantized one over the same text. Before a linear is rounded, its weights become those whose outputs come nearest to what is missing:
    W* = W + (Σ e x̂ᵀ) (Σ x̂ x̂ᵀ + λI)⁻¹,   e = W (x - x̂), and for linears that write to the residual stream what the two streams differ by, too.
Rounding follows, by the Gram matrix of x̂ (activations in int8 where the format has them so). One linear after the other: each sees the ones before it as
they will compute. arXiv:2504.02692 corrects the inputs' errors column by column; solving for W* first does both corrections, for any rounding.
λ is ten times that of rounding: e is mostly noise, which few tokens must not teach (measured on SmolLM2 with e8: KL 0.62 with 1%, 0.58 with 10%, 1.07 by
plain LDLQ). Not so for int2 in groups of 64: 1.17 with 1%, 2.47 with 10%, 1.95 by plain GPTQ; why is not understood.
A layer takes a pass of both models over the text for each of its matrices; C² and R·C numbers of statistics.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tradespace.formats import decode
from tradespace.model.layer import Layer
from tradespace.quantize.folds import Tensors
from tradespace.quantize.gram import Gram, fake_int8, output_error, tap
from tradespace.quantize.layer_passes import built
from tradespace.quantize.methods import Inputs, Method, QuantizedLayer, is_dense, layer_matrices, round_matrix
from tradespace.quantize.smooth_search import fold_searched
from tradespace.quantize.stream import HiddenStates, LayerRunner
from tradespace.spec.model import LayerSpec
from tradespace.spec.weights import WeightPlan

DAMPING = 0.1


class _EnoughError(Exception):
    """Ends a layer's pass at the linear that was asked about."""


class _Probe:
    """A layer that shows what one of its linears gets, rounded to int8 first where `int8`; its pass ends there unless `whole`."""

    def __init__(self, layer: Layer, stem: str, *, int8: bool, whole: bool):
        self.layer, self.int8, self.whole = layer, int8, whole
        self.seen_TC: Tensor | None = None
        tap(layer, stem, self._see)

    def _see(self, x_TC: Tensor, expert: int | None) -> Tensor:
        self.seen_TC = fake_int8(x_TC) if self.int8 else x_TC
        if not self.whole:
            raise _EnoughError
        return self.seen_TC

    def run(self, runner: LayerRunner, index: int, hidden_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """(the linear's inputs, the layer's outputs or None)."""
        try:
            out_TD = runner.run(index, self.layer, hidden_TD)
        except _EnoughError:
            out_TD = None
        assert self.seen_TC is not None, "every linear of a layer gets every token"
        return self.seen_TC, out_TD


class _Aim:
    """Statistics of one linear: Σ x̂ x̂ᵀ and Σ e x̂ᵀ."""

    def __init__(self, rows: int, columns: int):
        self.gram = Gram(columns)
        self.missing_RC = torch.zeros(rows, columns)

    def add(self, seen_TC: Tensor, missing_TR: Tensor) -> None:
        self.gram.add(seen_TC)
        self.missing_RC.addmm_(missing_TR.T, seen_TC)

    def target(self, weight_RC: Tensor, *, damping: float = DAMPING) -> Tensor:
        """W*. The damping is raised tenfold where the damped matrix is still not positive."""
        damped_CC = self.gram.gram_CC.clone()
        mean = float(damped_CC.diagonal().mean()) or 1.0
        damped_CC.diagonal().add_(damping * mean)
        lower_CC, info = torch.linalg.cholesky_ex(damped_CC)
        if int(info):
            return self.target(weight_RC, damping=10 * damping)
        return weight_RC + torch.cholesky_solve(self.missing_RC.T, lower_CC).T


def aim_layer(
    runner: LayerRunner,
    index: int,
    tensors: Tensors,
    plan: WeightPlan,
    method: Method,
    reference: HiddenStates,
    hidden: HiddenStates,
    *,
    round_norm: Callable[[Tensor], Tensor] = lambda x: x,
) -> QuantizedLayer:
    """One layer, its linears one after the other. `tensors` (fp32) become what the model itself computes with, folded where the method folds; `reference` and
    `hidden`: the layer's inputs in the model itself and in the quantized one."""
    spec, prefix = runner.spec, f"layers.{index}."
    alphas = fold_searched(runner, index, tensors, reference, round_norm=round_norm) if method.fold == "smooth-search" else {}
    found = QuantizedLayer(dict(tensors), {}, alphas=alphas)
    formats: dict[str, str] = {}
    for tensor in layer_matrices(spec, index):
        name, fmt = tensor.name, plan.format_of(tensor)
        weight_RC = tensors[name]
        if is_dense(fmt):
            codes = round_matrix(fmt, weight_RC, None, method.rounding)
        else:
            stem = name.removeprefix(prefix).removesuffix(".weight")
            aim = _Aim(*weight_RC.shape)
            whole = stem == "ffn.down" and _adds_plainly(spec.layers[index])
            own = _Probe(runner.build(index, tensors), stem, int8=False, whole=whole)
            theirs = _Probe(built(runner, index, found.tensors, formats), stem, int8=fmt.activations == 8, whole=whole)
            for window in range(hidden.num_windows):
                _learn(aim, runner, index, stem, weight_RC, own, theirs, reference.read(window), hidden.read(window))
            target_RC = aim.target(weight_RC)
            codes = round_matrix(fmt, target_RC, Inputs(aim.gram), method.rounding)
            off_RC = decode(fmt.name, codes).sub_(target_RC)
            found.errors[stem] = output_error(off_RC, aim.gram.gram_CC) / max(1e-30, output_error(target_RC, aim.gram.gram_CC))
        found.tensors[name], found.codes[name], formats[name] = decode(fmt.name, codes), (fmt.name, codes), fmt.name
    return found


def _adds_plainly(layer: LayerSpec) -> bool:
    """Whether what a linear writes is added to the stream as it is: no norm stands between."""
    return layer.arrangement not in ("sandwich", "post")


def _learn(
    aim: _Aim, runner: LayerRunner, index: int, stem: str, weight_RC: Tensor, own: _Probe, theirs: _Probe, reference_TD: Tensor, hidden_TD: Tensor
) -> None:
    """Adds one piece of the text. `reference_TD` and `hidden_TD` are overwritten."""
    layer = runner.spec.layers[index]
    apart_TD = (reference_TD - hidden_TD).div_(layer.residual_scale) if stem == "attn.out" and _adds_plainly(layer) else None
    x_TC, own_TD = own.run(runner, index, reference_TD)
    seen_TC, their_TD = theirs.run(runner, index, hidden_TD)
    if own_TD is not None and their_TD is not None:  # the layer's outputs, with all that came before in them
        missing_TR = (own_TD - their_TD).div_(layer.residual_scale)
    else:
        missing_TR = (x_TC - seen_TC) @ weight_RC.T
        if apart_TD is not None:
            missing_TR += apart_TD
    aim.add(seen_TC, missing_TR)
