"""The frontier against the definition, by brute force."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tradespace.planner.pareto import dominates, non_dominated

few = st.sampled_from([0.0, 1.0, 2.0, 3.0, float("inf")])


@settings(max_examples=300)
@given(st.lists(st.tuples(few, few, few, few), max_size=30))
def test_exactly_the_non_dominated(points):
    expected = [p for p in points if not any(dominates(q, p) for q in points)]
    assert sorted(non_dominated(points, lambda p: p)) == sorted(expected)


@given(st.lists(st.tuples(few, few), max_size=20))
def test_two_objectives(points):
    expected = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]
    assert sorted(non_dominated(points, lambda p: p)) == sorted(expected)


def test_equal_points_all_stay():
    assert non_dominated(["a", "b"], lambda _: (1.0, 1.0, 0.0)) == ["a", "b"]
    assert non_dominated([], lambda _: (0.0,)) == []
