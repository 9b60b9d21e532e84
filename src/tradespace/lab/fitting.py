"""How a measured quantity grows: the power of n that fits best, and how well a stated law fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log, sqrt
from statistics import fmean

Points = Sequence[tuple[float, float]]


def exponent(points: Points) -> float:
    """The power that fits best: least squares on logarithms, of at least two lengths.

    >>> round(exponent([(2, 8), (4, 64), (8, 512)]), 6)
    3.0
    """
    xs, ys = [log(x) for x, _ in points], [log(max(y, 1e-12)) for _, y in points]
    mean_x, mean_y = fmean(xs), fmean(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)


def misfit(points: Points, law: Callable[[float], float]) -> float:
    """How far values lie from a constant multiple of `law`: the standard deviation of the logarithm of their ratio."""
    ratios = [log(y / law(x)) for x, y in points]
    mean = fmean(ratios)
    return sqrt(fmean([(ratio - mean) ** 2 for ratio in ratios]))


def power_text(power: float) -> str:
    """A fitted power as tables show it.

    >>> power_text(1.987), power_text(-0.001)
    ('n^1.99', 'n^0.00')
    """
    return f"n^{round(power, 2) + 0.0:.2f}"
