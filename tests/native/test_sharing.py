"""Shared prefixes on the native step: a request's logits are the same bits with and without them, from a cache of tiles."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from engine.oracle import check_blocks
from native.test_recorded import _random_model, _spec
from tradespace.engine.engine import Engine
from tradespace.engine.request import SamplingParams
from tradespace.engine.runner import Runner
from tradespace.engine.sampler import Sampler
from tradespace.engine.scheduler import Scheduler
from tradespace.kernels.native import unavailable
from tradespace.kv.cache import KVCache
from tradespace.model.recorded import Recorded
from tradespace.model.transformer import Transformer
from tradespace.spec.kv import KVPlan
from tradespace.spec.plan import Plan
from tradespace.spec.weights import WeightPlan

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"native kernels: {unavailable()}")

CONTEXT = 160
SPEC = _spec(4, 2, 32, 32, window=70, context=CONTEXT)
PLAN = Plan(model="drawn", max_sequences=6, max_context=CONTEXT, step_tokens=64, kv_tokens=6 * CONTEXT)


class Recorder(Sampler):
    """Keeps every row of logits, by sample and position."""

    def __init__(self):
        super().__init__()
        self.seen: dict[tuple[object, ...], torch.Tensor] = {}

    def sample(self, logits_RV, rows):
        for row, logits_V in zip(rows, logits_RV, strict=True):
            self.seen[row.request.prompt_ids, row.request.seed, row.request.sample, row.position] = logits_V.clone()
        return super().sample(logits_RV, rows)


def engine_of(model: Transformer, *, store: str = "fp16", prefix_sharing: bool, **changes) -> Engine:
    plan = replace(PLAN, kv=KVPlan(store=store, prefix_sharing=prefix_sharing), **changes)
    recorded = Recorded(model, step_tokens=plan.step_tokens, logit_rows=plan.logit_rows, threads=2)
    cache = KVCache(SPEC, plan.kv, num_blocks=plan.num_blocks, block_size=16, dtype=model.dtype, order="tiles")
    recorded.record(cache)
    return Engine(Runner(recorded, cache, plan), Scheduler.from_plan(plan), Recorder())


@pytest.mark.parametrize("changes", [{}, {"step_tokens": 19}, {"kv_tokens": CONTEXT}, {"max_sequences": 2}], ids=lambda changes: ",".join(changes) or "all")
@pytest.mark.parametrize(("weights", "store"), [("fp32", "fp32"), ("bf16", "fp16"), ("bf16", "int8")])
def test_logits_are_the_same_bits(weights, store, changes):
    """Prompts with a common beginning, whole prompts known, samples that copy a block, chunks and preemptions; twice over one cache."""
    model = _random_model(SPEC, WeightPlan(default=weights, layout="native"))
    pick = random.Random(3)
    common = [pick.randrange(53) for _ in range(75)]
    lengths = [(75, 4), (75, 9), (64, 0), (64, 0), (40, 30), (75, 0), (0, 20)]
    prompts = [common[:length] + [pick.randrange(53) for _ in range(own)] for length, own in lengths]
    params = [SamplingParams(seed=i, max_tokens=40, n=1 + i % 3) for i in range(len(prompts))]
    shared, plain = engine_of(model, store=store, prefix_sharing=True, **changes), engine_of(model, store=store, prefix_sharing=False)
    right = plain.generate(prompts, params)
    for _ in range(2):
        found = shared.generate(prompts, params)
        check_blocks(shared.scheduler)
        for ours, theirs in zip(found, right, strict=True):
            assert [sample.output_ids for sample in ours.samples] == [sample.output_ids for sample in theirs.samples]
    theirs = plain.sampler.seen  # pyright: ignore[reportAttributeAccessIssue]
    for key, logits_V in shared.sampler.seen.items():  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.equal(logits_V, theirs[key]), key
    assert shared.counters.prefix_cache_hits > 300 and shared.counters.copied_blocks > 0
    assert "kv_tokens" not in changes or shared.counters.preemptions > 0


def test_a_tiled_block_is_copied_whole():
    cache = KVCache(SPEC, KVPlan(store="fp32"), num_blocks=4, block_size=16, dtype=torch.float32, order="tiles")
    planes = [plane for index in SPEC.attention_layers for plane in (cache.view(index).k_SKH, cache.view(index).v_SKH)]
    for plane in planes:
        plane.copy_(torch.randn_like(plane))
    before = [plane.clone().view(4, -1) for plane in planes]
    cache.copy_blocks([(0, 1), (1, 3)])  # at once: 3 gets what 1 held before
    for plane, old in zip(planes, before, strict=True):
        assert torch.equal(plane.view(4, -1), old[[0, 0, 2, 1]])
