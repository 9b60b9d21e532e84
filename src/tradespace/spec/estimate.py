"""A number that says where it comes from. Nothing in a plan or a report is a bare float."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MEASURED, ROOFLINE, UNKNOWN = "measured", "roofline", "unknown"


@dataclass(frozen=True, slots=True)
class Estimate:
    """`value` in the unit that the field's name states, and its `source`: "measured …", "roofline", "cited: …" or "unknown".

    An unknown value is `Estimate.unknown(why)`: its value is None, never zero, and arithmetic on it stays unknown.
    """

    value: float | None
    source: str

    @classmethod
    def unknown(cls, why: str) -> Estimate:
        return cls(None, f"{UNKNOWN}: {why}")

    @property
    def known(self) -> bool:
        return self.value is not None

    @property
    def is_measured(self) -> bool:
        return self.source.startswith(MEASURED)

    def require(self) -> float:
        """The value, or ValueError with the reason why there is none."""
        if self.value is None:
            raise ValueError(self.source)
        return self.value

    def map(self, function: Callable[[float], float]) -> Estimate:
        """The estimate of a function of this quantity, with the same source."""
        return self if self.value is None else Estimate(function(self.value), self.source)

    def __str__(self) -> str:
        return f"? ({self.source})" if self.value is None else f"{self.value:.4g} ({self.source})"
