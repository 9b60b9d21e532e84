"""Packed matrices against their own decoded rows: every format, odd widths, any rows in any order, no tokens, one token, threads, instruction sets."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from native.sanitized import examples
from tradespace.errors import UnsupportedError
from tradespace.formats import decode
from tradespace.formats.native import FORMS, NativeWeight, OperandBuffers
from tradespace.kernels.native import load, unavailable
from tradespace.kernels.native.compiler import ISAS, cpu_flags
from tradespace.quantize.rtn import round_to_nearest
from tradespace.spec import native
from tradespace.spec.formats import FORMATS, refusal
from tradespace.spec.native import round_up

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"native kernels: {unavailable()}")


def _filled(name: str, rows: int, columns: int, *, activations: str = "auto", threads: int = 0) -> tuple[NativeWeight, torch.Tensor]:
    """A packed random matrix, filled in two pieces and out of order, and the values that its format says it has."""
    values_RC = torch.randn(rows, columns)
    codes = round_to_nearest(name, values_RC)
    weight = NativeWeight(name, (rows, columns), activations=activations, threads=threads)
    order = torch.randperm(rows)
    for ids in (order[: rows // 2], order[rows // 2 :]):
        if len(ids):
            weight.set_rows(ids, codes[ids])
    return weight, decode(name, codes)[:, :columns]


@settings(max_examples=examples(60), deadline=None)
@given(
    name=st.sampled_from(sorted(native.FORMAT_KINDS)),
    rows=st.integers(1, 70),
    columns=st.integers(1, 9),
    odd=st.integers(0, 31),
    tokens=st.sampled_from([0, 1, 2, 3, 5, 8, 13, 30]),
    threads=st.sampled_from([1, 2, 7]),
)
def test_products_are_those_of_the_decoded_rows(name, rows, columns, odd, tokens, threads):
    block = FORMATS[name].block
    width = columns * block[0] if block else columns * 32 - odd
    assert refusal(FORMATS[name], width) is None
    torch.manual_seed(0)
    for activations in ("auto", "fp32"):
        weight, expected_RC = _filled(name, rows, width, activations=activations, threads=threads)
        torch.testing.assert_close(weight.dense_rows(0, rows), expected_RC, rtol=1e-6, atol=1e-6)
        assert (
            weight.nbytes
            == native.packed_bytes(name, rows, width)
            == -(-rows // 16) * weight.library.ts_panel_bytes(native.KINDS[weight.kind].number, width, weight.group)
        )
        x_TC, bias_R = torch.randn(tokens, width), torch.randn(rows)
        y_TR = weight.linear(x_TC, bias_R)
        exact = x_TC.double() @ expected_RC.double().T + bias_R
        # int8 activations: each of 32 numbers is off by at most half a step of max|x| / 127; bf16: by 2^-9 of itself
        bound = {"fp32": 1e-5, "bf16": 2**-8, "int8": 1 / 254}[weight.form]
        scale = x_TC.abs().amax(dim=1, keepdim=True).double() @ expected_RC.abs().sum(dim=1, keepdim=True).double().T if tokens else exact.abs()
        assert ((y_TR - exact).abs() <= bound * scale + 1e-4).all()
        if tokens:
            assert torch.equal(torch.cat([weight.linear(x_TC[i : i + 1], bias_R) for i in range(tokens)]), y_TR), "a row depends on its neighbours"


@pytest.mark.parametrize("name", sorted(native.FORMAT_KINDS))
def test_every_format_at_odd_sizes(name):
    """What drawing may leave out: each format, with a last panel and (where it may) a last section that are not full; none, one and several tokens."""
    block = FORMATS[name].block
    width = 3 * block[0] if block else 3 * 32 - 5
    torch.manual_seed(0)
    for activations in ("auto", "fp32"):
        weight, expected_RC = _filled(name, 19, width, activations=activations)
        for tokens, weight.threads in ((0, 2), (1, 1), (1, 7), (5, 2), (13, 7)):
            x_TC = torch.randn(tokens, width)
            torch.testing.assert_close(weight.linear(x_TC), x_TC @ expected_RC.T, rtol=0.05, atol=0.05 * float(expected_RC.abs().max()) * width**0.5)


@settings(max_examples=examples(60), deadline=None)
@given(
    name=st.sampled_from(sorted(native.FORMAT_KINDS)),
    rows=st.integers(1, 40),
    sections=st.integers(1, 9),
    tokens=st.integers(0, 20),
    threads=st.sampled_from([1, 2, 7]),
    off=st.integers(0, 3),
)
def test_floats_may_begin_anywhere_and_nothing_lies_behind_the_panels(name, rows, sections, tokens, threads, off):
    """Activations, bias and results at any multiple of 4 bytes, and panels in an allocation that ends with them: the bits of aligned ones."""
    torch.manual_seed(0)
    width = sections * (FORMATS[name].block or (32,))[0]
    weight, _ = _filled(name, rows, width, threads=threads)
    exact = torch.empty(weight.nbytes, dtype=torch.uint8)
    exact.copy_(weight.packed[weight._offset : weight._offset + weight.nbytes])
    matrix, padded, wide = weight.matrix(), round_up(width, 32), round_up(rows, 16)
    matrix.data = exact.data_ptr()
    x_TC, bias_R = torch.randn(tokens, width), torch.randn(rows)
    x, bias, y = torch.zeros(off + tokens * padded)[off:], torch.zeros(off + wide)[off:], torch.full((off + tokens * wide,), -1.0)[off:]
    x.view(tokens, padded)[:, :width] = x_TC
    bias[:rows] = bias_R
    held = OperandBuffers(tokens, padded, {weight.form})
    arguments = (x.data_ptr(), padded, tokens, FORMS[weight.form], bias.data_ptr(), y.data_ptr(), wide, threads)
    weight.library.ts_linear(ctypes.byref(matrix), ctypes.byref(held.operand()), *arguments)
    assert torch.equal(y.view(tokens, wide)[:, :rows], weight.linear(x_TC, bias_R))


def test_experts_are_panels_of_their_own():
    weight = NativeWeight("int4-g32", (3, 32, 64), activations="fp32")
    codes = round_to_nearest("int4-g32", torch.randn(96, 64))
    weight.set_rows(slice(0, 96), codes)
    x_TC = torch.randn(5, 64)
    for expert in range(3):
        torch.testing.assert_close(weight.linear(x_TC, expert=expert), x_TC @ decode("int4-g32", codes)[32 * expert : 32 * expert + 32].T, atol=1e-4, rtol=1e-4)
    with pytest.raises(UnsupportedError, match="whole panels"):
        NativeWeight("int4-g32", (3, 30, 64))


@pytest.mark.parametrize("isa", [isa for isa, (need, _) in ISAS.items() if need <= cpu_flags()])
def test_instruction_sets_agree(isa):
    """Whole-number sums are exact, so integer formats differ only in the last bits of their fp32 sums."""
    torch.manual_seed(0)
    for name in ("q4_0", "q4_1", "q8_0", "q6_k", "q5_k", "int3-g64-zp", "int2-g32", "int8", "bf16", "fp32"):
        weight, _ = _filled(name, 37, 512)
        x_TC = torch.randn(9, 512)
        best = weight.linear(x_TC)
        weight.library = load(isa)
        torch.testing.assert_close(weight.linear(x_TC), best, rtol=2e-5, atol=2e-3 if name == "bf16" else 2e-4)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("form", ["int8", "bf16", "fp32"])
def test_rates_are_of_products_that_all_threads_have_a_part_in(form, threads):
    """The machine's measurement: more threads, more rows, in whole panels."""
    from tradespace.measure.native_rates import product_rate, rows_of

    assert rows_of(threads) % native.LANES == 0 and rows_of(threads) // native.LANES >= 8 * threads
    assert product_rate(form, threads, budget_s=0.01) > 0
