"""The audit: claims.toml holds what is said and how it is decided; here a claim gets its verdict, from a calculation, from a record, or from a stated reason.

Nothing is typed by hand: a calculation is one of our own cost or spec functions, a measurement comes out of results/. What no record decides yet says which
experiment will.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tradespace.errors import InputError
from tradespace.lab.claims_found import CONFIRMED, NOT_MEASURED, NOT_TESTABLE, Found
from tradespace.lab.common import record_file
from tradespace.measure.record import Record, read_record

FILE = Path(__file__).with_name("claims.toml")
RECORDS = Path(__file__).resolve().parents[3] / "results"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement. Exactly one of `calculation`, `experiment` and `reason` decides it; `value` is the document's own."""

    id: int
    document: str
    wording: str
    value: str
    reading: str
    calculation: bool = False
    experiment: str = ""
    reason: str = ""
    threshold: str = ""

    @property
    def code(self) -> str:
        return f"{self.document}{self.id}"


@lru_cache(maxsize=1)
def _file() -> dict[str, Any]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def load_claims() -> dict[int, Claim]:
    """Every claim by its number."""
    return {values["id"]: Claim(**values) for values in _file()["claim"]}


def planned() -> dict[str, str]:
    """Experiments that do not exist yet, with what they will measure."""
    return dict(_file()["planned"])


def find_claims(text: str | None) -> list[Claim]:
    """One claim by number or code ("9", "A9"), or all of them. Raises InputError for what is neither."""
    claims = load_claims()
    if text is None:
        return list(claims.values())
    digits = text[1:] if text[:1].upper() in "ABCD" else text
    claim = claims.get(int(digits)) if digits.isdigit() else None
    if claim is None or (digits != text and claim.document != text[0].upper()):
        raise InputError(f"no claim '{text}'. Known: 1 to {max(claims)}, or with their document, A1 to D{max(claims)}: tradespace lab claims")
    return [claim]


def find_record(experiment: str) -> Record | None:
    """The record of an experiment, from this checkout's results or those of the present folder; None where there is none."""
    for folder in (RECORDS, Path("results")):
        if (path := folder / record_file(experiment)).is_file():
            return read_record(path)
    return None


def decide(claim: Claim, record: Callable[[str], Record | None] = find_record) -> Found:
    """The verdict with its figure. Never an error for what was not measured: that is a verdict, too."""
    from tradespace.lab.claims_measured import VERDICTS
    from tradespace.lab.claims_rates import RATES
    from tradespace.lab.claims_sizes import SIZES

    if claim.reason:
        return Found(CONFIRMED if claim.reason.startswith("a theorem") else NOT_TESTABLE, claim.reason)
    if claim.calculation:
        calculations: Mapping[int, Callable[[], Found]] = {**SIZES, **RATES}
        return calculations[claim.id]()
    what = planned().get(claim.experiment)
    measured = record(claim.experiment)
    if claim.id not in VERDICTS or measured is None:
        return Found(NOT_MEASURED, f"experiment {claim.experiment} decides it" + (f": {what}" if what else f": tradespace lab run {claim.experiment}"))
    return VERDICTS[claim.id](measured)


def to_dict(claim: Claim, found: Found) -> dict[str, Any]:
    """One line of the audit, as --json prints it."""
    by = "calculation" if claim.calculation else f"experiment {claim.experiment}" if claim.experiment else "reason"
    return {
        "id": claim.id,
        "document": claim.document,
        "claim": claim.wording,
        "value": claim.value,
        "reading": claim.reading,
        "decided_by": by,
        "threshold": claim.threshold,
        "verdict": found.verdict,
        "figure": found.figure,
    }
