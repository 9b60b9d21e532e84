"""The reference gives a query the same bits whatever else is in the batch, however its prefill was cut, and wherever its keys lie."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.attention_cases import LAYOUTS, make_case, mixers, spans_for
from tradespace.kernels.attention import KERNELS
from tradespace.kernels.view import PackedView, StepBatch
from tradespace.spec.mixers import Attention


def alone(mixer, q, k, v, sinks_N) -> torch.Tensor:
    """The whole sequence in one step, nothing else in it, no cache."""
    return KERNELS["reference"]()(q, PackedView(k, v), StepBatch.packed([q.shape[0]]), mixer, sinks_N)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=40, deadline=None)
@given(
    mixer=mixers(),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_any_batch_and_any_cut_give_the_same_bits(threads, layout, mixer, lengths, dtype, seed):
    torch.set_num_threads(threads)
    try:
        rng, reference = random.Random(seed), KERNELS["reference"]()
        case = make_case(mixer, [(0, length) for length in lengths], layout, dtype, seed)
        starts = [span.query_start for span in case.batch.spans]
        queries = [case.q_TNH[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        parts: list[list[torch.Tensor]] = [[] for _ in lengths]
        done = [0] * len(lengths)
        while any(d < length for d, length in zip(done, lengths, strict=True)):
            # each step advances some of the sequences by some tokens, in any order
            chosen = rng.sample(
                [i for i, length in enumerate(lengths) if done[i] < length], k=rng.randint(1, sum(d < n for d, n in zip(done, lengths, strict=True)))
            )
            news = [min(lengths[i] - done[i], rng.choice([1, 1, 3, 8, 50, 200])) for i in chosen]
            spans = spans_for([(done[i], new) for i, new in zip(chosen, news, strict=True)], [case.batch.spans[i].blocks for i in chosen])
            q_TNH = torch.cat([queries[i][done[i] : done[i] + new] for i, new in zip(chosen, news, strict=True)])
            out = reference(q_TNH, case.cache.view(0), StepBatch.from_spans(spans), mixer, case.sinks_N)
            for i, new, span in zip(chosen, news, spans, strict=True):
                parts[i].append(out[span.query_start : span.query_start + new])
                done[i] += new
        for i in range(len(lengths)):
            expected = alone(mixer, queries[i], case.keys[i], case.values[i], case.sinks_N)
            assert torch.equal(torch.cat(parts[i]), expected), f"sequence {i} of {lengths} differs"
    finally:
        torch.set_num_threads(1)


def test_another_kernel_fails_this_test():
    """The property is the reference's tiles, not an accident of the machine: another kernel, cut differently, gives other bits."""
    gen = torch.Generator().manual_seed(0)
    mixer = Attention(N=9, K=3, H=64)
    q, k, v = (torch.randn(shape, generator=gen) for shape in ((300, 9, 64), (300, 3, 64), (300, 3, 64)))
    whole = KERNELS["chunked"]()(q, PackedView(k, v), StepBatch.packed([300]), mixer)
    short = KERNELS["chunked"]()(q[:150], PackedView(k[:150], v[:150]), StepBatch.packed([150]), mixer)
    assert not torch.equal(whole[:150], short)
    assert torch.equal(alone(mixer, q, k, v, None)[:150], alone(mixer, q[:150], k[:150], v[:150], None))
