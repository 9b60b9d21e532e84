"""Our engine as its users get it: planned by the planner (or a plan file), driven request by request, text spelt out."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from tradespace.lab.bench.task import Task

SLACK = 64  # tokens more than asked for: a sequence may be well ahead when the last one begins


def variants(task: Task) -> dict[str, dict[str, Any]]:
    return {"planned": {}}


class Session:
    def __init__(self, task: Task, settings: dict[str, Any]):
        from tradespace import light_torch

        light_torch.begin()  # as `tradespace run` does
        import tradespace as ts
        from tradespace import api
        from tradespace.choosing import choose_plan, read_plan
        from tradespace.loading.resolve import resolve

        if task.plan is not None:
            plan = read_plan(task.plan)
        else:
            device, files = _device(task), resolve(task.path, download=False)
            spec = api.spec_of_files(files)
            context = min(spec.max_context, task.prompt + task.tokens + SLACK)
            budget = min(api.budget_bytes(task.memory, device), device.free_bytes)
            goal = "throughput" if task.kind == "batch" else "latency"
            plan = choose_plan(spec, device, budget, context, task.sequences, goal, task.weights, None, stored=api.stored_weights(files, spec))
            plan = replace(plan, threads=task.threads)
        self._llm = ts.open(task.path, plan=plan, memory=task.memory, device=task.device, offline=True)
        self._sampling = ts.SamplingParams

    def measure(self, prompts: list[list[int]], tokens: int) -> dict[str, float]:
        """Wall time of the engine's own steps; the requests that are left are then aborted."""
        engine = self._llm.engine
        room = self._llm.plan.max_context - max(len(prompt) for prompt in prompts)
        params = self._sampling(max_tokens=min(room, tokens + SLACK), temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        requests = [engine.add(prompt, params) for prompt in prompts]
        try:
            # a device's engine notes a token before it knows it: its time says when it did
            while any(request.timings.first_token_s is None for request in requests):
                _check(engine.step())
            ready = time.perf_counter()
            held = sum(len(request.output_ids) for request in requests)
            for _ in range(tokens):
                _check(engine.step())
            end = time.perf_counter()
            made = sum(len(request.output_ids) for request in requests) - held
            if made != tokens * len(prompts):
                raise RuntimeError(f"{made} tokens instead of {tokens} for each of {len(prompts)}: they do not all fit the plan's cache. Give more --memory")
        finally:
            for request in requests:
                engine.abort(request)
        return {"prefill_s": ready - start, "decode_s": end - ready}

    def facts(self) -> dict[str, str | int]:
        report, plan = self._llm.report(), self._llm.plan
        sizes = {name: round(report.line(name).measured or 0) for name in ("weights", "kv cache")}
        return {"plan": plan.describe(), "weight_bytes": sizes["weights"], "kv_bytes": sizes["kv cache"]}


def _device(task: Task) -> Any:
    from tradespace import api
    from tradespace.llm_cuda import device_spec, find_place

    place = find_place(task.device)
    return api.find_machine(None) if place is None else device_spec(place)


def _check(changed: list[Any]) -> None:
    for request in changed:
        if request.error is not None:
            raise request.error
