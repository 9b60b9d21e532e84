"""The learning rate of a step: warm-up, then constant, linear or half a cosine down to 0 (arXiv:1608.03983)."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi

from tradespace.errors import InputError

SHAPES = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """`at(step)` for steps counted from 0.

    >>> [round(Schedule(lr=1.0, steps=4, warmup=1, shape="linear").at(step), 3) for step in range(4)]
    [0.0, 1.0, 0.667, 0.333]
    """

    lr: float
    steps: int
    warmup: int = 0
    shape: str = "constant"

    def __post_init__(self):
        if self.shape not in SHAPES:
            raise InputError(f"unknown schedule '{self.shape}'. Known: {', '.join(SHAPES)}")
        if not 0 < self.lr < 10:
            raise InputError(f"--lr {self.lr}: a learning rate lies above 0 and below 10")

    def at(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * step / max(1, self.warmup)
        if self.shape == "constant":
            return self.lr
        share = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr * ((1 - share) if self.shape == "linear" else 0.5 * (1 + cos(pi * share)))
