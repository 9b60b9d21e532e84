"""Page waste of the engine's own scheduler and allocator, over a public trace's lengths and over drawn ones, against the closed formula."""

import pytest

from tradespace.errors import InputError
from tradespace.lab.common import data_file, trace_lengths, uniform_lengths
from tradespace.lab.paging import mean_held, simulate
from tradespace.spec.kv import expected_waste

SEQUENCES = 32


def waste(lengths, block_size: int | None) -> float:
    """Time-averaged share of allocated slots that hold nothing; block_size None: one region of the longest length for each sequence."""
    longest = max(length.prompt + length.output for length in lengths)
    size = block_size or longest
    blocks = -(-SEQUENCES * longest // size)
    return simulate(lengths, block_size=size, num_blocks=blocks, max_context=longest, max_sequences=SEQUENCES).counters.slot_waste


def test_conversations_waste_under_one_percent_in_blocks_of_16():
    try:
        data_file("traces", "AzureLLMInferenceTrace_conv.csv")
    except InputError as missing:
        pytest.skip(str(missing))
    lengths = trace_lengths(300)
    paged, contiguous = waste(lengths, 16), waste(lengths, None)
    assert paged < 0.01
    assert contiguous > 0.5  # the trace's longest request is many times its mean


@pytest.mark.parametrize("block_size", [1, 8, 16, 32])
def test_uniform_lengths_waste_what_the_formula_says(block_size):
    lengths = uniform_lengths(400, 16, 256)
    expected = expected_waste(mean_held(lengths), block_size)
    assert waste(lengths, block_size) == pytest.approx(expected, rel=0.1)


def test_the_formula_is_about_the_mean_over_time():
    """A sequence that grows from 1 to n tokens holds n/2 on average: half of its final length counts."""
    lengths = uniform_lengths(50, 200, 200)
    assert mean_held(lengths) < 200
