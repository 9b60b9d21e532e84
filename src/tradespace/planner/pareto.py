"""The set of points that no other point beats: smaller is better in every objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Point = TypeVar("Point")


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """True if `a` is nowhere worse than `b` and somewhere better.

    >>> dominates((1, 2), (1, 3)), dominates((1, 2), (1, 2)), dominates((0, 3), (1, 2))
    (True, False, False)
    """
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def non_dominated(points: Iterable[Point], objectives: Callable[[Point], tuple[float, ...]]) -> list[Point]:
    """The points that none dominates, exactly, in ascending order of their objectives; points with equal objectives all stay.

    Sorted lexicographically, nothing can be dominated by what comes after it, and whatever dominates a point is dominated by, or is, one already kept. Points
    that share all objectives but the first two reduce to a staircase first, which keeps thousands of plans with few distinct qualities cheap.
    """
    found: list[tuple[tuple[float, ...], Point]] = []
    for key, point in sorted(_staircases([(objectives(point), point) for point in points]), key=lambda pair: pair[0]):
        if not any(dominates(kept, key) for kept, _ in found):
            found.append((key, point))
    return [point for _, point in found]


def _staircases(pairs: list[tuple[tuple[float, ...], Point]]) -> list[tuple[tuple[float, ...], Point]]:
    """Per value of the objectives from the third on: the pairs that none of the same value dominates in the first two."""
    groups: dict[tuple[float, ...], list[tuple[tuple[float, ...], Point]]] = {}
    for key, point in pairs:
        groups.setdefault(key[2:], []).append((key, point))
    kept = []
    for group in groups.values():
        lowest, step = float("inf"), None
        for key, point in sorted(group, key=lambda pair: pair[0]):
            if key[1] < lowest or step is None or key[:2] == step:
                lowest, step = key[1], key[:2]
                kept.append((key, point))
    return kept
