"""Retention against oracles of its own: sliding as a mask, eviction replayed in plain Python, rebuilding and rematerialising against the full cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conformance.attention_cases import LAYOUTS, model_of
from helpers_stories import BOS, load_stories, stories_spec
from tradespace.engine.engine import Engine
from tradespace.engine.request import SamplingParams
from tradespace.engine.runner import Runner
from tradespace.engine.sampler import Sampler
from tradespace.engine.scheduler import Scheduler
from tradespace.errors import EngineError
from tradespace.kernels.attention import KERNELS
from tradespace.kernels.attention.dispatch import choose, resolve_kernels
from tradespace.kernels.view import Span, StepBatch, positions_of
from tradespace.kv import KVCache
from tradespace.model.rebuild import Rebuilding
from tradespace.model.transformer import Transformer
from tradespace.spec.kv import KVPlan, Retain
from tradespace.spec.mixers import Attention
from tradespace.spec.plan import Plan
from tradespace.spec.weights import WeightPlan

torch.set_num_threads(1)
MIXER = Attention(N=6, K=2, H=16, value_H=24)
FP32 = WeightPlan(default="fp32")


def cache_of(kv: KVPlan, mixer: Attention, context: int, sequences: int = 1) -> KVCache:
    size = kv.block_slots(context)
    blocks = sequences * max(1, -(-kv.retain.tokens(context) // size))
    return KVCache(model_of(mixer), kv, num_blocks=blocks, block_size=size, dtype=torch.float32, max_sequences=sequences, max_context=context)


def run_steps(kernel: str, kv: KVPlan, mixer: Attention, q: Tensor, k: Tensor, v: Tensor, steps: list[int], sinks_N: Tensor | None = None) -> Tensor:
    """One sequence's tokens through the cache in these steps, its blocks in descending order; the outputs of all queries."""
    cache, attend, at, out = cache_of(kv, mixer, len(q)), KERNELS[kernel](), 0, []
    for count in steps:
        span = Span(0, count, at + count, tuple(reversed(range(cache.num_blocks))))
        view, batch = cache.view(0), StepBatch.from_spans([span])
        view.write(k[at : at + count], v[at : at + count], batch)
        out.append(attend(q[at : at + count], view, batch, mixer, sinks_N))
        view.settle(batch)
        at += count
    return torch.cat(out)


