"""Stores of the cache: bytes equal to the spec's, values as near as their codes allow, tails, keys per channel, and the layer's input."""

from __future__ import annotations

import pytest
import torch

from conformance.attention_cases import LAYOUTS, model_of
from tradespace.errors import EngineError, InputError, UnsupportedError
from tradespace.kernels.view import Span, StepBatch
from tradespace.kv import STORES, KVCache
from tradespace.kv.store.grouped import pack, unpack
from tradespace.spec.kv import STORES as SPECS
from tradespace.spec.kv import KVPlan, Retain, find_store, model_refusal, parse_retain, parse_stores, pointless, refusal, state_bytes, token_bytes
from tradespace.spec.kv_stores import ALIASES
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec

HEADS = Attention(N=6, K=3, H=64, value_H=40)
RETAINED = {
    "full": Retain(),
    "sliding": Retain(kind="sliding", window=20, sinks=4),
    "h2o": Retain(kind="h2o", budget=24),
    "snapkv": Retain(kind="snapkv", budget=40, window=8),
    "recent": Retain(kind="recent", recent=9),
    "ids only": Retain(kind="recent"),
}


def cache_of(kv: KVPlan, model: ModelSpec, *, context: int = 96, sequences: int = 2) -> KVCache:
    size = kv.block_slots(context)
    blocks = sequences * max(1, -(-kv.retain.tokens(context) // size))
    return KVCache(model, kv, num_blocks=blocks, block_size=size, dtype=torch.float32, max_sequences=sequences, max_context=context)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("retain", list(RETAINED))
@pytest.mark.parametrize("store", [*STORES, "k=int4c,v=int4", "k=int8,v=fp8", "k=fp32,v=int2"])
def test_spec_is_implementation_is_memory(store, retain, layout):
    """Every point of the space: to the byte what the spec says, no storage shared or padded; or refused by spec and implementation alike, with one reason."""
    keys, values = parse_stores(store)
    kv = KVPlan(retain=RETAINED[retain], layout=layout, block_size=32, store=keys, values="" if values == keys else values)
    model = model_of(HEADS, Attention(N=4, K=2, H=16))
    if (reason := refusal(kv)) is not None:
        with pytest.raises(UnsupportedError) as refused:
            cache_of(kv, model)
        assert str(refused.value) == reason
        return
    cache = cache_of(kv, model)
    assert cache.nbytes == cache.num_blocks * cache.block_size * token_bytes(model, kv) + 2 * state_bytes(model, kv, 96)
    tensors = [plane for planes in (*cache._planes.values(), *cache._tails.values()) for plane in planes if plane.numel()]
    tensors += [] if cache.ids_BS is None else [cache.ids_BS]
    storages = {plane.untyped_storage().data_ptr(): plane.untyped_storage().nbytes() for plane in tensors}
    assert sum(storages.values()) == cache.nbytes


# relative to the largest element of what shares a scale: half a step, and the rounding of scale and minimum to fp16
BOUNDS = {"fp8": 2**-4, "int8": 0.6 / 127, "int4": 1.2 / 15, "int2": 1.2 / 3}


@pytest.mark.parametrize("store", ["fp8", "int8", "int4", "int2"])
@pytest.mark.parametrize("width", [8, 24, 40, 64, 96])
def test_values_come_back_within_half_a_step(store, width):
    torch.manual_seed(0)
    x_XW = torch.cat((torch.randn(50, width) * 3, torch.zeros(1, width), torch.full((1, width), 1e-9), torch.full((1, width), -7.5)))
    codec = STORES[store]
    parts = codec.encode(x_XW)
    assert sum(part.nbytes for part in parts) == SPECS[store].nbytes(len(x_XW), width)
    found = codec.decode(parts, width, torch.float32)
    span = x_XW.abs().amax(-1, keepdim=True) if store in ("fp8", "int8") else x_XW.amax(-1, keepdim=True) - x_XW.amin(-1, keepdim=True) + x_XW.abs() * 1e-3
    assert bool(((found - x_XW).abs() <= BOUNDS[store] * span + 1e-7).all())
    for row in (0, 17):  # a vector's codes do not depend on what it lies beside
        assert all(torch.equal(part[row], alone[0]) for part, alone in zip(parts, codec.encode(x_XW[row : row + 1]), strict=True))


@pytest.mark.parametrize("bits", [2, 4])
def test_packing(bits):
    codes = torch.randint(0, 2**bits, (7, 21), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, 21), codes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("store", ["int4c", "int2", "k=int2,v=int8", "int2-token-tail"])
def test_tails_are_full_precision_and_groups_are_coded_once(store, layout):
    """However the tokens come, the last ones are read as they were written (to fp16), older ones as their group's codes say; the codes never change."""
    keys, values = parse_stores(store)
    mixer = Attention(N=4, K=2, H=32)
    kv = KVPlan(layout=layout, block_size=64, store=keys, values=values)
    torch.manual_seed(1)
    k, v = torch.randn(300, 2, 32), torch.randn(300, 2, 32)
    k[..., 5] *= 30  # an outlier channel
    seen = []
    for steps in ([300], [1] * 300, [37, 100, 1, 1, 150, 11]):
        cache = cache_of(kv, model_of(mixer), context=320)
        blocks = tuple(range(cache.num_blocks // 2, cache.num_blocks)) if layout == "paged" else (1,)
        at = 0
        for count in steps:
            span = Span(0, count, at + count, blocks, 1)
            view, batch = cache.view(0), StepBatch.from_spans([span])
            view.write(k[at : at + count], v[at : at + count], batch)
            found_k, _ = view.read(span)
            assert torch.equal(found_k[at:], k[at : at + count])  # its own tokens: as they were computed
            view.settle(batch)
            at += count
        view, span = cache.view(0), Span(0, 1, 301, blocks, 1)
        view.write(k[:1], v[:1], StepBatch.from_spans([span]))
        seen.append(view.read(span))
    for part, x, axis in ((0, k, keys), (1, v, values)):
        coded = SPECS[axis].coded(300)
        for found in seen:
            assert torch.equal(found[part][:coded], seen[0][part][:coded])
            if SPECS[axis].tail:
                assert torch.equal(found[part][coded:300], x[coded:].half().float())
    if SPECS[keys].group_tokens:  # one channel's outliers do not spoil the others
        error = (seen[0][0][:160] - k[:160]).abs()
        assert float(error[..., :5].mean()) < 0.4 and float(error[..., 5].mean()) < 12


def test_sequences_of_a_step_need_rows_of_their_own():
    cache = cache_of(KVPlan(store="int2", block_size=32), model_of(HEADS))
    spans = [Span(0, 1, 1, (0,), 1), Span(1, 1, 1, (1,), 1)]
    with pytest.raises(EngineError, match="each needs one of its own"):
        cache.view(0).write(torch.zeros(2, 3, 64), torch.zeros(2, 3, 40), StepBatch.from_spans(spans))


def test_what_makes_no_sense_is_refused_with_the_reason():
    model = model_of(HEADS)
    for kv, why in (
        (KVPlan(store="x-int8", retain=Retain(kind="h2o", budget=8)), "serves all heads"),
        (KVPlan(store="x-int8", values="int4"), "gives keys and values alike"),
        (KVPlan(store="int2", retain=Retain(kind="sliding", window=8), block_size=32), "drops single ones"),
        (KVPlan(store="int4c"), "must be a multiple"),
        (KVPlan(store="int8", retain=Retain(kind="h2o", budget_bytes=1000)), "in bytes still"),
    ):
        assert why in (refusal(kv) or "") and why in (model_refusal(model, kv) or "")
        with pytest.raises(UnsupportedError, match=why):
            KVCache(model, kv, num_blocks=2, block_size=kv.block_size, dtype=torch.float32)
    narrow = model_of(Attention(N=2, K=2, H=12))
    assert "no multiple of 8" in (model_refusal(narrow, KVPlan(store="int2", block_size=32)) or "")


def test_an_input_as_wide_as_keys_and_values_is_pointless_unless_it_has_fewer_bits():
    """D = 32 here. Shared heads make K and V narrow; without sharing the input is half of both."""
    shared, own = model_of(Attention(N=4, K=1, H=8)), model_of(Attention(N=4, K=4, H=8))
    assert "wider than K and V" in (pointless(shared, KVPlan(store="x-bf16")) or "")
    assert pointless(shared, KVPlan(store="x-int4")) is None
    assert all(pointless(own, KVPlan(store=store)) is None for store in ("x-bf16", "x-int8", "x-int4"))
    assert pointless(shared, KVPlan(store="int8")) is None


def test_bad_input():
    for values in (
        {"kind": "sliding", "window": 0},
        {"kind": "sliding", "window": 4, "sinks": 5},
        {"kind": "sliding", "window": -1},
        {"kind": "h2o"},
        {"kind": "h2o", "budget": 8, "recent": 8},
        {"kind": "snapkv", "budget": 32},
        {"kind": "recent", "window": 3},
        {"kind": "oldest"},
    ):
        with pytest.raises(InputError):
            Retain(**values)  # pyright: ignore[reportArgumentType]
    for text in ("sliding", "sliding:0", "sliding:4,5", "sliding:1,2,3", "h2o:0", "recent:many", "full:1", "lru:5", "snapkv:10,10"):
        with pytest.raises(InputError):
            parse_retain(text, 2048)
    for text in ("int9", "k=int8", "k=int8,v=int8,q=int8", "int8,int4", ""):
        with pytest.raises(InputError):
            parse_stores(text)
    with pytest.raises(InputError, match="block size 0"):
        KVPlan(block_size=0)
    assert all(find_store(alias).name == name for alias, name in ALIASES.items())
