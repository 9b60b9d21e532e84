"""The search: prices agree with the ledger, fits means fits, and the answers are the ones that the issue asks for."""

import json
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tradespace.cost import calibration
from tradespace.cost.quality import quality
from tradespace.cost.summary import summarize, weight_share
from tradespace.cost.time import decode_time, prefill_time
from tradespace.errors import BudgetError, InputError
from tradespace.planner.candidate import QUALITY_LIMIT
from tradespace.planner.pareto import dominates
from tradespace.planner.parts import Placements
from tradespace.planner.search import Frontier, budget_error, plan_frontier
from tradespace.spec.device_zoo import find_device
from tradespace.spec.estimate import Estimate
from tradespace.spec.mixers import Attention
from tradespace.spec.weights import WeightPlan
from tradespace.spec.workload import Workload
from tradespace.spec.zoo import find_model
from tradespace.units import MiB
from unit.cost_examples import cpu, gpu, tiny_model

WORKLOAD = Workload(context_tokens=256, concurrency=4, prompt_tokens=64, output_tokens=64)
MODEL = tiny_model(L=4, N=8, K=2)
DEVICE = gpu(count=2, disk_bytes_per_s=Estimate(1e8, "cited: test"))
NARROW = {"weights": "int8", "attention": "sdpa"}
SLIM = {"kv_store": "bf16", "attention": "sdpa", "step_tokens": "32"}


@cache
def frontier(budget: int, runnable_only: bool = False) -> Frontier:
    return plan_frontier(MODEL, DEVICE, WORKLOAD, memory_bytes=budget, runnable_only=runnable_only)


FULL = max(c.bytes_each for c in frontier(1 << 40).candidates)
LEAST = min(c.bytes_each for c in frontier(1).candidates)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3, 1.0])
def test_prices_are_the_ledger_s(share):
    found = frontier(int(LEAST + share * (FULL - LEAST)))
    for candidate in found.candidates[:: max(1, len(found.candidates) // 100)]:
        assert candidate.ledger.total_bytes().value == candidate.bytes_each
        assert candidate.ledger.total_bytes("host").value == candidate.host_bytes
        assert decode_time(MODEL, candidate.plan, DEVICE, WORKLOAD) == candidate.decode
        assert prefill_time(MODEL, candidate.plan, DEVICE, WORKLOAD) == candidate.prefill
        assert quality(MODEL, candidate.plan) == candidate.quality
        assert set(candidate.plan.cannot_run()) <= set(candidate.runs)


@pytest.mark.parametrize("memory_bytes", [3 * MiB, 4 * MiB, 64 * MiB])
@pytest.mark.parametrize("linear", ["torch", "reference"])
def test_prices_on_a_cpu_are_the_ledger_s(memory_bytes, linear):
    found = plan_frontier(MODEL, cpu(), WORKLOAD, memory_bytes=memory_bytes, pins={"linear": linear, "step_tokens": "32"}, staging_bytes=500_000)
    for candidate in found.candidates[::7]:
        assert candidate.ledger.total_bytes().value == candidate.bytes_each == candidate.host_bytes
        assert candidate.fits == (candidate.bytes_each <= found.question.usable_bytes < memory_bytes)


@settings(max_examples=25, deadline=None)
@given(st.floats(-0.1, 1.1))
def test_what_fits_is_within_the_budget(share):
    budget = max(1, int(LEAST + share * (FULL - LEAST)))
    found = plan_frontier(MODEL, DEVICE, WORKLOAD, memory_bytes=budget, pins=NARROW)
    for candidate in found.candidates:
        assert candidate.fits_memory == (candidate.bytes_each <= budget)
        assert candidate.plan.max_sequences >= 1 and candidate.kv_tokens >= WORKLOAD.context_tokens
        assert candidate.max_sequences <= WORKLOAD.concurrency
    assert all(c.fits and c.bytes_each <= budget for c in found.pareto if found.best is not None)
    assert (found.best is None) == (not found.eligible)


def test_frontier_is_the_non_dominated_set():
    found = frontier(int(LEAST + 0.3 * (FULL - LEAST)))
    best_points = {c.objectives for c in found.eligible}
    expected = {p for p in best_points if not any(dominates(q, p) for q in best_points)}
    assert {c.objectives for c in found.pareto} == expected
    assert len(found.pareto) == len(expected)


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1.1), st.floats(0, 1.1))
def test_less_memory_is_never_faster_at_equal_comfort_and_quality(one, other):
    low, high = sorted(int(LEAST + share * (FULL - LEAST)) for share in (one, other))
    poor, rich = (plan_frontier(MODEL, DEVICE, WORKLOAD, memory_bytes=budget, pins=SLIM).best for budget in (low, high))
    assume(poor is not None)
    assert rich is not None and poor is not None
    assert (rich.comfort, rich.quality_key) <= (poor.comfort, poor.quality_key)
    if (rich.comfort, rich.quality_key) == (poor.comfort, poor.quality_key):
        assert rich.request_s <= poor.request_s


