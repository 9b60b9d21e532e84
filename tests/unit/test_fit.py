"""`fit`: what is ranked really fits, one token more does not, and nothing that fits is left out."""

import pytest

from tradespace.planner.fit import GRAIN, fit, fit_one
from tradespace.planner.search import plan_frontier
from tradespace.spec.device_zoo import find_device
from tradespace.spec.workload import Workload
from tradespace.spec.zoo import ZOO, find_model
from tradespace.spec.zoo_scores import SCORES, TIERS, tier
from tradespace.units import GiB

NAMES = ("smollm2-135m", "qwen3-4b", "llama-3.1-8b", "llama-2-70b", "qwen3-30b-a3b", "deepseek-v3", "nemotron-h-56b")
WORK = Workload(context_tokens=2048, concurrency=1, prompt_tokens=1024, output_tokens=256)


@pytest.mark.parametrize(("device", "gib"), [("rtx-4090", 20), ("ryzen-7950x", 8)])
def test_the_longest_context_fits_and_the_next_does_not(device, gib):
    found = fit([find_model(name) for name in NAMES], find_device(device), WORK, gib * GiB)
    assert found and [entry.tier for entry in found] == sorted((entry.tier for entry in found), key=lambda t: (t == "?", t))
    for entry in found:
        best = entry.candidate
        assert best.fits and best.bytes_each <= gib * GiB and best.placement.streamed_layers == 0 and best.serves_all
        assert WORK.context_tokens <= entry.longest_context <= entry.model.max_context
        if entry.longest_context < entry.model.max_context - GRAIN:
            longer = Workload(context_tokens=entry.longest_context + GRAIN, concurrency=1, prompt_tokens=1024, output_tokens=256)
            pins = {"weights": best.weights.default, "placement": "resident", "kv_store": "bf16", "kv_retain": "full", "layout": "paged", "block_size": "16"}
            over = plan_frontier(entry.model, find_device(device), longer, memory_bytes=gib * GiB, pins=pins)
            assert over.best is None or not over.best.serves_all
    absent = set(NAMES) - {entry.model.name for entry in found}
    for name in absent:
        pins = {"weights": "int4", "placement": "resident", "kv_store": "bf16", "kv_retain": "full", "layout": "paged"}
        assert plan_frontier(find_model(name), find_device(device), WORK, memory_bytes=gib * GiB, pins=pins).best is None


def test_more_memory_never_means_fewer_bits():
    model, device = find_model("llama-3.1-8b"), find_device("rtx-4090")
    chosen = [fit_one(model, device, WORK, gib * GiB) for gib in (4, 8, 12, 20)]
    assert chosen[0] is None
    assert [entry.candidate.weights.default for entry in chosen[1:] if entry] == ["int4", "int8", "bf16"]


def test_runnable_leaves_out_what_is_planned_only():
    device = find_device("h200")
    assert fit_one(find_model("mixtral-8x7b"), device, WORK, 120 * GiB) is not None
    assert fit_one(find_model("mixtral-8x7b"), device, WORK, 120 * GiB, runnable_only=True) is None


def test_scores_are_of_the_zoo_and_say_where_they_come_from():
    assert set(SCORES) <= set(ZOO)
    assert all(found.source.startswith("cited: MMLU, ") and 25 <= found.require() <= 100 for found in SCORES.values())
    bounds = [least for least, _ in TIERS]
    assert bounds == sorted(bounds, reverse=True) and tier(SCORES["deepseek-v3"]) == "A"
