"""Shapes, batches and an independent oracle for the attention and cache tests. The oracle is full-matrix fp64 and shares no code with the kernels."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from tradespace.kernels.view import Span, StepBatch
from tradespace.kv import KVCache
from tradespace.spec.kv import KVPlan
from tradespace.spec.mixers import Attention
from tradespace.spec.model import LayerSpec, ModelSpec

LAYOUTS = ("contiguous", "paged")


def model_of(*mixers: Attention) -> ModelSpec:
    return ModelSpec(name="test", family="llama", D=32, V=64, layers=tuple(LayerSpec(mixer=mixer, ffn=None) for mixer in mixers), max_context=1024)


@st.composite
def mixers(draw, *, softcap: bool = True, sinks: bool = True) -> Attention:
    G, K = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    H = draw(st.sampled_from([8, 16, 24, 40, 64]))
    window = draw(st.sampled_from([None, None, 1, 2, 5, 16, 33, 1000]))
    return Attention(
        N=G * K,
        K=K,
        H=H,
        value_H=draw(st.sampled_from([None, None, 8, 24, 48])),
        window=window,
        chunked=window is not None and draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.3, 1.0 / H])),
        logit_softcap=draw(st.sampled_from([None, 5.0])) if softcap else None,
        sinks=sinks and draw(st.booleans()),
    )


# (length before the step, new tokens): decoding, drafts, prefills and their later chunks
sequences = st.lists(
    st.tuples(st.sampled_from([0, 1, 7, 15, 16, 17, 63, 64, 100, 130]), st.one_of(st.just(1), st.integers(1, 9), st.sampled_from([0, 16, 65, 150]))),
    max_size=6,
)


@dataclass
class Case:
    """One step over a cache that holds what came before. `keys[i]`, `values[i]` are sequence i's from the start, in order."""

    q_TNH: Tensor
    batch: StepBatch
    keys: list[Tensor]
    values: list[Tensor]
    sinks_N: Tensor | None
    cache: KVCache


def spans_for(cuts: list[tuple[int, int]], tables: list[tuple[int, ...]]) -> tuple[Span, ...]:
    """Spans of a step that brings cuts[i] = (before, new) tokens of sequence i."""
    spans, start = [], 0
    for (before, new), table in zip(cuts, tables, strict=True):
        spans.append(Span(start, new, before + new, table))
        start += new
    return tuple(spans)


def make_case(mixer: Attention, cuts: list[tuple[int, int]], layout: str, dtype: torch.dtype, seed: int, *, block_size: int = 16) -> Case:
    """Writes the tokens before the step into a cache full of NaN, then the step's own; blocks are dealt in random order."""
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    totals = [before + new for before, new in cuts]
    if layout == "contiguous":
        block_size = max([1, *totals])
    need = [max(1, -(-total // block_size)) for total in totals]
    order = rng.sample(range(sum(need) + 2), sum(need))
    tables = [tuple(order.pop() for _ in range(blocks)) for blocks in need]
    if rng.random() < 0.3:  # consecutive blocks, which are read without a copy
        tables = [tuple(sorted(table)) for table in tables]
    plan = KVPlan(layout=layout, store={torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype])
    if layout == "paged":
        plan = KVPlan(layout=layout, block_size=block_size, store=plan.store)
    cache = KVCache(model_of(mixer), plan, num_blocks=sum(need) + 2, block_size=block_size, dtype=dtype)
    view = cache.view(0)
    view.k_SKH.fill_(float("nan"))  # whatever is read without having been written shows
    view.v_SKH.fill_(float("nan"))
    keys = [torch.randn((total, mixer.K, mixer.H), generator=gen).to(dtype) for total in totals]
    values = [torch.randn((total, mixer.K, mixer.Hv), generator=gen).to(dtype) for total in totals]
    for step in ([(0, before) for before, _ in cuts], cuts):
        spans = spans_for(step, tables)
        batch = StepBatch.from_spans(spans, block_size=block_size)
        if batch.num_tokens:
            view.write(
                torch.cat([k[span.first_position : span.length] for k, span in zip(keys, spans, strict=True)]),
                torch.cat([v[span.first_position : span.length] for v, span in zip(values, spans, strict=True)]),
                batch,
            )
    batch = StepBatch.from_spans(spans_for(cuts, tables), block_size=block_size)
    q_TNH = torch.randn((batch.num_tokens, mixer.N, mixer.H), generator=gen).to(dtype)
    sinks_N = torch.randn(mixer.N, generator=gen).to(dtype) if mixer.sinks else None
    return Case(q_TNH, batch, keys, values, sinks_N, cache)


def oracle(case: Case, mixer: Attention) -> Tensor:
    """out_TNHv in fp64, a full score matrix per sequence and head, its mask written out pair by pair from the definition."""
    out = [torch.zeros((0, mixer.N, mixer.Hv), dtype=torch.float64)]
    for span, k, v in zip(case.batch.spans, case.keys, case.values, strict=True):
        q = case.q_TNH[span.query_start : span.query_start + span.num_queries].double()
        mask = torch.full((span.num_queries, span.length), float("-inf"), dtype=torch.float64)
        for i in range(span.num_queries):
            p = span.length - span.num_queries + i
            for s in range(p + 1):
                same_chunk = mixer.window is None or s // mixer.window == p // mixer.window
                in_window = mixer.window is None or p - s < mixer.window
                if same_chunk if mixer.chunked else in_window:
                    mask[i, s] = 0
        k, v = (x.double().repeat_interleave(mixer.N // mixer.K, dim=1) for x in (k, v))
        scores = torch.einsum("tnh,snh->nts", q, k) * (mixer.H**-0.5 if mixer.scale is None else mixer.scale)
        if mixer.logit_softcap:
            scores = mixer.logit_softcap * torch.tanh(scores / mixer.logit_softcap)
        weights = torch.exp(scores + mask)
        total = weights.sum(-1, keepdim=True)
        if case.sinks_N is not None:
            total = total + torch.exp(case.sinks_N.double())[:, None, None]
        out.append(torch.einsum("nts,snh->tnh", weights / total, v))
    return torch.cat(out)
