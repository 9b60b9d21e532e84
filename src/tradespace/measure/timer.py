"""Time on the monotonic clock, and the spread of repeated figures: a lone number is not a measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from tradespace.errors import InputError


class Timer:
    """Seconds between entry and exit of a `with` block; `elapsed_s` may be read inside the block as well.

    >>> with Timer() as timer:
    ...     _ = sum(range(10))
    >>> timer.elapsed_s >= 0
    True
    """

    def __init__(self) -> None:
        self._start_ns: int | None = None
        self._stop_ns: int | None = None

    def __enter__(self) -> Timer:
        self._start_ns, self._stop_ns = time.perf_counter_ns(), None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop_ns = time.perf_counter_ns()

    @property
    def elapsed_s(self) -> float:
        if self._start_ns is None:
            return 0.0
        return ((self._stop_ns if self._stop_ns is not None else time.perf_counter_ns()) - self._start_ns) / 1e9


def median_and_spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, min, max) of at least one value.

    >>> median_and_spread([3.0, 1.0, 2.0])
    (2.0, 1.0, 3.0)
    """
    if not values:
        raise InputError("no values to take a median of: the measurement did not run once")
    return statistics.median(values), min(values), max(values)


def time_repeats(operation: Callable[[], object], *, repeats: int, budget_s: float = float("inf"), warmup: int = 1) -> list[float]:
    """Seconds of each of `repeats` calls after `warmup` untimed ones; stops early, but after one timed call at least, once `budget_s` is used up."""
    for _ in range(warmup):
        operation()
    durations_s: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(durations_s) < repeats:
        start = time.perf_counter()
        operation()
        stop = time.perf_counter()
        durations_s.append(stop - start)
        if stop > deadline:
            break
    return durations_s
