"""Linears that aim at the model's own outputs, and SmoothQuant's scales by descent: each lowers the error that it is there to lower, and nothing else moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantize.models import CONTEXT, stored
from tradespace.formats import decode
from tradespace.lab.quantizers_model import HeldHidden
from tradespace.quantize.aiming import aim_layer
from tradespace.quantize.folds import layer_folds, shared_scales
from tradespace.quantize.layer_passes import run_own, run_quantized
from tradespace.quantize.methods import QuantizedLayer, find_method, layer_matrices
from tradespace.quantize.rtn import round_to_nearest
from tradespace.quantize.smooth_search import fold_searched, rounded_error, search_scales
from tradespace.quantize.smoothquant import smooth_scales
from tradespace.quantize.stream import LayerRunner, read_layer
from tradespace.spec.weights import WeightPlan

WINDOWS = 40


def hidden(width: int, seed: int = 0) -> HeldHidden:
    """Inputs of a layer that lie near a plane, as a residual stream's do, so that there is something to learn about them."""
    plane = torch.randn(width // 4, width, generator=torch.Generator().manual_seed(99))
    draw = torch.Generator().manual_seed(seed)
    return HeldHidden([torch.randn(CONTEXT, width // 4, generator=draw) @ plane for _ in range(WINDOWS)])


def off(own: HeldHidden, other: HeldHidden) -> float:
    return sum(float((a - b).square().sum()) for a, b in zip(own.pieces, other.pieces, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "falcon"])  # a plain stream, norms before it is added to, both parts beside each other
def test_a_layer_makes_good_what_its_inputs_lost(family: str, tmp_path: Path):
    """The same layer, the same format and the same wrong inputs: aimed, it ends nearer to what the right inputs give; on text that it has not seen, too."""
    weights = stored(family, tmp_path)
    runner, plan = LayerRunner(weights.spec, CONTEXT), WeightPlan(default="int8")
    method = find_method("gptaq")

    def states(seed: int) -> tuple[HeldHidden, HeldHidden]:
        right = hidden(weights.spec.D, seed)
        wrong = HeldHidden([0.8 * piece for piece in right.pieces])
        wrong.pieces = [piece + 0.3 * piece.roll(1, dims=1) for piece in wrong.pieces]
        return right, wrong

    right, wrong = states(0)
    aimed = aim_layer(runner, 0, read_layer(weights, 0), plan, method, right, wrong)
    tensors = read_layer(weights, 0)
    codes = {tensor.name: ("int8", round_to_nearest("int8", tensors[tensor.name])) for tensor in layer_matrices(weights.spec, 0)}
    plain = QuantizedLayer(tensors | {name: decode(fmt, code) for name, (fmt, code) in codes.items()}, codes)
    assert set(aimed.codes) == set(codes)
    for seed in (0, 1):
        right, wrong = states(seed)
        wanted = HeldHidden(list(run_own(runner, 0, read_layer(weights, 0), right)))
        errors = [off(wanted, HeldHidden(list(run_quantized(runner, 0, done, wrong)))) for done in (aimed, plain)]
        assert errors[0] < 0.9 * errors[1], (seed, errors)


def test_with_right_inputs_eight_bits_lose_little(tmp_path: Path):
    weights = stored("llama", tmp_path)
    runner, right = LayerRunner(weights.spec, CONTEXT), hidden(weights.spec.D)
    done = aim_layer(runner, 0, read_layer(weights, 0), WeightPlan(default="int8"), find_method("gptaq"), right, right.copied())
    wanted, found = HeldHidden(list(run_own(runner, 0, read_layer(weights, 0), right))), HeldHidden(list(run_quantized(runner, 0, done, right)))
    assert 0 < off(wanted, found) < 1e-3 * off(wanted, right)
    assert all(0 < error < 1e-3 for error in done.errors.values())


def test_scales_by_descent_beat_every_alpha(tmp_path: Path):
    draw = torch.Generator().manual_seed(2)
    x_TC = torch.randn(512, 96, generator=draw) * (3 * torch.rand(96, generator=draw) ** 4 + 0.05) * torch.randn(512, 1, generator=draw).exp()
    weight_RC = torch.randn(64, 96, generator=draw) * (torch.rand(96, generator=draw) + 0.1)
    scale_C, left = search_scales(x_TC, [weight_RC], lambda scale_C: scale_C)
    plain, found = (rounded_error(x_TC, weight_RC, scale_C) for scale_C in (torch.ones(96), scale_C))
    assert found == pytest.approx(left * plain) and left < 0.5
    grid = [smooth_scales(x_TC.abs().amax(0), weight_RC.abs().amax(0), alpha / 10) for alpha in range(2, 10)]
    assert found < 0.95 * min(rounded_error(x_TC, weight_RC, scale_C) for scale_C in grid)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_searched_folds_leave_the_outputs(family: str, tmp_path: Path):
    weights = stored(family, tmp_path)
    runner, right = LayerRunner(weights.spec, CONTEXT), hidden(weights.spec.D)
    before, tensors = read_layer(weights, 0), read_layer(weights, 0)
    left = fold_searched(runner, 0, tensors, right)
    assert set(left) == {"attn.out", "ffn.down", "attn.qkv", "ffn.gate_up"} and all(0 < share <= 1 for share in left.values())
    assert any(not torch.equal(before[name], tensors[name]) for name in before)
    wanted, found = (HeldHidden(list(run_own(runner, 0, values, right))) for values in (before, tensors))
    assert off(wanted, found) < 1e-8 * off(wanted, HeldHidden([torch.zeros_like(piece) for piece in wanted.pieces]))
    fold = next(fold for fold in layer_folds(weights.spec.layers[0]) if fold.kind == "value")
    assert shared_scales(fold, weights.spec.layers[0], torch.ones(before["layers.0.attn.out.weight"].shape[1])).eq(1).all()
