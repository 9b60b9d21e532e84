"""Formats: the implementation's bytes equal the spec's, and every way to read a weight agrees with its dense rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tradespace.errors import EngineError, InputError, UnsupportedError
from tradespace.formats import DTYPES, FORMATS, DenseWeight, Int8Weight, Workspace, build_weight
from tradespace.formats.int8 import FUSED_ROWS
from tradespace.quantize.rtn import fill_rtn
from tradespace.spec.weights import FORMATS as SPECS
from tradespace.spec.weights import workspace_shape

SHAPES = st.one_of(st.tuples(st.integers(1, 40), st.integers(1, 70)), st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 40)))
NAMES = sorted(FORMATS)


def _dense(name: str) -> torch.dtype:
    return DTYPES[SPECS[name].compute]


def _filled(name: str, values_RC: torch.Tensor, *, linear: str = "torch", dense: torch.dtype | None = None):
    dense = dense or _dense(name)
    workspace = Workspace(*workspace_shape([values_RC.shape]), dense)
    weight = build_weight(name, tuple(values_RC.shape), dense=dense, linear=linear, workspace=workspace)
    fill_rtn(weight, 0, values_RC.clone().view(-1, values_RC.shape[-1]))
    return weight


def test_tables_agree():
    assert set(FORMATS) == {name for name, spec in SPECS.items() if spec.runs_since is not None}


def test_unimplemented_format_is_refused():
    with pytest.raises(UnsupportedError, match="int4"):
        build_weight("int4", (2, 2), dense=torch.float32)


@pytest.mark.parametrize("name", NAMES)
@given(shape=SHAPES)
@settings(max_examples=30, deadline=None)
def test_bytes_are_those_of_the_spec(name, shape):
    weight = build_weight(name, shape, dense=_dense(name))
    assert weight.nbytes == SPECS[name].nbytes(shape)
    assert weight.nbytes == sum(tensor.nbytes for tensor in weight.state_dict().values())


@pytest.mark.parametrize("name", NAMES)
@given(
    rows=st.integers(1, 30),
    columns=st.one_of(st.integers(1, 50), st.sampled_from([32, 64])),
    batch=st.sampled_from([0, 1, 3, FUSED_ROWS, FUSED_ROWS + 1, 40]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_every_way_to_read_agrees(name, rows, columns, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    values_RC = torch.randn(rows, columns, generator=generator)
    weight = _filled(name, values_RC)
    dense_RC = weight.dense_rows(0, rows)
    error = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8, "int8": 0.5 / 127 + 2**-8}[name]
    assert ((dense_RC.float() - values_RC).abs() <= error * values_RC.abs().amax(1, keepdim=True) + 1e-7).all()
    ids = torch.randint(0, rows, (7,), generator=generator)
    assert torch.equal(weight.rows(ids), dense_RC[ids])
    x_TC = torch.randn(batch, columns, generator=generator).to(dense_RC.dtype)
    bias_R = torch.randn(rows, generator=generator).to(dense_RC.dtype)
    found_TR = weight.linear(x_TC, bias_R)
    expected_TR = x_TC.double() @ dense_RC.double().T + bias_R.double()
    assert found_TR.dtype == dense_RC.dtype and found_TR.shape == (batch, rows)
    bound = {"fp32": 1e-5, "fp16": 2e-3}.get(name, 2e-2) * (x_TC.double().abs() @ dense_RC.double().abs().T + bias_R.double().abs() + 1e-3)
    assert ((found_TR.double() - expected_TR).abs() <= bound).all()


@pytest.mark.parametrize("name", NAMES)
def test_filling_by_chunks_and_by_index(name):
    values_RC = torch.randn(13, 9)
    whole, chunks, scattered = (_filled(name, values_RC) for _ in range(3))
    for start in range(0, 13, 4):
        fill_rtn(chunks, start, values_RC[start : start + 4].clone())
    order = torch.randperm(13)
    fill_rtn(scattered, order, values_RC[order].clone())
    for other in (chunks, scattered):
        assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_experts_are_matrices_of_a_stack(name):
    values_ERC = torch.randn(3, 8, 6)
    stack = _filled(name, values_ERC)
    x_TC = torch.randn(2, 6).to(_dense(name))
    for expert in range(3):
        one = _filled(name, values_ERC[expert])
        assert torch.equal(stack.linear(x_TC, expert=expert), one.linear(x_TC))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity_are_refused_by_name(name, bad):
    values_RC = torch.randn(4, 4)
    values_RC[2, 1] = bad
    with pytest.raises(InputError, match=r"blk\.7.*row 2"):
        fill_rtn(build_weight(name, (4, 4), dense=_dense(name)), 0, values_RC, name="blk.7")


def test_what_fp16_cannot_hold_is_refused():
    with pytest.raises(InputError, match="fp16"):
        fill_rtn(build_weight("fp16", (1, 2), dense=torch.float16), 0, torch.tensor([[1.0, 7e4]]), name="w")


def test_int8_rows_of_zeros_and_of_tiny_numbers():
    values_RC = torch.tensor([[0.0, 0.0], [1e-40, -1e-40], [3.0, -127.0]])
    weight = _filled("int8", values_RC, dense=torch.float32)
    assert torch.equal(weight.dense_rows(0, 1), torch.zeros(1, 2)) and weight.dense_rows(0, 3).isfinite().all()
    assert torch.equal(weight.dense_rows(2, 3), values_RC[2:])


def test_int8_tiles_of_a_large_matrix(monkeypatch):
    """A matrix larger than the workspace's tile is dequantized piece by piece: same result, for all dtypes of activations."""
    values_RC, x_TC = torch.randn(37, 11), torch.randn(20, 11)
    expected_TR = {dtype: _filled("int8", values_RC, dense=dtype).linear(x_TC.to(dtype)) for dtype in DTYPES.values()}
    monkeypatch.setattr("tradespace.spec.weights.TILE_ELEMENTS", 50)
    for dtype, expected in expected_TR.items():
        weight = _filled("int8", values_RC, dense=dtype)
        assert weight.workspace is not None and weight.workspace.flat.numel() == 44
        torch.testing.assert_close(weight.linear(x_TC.to(dtype)), expected)


def test_int8_says_what_it_cannot():
    weight = Int8Weight((4, 4), torch.bfloat16)
    with pytest.raises(EngineError, match="workspace"):
        weight.linear(torch.zeros(1, 4, dtype=torch.bfloat16))
    with pytest.raises(EngineError, match="gradient"):
        _filled("int8", torch.randn(4, 4)).linear(torch.zeros(1, 4, dtype=torch.bfloat16, requires_grad=True))


def test_dense_weight_trains_on_demand():
    weight = _filled("fp32", torch.randn(4, 3))
    assert isinstance(weight, DenseWeight) and not weight.weight.requires_grad
    weight.weight.requires_grad_()
    weight.linear(torch.ones(2, 3)).sum().backward()
    assert torch.equal(weight.weight.grad, torch.full((4, 3), 2.0))


def test_mixed_precision_multiplies_in_the_weights_dtype():
    values_RC, x_TC = torch.randn(6, 5), torch.randn(3, 5).bfloat16()
    found_TR = _filled("fp32", values_RC).linear(x_TC, torch.ones(6).bfloat16())
    assert found_TR.dtype == torch.bfloat16
    torch.testing.assert_close(found_TR, (x_TC.float() @ values_RC.T + 1).bfloat16())
