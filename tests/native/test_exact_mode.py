"""`--activations fp32`: whatever holds the weights, the native step's logits are those of the torch path in fp32 on the same numbers, to 1e-4."""

from __future__ import annotations

import pytest
import torch

from helpers_stories import BOS, load_stories
from model.family_models import FP32, packed_logits
from native.native_steps import RecordedStepper
from tradespace.formats.native import NativeWeight
from tradespace.kernels.native import unavailable
from tradespace.model.transformer import Transformer
from tradespace.quantize.rtn import round_to_nearest
from tradespace.spec import native
from tradespace.spec.formats import FORMATS, refusal
from tradespace.spec.model import Attention, DenseFFN, LayerSpec, ModelSpec, Rope
from tradespace.spec.weights import WeightPlan

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"native kernels: {unavailable()}")

BAR = 1e-4
A_FORMAT_EACH = {kind: next(name for name, (held, _) in native.FORMAT_KINDS.items() if held == kind) for kind in native.KINDS}


def _largest_difference(model: Transformer, tokens_T: torch.Tensor) -> float:
    """Between the native step and the torch modules in fp32 that hold what `model`'s packed weights mean."""
    torch_path = Transformer(model.spec, FP32, attention="sdpa", linear="torch", max_context=model.max_context)
    for name, module in model.named_modules():
        if isinstance(module, NativeWeight):
            torch_path.get_submodule(name).weight.data.copy_(module.dense_rows(0, module.num_rows))  # type: ignore[operator]
    theirs = dict(torch_path.named_parameters())
    for name, parameter in model.named_parameters():
        theirs[name].data.copy_(parameter)
    expected = packed_logits(torch_path, [tokens_T])[0]
    stepper = RecordedStepper(model, 1)
    found = [stepper.step({0: piece_T})[0] for piece_T in (tokens_T[:-2], tokens_T[-2:-1], tokens_T[-1:])]
    return float((torch.cat(found) - expected).abs().max())


@pytest.mark.parametrize("kind", sorted(native.KINDS))
def test_every_kind_of_weight(kind):
    name = A_FORMAT_EACH[kind]
    layers = (LayerSpec(mixer=Attention(N=4, K=2, H=64, rope=Rope(dims=64)), ffn=DenseFFN(F=512)),) * 2
    spec = ModelSpec(name="exact", family="llama", D=256, V=300, layers=layers, max_context=64)
    model = Transformer(spec, WeightPlan(default=name, layout="native"), attention="native", linear="native", activations="fp32", max_context=64)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, NativeWeight):
            values_RC = torch.randn(module.num_rows, module.shape[-1]) * 0.05
            module.set_rows(slice(0, module.num_rows), round_to_nearest(name, values_RC))
    for parameter in model.parameters():
        parameter.data.normal_(mean=1.0, std=0.1)
    assert _largest_difference(model, torch.randint(0, spec.V, (50,))) <= BAR


@pytest.mark.parametrize("kind", sorted(native.KINDS))
def test_trained_weights(kind):
    """stories260k, whose 172 feed-forward columns some formats do not divide: int8 holds those."""
    name = A_FORMAT_EACH[kind]
    if refusal(FORMATS[name], 64) is not None:
        pytest.skip(f"{name} holds no rows of 64")
    exceptions = {"down": "int8"} if refusal(FORMATS[name], 172) is not None else {}
    model = load_stories(WeightPlan(default=name, exceptions=exceptions, layout="native"), attention="native", linear="native", activations="fp32")
    torch.manual_seed(0)
    tokens_T = torch.cat([torch.tensor([BOS]), torch.randint(3, 512, (99,))])
    assert _largest_difference(model, tokens_T) <= BAR