def tensors(mixer: Attention, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(tokens, mixer.N, mixer.H), torch.randn(tokens, mixer.K, mixer.H), torch.randn(tokens, mixer.K, mixer.Hv)


def weights_of(q_NH: Tensor, k_SKH: Tensor, seen_S: Tensor, mixer: Attention, sinks_N: Tensor | None) -> Tensor:
    """weights_NS of one query in fp64, from the definition."""
    k_SNH = k_SKH.double().repeat_interleave(mixer.G, dim=1)
    scores_NS = torch.einsum("nh,snh->ns", q_NH.double(), k_SNH) * mixer.softmax_scale
    if mixer.logit_softcap:
        scores_NS = mixer.logit_softcap * torch.tanh(scores_NS / mixer.logit_softcap)
    exp_NS = torch.where(seen_S, scores_NS, float("-inf")).exp()
    total_N = exp_NS.sum(-1) + (0 if sinks_N is None else sinks_N.double().exp())
    return exp_NS / total_N[:, None]


@pytest.mark.parametrize("kernel", ["reference", "chunked", "sdpa"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("window", "sinks", "own"), [(7, 3, None), (16, 0, None), (12, 4, 9), (1, 0, None), (5, 5, None), (100, 2, 30)])
def test_sliding_is_a_mask(kernel, layout, window, sinks, own):
    """However the tokens come, a query sees its last `window` tokens and the first `sinks`, as far as its layer's own window shows them."""
    mixer = replace(MIXER, window=own)
    q, k, v = tensors(mixer, 90)
    kv = KVPlan(store="fp32", layout=layout, block_size=8, retain=Retain(kind="sliding", window=window, sinks=sinks))
    expected = []
    for t in range(90):
        s = torch.arange(90)
        seen = (s <= t) & ((s > t - window) | (s < sinks)) & (s > t - (own or 1000))
        expected.append(torch.einsum("ns,snh->nh", weights_of(q[t], k, seen, mixer, None), v.double().repeat_interleave(mixer.G, dim=1)))
    for steps in ([1] * 90, [90], [20, 1, 33, 1, 1, 34]):
        found = run_steps(kernel, kv, mixer, q, k, v, steps)
        torch.testing.assert_close(found.double(), torch.stack(expected), atol=1e-5, rtol=1e-5)


def replayed(kind: str, budget: int, protected: int, mixer: Attention, q: Tensor, k: Tensor, v: Tensor, steps: list[int], sinks_N: Tensor | None) -> Tensor:
    """Eviction as the papers say it, head by head over dictionaries: position → score."""
    held: list[dict[int, float]] = [{} for _ in range(mixer.K)]
    out, at = torch.zeros(len(q), mixer.N, mixer.Hv, dtype=torch.float64), 0
    for count in steps:
        own = range(at, at + count)
        for head in range(mixer.K):
            scores, alone = held[head], replace(mixer, N=mixer.G, K=1)
            observed: dict[int, float] = {}
            positions = [*scores, *own]
            for t in own:
                rows = slice(head * mixer.G, (head + 1) * mixer.G)
                index = torch.tensor(positions)
                w = weights_of(q[t, rows], k[index][:, head : head + 1], index <= t, alone, None if sinks_N is None else sinks_N[rows])
                out[t, rows] = w @ v[index][:, head].double()
                if kind == "h2o" or (count > 1 and t >= at + count - protected):
                    for position, weight in zip(positions, w.sum(0).tolist(), strict=True):
                        observed[position] = observed.get(position, 0.0) + weight
            if kind == "h2o":
                scores = {position: scores.get(position, 0.0) + observed[position] for position in positions}
            elif count > 1:
                text = sorted(positions)
                line = [0.0, 0.0, *(observed.get(position, 0.0) for position in text), 0.0, 0.0]
                scores = {position: sum(line[i : i + 5]) / 5 for i, position in enumerate(text)}
            else:
                scores = scores | {at: 1e6 + at}
            end = at + count
            best = sorted(scores, key=lambda p, s=scores, e=end: (p < e - protected, -s[p], p))[:budget]
            held[head] = {position: scores[position] for position in best}
        at += count
    return out


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
@pytest.mark.parametrize(("kind", "budget", "protected"), [("h2o", 12, 5), ("h2o", 20, 0), ("snapkv", 14, 6), ("snapkv", 200, 8)])
@pytest.mark.parametrize("extras", ["plain", "softcap and sinks"])
def test_eviction_is_what_the_papers_say(kernel, kind, budget, protected, extras):
    mixer = MIXER if extras == "plain" else replace(MIXER, logit_softcap=4.0, sinks=True)
    sinks_N = torch.linspace(-1, 1, mixer.N) if mixer.sinks else None
    retain = Retain(kind=kind, budget=budget, **({"recent": protected} if kind == "h2o" else {"window": protected}))
    q, k, v = tensors(mixer, 60, 3)
    for steps in ([1] * 60, [30] + [1] * 30, [7, 25, 1, 1, 1, 20, 5]):
        found = run_steps(kernel, KVPlan(store="fp32", block_size=4, retain=retain), mixer, q, k, v, steps, sinks_N)
        expected = replayed(kind, budget, retain.protected, mixer, q, k, v, steps, sinks_N)
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_only_kernels_that_return_weights_serve_eviction():
    choice = choose("sdpa", MIXER, torch.float32, weights=True)
    assert choice.kernel == "chunked" and "attention weights" in (choice.reason or "")
    assert choose("sdpa", MIXER, torch.float32).kernel == "sdpa"


# ---------------------------------------------------------------------------------------------------------------- through the engine, on a trained model


def stories(kv: KVPlan, attention: str = "sdpa") -> Transformer:
    return load_stories(FP32, attention=resolve_kernels(stories_spec(), attention, torch.float32, weights=kv.retain.evicts))  # type: ignore[arg-type]


def generate(kv: KVPlan, lengths: list[int], total: int, *, step_tokens: int = 96, model: Transformer | None = None) -> list[tuple[int, ...]]:
    """Greedy continuations of prompts of these lengths up to `total` tokens each, all in one continuous batch with chunked prefill."""
    model = model or stories(kv)
    size, count = kv.block_slots(total), len(lengths)
    blocks = count * max(1, -(-kv.retain.tokens(total) // size))
    plan = Plan(model="s", weights=FP32, kv=kv, max_sequences=count, max_context=total, step_tokens=step_tokens, kv_tokens=blocks * size)
    cache = KVCache(model.spec, kv, num_blocks=plan.num_blocks, block_size=size, dtype=torch.float32, max_sequences=count, max_context=total)
    engine = Engine(Runner(Rebuilding(model) if kv.retain.rebuilds else model, cache, plan), Scheduler.from_plan(plan), Sampler())
    prompts = [[BOS, *((7 * i + 13 * j) % 400 + 3 for i in range(length - 1))] for j, length in enumerate(lengths)]
    params = [SamplingParams(temperature=0, max_tokens=total - length, ignore_eos=True) for length in lengths]
    found = [completion.output_ids for completion in engine.generate(prompts, params)]
    assert engine.scheduler.allocator.num_used == 0
    return found


@pytest.fixture(scope="module")
def full():
    return generate(KVPlan(store="fp32"), [240, 300, 340, 380, 400, 420, 450, 460], 480)


EXACT = [
    KVPlan(store="fp32", layout="contiguous"),
    KVPlan(store="fp32", block_size=1),
    KVPlan(store="fp32", block_size=7),
    KVPlan(store="fp32", block_size=256),
    KVPlan(store="x-fp32"),
    KVPlan(store="x-fp32", layout="contiguous"),
    KVPlan(store="fp32", retain=Retain(kind="sliding", window=480)),
    KVPlan(store="fp32", retain=Retain(kind="h2o", budget=480)),
    KVPlan(store="fp32", layout="contiguous", retain=Retain(kind="snapkv", budget=480)),
]


@pytest.mark.parametrize("kv", EXACT, ids=lambda kv: kv.describe())
def test_exact_combinations_give_the_full_caches_tokens(kv, full):
    assert generate(kv, [240, 300, 340, 380, 400, 420, 450, 460], 480) == full


# with no recent tokens nothing is stored, so that one store stands for all
@pytest.mark.parametrize(("recent", "store"), [(0, "fp32"), (8, "fp32"), (100, "fp32"), (8, "x-fp32"), (100, "x-fp32")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rebuilt_keys_and_values_give_the_full_caches_tokens(recent, layout, store):
    kv = KVPlan(store=store, layout=layout, block_size=4, retain=Retain(kind="recent", recent=recent))
    assert generate(kv, [9, 30], 64, step_tokens=20) == generate(KVPlan(store="fp32"), [9, 30], 64)


@pytest.mark.parametrize("kv", [KVPlan(store="int8"), KVPlan(store="int4c", block_size=32), KVPlan(store="x-int8", layout="contiguous")], ids=str)
def test_lossy_stores_go_through_the_engine_alike_alone_and_together(kv):
    """A request's tokens do not depend on who else is in the batch where nothing but the store is lossy."""
    model, lengths = stories(kv), [5, 33, 90]
    together = generate(kv, lengths, 140, step_tokens=400, model=model)
    small = generate(kv, lengths, 140, step_tokens=400, model=model)
    assert together == small


@torch.inference_mode()
def test_rematerialised_logits():
    """Keys and values projected from the kept input: fp32 logits within 1e-4 of the full cache's, at every decoded position."""
    model, tokens = load_stories(FP32), torch.arange(3, 123)
    seen = []
    for store in ("fp32", "x-fp32"):
        cache = KVCache(model.spec, KVPlan(store=store, block_size=16), num_blocks=8, block_size=16, dtype=torch.float32)
        rows = []
        for start, stop in [(0, 100), *((i, i + 1) for i in range(100, 120))]:
            span = Span(0, stop - start, stop, tuple(range(8)))
            hidden = model(tokens[start:stop], positions_of([span]), StepBatch.from_spans([span], block_size=16), cache)
            rows.append(model.logits(hidden))
        seen.append(torch.cat(rows))
    assert float((seen[0] - seen[1]).abs().max()) < 1e-4


def test_a_cache_that_rebuilds_says_so():
    kv = KVPlan(store="fp32", retain=Retain(kind="recent", recent=2))
    cache = cache_of(kv, MIXER, 32)
    _, k, v = tensors(MIXER, 5)
    span = Span(0, 1, 5, (0,))
    view = cache.view(0)
    view.write(k[:1], v[:1], StepBatch.from_spans([span]))
    with pytest.raises(EngineError, match="must be rebuilt first"):
        view.read(span)
