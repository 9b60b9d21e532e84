"""The audit: every claim is there once, has one thing that decides it, and gets a verdict with a figure."""

from __future__ import annotations

from dataclasses import fields

import pytest

from tradespace.errors import InputError
from tradespace.lab.claims import Claim, decide, find_claims, load_claims, planned
from tradespace.lab.claims_found import CONFIRMED, NOT_MEASURED, NOT_TESTABLE, REFUTED, VERDICT_WORDS
from tradespace.lab.claims_measured import VERDICTS
from tradespace.lab.claims_rates import RATES
from tradespace.lab.claims_sizes import SIZES
from tradespace.lab.experiments import EXPERIMENTS
from tradespace.lab.snippets import SNIPPETS

CLOSED = {7, 8, 22, 39, 57, 76}  # about systems that nobody outside can look into


def deciders(claim: Claim) -> int:
    return sum((claim.calculation, bool(claim.experiment), bool(claim.reason)))


def test_all_claims_are_there_once_and_one_thing_decides_each():
    claims = load_claims()
    assert list(claims) == list(range(1, 125))
    assert [claim.id for claim in claims.values() if deciders(claim) != 1] == []
    assert all(claim.wording and claim.value and claim.reading for claim in claims.values())
    assert all(claim.threshold for claim in claims.values() if not claim.reason)


def test_a_claim_that_nothing_decides_would_be_found():
    assert deciders(Claim(id=1, document="A", wording="w", value="v", reading="r")) == 0
    assert {field.name for field in fields(Claim)} >= {"id", "document", "value", "reading", "calculation", "experiment", "reason", "threshold"}


def test_what_decides_exists_or_is_planned():
    claims = load_claims()
    assert {claim.id for claim in claims.values() if claim.calculation} == set(SIZES) | set(RATES)
    assert not set(SIZES) & set(RATES)
    named = {claim.experiment for claim in claims.values() if claim.experiment}
    assert named <= set(EXPERIMENTS) | set(planned())
    assert all(claims[number].experiment for number in VERDICTS)
    # an experiment that exists decides each of its claims, once it has a record
    assert all(claim.id in VERDICTS for claim in claims.values() if claim.experiment in EXPERIMENTS and claim.experiment not in planned())


def test_not_testable_is_what_is_closed_and_nothing_else():
    found = {claim.id for claim in load_claims().values() if decide(claim, lambda name: None).verdict == NOT_TESTABLE}
    assert found == CLOSED


@pytest.mark.parametrize("claim", list(load_claims().values()), ids=lambda claim: claim.code)
def test_every_claim_gets_a_verdict_with_a_figure(claim):
    found = decide(claim)
    assert found.verdict in VERDICT_WORDS
    assert found.figure
    if claim.calculation:
        assert found.verdict not in (NOT_MEASURED, NOT_TESTABLE)


@pytest.mark.parametrize(
    ("number", "verdict", "word"), [(9, REFUTED, "10.7 GB"), (20, REFUTED, "12.7B"), (61, CONFIRMED, "138.0"), (95, CONFIRMED, "1.00"), (99, REFUTED, "21.5")]
)
def test_verdicts_that_arithmetic_decides(number, verdict, word):
    found = decide(load_claims()[number])
    assert found.verdict == verdict
    assert word in found.figure


def test_without_a_record_the_experiment_is_named():
    found = decide(load_claims()[4], lambda name: None)
    assert found.verdict == NOT_MEASURED
    assert "tradespace lab run attention" in found.figure


@pytest.mark.parametrize("name", list(SNIPPETS))
def test_every_printed_snippet_is_wrong_and_its_neighbour_right(name):
    assert SNIPPETS[name].printed_fails() is not None
    assert SNIPPETS[name].fixed_fails() is None


@pytest.mark.parametrize("text", ["9", "A9", "a9"])
def test_a_claim_is_found_by_number_and_code(text):
    assert [claim.id for claim in find_claims(text)] == [9]


@pytest.mark.parametrize("text", ["0", "125", "B9", "", "nine", "A"])
def test_what_is_no_claim_is_an_error_that_says_what_there_is(text):
    with pytest.raises(InputError, match="lab claims"):
        find_claims(text)
