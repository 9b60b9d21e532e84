"""GPTQ, clipping, lattice feedback: on random matrices with correlated inputs their output error lies below rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tradespace.errors import EngineError, UnsupportedError
from tradespace.formats import decode
from tradespace.quantize.feedback import factorize, round_with_feedback
from tradespace.quantize.gptq import activation_order, gptq, gptq_factor
from tradespace.quantize.gram import Gram, output_error
from tradespace.quantize.ldlq import lattice_factor, ldlq
from tradespace.quantize.methods import Inputs, round_matrix
from tradespace.quantize.rtn import round_to_nearest
from tradespace.spec.formats import find_format

FORMATS = ("int4-g32", "int4-g64-zp", "int3-g64", "int3-g32-zp", "int2-g64", "int2-g32-zp", "int8", "int8-tensor", "w8a8", "fp8", "nf4", "nf4-plain")


def correlated(columns: int, tokens: int = 512, seed: int = 0) -> Gram:
    """Inputs that a few directions dominate, as a language model's do, and a few loud channels."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 4, columns, generator=draw)
    x_TC = torch.randn(tokens, columns // 4, generator=draw) @ mixing + 0.3 * torch.randn(tokens, columns, generator=draw)
    x_TC[:, :3] *= 8
    gram = Gram(columns)
    gram.add(x_TC[: tokens // 2])
    gram.add(x_TC[tokens // 2 :])
    torch.testing.assert_close(gram.gram_CC, x_TC.T @ x_TC, rtol=1e-4, atol=1e-1)
    torch.testing.assert_close(gram.mean_abs_C, x_TC.abs().mean(0), rtol=1e-4, atol=1e-4)
    assert torch.equal(gram.max_abs_C, x_TC.abs().amax(0))
    return gram


def weight(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("columns", [64, 200])
def test_gptq_beats_rounding_to_nearest(name: str, columns: int):
    fmt, gram, w = find_format(name), correlated(columns), weight(48, columns)
    before = w.clone()
    plain = output_error(decode(name, round_to_nearest(name, w)) - w, gram.gram_CC)
    found = output_error(decode(name, round_matrix(fmt, w, Inputs(gram), "gptq")) - w, gram.gram_CC)
    assert found < (0.9 if name.startswith(("int8", "w8a8", "fp8")) else 0.8) * plain
    assert torch.equal(w, before)


@pytest.mark.parametrize("name", ["int4-g64", "int3-g32-zp", "int2-g64"])
def test_clipping_by_the_outputs_beats_clipping_by_the_weights(name: str):
    gram, w = correlated(128), weight(48, 128)
    errors = {
        rounding: output_error(decode(name, round_matrix(find_format(name), w, Inputs(gram), rounding)) - w, gram.gram_CC) for rounding in ("search", "clip")
    }
    assert errors["clip"] < errors["search"]


@pytest.mark.parametrize("name", ["e8", "e8-3", "e8-4"])
def test_lattice_feedback_beats_the_nearest_points_and_sweeps_help(name: str):
    fmt, gram, w = find_format(name), correlated(128), weight(64, 128)
    inputs = lattice_factor(gram.gram_CC)
    errors = [output_error(decode(name, ldlq(fmt, w, *inputs, sweeps=sweeps)) - w, gram.gram_CC) for sweeps in (0, 2)]
    plain = output_error(decode(name, round_to_nearest(name, w)) - w, gram.gram_CC)
    assert errors[1] < errors[0] < 0.6 * plain


def test_lattice_at_two_bits_beats_gptq_at_more():
    gram, w = correlated(256), weight(64, 256)
    two = output_error(decode("int2-g64", round_matrix(find_format("int2-g64"), w, Inputs(gram), "gptq")) - w, gram.gram_CC)
    e8 = output_error(decode("e8", round_matrix(find_format("e8"), w, Inputs(gram), "gptq")) - w, gram.gram_CC)
    assert e8 < 0.75 * two
    assert find_format("e8").nbytes((64, 256)) < find_format("int2-g64").nbytes((64, 256))


def test_independent_inputs_leave_nothing_to_make_good():
    # with H = I no column says anything about another: feedback is rounding to nearest on the same grid
    w = weight(16, 64)
    fmt = find_format("int8")
    codes = gptq(fmt, w, torch.eye(64), factorize(torch.eye(64), damping=0.0))
    assert torch.equal(codes.codes_RC, round_to_nearest("int8", w).codes_RC)


@settings(max_examples=25, deadline=None)
@given(columns=st.integers(1, 40), rows=st.integers(1, 5), seed=st.integers(0, 10**6), ordered=st.booleans())
def test_feedback_follows_the_inverse(columns: int, rows: int, seed: int, ordered: bool):
    """Against the plain form of the algorithm: after each column the others are refitted by least squares, which H's inverse states in closed form."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * columns + 5, columns, generator=draw, dtype=torch.float64)
    gram = x.T @ x
    w = torch.randn(rows, columns, generator=draw)
    order = gram.diagonal().sort(descending=True, stable=True).indices if ordered else torch.arange(columns)
    found = torch.zeros(rows, columns)

    def take(first: int, values: torch.Tensor) -> torch.Tensor:
        found[:, order[first]] = values[:, 0].round()
        return values.round()

    round_with_feedback(w, factorize(gram.float(), damping=1e-6, order_C=order if ordered else None), take)
    damped = gram + 1e-6 * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    rest, wanted = w.double().clone(), torch.zeros(rows, columns, dtype=torch.float64)
    for position in range(columns):
        here, later = order[position], order[position + 1 :]
        wanted[:, here] = rest[:, here].round()
        moved = (rest[:, here] - wanted[:, here])[:, None]
        rest[:, later] += moved @ torch.linalg.solve(damped[later][:, later], damped[here, later, None]).T
    # a value that lies on the edge between two codes may fall either way
    assert (found.double() - wanted).abs().ne(0).float().mean() < 0.05


def test_dead_and_repeated_channels():
    gram = correlated(64)
    gram.gram_CC[5], gram.gram_CC[:, 5] = 0, 0  # never moves
    gram.gram_CC[7], gram.gram_CC[:, 7] = gram.gram_CC[6].clone(), gram.gram_CC[:, 6].clone()
    gram.gram_CC[7, 7] = gram.gram_CC[6, 7] = gram.gram_CC[7, 6] = gram.gram_CC[6, 6]  # one channel twice: singular
    w = weight(16, 64)
    values = decode("int4-g32", round_matrix(find_format("int4-g32"), w, Inputs(gram), "gptq"))
    assert values.isfinite().all()
    zeros = Gram(64)
    codes = gptq(find_format("int4-g32"), w, zeros.gram_CC, gptq_factor(zeros.gram_CC))
    assert (decode("int4-g32", codes) - w).abs().max() < 0.02


def test_a_matrix_of_zeros_stays_zero():
    for name in (*FORMATS, "e8", "e8-3", "e8-4"):
        values = decode(name, round_matrix(find_format(name), torch.zeros(8, 64), Inputs(correlated(64)), "gptq"))
        assert not values.any(), name


def test_order_is_by_energy_and_stable():
    assert activation_order(torch.diag(torch.tensor([1.0, 3.0, 1.0, 3.0]))).tolist() == [1, 3, 0, 2]


def test_refusals():
    bad = torch.full((8, 8), torch.nan)
    with pytest.raises(EngineError, match="overflow"):
        factorize(bad)
    with pytest.raises(UnsupportedError, match="q4_k"):
        gptq(find_format("q4_k"), weight(4, 256), torch.eye(256), factorize(torch.eye(256)))
    with pytest.raises(UnsupportedError, match="multiple of 8"):
        ldlq(find_format("e8"), weight(4, 12), torch.eye(12), factorize(torch.eye(12)))
