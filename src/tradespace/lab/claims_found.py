"""A verdict and the figure that it rests on, and the words that verdicts are made of."""

from __future__ import annotations

from dataclasses import dataclass

CONFIRMED, HOLDS_IF, REFUTED, NOT_TESTABLE, NOT_MEASURED = "confirmed", "holds if", "refuted", "not testable", "not measured yet"
VERDICT_WORDS = (CONFIRMED, HOLDS_IF, REFUTED, NOT_TESTABLE, NOT_MEASURED)


@dataclass(frozen=True, slots=True)
class Found:
    """`figure`: one sentence with the numbers; after "holds if" it begins with the condition."""

    verdict: str
    figure: str


def judged(holds: bool, figure: str) -> Found:
    """Confirmed or refuted, by a condition."""
    return Found(CONFIRMED if holds else REFUTED, figure)


def near(value: float, expected: float, tolerance: float) -> bool:
    """Whether a value lies within a relative tolerance of another."""
    return abs(value - expected) <= tolerance * abs(expected)
