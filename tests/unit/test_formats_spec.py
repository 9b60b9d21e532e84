"""Bytes of weight formats by hand, and which widths they refuse."""

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tradespace.errors import InputError
from tradespace.spec.formats import ALIASES, FORMATS, find_format, refusal

# SmolLM2's qkv, a stack of two experts with a short last group and a short last block of rows, and a row of one
SHAPES = ((960, 576), (2, 200, 336), (1, 1))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fp32", (960 * 576 * 4, 2 * 200 * 336 * 4, 4)),
        ("bf16", (960 * 576 * 2, 2 * 200 * 336 * 2, 2)),
        ("int8", (960 * (576 + 4), 400 * (336 + 4), 5)),
        ("int8-tensor", (960 * 576 + 4, 400 * 336 + 2 * 4, 5)),
        ("w8a8", (960 * (576 + 4), 400 * (336 + 4), 5)),
        ("fp8", (960 * (576 + 4), 400 * (336 + 4), 5)),
        ("fp8-tensor", (960 * 576 + 4, 400 * 336 + 2 * 4, 5)),
        ("fp8-block", (960 * 576 + 8 * 5 * 4, 400 * 336 + 2 * 2 * 3 * 4, 5)),
        ("int4-g64", (960 * (288 + 9 * 2), 400 * (168 + 6 * 2), 3)),
        ("int4-g128-zp", (960 * (288 + 5 * 2 + 3), 400 * (168 + 3 * 2 + 2), 4)),
        ("int3-g32", (960 * (216 + 18 * 2), 400 * (126 + 11 * 2), 3)),
        ("int3-g64-zp", (960 * (216 + 9 * 2 + 4), 400 * (126 + 6 * 2 + 3), 4)),
        ("int2-g64-zp", (960 * (144 + 9 * 2 + 3), 400 * (84 + 6 * 2 + 2), 4)),
        ("nf4", (960 * (288 + 9) + 34 * 4 + 4, 400 * (168 + 6) + 10 * 4 + 4, 1 + 1 + 4 + 4)),
        ("nf4-plain", (960 * (288 + 9 * 4), 400 * (168 + 6 * 4), 5)),
        ("e8", (960 * (144 + 4), 400 * (84 + 4), 2 + 4)),
        ("e8-3", (960 * (216 + 4), 400 * (126 + 4), 3 + 4)),
        ("e8-4", (960 * (288 + 4), 400 * (168 + 4), 4 + 4)),
        ("q8_0", (960 * 18 * 34, 400 * 11 * 34, 34)),
        ("q4_1", (960 * 18 * 20, 400 * 11 * 20, 20)),
        ("q6_k", (960 * 3 * 210, 400 * 2 * 210, 210)),
    ],
)
def test_bytes_by_hand(name, expected):
    assert tuple(FORMATS[name].nbytes(shape) for shape in SHAPES) == expected


def test_bits_per_weight():
    assert round(FORMATS["nf4"].bits_per_weight, 3) == 4.127
    found = {name: FORMATS[name].bits_per_weight for name in ("int4-g64", "int2-g64-zp", "int3-g128", "nf4-plain", "q4_k", "q6_k", "fp8-tensor", "bf16")}
    expected = {"int4-g64": 4.25, "int2-g64-zp": 2.28125, "int3-g128": 3.125, "nf4-plain": 4.5, "q4_k": 4.5, "q6_k": 6.5625, "fp8-tensor": 8, "bf16": 16}
    assert found == expected


@given(st.sampled_from(sorted(FORMATS)), st.integers(1, 3000))
def test_bits_per_weight_is_the_limit_of_bytes(name, rows):
    """On a large matrix both agree but for what is per row, per tensor and rounded up."""
    fmt = FORMATS[name]
    per_row = fmt.scale_bytes if fmt.group == 0 and fmt.scale_rows == 1 else 0
    bits = 8 * (fmt.nbytes((rows, 8192)) - rows * per_row) / (rows * 8192)
    assert fmt.bits_per_weight - 1e-9 <= bits <= fmt.bits_per_weight + 64 / rows / 8192 + 8 * 64 * 4 / 8192 / rows


def test_short_names_are_what_they_stand_for():
    assert {short: FORMATS[short].name for short in ALIASES} == ALIASES
    assert find_format("int4") is FORMATS["int4-g128"]
    with pytest.raises(InputError, match="int5"):
        find_format("int5")


@given(st.sampled_from(sorted(FORMATS)), st.integers(1, 4096))
def test_only_blocks_refuse_widths(name, columns):
    fmt = FORMATS[name]
    why = refusal(fmt, columns)
    assert (why is None) == (fmt.block is None or columns % fmt.block[0] == 0)
    if why is not None and fmt.block is not None:
        assert str(columns) in why and str(fmt.block[0]) in why and "Use " in why
        assert fmt.row_bytes(columns) == ceil(columns / fmt.block[0]) * fmt.block[1]
