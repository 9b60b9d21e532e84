"""Products, norms and activations: every kernel against float64, and the reference bit for bit whatever stands around a row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tradespace.kernels.activation import ACTIVATIONS, SOFTCAPS
from tradespace.kernels.activation.torch import FUNCTIONS
from tradespace.kernels.linear import LINEAR
from tradespace.kernels.linear.reference import WEIGHT_TILE_ROWS
from tradespace.kernels.norm import NORMS
from tradespace.spec.plan import LINEAR_KERNELS

WIDTHS = st.integers(1, 150)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def test_tables_agree():
    # native and CUDA steps bring their own: `formats.native`, `model.recorded`, `model.cuda_step`
    assert set(LINEAR) == set(ACTIVATIONS) == set(SOFTCAPS) == {name for name, _ in NORMS} == set(LINEAR_KERNELS) - {"native", "cuda"}


def _row_functions(C: int, R: int, dtype: torch.dtype, generator: torch.Generator):
    """Everything that the reference does with a row of width C."""
    weight_RC, bias_R = _normal(generator, R, C).to(dtype), _normal(generator, R).to(dtype)
    scale_C, shift_C = _normal(generator, C), _normal(generator, C)
    yield "linear", lambda x: LINEAR["reference"](x, weight_RC, bias_R)
    yield "rms", lambda x: NORMS["reference", "rms"](x, scale_C, None, 1e-5)
    yield "layer", lambda x: NORMS["reference", "layer"](x, scale_C, shift_C, 1e-5)
    yield "softcap", lambda x: SOFTCAPS["reference"](x, 3.0)
    for name in FUNCTIONS:
        yield name, lambda x, name=name: ACTIVATIONS["reference"](x, name, False)
        if C % 2 == 0:
            yield f"gated {name}", lambda x, name=name: ACTIVATIONS["reference"](x, name, True)


@given(
    C=WIDTHS,
    R=st.integers(1, 70),
    dtype=DTYPES,
    places=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    extra=st.integers(0, 30),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_reference_rows_do_not_see_their_neighbours(C, R, dtype, places, extra, seed):
    """A row alone, and at any place of any batch of other rows: equal bits."""
    generator = torch.Generator().manual_seed(seed)
    row_1C = (3 * _normal(generator, 1, C)).to(dtype)
    for name, function in _row_functions(C, R, dtype, generator):
        alone = function(row_1C)
        for place in places:
            batch_TC = (10 * _normal(generator, place + 1 + extra, C)).to(dtype)
            batch_TC[place] = row_1C
            assert torch.equal(function(batch_TC)[place], alone[0]), f"{name} at row {place} of {len(batch_TC)}"


def test_the_library_does_see_neighbours():
    """Why the reference exists: the same rows through the library's kernel differ somewhere. If this fails, the test above proves little on this machine."""
    generator = torch.Generator().manual_seed(0)
    differences = 0
    for C, R in ((64, 96), (65, 33), (577, 131), (7, 5), (3, 1), (129, 1), (513, 2)):
        weight_RC, x_TC = _normal(generator, R, C), _normal(generator, 33, C)
        together = LINEAR["torch"](x_TC, weight_RC, None)
        differences += sum(not torch.equal(together[t], LINEAR["torch"](x_TC[t : t + 1], weight_RC, None)[0]) for t in range(33))
    assert differences


@pytest.mark.parametrize("kernel", sorted(LINEAR))
@given(T=st.integers(0, 20), C=WIDTHS, R=st.integers(1, 60), dtype=DTYPES, has_bias=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_linear(kernel, T, C, R, dtype, has_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    x_TC, weight_RC = _normal(generator, T, C).to(dtype), _normal(generator, R, C).to(dtype)
    bias_R = _normal(generator, R).to(dtype) if has_bias else None
    found_TR = LINEAR[kernel](x_TC, weight_RC, bias_R)
    expected_TR = F.linear(x_TC.double(), weight_RC.double(), None if bias_R is None else bias_R.double())
    assert found_TR.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found_TR.double(), expected_TR, atol=tolerance * C**0.5, rtol=tolerance)


def test_reference_over_several_weight_tiles():
    x_TC, weight_RC, bias_R = torch.randn(3, 8), torch.randn(2 * WEIGHT_TILE_ROWS + 5, 8), torch.randn(2 * WEIGHT_TILE_ROWS + 5)
    torch.testing.assert_close(LINEAR["reference"](x_TC, weight_RC, bias_R), F.linear(x_TC, weight_RC, bias_R))


@pytest.mark.parametrize(("kernel", "kind"), sorted(NORMS))
@given(shape=st.one_of(st.tuples(st.integers(0, 9), WIDTHS), st.tuples(st.integers(0, 5), st.integers(1, 4), WIDTHS)), dtype=DTYPES, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_norms(kernel, kind, shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (5 * _normal(generator, *shape) + 1).to(dtype), _normal(generator, shape[-1]), _normal(generator, shape[-1])
    bias = bias if kind == "layer" else None
    found = NORMS[kernel, kind](x, weight, bias, 1e-5)
    wide = x.double()
    if kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + (0 if bias is None else bias)
    assert found.dtype == dtype
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
@pytest.mark.parametrize("kernel", sorted(ACTIVATIONS))
def test_activations_against_transformers(kernel, name, gated):
    from transformers.activations import ACT2FN

    theirs = ACT2FN[{"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)]
    x = 4 * torch.randn(7, 26)
    expected = theirs(x[:, :13]) * x[:, 13:] if gated else theirs(x)
    torch.testing.assert_close(ACTIVATIONS[kernel](x, name, gated), expected, atol=1e-5, rtol=1e-5)
    assert ACTIVATIONS[kernel](x[:0], name, gated).shape == (0, 13 if gated else 26)


def test_reference_gradients_are_the_librarys():
    found = {}
    for kernel in LINEAR:
        generator = torch.Generator().manual_seed(1)
        x, weight, norm = (_normal(generator, *shape).requires_grad_() for shape in ((5, 12), (14, 12), (12,)))
        hidden = LINEAR[kernel](NORMS[kernel, "rms"](x, norm, None, 1e-5), weight, None)
        SOFTCAPS[kernel](ACTIVATIONS[kernel](hidden, "silu", True), 2.0).square().sum().backward()
        found[kernel] = (x.grad, weight.grad, norm.grad)
    for a, b in zip(found["torch"], found["reference"], strict=True):
        torch.testing.assert_close(a, b)
