"""The recorded native step against transformers and our own modules: logits, bits that do not depend on neighbours, stores, bytes of its buffers."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.family_configs import FAMILIES, V
from model.family_models import FP32, make_pair, packed_logits
from native.native_steps import RecordedStepper
from native.sanitized import examples
from tradespace.formats.native import NativeWeight
from tradespace.kernels.native import unavailable
from tradespace.kernels.view import StepBatch
from tradespace.model.transformer import Transformer
from tradespace.spec import native
from tradespace.spec.kv import KVPlan
from tradespace.spec.model import Attention, DenseFFN, LayerSpec, ModelSpec, Rope
from tradespace.spec.weights import WeightPlan, weight_bytes

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"native kernels: {unavailable()}")

EXACT = replace(FP32, layout="native")


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_are_transformers(family, seed, tmp_path):
    """Ragged prompts in chunks beside decode steps, both layouts; fp32 throughout: within 1e-4 of transformers."""
    pair = make_pair(family, seed, tmp_path)
    model = pair.ours(max_context=48, plan=EXACT, attention="native", linear="native")
    assert native.refusal(model.spec, KVPlan(store="fp32")) is None, "a family that the native step used to compute"
    generator = random.Random(seed)
    # none within the trained context of 16: transformers' long rope factors begin with the first sequence that is longer
    sequences = [torch.tensor([generator.randrange(V) for _ in range(length)]) for length in (41, 23, 19)]
    theirs = [pair.logits(tokens_T) for tokens_T in sequences]
    for layout in ("paged", "contiguous"):
        stepper = RecordedStepper(model, 3, layout)
        found: list[list[torch.Tensor]] = [[], [], []]
        while any(stepper.lengths[i] < len(sequences[i]) for i in range(3)):
            chunks = {}
            for i in (2, 0, 1):
                size = generator.choice([0, 1, 1, 2, 5, 19])
                if tokens := sequences[i][stepper.lengths[i] :][:size].tolist():
                    chunks[i] = torch.tensor(tokens)
            for i, logits in (stepper.step(chunks) if chunks else {}).items():
                found[i].append(logits)
        for ours, expected in zip(found, theirs, strict=True):
            torch.testing.assert_close(torch.cat(ours), expected, atol=1e-4, rtol=1e-4)


def _random_model(spec: ModelSpec, plan: WeightPlan, *, activations: str = "auto") -> Transformer:
    torch.manual_seed(0)
    model = Transformer(spec, plan, attention="native", linear="native", activations=activations, max_context=spec.max_context)
    for module in model.modules():
        if isinstance(module, NativeWeight):
            module.set_rows(slice(0, module.num_rows), torch.randn(module.num_rows, module.shape[-1]) * 0.3)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model


def _spec(N: int, K: int, H: int, Hv: int, *, window: int | None = None, softcap: float | None = None, sinks: bool = False, context: int = 300) -> ModelSpec:
    mixer = Attention(N=N, K=K, H=H, value_H=Hv, rope=Rope(dims=H // 2 * 2), window=window, logit_softcap=softcap, sinks=sinks)
    layers = (LayerSpec(mixer=mixer, ffn=DenseFFN(F=21, activation="gelu")),) * 2
    return ModelSpec(name="drawn", family="llama", D=37, V=53, layers=layers, max_context=context)


@settings(max_examples=examples(20), deadline=None)
@given(data=st.data())
def test_drawn_attention_is_the_references_and_blind_to_neighbours(data):
    """GQA ratios, odd heads, windows, caps, sinks, contexts of several chunks, threads: the reference's logits, and equal bits however it is cut."""
    K = data.draw(st.sampled_from([1, 2, 3]), label="K")
    G = data.draw(st.sampled_from([1, 2, 3, 5, 13]), label="G")
    H, Hv = data.draw(st.sampled_from([(8, 8), (20, 12), (64, 64), (16, 80)]), label="H, Hv")
    spec = _spec(
        K * G, K, H, Hv, window=data.draw(st.sampled_from([None, 5, 70])), softcap=data.draw(st.sampled_from([None, 3.0])), sinks=data.draw(st.booleans())
    )
    model = _random_model(spec, EXACT)
    reference = Transformer(spec, FP32, attention="reference", linear="reference", max_context=spec.max_context)
    _copy(model, reference)
    length = data.draw(st.integers(1, spec.max_context), label="length")
    tokens_T, other_T = torch.randint(0, spec.V, (length,)), torch.randint(0, spec.V, (150,))
    expected = packed_logits(reference, [tokens_T])[0]
    whole = RecordedStepper(model, 2, threads=data.draw(st.sampled_from([1, 2, 7])), step_tokens=512).step({1: other_T, 0: tokens_T})[0]
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)
    cut = RecordedStepper(model, 2, block_size=data.draw(st.sampled_from([16, 48])), threads=data.draw(st.sampled_from([1, 2, 7])), step_tokens=512)
    found = []
    while cut.lengths[0] < length:
        size = data.draw(st.sampled_from([1, 3, 40, 300]))
        found.append(cut.step({0: tokens_T[cut.lengths[0] :][:size]})[0])
    assert torch.equal(torch.cat(found), whole)


def _copy(source: Transformer, target: Transformer) -> None:
    for name, module in source.named_modules():
        if isinstance(module, NativeWeight):
            target.get_submodule(name).weight.data.copy_(module.dense_rows(0, module.num_rows).view(module.shape))  # type: ignore[operator]
    theirs = dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        theirs[name].data.copy_(parameter)


@pytest.mark.parametrize(("store", "tolerance"), [("fp16", 1e-2), ("bf16", 8e-2)])
def test_stores_round_and_no_more(store, tolerance):
    model = _random_model(_spec(4, 2, 32, 32), EXACT)
    tokens_T = torch.randint(0, 53, (200,))
    exact, rounded = (RecordedStepper(model, 1, store=name).step({0: tokens_T})[0] for name in ("fp32", store))
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, atol=tolerance, rtol=tolerance)


def test_bytes_are_the_specs():
    """Weights and buffers, to the byte."""
    spec = _spec(6, 3, 20, 12)
    for name in native.FORMAT_KINDS:
        if name in ("q4_k", "q5_k", "q6_k", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"):
            continue
        plan = WeightPlan(default=name, layout="native")
        model = Transformer(spec, plan, attention="native", linear="native", max_context=64)
        held = sum(module.nbytes for module in model.modules() if isinstance(module, NativeWeight)) + sum(p.nbytes for p in model.parameters())
        assert held == weight_bytes(spec, plan), name
        recorded = RecordedStepper(model, 1, threads=3, step_tokens=33).model
        forms = native.forms(dict.fromkeys(("qkv",), name), "auto")
        assert recorded.nbytes == native.buffers(spec).nbytes(33, 33, forms, 3, native.value_width(spec)), name


def test_nothing_is_computed_for_an_empty_step():
    model, none = RecordedStepper(_random_model(_spec(2, 1, 8, 8), EXACT), 1).model, torch.empty(0, dtype=torch.int64)
    assert model.logits(model.forward(none, none, StepBatch.from_spans([], block_size=16))).shape == (0, 53)
