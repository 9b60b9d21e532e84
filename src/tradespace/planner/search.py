"""The exact search: every plan of the listed space is priced (`planner/price.py`), none is skipped by a heuristic. Where only the best one is wanted, those are
priced that could be it.

What comes of it: the frontier, the best plan, why the rest lost, and where nothing fits the nearest plan that does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import takewhile
from math import ceil

from tradespace.errors import BudgetError, InputError
from tradespace.planner.candidate import Candidate, Question
from tradespace.planner.enumerate import anything_fits, price, price_rivals
from tradespace.planner.pareto import non_dominated
from tradespace.planner.reject import Rejection, rejections
from tradespace.planner.space import Space, build_space
from tradespace.spec.device import DeviceSpec
from tradespace.spec.model import ModelSpec
from tradespace.spec.weights import WeightPlan
from tradespace.spec.workload import Workload
from tradespace.units import MiB, format_bytes

MIN_CONTEXT = 64  # below this nobody is helped by a nearest plan


def may_be_chosen(candidate: Candidate, *, runnable_only: bool) -> bool:
    """Whether it fits and, where one is to be run, runs."""
    return candidate.fits and not (runnable_only and candidate.runs)


@dataclass(frozen=True)
class Frontier:
    """The answer: all plans priced, those that nobody beats, the best, why the others lost, and where nothing fits what comes nearest."""

    question: Question
    space: Space
    runnable_only: bool
    candidates: tuple[Candidate, ...]

    @cached_property
    def eligible(self) -> tuple[Candidate, ...]:
        """What may be chosen: plans that fit and, when one is to be run, that run."""
        return tuple(c for c in self.candidates if may_be_chosen(c, runnable_only=self.runnable_only))

    @cached_property
    def pareto(self) -> tuple[Candidate, ...]:
        """The plans that no eligible plan beats in bytes, decode speed and quality at once; where nothing is eligible, among all of them.

        Of plans equal in all three the one that runs, then the one that prefills faster, stands for all.
        """
        chosen: dict[tuple[float, ...], Candidate] = {}
        for found in non_dominated(self.eligible or self.candidates, lambda c: c.objectives):
            rival = chosen.get(found.objectives)
            if rival is None or (bool(found.runs), found.request_s) < (bool(rival.runs), rival.request_s):
                chosen[found.objectives] = found
        return tuple(chosen.values())

    @cached_property
    def best(self) -> Candidate | None:
        """The preferred eligible plan (the rule stands in `planner/candidate.py`), of equals one that runs; None where nothing fits."""
        if not self.ranked:
            return None
        first = self.ranked[0].preference
        return min(takewhile(lambda c: c.preference == first, self.ranked), key=lambda c: len(c.runs))

    @cached_property
    def ranked(self) -> tuple[Candidate, ...]:
        """The eligible plans, the preferred ones first."""
        return tuple(sorted(self.eligible, key=lambda c: c.preference))

    @cached_property
    def smallest(self) -> Candidate:
        """The plan of the fewest bytes on a device, whether it fits or not, on no more devices than there are."""
        at_hand = [c for c in self.candidates if c.tensor_parallel <= self.question.device.count and not (self.runnable_only and c.runs)]
        return min(at_hand or self.candidates, key=lambda c: c.bytes_each)

    @cached_property
    def why_not(self) -> list[Rejection]:
        """For each family of options that the best plan does not use: why."""
        return rejections(self.candidates, self.ranked, self.best, self.space, self.question, runnable_only=self.runnable_only)

    @cached_property
    def nearest(self) -> Candidate | None:
        """Where nothing fits: the plan for one sequence of the longest context, halved as often as it takes, that does. None: not even the shortest fits."""
        if self.best is not None:
            return None
        workload, frugal = self.question.workload, self.space.frugal()
        context = workload.context_tokens
        lengths = [context] if workload.concurrency > 1 else []
        while context // 2 >= MIN_CONTEXT:
            context //= 2
            lengths.append(context)
        # bytes shrink with the context: bisect for the longest that fits, once it is clear that the shortest does
        low, high = 0, len(lengths) - 1
        if not lengths or not self._with_context(frugal, lengths[high]).eligible:
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._with_context(frugal, lengths[middle]).eligible else (middle + 1, high)
        return self._with_context(self.space.of_smallest_steps(), lengths[low]).best

    def _with_context(self, space: Space, context: int) -> Frontier:
        prompt = min(self.question.workload.prompt_tokens, max(1, context * 3 // 4))
        output = min(self.question.workload.output_tokens, context - prompt)
        workload = replace(self.question.workload, context_tokens=context, concurrency=1, prompt_tokens=prompt, output_tokens=output)
        question = replace(self.question, workload=workload)
        return Frontier(question, space, self.runnable_only, price(question, space))

    def plot(self) -> str:
        """The frontier and the best plan's ledger as one self-contained HTML page."""
        from tradespace.planner.plot import plot_html

        return plot_html(self)

    def to_dicts(self) -> list[dict[str, object]]:
        """The frontier's rows as plain values, for a data frame."""
        return [found.to_dict() for found in self.pareto]

    def to_dict(self) -> dict[str, object]:
        """Plain values: the best plan with its ledger, the frontier, the rejections, the nearest plan."""
        return {
            "model": self.question.model.name,
            "published_as": self.question.model.quantization,
            "published_bytes": self.question.model.published_bytes,
            "device": self.question.device.name,
            "memory_bytes": self.question.memory_bytes,
            "num_candidates": len(self.candidates),
            "best": None if self.best is None else {**self.best.to_dict(), "ledger": self.best.ledger.to_dict()},
            "pareto": self.to_dicts(),
            "why_not": [found.to_dict() for found in self.why_not],
            "nearest": None if self.nearest is None else {**self.nearest.to_dict(), "ledger": self.nearest.ledger.to_dict()},
        }


