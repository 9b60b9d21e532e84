"""The knapsack against brute force, and its refusals."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradespace.errors import BudgetError
from tradespace.quantize.knapsack import Choice, Option, choose

options = st.builds(Option, name=st.just("x"), nbytes=st.integers(1, 40), loss=st.one_of(st.floats(0, 1), st.integers(0, 3).map(float)))
problems = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=6)


def brute(units: list[list[Option]], budget: int) -> tuple[float, int] | None:
    found = [(sum(o.loss for o in choice), sum(o.nbytes for o in choice)) for choice in itertools.product(*units)]
    return min((entry for entry in found if entry[1] <= budget), default=None)


@settings(max_examples=200, deadline=None)
@given(units=problems, budget=st.integers(1, 200))
def test_equals_brute_force(units: list[list[Option]], budget: int):
    wanted = brute(units, budget)
    if wanted is None:
        with pytest.raises(BudgetError) as refused:
            choose(units, budget)
        assert refused.value.need_bytes == sum(min(o.nbytes for o in options) for options in units)
        return
    found: Choice = choose(units, budget)
    assert found.loss == pytest.approx(wanted[0], abs=1e-12)
    assert found.nbytes == sum(option.nbytes for option in found.options) <= budget
    assert all(option in options for option, options in zip(found.options, units, strict=True))
    assert found.bound <= found.loss + 1e-12


def test_a_greedy_choice_would_be_wrong():
    # the best gain per byte (a → 1 byte, gain 2) leaves no room for the best choice
    units = [[Option("small", 0, 10.0), Option("greedy", 1, 8.0)], [Option("small", 0, 10.0), Option("large", 3, 5.0)]]
    assert [option.name for option in choose(units, 3).options] == ["small", "large"]


def test_hundreds_of_matrices_with_bytes_of_no_common_divisor():
    units = [
        [Option(str(bits), 331_777 * bits // 8 + (unit * bits) % 53, (1 + unit % 17) * 1e-4 * 4.0**-bits) for bits in (2, 3, 4, 5, 6, 8, 16)]
        for unit in range(210)
    ]
    budget = int(sum(options[0].nbytes for options in units) * 1.7)
    found = choose(units, budget)
    assert budget * 0.999 < found.nbytes <= budget
    # the gap to the bound is at most what the one matrix costs that a fractional choice would split
    assert found.bound <= found.loss <= found.bound * 1.01
