"""Predicted beside measured, line by line: what every run ends with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tradespace.spec.estimate import Estimate
from tradespace.units import format_bytes, format_seconds


@dataclass(frozen=True, slots=True)
class ReportLine:
    """One quantity: what the ledger or the roofline said, and what was seen. `unit` is "bytes", "tok/s" or "s"; `note` says how it was measured."""

    name: str
    predicted: Estimate
    measured: float | None
    unit: str
    note: str = ""

    @property
    def error(self) -> float | None:
        """Measured over predicted, less one; None where either is unknown or nothing was predicted."""
        if self.measured is None or not self.predicted.value:
            return None
        return self.measured / self.predicted.value - 1


@dataclass(frozen=True)
class Report:
    """The table predicted | measured of one run, and the facts that it holds for."""

    title: str
    lines: tuple[ReportLine, ...]
    facts: tuple[tuple[str, str], ...] = ()

    def line(self, name: str) -> ReportLine:
        """The line of this name; KeyError with the names there are."""
        for line in self.lines:
            if line.name == name:
                return line
        raise KeyError(f"no line '{name}' in the report; there are: {', '.join(line.name for line in self.lines)}")

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "facts": dict(self.facts),
            "lines": [
                {
                    "name": line.name,
                    "predicted": line.predicted.value,
                    "source": line.predicted.source,
                    "measured": line.measured,
                    "unit": line.unit,
                    "error": line.error,
                    "note": line.note,
                }
                for line in self.lines
            ],
        }

    def rows(self) -> Iterable[tuple[str, str, str, str]]:
        """(name, predicted, measured, difference) as text."""
        for line in self.lines:
            predicted = "?" if line.predicted.value is None else format_quantity(line.predicted.value, line.unit)
            measured = "" if line.measured is None else format_quantity(line.measured, line.unit)
            yield line.name, predicted, measured, "" if line.error is None else f"{line.error:+.1%}"

    def __str__(self) -> str:
        header = ("", "predicted", "measured", "difference")
        rows = [header, *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [self.title, *(f"{name}: {value}" for name, value in self.facts), ""]
        for row in rows:
            lines.append("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]).rstrip())
        return "\n".join(lines)


def format_quantity(value: float, unit: str) -> str:
    """A figure with its unit, as tables show it."""
    if unit == "bytes":
        return format_bytes(value)
    if unit == "s":
        return format_seconds(value)
    return f"{value:,.0f} {unit}" if abs(value) >= 100 else f"{value:.1f} {unit}"