def test_the_best_follows_the_rule():
    found = frontier(1 << 40)
    assert found.best is not None
    for candidate in found.eligible:
        assert found.best.preference <= candidate.preference
    assert found.best.quality.require() <= QUALITY_LIMIT and found.best.serves_all


@settings(max_examples=12, deadline=None)
@given(st.floats(-0.1, 1.1), st.booleans(), st.sampled_from([None, "int4", "q4_0"]), st.booleans())
def test_the_best_alone_is_the_best_of_all(share, runnable_only, stored, on_cpu):
    """Weights of the checkpoint's own and not, plans that stream, nothing that fits: what is not priced would not have been chosen."""
    own = WeightPlan(default=stored) if stored else None
    device = cpu(disk_bytes_per_s=Estimate(1e8, "cited: test")) if on_cpu else DEVICE
    budget = max(1, int(LEAST + share * (FULL - LEAST))) + (int(calibration.RESERVE_BYTES.value) if on_cpu else 0)
    asked = {"memory_bytes": budget, "runnable_only": runnable_only, "stored": own}
    whole, alone = plan_frontier(MODEL, device, WORKLOAD, **asked), plan_frontier(MODEL, device, WORKLOAD, **asked, only_best=True)
    assert (whole.best is None) == (alone.best is None)
    if whole.best is None:
        assert len(alone.candidates) == len(whole.candidates)
        assert whole.smallest.plan == alone.smallest.plan
        return
    assert alone.best is not None
    assert whole.best.plan == alone.best.plan
    assert len(alone.candidates) <= len(whole.candidates)


def test_runnable_only():
    found = plan_frontier(MODEL, cpu(), WORKLOAD, runnable_only=True)
    assert found.best is not None and found.best.runs == () and found.best.plan.cannot_run() == ()
    unable = plan_frontier(replace(MODEL, plan_only="a mechanism that is not built"), cpu(), WORKLOAD, runnable_only=True)
    assert unable.best is None
    assert all("a mechanism that is not built" in c.runs for c in unable.candidates)


def test_a_tight_budget_shrinks_the_cache_and_then_streams():
    pins = {"weights": "bf16", "kv_store": "bf16", "attention": "sdpa", "layout": "contiguous", "step_tokens": "32", "tensor_parallel": "1"}
    model = tiny_model(L=4, F=2048)  # whose layers outweigh the cache
    (resident,) = plan_frontier(model, gpu(), WORKLOAD, memory_bytes=1 << 40, pins=pins).candidates
    slot = resident.ledger.line("kv cache").bytes.require() / resident.kv_tokens
    budget = int(resident.bytes_each - 1.9 * WORKLOAD.context_tokens * slot)  # room for two sequences of four
    kept, streamed = plan_frontier(model, gpu(), WORKLOAD, memory_bytes=budget, pins=pins).candidates
    assert (kept.placement.streamed_layers, kept.fits, kept.max_sequences, kept.serves_all) == (0, True, 2, False)
    assert streamed.placement.streamed_layers > 0 and streamed.fits and streamed.serves_all