def plan_frontier(
    model: ModelSpec,
    device: DeviceSpec,
    workload: Workload,
    *,
    memory_bytes: int | None = None,
    host_memory_bytes: int | None = None,
    runnable_only: bool = False,
    pins: Mapping[str, str] | None = None,
    staging_bytes: int | None = None,
    tokenizer_bytes: int | None = None,
    stored: WeightPlan | None = None,
    only_best: bool = False,
) -> Frontier:
    """Price every plan for `model` on `device`; with `only_best` as many as it takes to know the best one.

    `memory_bytes` is the budget of the pool that the model computes in, on each device (None: what is free there); `host_memory_bytes` that of the host
    beside a device (None: not checked). `stored` is how the checkpoint holds its weights, where that is quantized. `runnable_only` chooses among plans
    that this version can run. `pins` fixes axes: see `planner.space.PINS`.
    InputError: a context beyond the model's, or an unknown pin.
    """
    if workload.context_tokens > model.max_context:
        raise InputError(f"a context of {workload.context_tokens} tokens is beyond the {model.max_context} of {model.name}. Give --context {model.max_context}")
    space = build_space(model, device, workload, pins or {}, stored)
    question = Question(
        model=model,
        device=device,
        workload=workload,
        memory_bytes=device.free_bytes if memory_bytes is None else memory_bytes,
        host_memory_bytes=host_memory_bytes,
        linear=space.linear,
        activations=space.activations,
        staging_bytes=staging_bytes,
        tokenizer_bytes=tokenizer_bytes,
    )
    if not anything_fits(question, space.frugal()):
        space = space.of_smallest_steps()
    priced = price_rivals(question, space, partial(may_be_chosen, runnable_only=runnable_only)) if only_best else price(question, space)
    return Frontier(question, space, runnable_only, priced)


def budget_error(frontier: Frontier) -> BudgetError:
    """The error for a frontier on which nothing fits: need, have, and the nearest plan that fits."""
    question, smallest = frontier.question, frontier.smallest
    need, have = smallest.need_bytes, question.memory_bytes
    workload = question.workload
    if smallest.fits_memory is False and smallest.bytes_each <= question.usable_bytes:
        need, have = smallest.host_bytes, question.host_memory_bytes or 0
        message = (
            f"{question.model.name} needs {format_bytes(need)} of host memory beside {question.device.name}; {format_bytes(have)} given. Give --host-memory"
        )
        return BudgetError(f"{message} {ceil(need / MiB)}MiB", need_bytes=need, have_bytes=have)
    message = (
        f"{question.model.name} needs at least {format_bytes(need)} on {question.device.name} for one sequence of {workload.context_tokens} tokens "
        f"({smallest.plan.describe()}); the budget is {format_bytes(have)}."
    )
    nearest = frontier.nearest
    if nearest is not None:
        message += f" Fits with --context {nearest.plan.max_context} --concurrency 1 ({nearest.plan.describe()}, {format_bytes(nearest.need_bytes)})"
    else:
        message += f" No shorter context fits either: give --memory {ceil(need / MiB)}MiB, or choose a smaller model"
    return BudgetError(message, need_bytes=need, have_bytes=have)
