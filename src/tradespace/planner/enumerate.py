"""Which plans of a space are priced: all of them, as many as it takes to know the best, or as many as it takes to know that anything fits."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tradespace.planner.candidate import Candidate, Question, best_preference
from tradespace.planner.parts import Cache, Part
from tradespace.planner.price import Pricer
from tradespace.planner.space import Space


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the collector of cycles: it walks tens of thousands of plans again and again, and pricing makes no cycles."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def price(question: Question, space: Space) -> tuple[Candidate, ...]:
    """Every plan of `space`, priced for `question`."""
    with _uncollected():
        return tuple(Pricer(question, space).candidates())


def price_rivals(question: Question, space: Space, eligible: Callable[[Candidate], bool]) -> tuple[Candidate, ...]:
    """Enough plans of `space` to have the best eligible one among them: what cannot come before one already found is not priced. All where none is."""
    pricer = Pricer(question, space)

    def bound(pair: tuple[Part, Cache]) -> tuple[float, ...]:
        part, cache = pair
        return best_preference(pricer.quality(part, cache), part.weights, cache.kv, part.requantized)

    priced: list[Candidate] = []
    best: tuple[float, ...] | None = None
    with _uncollected():
        for least, (part, cache) in sorted(((bound(pair), pair) for pair in pricer.pairs()), key=lambda bounded: bounded[0]):
            if best is not None and least > best:
                break
            for found in pricer.plans_of(part, cache):
                priced.append(found)
                if eligible(found) and (best is None or found.preference < best):
                    best = found.preference
    return tuple(priced)


def anything_fits(question: Question, space: Space) -> bool:
    """Whether memory suffices for any plan of `space`."""
    with _uncollected():
        return any(candidate.fits_memory for candidate in Pricer(question, space).candidates())
