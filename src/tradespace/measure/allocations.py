"""What torch allocates while a function runs, from its own record of allocations: on a CPU by the profiler, on a CUDA device by its counters."""

from __future__ import annotations

from collections.abc import Callable

import torch


def peak_allocated(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most bytes that were allocated at once beyond what was there when `function` began."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    now = peak = 0
    for _, nbytes in _events(profile):
        now += nbytes
        peak = max(peak, now)
    return peak


def _events(profile: torch.profiler.profile) -> list[tuple[int, int]]:
    """(nanosecond, bytes: negative where they are freed), in order."""
    results = profile.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    assert results is not None, "the profiler has ended"
    return sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")  # pyright: ignore[reportAttributeAccessIssue]


def kept_allocated(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes that are still allocated when `function` has returned, its result alive."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        after = torch.cuda.memory_allocated()
        del result
        return after - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    del result
    return sum(nbytes for _, nbytes in _events(profile))
