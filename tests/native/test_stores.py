"""Coded and paired caches under the native step: the specification's codes, attention and bytes; bits that depend on neither neighbours, chunks nor threads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.family_models import FP32
from native.native_steps import RecordedStepper
from native.sanitized import examples
from native.test_recorded import EXACT, _copy, _random_model, _spec
from tradespace.errors import EngineError, UnsupportedError
from tradespace.formats.native import NativeWeight
from tradespace.kernels.native import load, unavailable
from tradespace.kernels.native import program as ops
from tradespace.kernels.native.compiler import ISAS, cpu_flags
from tradespace.kernels.view import Span, StepBatch, positions_of
from tradespace.kv.cache import STORES, KVCache
from tradespace.model.recorded import FORMS
from tradespace.model.transformer import Transformer
from tradespace.spec import native
from tradespace.spec.kv import KVPlan, token_bytes
from tradespace.spec.mixers import Attention
from tradespace.spec.native import LANES

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"native kernels: {unavailable()}")

CODED = ("int8", "fp8")
PAIRED = "bf16"


def by_slots(cache: KVCache, layer: int, mixer: Attention) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Keys' and values' planes as the store's codec has them: codes (slots, K, W), and where there are scales (slots, K, 1)."""
    held, B, P = cache.tiled_planes(layer), cache.num_blocks, cache.block_size
    if held.keys.dtype == torch.bfloat16:
        keys = held.keys.view(B, mixer.K, P // LANES, mixer.H // 2, LANES, 2).permute(0, 2, 4, 1, 3, 5).reshape(B * P, mixer.K, mixer.H)
        values = held.values.view(B, mixer.K, P // 2, mixer.Hv, 2).permute(0, 2, 4, 1, 3).reshape(B * P, mixer.K, mixer.Hv)
        return (keys,), (values,)
    keys = held.keys.view(B, mixer.K, P // LANES, mixer.H, LANES).permute(0, 2, 4, 1, 3).reshape(B * P, mixer.K, mixer.H)
    values = held.values.view(B, mixer.K, P, mixer.Hv).transpose(1, 2).reshape(B * P, mixer.K, mixer.Hv)
    scales = [() if s is None else (s.view(B, mixer.K, P).transpose(1, 2).reshape(B * P, mixer.K, 1),) for s in (held.key_scales, held.value_scales)]
    return (keys, *scales[0]), (values, *scales[1])


@settings(max_examples=examples(12), deadline=None)
@given(data=st.data())
def test_drawn_attention_is_that_of_the_same_store_and_blind_to_neighbours(data):
    """As for plain floats: torch's path over the store's own codec gives the same logits, and equal bits come of any cut."""
    store = data.draw(st.sampled_from((*CODED, PAIRED)), label="store")
    K = data.draw(st.sampled_from([1, 2, 3]), label="K")
    G = data.draw(st.sampled_from([1, 3, 5, 13]), label="G")
    H, Hv = data.draw(st.sampled_from([(8, 8), (20, 12), (64, 64), (16, 80)]), label="H, Hv")
    spec = _spec(
        K * G, K, H, Hv, window=data.draw(st.sampled_from([None, 5, 70])), softcap=data.draw(st.sampled_from([None, 3.0])), sinks=data.draw(st.booleans())
    )
    model = _random_model(spec, EXACT)
    length = data.draw(st.integers(1, spec.max_context), label="length")
    tokens_T, other_T = torch.randint(0, spec.V, (length,)), torch.randint(0, spec.V, (150,))
    threads, layouts = st.sampled_from([1, 2, 7]), st.sampled_from(["paged", "contiguous"])
    whole = RecordedStepper(model, 2, store=store, threads=data.draw(threads), step_tokens=512).step({1: other_T, 0: tokens_T})[0]
    expected = _torch_logits(model, store, tokens_T)
    # a vector that differs in its last bit can round to the next code
    torch.testing.assert_close(whole, expected, atol=5e-2, rtol=5e-2)
    assert (whole - expected).abs().mean() < 2e-3
    block_size = data.draw(st.sampled_from([16, 48]))
    cut = RecordedStepper(model, 2, data.draw(layouts), store=store, block_size=block_size, threads=data.draw(threads), step_tokens=512)
    found = []
    while cut.lengths[0] < length:
        size = data.draw(st.sampled_from([1, 3, 40, 300]))
        found.append(cut.step({0: tokens_T[cut.lengths[0] :][:size]})[0])
    assert torch.equal(torch.cat(found), whole)


@settings(max_examples=examples(12), deadline=None)
@given(data=st.data())
def test_products_of_pairs_are_near_and_blind_to_neighbours(data):
    """Where activations need not be exact, queries and weights of a bf16 cache are rounded to bf16 as well, if the machine multiplies such pairs."""
    K = data.draw(st.sampled_from([1, 2, 3]), label="K")
    G = data.draw(st.sampled_from([1, 3, 5, 13]), label="G")
    H, Hv = data.draw(st.sampled_from([(8, 8), (20, 12), (64, 64), (16, 80)]), label="H, Hv")
    spec = _spec(
        K * G, K, H, Hv, window=data.draw(st.sampled_from([None, 5, 70])), softcap=data.draw(st.sampled_from([None, 3.0])), sinks=data.draw(st.booleans())
    )
    model = _random_model(spec, replace(EXACT, default="bf16"))
    length = data.draw(st.integers(1, spec.max_context), label="length")
    tokens_T, other_T = torch.randint(0, spec.V, (length,)), torch.randint(0, spec.V, (150,))
    threads = st.sampled_from([1, 2, 7])
    whole, exact = (
        RecordedStepper(model, 2, store=store, threads=data.draw(threads), step_tokens=512).step({1: other_T, 0: tokens_T})[0] for store in (PAIRED, "fp32")
    )
    # a bf16 number is off by 2^-9 at most, and a score is a sum of products of two
    assert (whole - exact).abs().mean() < 0.02 * exact.abs().mean()
    layout, block_size = data.draw(st.sampled_from(["paged", "contiguous"])), data.draw(st.sampled_from([16, 48]))
    cut = RecordedStepper(model, 2, layout, store=PAIRED, block_size=block_size, threads=data.draw(threads), step_tokens=512)
    found = []
    while cut.lengths[0] < length:
        size = data.draw(st.sampled_from([1, 3, 40, 300]))
        found.append(cut.step({0: tokens_T[cut.lengths[0] :][:size]})[0])
    assert torch.equal(torch.cat(found), whole)


@pytest.mark.parametrize("store", ["fp32", "fp16", *CODED, PAIRED])
@pytest.mark.parametrize(("threads", "window"), [(1, None), (2, None), (2, 70)])
def test_heads_that_take_turns_give_the_bits_of_heads_alone(store, threads, window):
    """With four sequences for each thread a sequence's heads are computed together, chunk by chunk; alone each is shared out in its own way."""
    spec = _spec(9, 3, 20, 12, window=window)
    model = _random_model(spec, replace(EXACT, default="bf16"))
    prompts = [torch.randint(0, spec.V, (length,)) for length in (1, 15, 16, 127, 128, 129, 200, 256, 290)]
    last = [torch.randint(0, spec.V, (3,)) for _ in prompts]
    many = RecordedStepper(model, len(prompts), store=store, threads=threads, step_tokens=1200)
    many.step(dict(enumerate(prompts)))
    together = [many.step({i: tokens_T[step : step + 1] for i, tokens_T in enumerate(last)}) for step in range(3)]
    for i, prompt_T in enumerate(prompts):
        alone = RecordedStepper(model, 1, store=store, threads=threads, step_tokens=1200)
        alone.step({0: prompt_T})
        for step, found in enumerate(together):
            assert torch.equal(found[i], alone.step({0: last[i][step : step + 1]})[0])


def test_products_of_pairs_are_for_activations_that_need_not_be_exact():
    """The step says which it wants, and where the machine multiplies pairs that makes a difference."""
    spec = _spec(4, 2, 32, 32)
    tokens_T = torch.randint(0, spec.V, (100,))
    for kind, form in (("auto", "bf16"), ("fp32", "fp32")):
        stepper = RecordedStepper(_random_model(spec, replace(EXACT, default="bf16"), activations=kind), 1, store=PAIRED)
        assert {op.form for op in stepper.model.body.ops if op.kind in (ops.HEADS, ops.ATTEND)} == {FORMS[form]}
    rounded, exact = (RecordedStepper(_random_model(spec, replace(EXACT, default="bf16")), 1, store=PAIRED) for _ in range(2))
    for op in exact.model.body.ops:
        if op.kind in (ops.HEADS, ops.ATTEND):
            op.form = FORMS["fp32"]
    same = torch.equal(*(stepper.step({0: tokens_T})[0] for stepper in (rounded, exact)))
    assert same == (native.PAIR_PRODUCTS not in ISAS[rounded.model.body.library.isa][0])


@pytest.mark.parametrize(("sets", "weights", "activations", "H", "store"), [
    ((native.PAIR_PRODUCTS,), "q4_0", "auto", 64, "bf16"),
    ((native.PAIR_PRODUCTS,), "bf16", "auto", 64, "bf16"),
    ((native.PAIR_PRODUCTS,), "q4_0", "fp32", 64, "fp16"),
    ((native.PAIR_PRODUCTS,), "fp32", "auto", 64, "fp16"),
    ((native.PAIR_PRODUCTS,), "q4_0", "auto", 33, "fp16"),
    (("avx512f",), "q4_0", "auto", 64, "fp16"),
])  # fmt: skip
def test_the_usual_store(sets, weights, activations, H, store):
    assert native.usual_store(weights, activations, sets, _spec(2, 2, H, H)) == store


def test_keys_of_an_odd_width_have_no_pairs():
    with pytest.raises(UnsupportedError, match="keys in pairs of numbers; those of layer 0 of drawn have 33"):
        KVCache(_spec(2, 2, 33, 32), KVPlan(store=PAIRED), num_blocks=1, block_size=16, dtype=torch.float32, order="tiles")


@torch.inference_mode()
def _torch_logits(model: Transformer, store: str, tokens_T: Tensor) -> Tensor:
    reference = Transformer(model.spec, FP32, attention="reference", linear="reference", max_context=model.spec.max_context)
    _copy(model, reference)
    blocks = tuple(range(-(-len(tokens_T) // 16)))
    cache = KVCache(model.spec, KVPlan(store=store), num_blocks=len(blocks), block_size=16, dtype=torch.float32)
    spans = [Span(0, len(tokens_T), len(tokens_T), blocks)]
    return reference.logits(reference.forward(tokens_T, positions_of(spans), StepBatch.from_spans(spans, block_size=16), cache))


def coded(store: str, x: Tensor) -> tuple[Tensor, ...]:
    """The codes of vectors x (…, W), and their scales where there are any, by the store's own codec."""
    return (x.bfloat16(),) if store == PAIRED else STORES[store].encode(x)


@pytest.mark.parametrize("store", [*CODED, PAIRED])
@pytest.mark.parametrize(("H", "Hv"), [(64, 64), (20, 12), (80, 16)])
@pytest.mark.parametrize("size", [1.0, 3e-3, 1e-6])
def test_codes_are_the_specifications(store, H, Hv, size):
    """The codec's codes and scales for the fp32 keys and values that a plain cache holds of the same first layer; small ones fall below fp16's least scale."""
    spec = _spec(3, 3, H, Hv)
    model = _random_model(spec, EXACT)
    qkv = model.get_submodule("layers.0.attn.qkv")
    assert isinstance(qkv, NativeWeight)
    width = 3 * 2 * H
    scale_R1 = torch.full((qkv.num_rows, 1), size)
    scale_R1[width:] *= torch.linspace(0.5, 600, qkv.num_rows - width)[:, None]  # values beyond fp8's range
    qkv.set_rows(slice(0, qkv.num_rows), torch.randn(qkv.num_rows, qkv.shape[-1]) * scale_R1)
    tokens_T = torch.randint(0, spec.V, (61,))
    plain, rounded = (RecordedStepper(model, 1, store=name) for name in ("fp32", store))
    for stepper in (plain, rounded):
        stepper.step({0: tokens_T})
    mixer = spec.layers[0].mixer
    assert isinstance(mixer, Attention)
    exact, found = (by_slots(stepper.cache, 0, mixer) for stepper in (plain, rounded))
    for (x_SKW,), parts in zip(exact, found, strict=True):
        x_SKW = x_SKW[: len(tokens_T)]
        for part, expected in zip(parts, coded(store, x_SKW.reshape(-1, x_SKW.shape[-1])), strict=True):
            assert torch.equal(part[: len(tokens_T)].reshape(expected.shape), expected)
    if store == "int8" and size == 1.0:
        assert all(parts[0][: len(tokens_T)].float().abs().amax(-1).eq(127).all() for parts in found)


@pytest.mark.parametrize("store", CODED)
def test_a_cache_has_the_specs_bytes_and_copies_scales(store):
    spec = _spec(6, 3, 24, 16, context=64)
    plan = KVPlan(store=store)
    cache = KVCache(spec, plan, num_blocks=4, block_size=16, dtype=torch.float32, order="tiles")
    assert cache.nbytes == 64 * token_bytes(spec, plan)
    planes = list(_planes(cache, spec.attention_layers))
    assert len(planes) == (8 if store == "int8" else 4)
    for plane in planes:
        plane.copy_(torch.randint(0, 100, plane.shape))
    before = [plane.clone().view(4, -1) for plane in planes]
    cache.copy_blocks([(0, 1), (1, 3)])
    for plane, old in zip(planes, before, strict=True):
        assert torch.equal(plane.view(4, -1), old[[0, 0, 2, 1]])


def _planes(cache: KVCache, layers):
    for index in layers:
        held = cache.tiled_planes(index)
        yield from (plane for plane in (held.keys, held.values, held.key_scales, held.value_scales) if plane is not None)


def test_other_stores_have_no_tiles():
    spec = _spec(2, 2, 32, 32)
    for plan in (KVPlan(store="int4"), KVPlan(store="int8", values="fp16"), KVPlan(store="x-bf16")):
        with pytest.raises(UnsupportedError, match="native attention reads keys and values alike"):
            KVCache(spec, plan, num_blocks=1, block_size=16, dtype=torch.float32, order="tiles")
    tiled, slots = (KVCache(spec, KVPlan(store="int8"), num_blocks=1, block_size=16, dtype=torch.float32, order=order) for order in ("tiles", "slots"))
    with pytest.raises(EngineError, match="native kernels' tiles"):
        tiled.view(0)
    with pytest.raises(EngineError, match="no tiles"):
        slots.tiled_planes(0)


@pytest.mark.parametrize("store", [*CODED, PAIRED])
@pytest.mark.parametrize("isa", [isa for isa, (need, _) in ISAS.items() if need <= cpu_flags()])
def test_instruction_sets_agree(isa, store, monkeypatch):
    """The specification's codes of the keys and values that each computes; logits as near as a code that rounds the other way lets them be."""
    model = _random_model(_spec(6, 2, 20, 12, window=70), EXACT)
    tokens_T = torch.randint(0, model.spec.V, (150,))
    best = RecordedStepper(model, 1, store=store).step({0: tokens_T})[0]
    monkeypatch.setattr("tradespace.model.recorded.load", lambda: load(isa))
    stepper, plain = RecordedStepper(model, 1, store=store), RecordedStepper(model, 1)
    torch.testing.assert_close(stepper.step({0: tokens_T})[0], best, atol=5e-2, rtol=5e-2)
    plain.step({0: tokens_T})
    mixer = model.spec.layers[0].mixer
    assert isinstance(mixer, Attention)
    for (x_SKW,), parts in zip(by_slots(plain.cache, 0, mixer), by_slots(stepper.cache, 0, mixer), strict=True):
        for part, expected in zip(parts, coded(store, x_SKW[: len(tokens_T)].reshape(-1, x_SKW.shape[-1])), strict=True):
            assert torch.equal(part[: len(tokens_T)].reshape(expected.shape), expected)