def test_fewest_layers_are_streamed():
    share = weight_share(summarize(MODEL), WeightPlan(default="bf16"))
    placed = Placements(share)
    for room in range(0, share.total_bytes, share.total_bytes // 50):
        enough = [k for k in range(1, MODEL.L + 1) if placed.resident[k] <= room]
        assert placed.fewest(room) == (enough[0] if enough else MODEL.L)


@pytest.mark.parametrize("degree", ["1", "2"])
def test_no_layer_more_is_streamed_than_the_budget_asks_for(degree):
    """A cache whose sequences have tails: what a device holds of them counts, not what all devices hold together."""
    pins = {"weights": "bf16", "kv_store": "int2", "attention": "sdpa", "step_tokens": "32", "layout": "contiguous", "tensor_parallel": degree}
    workload = replace(WORKLOAD, concurrency=64)
    (whole, *_) = plan_frontier(MODEL, DEVICE, workload, memory_bytes=1 << 40, pins=pins).candidates
    share = weight_share(summarize(MODEL), WeightPlan(default="bf16"), int(degree))
    placed = Placements(share)
    beside = whole.bytes_each - share.total_bytes
    for layers in range(1, MODEL.L):
        budget = beside + round(placed.resident[layers])
        found = plan_frontier(MODEL, DEVICE, workload, memory_bytes=budget, pins=pins | {"placement": "host"}).candidates
        assert [c.placement.streamed_layers for c in found] == [placed.fewest(placed.resident[layers])]
        assert found[0].serves_all and found[0].fits


def test_host_memory_counts_for_streamed_layers():
    budget = int(LEAST + 0.02 * (FULL - LEAST))
    found = plan_frontier(MODEL, gpu(), WORKLOAD, memory_bytes=budget, host_memory_bytes=1, pins={"placement": "host"})
    assert found.best is None
    assert all(c.placement.streamed_layers for c in found.candidates)
    error = budget_error(found)
    assert "host" in str(error) or (error.need_bytes or 0) > budget


def test_nothing_fits():
    found = plan_frontier(MODEL, cpu(), WORKLOAD, memory_bytes=1 * MiB)
    assert found.best is None and found.nearest is None
    error = budget_error(found)
    assert isinstance(error, BudgetError) and error.exit_code == 3
    assert error.have_bytes == MiB and error.need_bytes is not None and error.need_bytes > MiB
    assert "--memory" in str(error)
    again = plan_frontier(MODEL, cpu(), WORKLOAD, memory_bytes=error.need_bytes)
    assert again.best is not None, "what the error asks for suffices"


def test_the_nearest_plan_fits():
    model = tiny_model(L=8, K=4, H=64)
    long = Workload(context_tokens=4096, prompt_tokens=2048, output_tokens=512)
    need = plan_frontier(model, cpu(), long, memory_bytes=1, pins={"kv_store": "bf16"}).smallest.bytes_each
    short = need + int(calibration.RESERVE_BYTES.value) - MiB  # the reserve is left free
    found = plan_frontier(model, cpu(), long, memory_bytes=short, pins={"kv_store": "bf16"})
    assert found.best is None and found.nearest is not None
    assert found.nearest.fits and found.nearest.bytes_each <= need - MiB
    assert found.nearest.plan.max_context < 4096
    assert f"--context {found.nearest.plan.max_context}" in str(budget_error(found))


def test_why_not_covers_every_option():
    found = frontier(int(LEAST + 0.3 * (FULL - LEAST)))
    assert found.best is not None
    named = {rejection.family for rejection in found.why_not}
    weights = {f"weights {plan.default}" for plan in found.space.weights}
    assert weights - named == {f"weights {found.best.weights.default}"}
    assert all(rejection.reason for rejection in found.why_not)
    for rejection in found.why_not:
        if rejection.reason.startswith("does not fit"):
            assert rejection.need is not None and rejection.have is not None and rejection.need > rejection.have
        assert rejection.to_dict()["family"] == rejection.family


def test_pins_fix_axes():
    pins = {"weights": "int4", "head": "dense", "kv_store": "int8", "layout": "paged", "block_size": "32", "attention": "chunked", "step_tokens": "48"}
    found = plan_frontier(MODEL, gpu(), WORKLOAD, pins=pins | {"tensor_parallel": "1", "placement": "resident", "linear": "reference"})
    assert len(found.candidates) == 1
    plan = found.candidates[0].plan
    assert (plan.weights.default, dict(plan.weights.exceptions), plan.kv.store, plan.kv.block_size) == ("int4", {"embed": "bf16"}, "int8", 32)
    assert (plan.attention, plan.linear, plan.step_tokens) == ("chunked", "reference", 48)
    for pins in ({"colour": "red"}, {"weights": "int5"}, {"kv_store": "x"}, {"layout": "x"}, {"attention": "x"}, {"step_tokens": "-1"}, {"placement": "x"}):
        with pytest.raises(InputError):
            plan_frontier(MODEL, cpu(), WORKLOAD, pins=pins)
    with pytest.raises(InputError, match="--context"):
        plan_frontier(MODEL, cpu(), Workload(context_tokens=8192))


def test_kernels_that_cannot_compute_a_model_are_left_out():
    mixer = MODEL.layers[0].mixer
    assert isinstance(mixer, Attention)
    capped = replace(MODEL, layers=(replace(MODEL.layers[0], mixer=replace(mixer, logit_softcap=50.0)),) * 2)
    found = plan_frontier(capped, cpu(), WORKLOAD, pins={"weights": "int8"})
    assert {c.attention for c in found.candidates} == {"reference", "chunked", "native"}
    assert any(r.family == "attention sdpa" and "cap" in r.reason for r in found.why_not)


@pytest.mark.parametrize(("sets", "pins", "store"), [
    (("avx512f", "avx512_bf16"), {}, "bf16"),
    (("avx512f", "avx512_bf16"), {"activations": "fp32"}, "fp16"),
    (("avx512f", "avx512_bf16"), {"kv_store": "fp16"}, "fp16"),
    (("avx512f",), {}, "fp16"),
])  # fmt: skip
def test_native_steps_cache_what_the_machine_multiplies(sets, pins, store):
    found = plan_frontier(MODEL, replace(cpu(), instruction_sets=sets), WORKLOAD, pins={"weights": "int8", "attention": "native"} | pins)
    assert {candidate.plan.kv.store for candidate in found.candidates} == {store}


def test_what_no_kernel_computes_is_priced_and_does_not_run():
    found = plan_frontier(find_model("bloom-7b1"), cpu(free_bytes=64 * 2**30), WORKLOAD, pins={"weights": "bf16", "step_tokens": "32"})
    assert found.best is not None and any("ALiBi" in reason for reason in found.best.runs)
    with pytest.raises(InputError, match="ALiBi"):
        plan_frontier(find_model("bloom-7b1"), cpu(), WORKLOAD, pins={"attention": "sdpa"})


def test_the_full_space_of_a_large_model_is_a_bounded_number_of_plans():
    found = plan_frontier(find_model("llama-2-70b"), find_device("a100-40gb"), Workload(context_tokens=4096), memory_bytes=40 * 10**9)
    # formats and heads · stores · layouts · kernels · steps · degrees, and once more where layers are streamed
    plans = 3 * 5 + 9 * 2 * 5 + 1
    assert 10_000 < len(found.candidates) <= 2 * plans * 3 * 4 * 4 * 4
    assert found.best is not None
    assert (found.best.weights.default, found.best.placement.streamed_layers) == ("int4", 0)
    assert found.best.bytes_each <= 40 * 10**9


def test_plain_values():
    found = frontier(1 << 40)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["num_candidates"] == len(found.candidates) and values["nearest"] is None
    rows = found.to_dicts()
    assert len(rows) == len(found.pareto) and {"plan", "total_bytes", "decode_tokens_per_s", "quality_nats"} <= set(rows[0])


def test_at_equal_speed_prefixes_are_shared_and_the_pin_decides():
    """Native kernels read pages as fast as one piece: then the smallest blocks. "off" has none; "on" leaves only pages; the contiguous layout cannot."""
    device = cpu()

    def best(**pins):
        return plan_frontier(MODEL, device, WORKLOAD, memory_bytes=1 << 40, pins={"weights": "bf16", **pins}).best.plan.kv

    pages = {"layout": "paged"}
    assert best(**pages).prefix_sharing and best(**pages).block_size == 16
    assert not best(prefix_sharing="off", **pages).prefix_sharing
    assert best(prefix_sharing="on").layout == "paged"
    assert not best(layout="contiguous").prefix_sharing
    with pytest.raises(InputError, match="contiguous layout has one region per sequence"):
        best(layout="contiguous", prefix_sharing="on")
    with pytest.raises(InputError, match="choose one of on, off"):
        best(prefix_sharing="maybe")
