"""When a library's attention reads the prompts of a step: what it would plan anew is left to our own kernel, once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tradespace.kernels.attention.whole_prompts import RecurringPrompts, fused_prefill, runs_of
from tradespace.spec.cuda import WHOLE_PROMPT_TOKENS
from tradespace.spec.zoo import find_model

LENGTHS = st.lists(st.integers(WHOLE_PROMPT_TOKENS, WHOLE_PROMPT_TOKENS + 3), max_size=6).map(tuple)


@given(st.lists(LENGTHS, max_size=12))
def test_only_shapes_that_come_again_are_planned(steps):
    prompts, before = RecurringPrompts(), set()
    for lengths in steps:
        runs = set(runs_of(lengths))
        assert prompts.of(lengths) == (lengths if runs <= before else ())
        before |= runs


def test_what_is_expected_counts_as_come_before():
    prompts = RecurringPrompts()
    prompts.expect((4096, 4096, 800))
    assert prompts.of((4096, 4096)) == (4096, 4096)
    assert prompts.of((4096,)) == ()


def test_short_prompts_are_not_kept():
    prompts = RecurringPrompts()
    for _ in range(3):
        assert prompts.of((WHOLE_PROMPT_TOKENS - 1, 4096)) == ()
    assert not fused_prefill(find_model("llama-3-8b").layers[0].mixer, (WHOLE_PROMPT_TOKENS - 1,), None)


def test_runs_are_all_of_the_step():
    lengths = (700, 700, 512, 700)
    assert runs_of(lengths) == [(700, 2), (512, 1), (700, 1)]
    assert sum(length * count for length, count in runs_of(lengths)) == sum(lengths)
