"""Attention over a paged cache where it lies, against the reference: decode split over keys, and ragged steps. Under Triton's interpreter here."""

from __future__ import annotations

import os
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from conformance.attention_cases import model_of, spans_for
from tradespace.kernels.attention import reference
from tradespace.kernels.view import KVView, Span, StepBatch
from tradespace.kv import KVCache
from tradespace.spec.attention_pattern import BlockSparse, Prefix, Sliding
from tradespace.spec.cuda import attention_scratch_bytes, decode_splits
from tradespace.spec.kv import KVPlan
from tradespace.spec.mixers import Attention

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter (conftest.py sets TRITON_INTERPRET=1)")
torch.set_num_threads(1)

from tradespace.kernels.attention.paged import DecodeScratch, PagedTiles, Planes, paged_decode, paged_prefill, refusal  # noqa: E402

P = 16


class Widened:
    """A view whose keys and values come in fp32, whatever holds them."""

    keeps_all = True

    def __init__(self, view: KVView):
        self.view = view

    def read(self, span: Span) -> tuple[Tensor, Tensor]:
        k, v = self.view.read(span)
        return k.float(), v.float()


def planes_of(cache: KVCache, store: str) -> Planes:
    planes = cache._planes[0]
    if store != "int8":
        return Planes(keys=planes[0], values=planes[1], store=store, block_size=P)
    return Planes(keys=planes[0], key_scales=planes[1][..., 0], values=planes[2], value_scales=planes[3][..., 0], store=store, block_size=P)


def filled(mixer: Attention, cuts: list[tuple[int, int]], store: str, dtype: torch.dtype, seed: int):
    """(q, cache, batch, sinks) of a step whose tokens are written already; blocks are dealt in random order."""
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    totals = [before + new for before, new in cuts]
    need = [max(1, -(-total // P)) for total in totals]
    order = rng.sample(range(sum(need) + 2), sum(need))
    tables = [tuple(order.pop() for _ in range(blocks)) for blocks in need]
    cache = KVCache(model_of(mixer), KVPlan(layout="paged", block_size=P, store=store), num_blocks=sum(need) + 2, block_size=P, dtype=dtype)
    whole = StepBatch.from_spans(spans_for([(0, total) for total in totals], tables), block_size=P)
    view = cache.view(0)
    if whole.num_tokens:
        keys, values = (torch.randn((sum(totals), mixer.K, width), generator=gen).to(dtype) for width in (mixer.H, mixer.Hv))
        view.write(keys, values, whole)
        view.settle(whole)
    batch = StepBatch.from_spans(spans_for(cuts, tables), block_size=P)
    q = torch.randn((batch.num_tokens, mixer.N, mixer.H), generator=gen).to(dtype)
    return q, cache, batch, torch.randn(mixer.N, generator=gen) if mixer.sinks else None


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert bool(got.isfinite().all())
    size = torch.linalg.vector_norm(expected).clamp(min=1e-6)
    assert float(torch.linalg.vector_norm(got.float() - expected) / size) <= (1e-5 if dtype == torch.float32 else 1e-2)


@st.composite
def mixers(draw) -> Attention:
    K, G = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 4)]))
    pattern = draw(st.sampled_from([None, None, Sliding(window=9), Prefix(length=40)]))
    window = draw(st.sampled_from([None, None, 1, 20]))
    return Attention(
        N=G * K,
        K=K,
        H=draw(st.sampled_from([16, 24, 64])),
        value_H=draw(st.sampled_from([None, None, 40])),
        window=window,
        chunked=window is not None and pattern is None and draw(st.booleans()),
        pattern=pattern,
        logit_softcap=draw(st.sampled_from([None, 4.0])),
        sinks=draw(st.booleans()),
    )


STORES = st.sampled_from([("fp32", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.float32), ("fp8", torch.float32), ("int8", torch.bfloat16)])


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(mixer=mixers(), held=STORES, seed=st.integers(0, 10**6))
def test_ragged_steps(mixer, held, seed):
    """Decode, later chunks, whole prompts, an empty part of a step, one token."""
    store, dtype = held
    cuts = [(0, 45), (0, 11), (50, 1)] if isinstance(mixer.pattern, Prefix) else [(30, 1), (16, 17), (0, 9), (7, 0), (33, 3), (0, 1)]
    q, cache, batch, sinks = filled(mixer, cuts, store, dtype, seed)
    out = torch.full((len(q), mixer.N, mixer.Hv), float("nan"), dtype=dtype)
    paged_prefill(q, planes_of(cache, store), batch.block_tables_BM, batch.query_starts_B1, batch.lengths_B, mixer, out, sinks_N=sinks)
    close(out, reference.attend(q.float(), Widened(cache.view(0)), batch, mixer, sinks), dtype)  # pyright: ignore[reportArgumentType]


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(mixer=mixers(), held=STORES, splits=st.sampled_from([1, 2, 5]), least=st.sampled_from([16, 32, 512]), gather=st.booleans(), seed=st.integers(0, 10**6))
def test_decode(mixer, held, splits, least, gather, seed):
    """A split's least number of keys is small in most of the draws: sequences of one split and of several lie beside each other."""
    store, dtype = held
    tiles = PagedTiles(N=16, stages=1, least=least, gather=gather)
    q, cache, batch, sinks = filled(mixer, [(40, 1), (0, 1), (70, 1)], store, dtype, seed)
    scratch = DecodeScratch("cpu", 3, mixer.N, mixer.Hv, 5)
    found = []
    for _ in range(2):
        out = torch.full((len(q), mixer.N, mixer.Hv), float("nan"), dtype=dtype)
        paged_decode(q, planes_of(cache, store), batch.block_tables_BM, batch.lengths_B, mixer, scratch, out, splits=splits, sinks_N=sinks, tiles=tiles)
        found.append(out)
    assert torch.equal(*found) and int(scratch.counters.sum()) == 0
    close(found[0], reference.attend(q.float(), Widened(cache.view(0)), batch, mixer, sinks), dtype)  # pyright: ignore[reportArgumentType]


def test_a_sequence_of_no_tokens_gets_zeros():
    mixer = Attention(N=2, K=1, H=16)
    q, cache, batch, _ = filled(mixer, [(3, 1)], "bf16", torch.bfloat16, 1)
    for splits in (1, 3):
        out = torch.full((1, 2, 16), float("nan"), dtype=torch.bfloat16)
        lengths = torch.zeros(1, dtype=torch.int32)
        paged_decode(q, planes_of(cache, "bf16"), batch.block_tables_BM, lengths, mixer, DecodeScratch("cpu", 1, 2, 16, 3), out, splits=splits)
        assert not out.any()


def test_scratch_is_the_spec_and_splits_are_a_matter_of_shapes():
    assert DecodeScratch("cpu", 3, 8, 64, 5).nbytes == attention_scratch_bytes(3, 8, 64, 5)
    assert decode_splits(1, 8, 32768) == 66 and decode_splits(64, 8, 4096) == 1 and decode_splits(1, 8, 100) == 1


def test_what_it_cannot_take_is_said():
    plain = Attention(N=2, K=1, H=16)
    assert refusal(plain, "int8") is None
    assert "int4" in str(refusal(plain, "int4"))
    assert "block_sparse" in str(refusal(Attention(N=2, K=1, H=16, pattern=BlockSparse(block=16, local=1, leading=1)), "bf16")).replace("-", "_")
    assert "ALiBi" in str(refusal(Attention(N=2, K=1, H=16, alibi=True), "bf16"))
