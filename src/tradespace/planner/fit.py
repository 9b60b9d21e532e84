"""What fits here: every model of the zoo against one budget, each with its best resident plan and the longest context that the budget leaves room for.

The search per model is the planner's own, over a part of the space: all layers resident, the whole past kept, the device's usual kernels. What does not fit
so is not listed; `tradespace plan NAME` shows what streaming or a coded cache would do for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tradespace.planner.candidate import MIN_BITS, Candidate
from tradespace.planner.search import plan_frontier
from tradespace.spec.device import DeviceSpec
from tradespace.spec.estimate import Estimate
from tradespace.spec.formats import FORMATS
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import active_parameters, num_parameters
from tradespace.spec.weights import WeightPlan, weight_bytes
from tradespace.spec.workload import Workload
from tradespace.spec.zoo_scores import score, tier

WEIGHTS = ("bf16", "int8", "int4")  # the formats that are tried, the best first
GRAIN = 256  # tokens to which the longest context is found


@dataclass(frozen=True)
class Fit:
    """One model that fits: its best plan, its published score, and the longest context under the same weights and cache."""

    model: ModelSpec
    candidate: Candidate
    score: Estimate
    longest_context: int

    @property
    def tier(self) -> str:
        return tier(self.score)

    def to_dict(self) -> dict[str, object]:
        return {
            "model": self.model.name,
            "parameters": num_parameters(self.model),
            "active_parameters": active_parameters(self.model),
            "tier": self.tier,
            "score": self.score.value,
            "score_source": self.score.source,
            "longest_context": self.longest_context,
            "plan_only": self.model.plan_only,
            **self.candidate.to_dict(),
        }


def fit(models: Iterable[ModelSpec], device: DeviceSpec, workload: Workload, memory_bytes: int, *, runnable_only: bool = False) -> list[Fit]:
    """The models that fit, ranked: by tier (unknown scores last), then the plan's own loss, then predicted decode speed."""
    found = [entry for model in models if (entry := fit_one(model, device, workload, memory_bytes, runnable_only=runnable_only)) is not None]
    return sorted(found, key=lambda entry: (entry.tier == "?", entry.tier, _loss(entry.candidate) > 0.05, -(entry.candidate.decode_tokens_per_s.value or 0)))


def fit_one(model: ModelSpec, device: DeviceSpec, workload: Workload, memory_bytes: int, *, runnable_only: bool = False) -> Fit | None:
    """The best resident plan of one model; None: not even the fewest bits fit, or (runnable_only) our engine cannot run it."""
    if runnable_only and model.plan_only:
        return None
    work = _within(workload, model.max_context)
    for name in WEIGHTS:
        if weight_bytes(model, WeightPlan(default=name)) > memory_bytes * device.count:
            continue
        best = _search(model, device, work, memory_bytes, name)
        if best is not None:
            return Fit(model, best, score(model.name), _longest(model, device, work, memory_bytes, best))
    return None


def _within(workload: Workload, most: int) -> Workload:
    context = min(workload.context_tokens, most)
    prompt = min(workload.prompt_tokens, max(1, context * 3 // 4))
    return replace(workload, context_tokens=context, prompt_tokens=prompt, output_tokens=max(1, min(workload.output_tokens, context - prompt)))


def _search(model: ModelSpec, device: DeviceSpec, workload: Workload, memory_bytes: int, weights: str, degree: int | None = None) -> Candidate | None:
    pins = {"weights": weights, "kv_retain": "full", "kv_store": "bf16", "placement": "resident", "layout": "paged", "block_size": "16"}
    if degree is not None:
        pins["tensor_parallel"] = str(degree)
    best = plan_frontier(model, device, workload, memory_bytes=memory_bytes, pins=pins).best
    return best if best is not None and best.serves_all and FORMATS[weights].bits >= MIN_BITS else None


def _longest(model: ModelSpec, device: DeviceSpec, workload: Workload, memory_bytes: int, best: Candidate) -> int:
    """The most tokens a sequence that still fits with the same weights; bytes grow with the context, so bisection finds it."""

    def fits(context: int) -> bool:
        work = replace(workload, context_tokens=context)
        return _search(model, device, work, memory_bytes, best.weights.default, best.tensor_parallel) is not None

    low, high = workload.context_tokens, model.max_context
    if fits(high):
        return high
    while high - low > GRAIN:
        middle = (low + high) // 2 // GRAIN * GRAIN
        if middle <= low:
            break
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _loss(candidate: Candidate) -> float:
    return float("inf") if candidate.quality.value is None else candidate.quality.value
