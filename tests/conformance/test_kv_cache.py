"""The KV cache: bytes equal to the spec's, reads without copies where they are promised, nothing read that was not written, whatever the layout and store."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.attention_cases import LAYOUTS, make_case, mixers, model_of, oracle, spans_for
from tradespace.errors import InputError
from tradespace.kernels.attention import KERNELS
from tradespace.kernels.attention.sdpa import GatherView
from tradespace.kernels.view import Span, StepBatch
from tradespace.kv import LAYOUTS as LAYOUT_CLASSES
from tradespace.kv import RETAIN, STORES, KVCache
from tradespace.spec.kv import STORES as STORE_SPECS
from tradespace.spec.kv import KVPlan, Retain, block_bytes, sequence_bytes, token_bytes
from tradespace.spec.mixers import Attention
from tradespace.spec.model import LayerSpec, ModelSpec

SMALL = Attention(N=4, K=2, H=16)
FLOATS = ("fp32", "bf16", "fp16")  # read without decoding; the others have tests of their own (test_kv_stores, test_kv_retain)


def cache_of(layout: str, *, store: str = "fp32", num_blocks: int = 6, block_size: int = 4, dtype=torch.float32, mixer: Attention = SMALL) -> KVCache:
    plan = KVPlan(layout=layout, store=store, block_size=block_size)
    return KVCache(model_of(mixer), plan, num_blocks=num_blocks, block_size=block_size, dtype=dtype)


def write(cache: KVCache, span: Span, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    k = torch.randn((span.num_queries, SMALL.K, SMALL.H), generator=gen)
    v = torch.randn((span.num_queries, SMALL.K, SMALL.Hv), generator=gen)
    cache.view(0).write(k, v, StepBatch.from_spans([span], block_size=cache.block_size))
    return k, v


def test_the_tables_agree_with_the_spec():
    assert set(STORES) == {name for name, store in STORE_SPECS.items() if store.runs_since is not None}
    assert set(RETAIN) == {name for name, since in Retain.RUNS_SINCE.items() if since is not None}
    assert set(LAYOUT_CLASSES) == set(LAYOUTS)


@pytest.mark.parametrize("store", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=20, deadline=None)
@given(layers=st.lists(st.one_of(st.none(), mixers()), min_size=1, max_size=4), num_blocks=st.integers(1, 9), block_size=st.integers(1, 40))
def test_bytes_equal_the_spec(layout, store, layers, num_blocks, block_size):
    model = ModelSpec(name="m", family="llama", D=8, V=8, layers=tuple(LayerSpec(mixer=mixer, ffn=None) for mixer in layers), max_context=64)
    plan = KVPlan(layout=layout, store=store, block_size=block_size)
    cache = KVCache(model, plan, num_blocks=num_blocks, block_size=block_size, dtype=torch.float32)
    assert cache.nbytes == num_blocks * block_size * token_bytes(model, store) == num_blocks * block_bytes(model, plan)
    held = {plane.untyped_storage().data_ptr(): plane.untyped_storage().nbytes() for planes in cache._planes.values() for plane in planes}
    assert sum(held.values()) == cache.nbytes  # nothing shared, nothing padded


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 300), block_size=st.integers(1, 64))
def test_slots_per_sequence_equal_the_spec(length, block_size):
    for layout, cls in LAYOUT_CLASSES.items():
        plan = KVPlan(layout=layout, block_size=block_size, store="fp32")
        slots = cls().slots_per_sequence(length, block_size if layout == "paged" else length)
        assert slots * token_bytes(model_of(SMALL), "fp32") == sequence_bytes(model_of(SMALL), plan, length)
    for retain in (Retain(), Retain(kind="sliding", window=9, sinks=2), Retain(kind="h2o", budget=20), Retain(kind="recent", recent=7), Retain(kind="recent")):
        assert RETAIN[retain.kind](retain).kept(length) == retain.tokens(length)


@pytest.mark.parametrize(
    ("layout", "blocks", "copies"), [("contiguous", (3,), False), ("paged", (2, 3, 4), False), ("paged", (2, 4, 3), True), ("paged", (4, 3, 2), True)]
)
def test_what_lies_in_one_piece_is_read_without_a_copy(layout, blocks, copies):
    cache = cache_of(layout, block_size=12 if layout == "contiguous" else 4)
    span = Span(0, 10, 10, blocks)
    k, v = write(cache, span, 0)
    view = cache.view(0)
    found_k, found_v = view.read(span)
    assert torch.equal(found_k, k) and torch.equal(found_v, v)
    assert (found_k.untyped_storage().data_ptr() != view.k_SKH.untyped_storage().data_ptr()) == copies
    assert (found_v.untyped_storage().data_ptr() != view.v_SKH.untyped_storage().data_ptr()) == copies


@pytest.mark.parametrize("store", FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stores_cast_in_and_out(layout, dtype, store):
    cache = cache_of(layout, store=store, dtype=dtype, block_size=8)
    span = Span(0, 7, 7, (1,))
    k, v = (torch.randn(7, SMALL.K, 16).to(dtype) for _ in range(2))
    cache.view(0).write(k, v, StepBatch.from_spans([span], block_size=8))
    held = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[store]
    for x, found in zip((k, v), cache.view(0).read(span), strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, x.to(held).to(dtype))
        if STORE_SPECS[store].exact and held == dtype:
            assert torch.equal(found, x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_rollback_needs_nothing_from_the_cache(kernel, layout):
    """Draft tokens are written, rejected, and their slots are NaN: a shorter length alone makes them invisible."""
    mixer = Attention(N=4, K=2, H=16)
    case = make_case(mixer, [(20, 5), (33, 4)], layout, torch.float32, 7)
    spans = tuple(Span(i, 1, span.length - 3, span.blocks) for i, span in enumerate(case.batch.spans))
    view = case.cache.view(0)
    for span, old in zip(spans, case.batch.spans, strict=True):
        stale = view.locate((old,), (span.length,), 3)
        view.k_SKH[stale], view.v_SKH[stale] = float("nan"), float("nan")
    last = torch.tensor([old.query_start + old.num_queries - 4 for old in case.batch.spans])
    expected = oracle(case, mixer)[last]
    out = KERNELS[kernel]()(case.q_TNH[last], view, StepBatch.from_spans(spans), mixer)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copy_blocks_copies_all_at_once(layout):
    cache = cache_of(layout)
    for block in range(3):
        write(cache, Span(0, 4, 4, (block,)), block)
    before = [plane.clone() for plane in cache._planes[0]]
    cache.copy_blocks([(0, 5), (1, 0), (0, 1)])  # a swap and a copy: sources are read before any target is written
    for plane, old in zip(cache._planes[0], before, strict=True):
        blocks, olds = plane.view(6, -1), old.view(6, -1)
        assert torch.equal(blocks[torch.tensor([5, 0, 1, 2])], olds[torch.tensor([0, 1, 0, 2])])
    cache.copy_blocks([])


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), block_size=st.integers(1, 9), scattered=st.booleans(), data=st.data())
def test_locate_repeats_the_last_row_and_never_leaves_a_sequence(lengths, block_size, scattered, data):
    need = [-(-length // block_size) for length in lengths]
    ids = list(range(sum(need)))
    ids = data.draw(st.permutations(ids)) if scattered else ids
    tables, start = [], 0
    for blocks in need:
        tables.append(tuple(ids[start : start + blocks]))
        start += blocks
    spans = spans_for([(length - 1, 1) for length in lengths], tables)
    starts = tuple(data.draw(st.integers(0, length - 1)) for length in lengths)
    width = data.draw(st.integers(1, 50))
    cache = cache_of("paged", num_blocks=sum(need), block_size=block_size)
    rows = cache.view(0).locate(spans, starts, width)
    found = list(range(rows.start, rows.stop)) if isinstance(rows, slice) else rows.tolist()
    expected = []
    for span, first in zip(spans, starts, strict=True):
        for position in range(first, first + width):
            position = min(position, span.length - 1)
            expected.append(span.blocks[position // block_size] * block_size + position % block_size)
    assert found == expected


def test_memory_is_touched_at_construction():
    plane = cache_of("paged", num_blocks=3).view(0).k_SKH
    assert bool((plane == 0).all())
    assert isinstance(cache_of("paged").view(0), GatherView)


def test_what_cannot_run_is_refused():
    with pytest.raises(InputError, match="pages by 16"):
        KVCache(model_of(SMALL), KVPlan(), num_blocks=1, block_size=8, dtype=torch.float32)
    with pytest.raises(InputError, match="at least one block"):
        KVCache(model_of(SMALL), KVPlan(), num_blocks=0, block_size=16, dtype=torch.float32)
