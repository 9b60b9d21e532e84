"""Formats: the implementation's bytes equal the spec's, and every way to read a weight agrees with the values that its codes stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tradespace.errors import EngineError, InputError, UnsupportedError
from tradespace.formats import DTYPES, FORMATS, DenseWeight, QuantizedWeight, ScaledWeight, Workspace, build_weight, decode
from tradespace.formats.int8 import FUSED_ROWS
from tradespace.quantize.rtn import fill_rtn, round_to_nearest
from tradespace.spec.formats import ALIASES, refusal
from tradespace.spec.formats import FORMATS as SPECS
from tradespace.spec.weights import workspace_shape

TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}, torch.float16: {"rtol": 2e-3, "atol": 2e-3}}
NAMES = sorted(set(FORMATS) - set(ALIASES))
SPANNING = [name for name in NAMES if SPECS[name].scale_rows != 1]
WIDTHS = st.one_of(st.integers(1, 150), st.sampled_from([32, 64, 96, 128, 256, 512]))
SHAPES = st.one_of(st.tuples(st.integers(1, 40), WIDTHS), st.tuples(st.integers(1, 3), st.integers(1, 20), WIDTHS), st.tuples(st.just(1), WIDTHS))
# largest error of a weight, in parts of its row's (for shared scales: of all) largest magnitude; lattices are held to their mean error elsewhere
ERRORS = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8, "fp8": 2**-4, "q8_0": 0.5 / 127 + 2**-11, "q6_k": 0.06, "nf4": 0.17, "q5_k": 0.08, "q4_k": 0.16}
ERRORS |= {"int8": 0.5 / 127, "w8a8": 0.5 / 127}
# q4_0 lets the largest magnitude reach its lowest code, so the other end is off by up to a step
ERRORS |= {"q4_0": 1 / 8, "q5_0": 1 / 16, "q4_1": 1 / 15, "q5_1": 1 / 31, "int4": 1.01 / 15, "int3": 1.01 / 7, "int2": 1.01 / 3}


def _bound(name: str) -> float | None:
    return ERRORS.get(name, ERRORS.get(name.split("-")[0]))


def _dense(name: str) -> torch.dtype:
    return DTYPES[SPECS[name].compute]


def _width(name: str, columns: int) -> int:
    """`columns`, or the nearest width that the format can hold."""
    fmt = SPECS[name]
    return columns if refusal(fmt, columns) is None or fmt.block is None else -(-columns // fmt.block[0]) * fmt.block[0]


def _filled(name: str, values_RC: torch.Tensor, *, linear: str = "torch", dense: torch.dtype | None = None):
    dense = dense or _dense(name)
    workspace = Workspace(*workspace_shape([tuple(values_RC.shape)]), dense)
    weight = build_weight(name, tuple(values_RC.shape), dense=dense, linear=linear, workspace=workspace)
    fill_rtn(weight, 0, values_RC.clone().view(-1, values_RC.shape[-1]))
    return weight


def _equal(one, other) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_tables_agree():
    assert set(FORMATS) == {name for name, spec in SPECS.items() if spec.runs_since is not None}
    for name, held in FORMATS.items():
        assert held.codec is None or held.codec.fmt is SPECS[name]


def test_an_unknown_format_is_refused():
    with pytest.raises(UnsupportedError, match="int5"):
        build_weight("int5", (2, 2), dense=torch.float32)


@pytest.mark.parametrize("name", NAMES)
@given(shape=SHAPES)
@settings(max_examples=12, deadline=None)
def test_bytes_are_those_of_the_spec(name, shape):
    shape = (*shape[:-1], _width(name, shape[-1]))
    weight = build_weight(name, shape, dense=_dense(name))
    assert weight.nbytes == SPECS[name].nbytes(shape)
    assert weight.nbytes == sum(tensor.nbytes for tensor in weight.state_dict().values())
    assert weight.format_name == SPECS[name].name


@pytest.mark.parametrize("name", NAMES)
@given(shape=SHAPES, batch=st.sampled_from([0, 1, 3, FUSED_ROWS, FUSED_ROWS + 1, 40]), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_every_way_to_read_agrees(name, shape, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    *stack, rows, columns = (*shape[:-1], _width(name, shape[-1]))
    values = torch.randn(*stack, rows, columns, generator=generator)
    weight = _filled(name, values)
    all_rows = values.view(-1, columns).shape[0]
    dense_RC = weight.dense_rows(0, all_rows)
    found_RC = decode(name, weight.get_rows(0, all_rows))[:, :columns]
    assert torch.equal(found_RC.to(dense_RC.dtype), dense_RC)
    if (error := _bound(name)) is not None:
        span = values.view(-1, columns).abs().amax(1, keepdim=True) if SPECS[name].scale_rows == 1 else values.abs().max()
        # scales that are quantized themselves are off by a share of the largest of them, which a small row feels most
        nested = 0.01 * values.abs().max() if SPECS[name].nested else 0.0
        bound = (2 if name.endswith("-zp") or name in ("q4_1", "q5_1") else 1) * error * span + nested + 1e-7
        assert ((found_RC - values.view(-1, columns)).abs() <= bound).all()
    ids = torch.randint(0, all_rows, (7,), generator=generator)
    assert torch.equal(weight.rows(ids), dense_RC[ids])
    x_TC = torch.randn(batch, columns, generator=generator).to(dense_RC.dtype)
    bias_R = torch.randn(rows, generator=generator).to(dense_RC.dtype)
    expert = len(stack) and int(torch.randint(0, stack[0], (1,), generator=generator))
    y_TR = weight.linear(x_TC, bias_R, expert=expert if stack else None)
    own_RC = found_RC[expert * rows : (expert + 1) * rows].double() if stack else found_RC.double()
    expected_TR = x_TC.double() @ own_RC.T + bias_R.double()
    assert y_TR.dtype == dense_RC.dtype and y_TR.shape == (batch, rows)
    # activations of w8a8 are off by half a step of their token's scale, and rotated ones are rounded once more
    bound = {"fp32": 1e-5, "fp16": 2e-3}.get(name, 2e-2) * (x_TC.double().abs() @ own_RC.abs().T + bias_R.double().abs() + 1e-3)
    if name == "fp8-a8":  # three bits of mantissa: a sixteenth of itself, or half a step of the smallest
        bound = bound + (x_TC.double().abs() / 16 + x_TC.double().abs().amax(1, keepdim=True) / 448 / 1024) @ own_RC.abs().T
    if name == "w8a8" or name.startswith("e8"):
        step = x_TC.double().abs().amax(1, keepdim=True) / 255 if name == "w8a8" else x_TC.double().norm(dim=1, keepdim=True) * 2**-8
        bound = bound + step * (own_RC.abs().sum(1) if name == "w8a8" else own_RC.norm(dim=1))
    assert ((y_TR.double() - expected_TR).abs() <= bound).all()


@pytest.mark.parametrize("name", NAMES)
@given(shape=SHAPES, seed=st.integers(0, 99))
@settings(max_examples=6, deadline=None)
def test_codes_come_back_as_they_went_in(name, shape, seed):
    shape = (*shape[:-1], _width(name, shape[-1]))
    first = _filled(name, torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))
    rows = first.rows_RC.shape[0]
    second = build_weight(name, shape, dense=_dense(name))
    for tensor in second.state_dict().values():
        tensor.view(torch.uint8).random_()
    if SPECS[name].scale_rows == 1:
        middle = rows // 2
        second.set_rows(slice(0, middle), first.get_rows(0, middle))
        order = torch.randperm(rows - middle)
        second.set_rows(order + middle, first.get_rows(middle, rows)[order])
    else:
        second.set_rows(slice(0, rows), first.get_rows(0, rows))
    assert _equal(first, second)


@pytest.mark.parametrize("name", NAMES)
def test_filling_by_chunks_and_by_index(name):
    columns = _width(name, 72)
    values_RC = torch.randn(13, columns)
    whole, chunks, scattered = (_filled(name, values_RC) for _ in range(3))
    order = torch.randperm(13)
    if isinstance(chunks, ScaledWeight) and chunks.spans_rows:
        for start in range(0, 13, 4):
            chunks.observe(slice(start, start + 4), values_RC[start : start + 4])
        scattered.observe(order, values_RC[order])
    for start in range(0, 13, 4):
        fill_rtn(chunks, start, values_RC[start : start + 4].clone())
    fill_rtn(scattered, order, values_RC[order].clone())
    assert _equal(whole, chunks) and _equal(whole, scattered)


@pytest.mark.parametrize("name", SPANNING)
def test_rows_that_share_scales_are_not_filled_apart_unseen(name):
    weight = build_weight(name, (6, 8), dense=torch.float32)
    assert isinstance(weight, ScaledWeight)
    with pytest.raises(EngineError, match="all 6"):
        fill_rtn(weight, 0, torch.randn(3, 8))
    weight.observe(slice(0, 3), torch.full((3, 8), 0.5))
    with pytest.raises(EngineError, match="observe"):
        fill_rtn(weight, 3, torch.ones(3, 8))


@pytest.mark.parametrize("name", SPANNING)
def test_a_shared_scale_does_not_change_under_rows_that_are_held(name):
    """As q's would under k's, where both lie in one matrix and each brings its own."""
    weight, small, large = (build_weight(name, (130, 8), dense=torch.float32) for _ in range(3))
    fill_rtn(small, 0, torch.full((130, 8), 0.5))
    fill_rtn(large, 0, torch.full((130, 8), 3.0))
    weight.set_rows(slice(0, 64), small.get_rows(0, 64))
    with pytest.raises(EngineError, match="share a scale"):
        weight.set_rows(slice(64, 128), large.get_rows(64, 128))
    weight.set_rows(slice(0, 130), large.get_rows(0, 130))
    weight.set_rows(torch.tensor([5, 3]), large.get_rows(3, 5))
    assert torch.equal(weight.dense_rows(0, 130), large.dense_rows(0, 130))


@pytest.mark.parametrize("name", NAMES)
def test_experts_are_matrices_of_a_stack(name):
    values_ERC = torch.randn(3, 8, _width(name, 6))
    stack = _filled(name, values_ERC)
    x_TC = torch.randn(2, values_ERC.shape[-1]).to(_dense(name))
    for expert in range(3):
        # doubly quantized scales share their mean over the whole stack: the same values are all that can be asked for
        one = _filled(name, values_ERC[expert]) if name != "nf4" else build_weight(name, (8, x_TC.shape[1]), dense=_dense(name), workspace=stack.workspace)
        if name == "nf4":
            one.set_rows(slice(0, 8), stack.get_rows(8 * expert, 8 * expert + 8))
        assert torch.equal(stack.linear(x_TC, expert=expert), one.linear(x_TC))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity_are_refused_by_name(name, bad):
    values_RC = torch.randn(4, _width(name, 4))
    values_RC[2, 1] = bad
    with pytest.raises(InputError, match=r"blk\.7.*row 2"):
        fill_rtn(build_weight(name, tuple(values_RC.shape), dense=_dense(name)), 0, values_RC, name="blk.7")


@pytest.mark.parametrize("name", ["fp16", "int4-g32", "int2-g64-zp", "q8_0", "q4_1", "q4_k", "q6_k"])
def test_what_16_bits_cannot_hold_is_refused_by_name(name):
    values_RC = torch.ones(1, 256)
    values_RC[0, 0], values_RC[0, 1] = 5e8, -5e8
    with pytest.raises(InputError, match=r"tensor w: .*(fp16|16 bits)"):
        fill_rtn(build_weight(name, (1, 256), dense=torch.float16), 0, values_RC, name="w")


@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(build_weight(name, (1, 256), dense=torch.float32), QuantizedWeight)])
def test_rows_of_zeros_and_of_tiny_numbers(name):
    columns = _width(name, 70)
    values_RC = torch.zeros(4, columns)
    values_RC[1], values_RC[2, 0], values_RC[3] = 1e-40, -1e-9, torch.randn(columns)
    weight = _filled(name, values_RC, dense=torch.float32)
    dense_RC = weight.dense_rows(0, 4)
    assert torch.equal(dense_RC[0], torch.zeros(columns))
    # nf4's scales are rounded to an 8-bit grid themselves, whose steps are those of the largest scale
    assert dense_RC.isfinite().all() and dense_RC[1:3].abs().max() < (0.1 if name == "nf4" else 1e-3)
    assert weight.linear(torch.ones(2, columns)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dense", [torch.float32, torch.bfloat16, torch.float16])
def test_tiles_of_a_large_matrix(name, dense, monkeypatch):
    """A matrix larger than the workspace's tile is decoded piece by piece: same result, for all dtypes of activations."""
    if FORMATS[name].codec is None:
        return
    columns = _width(name, 40)
    values_RC, x_TC = torch.randn(37, columns), torch.randn(20, columns).to(dense)
    expected = _filled(name, values_RC, dense=dense).linear(x_TC)
    monkeypatch.setattr("tradespace.spec.weights.TILE_ELEMENTS", 5 * columns)
    monkeypatch.setattr("tradespace.formats.quantized.DECODE_ELEMENTS", 2 * columns)
    weight = _filled(name, values_RC, dense=dense)
    assert weight.workspace is not None and weight.workspace.flat.numel() == 5 * columns
    torch.testing.assert_close(weight.linear(x_TC), expected, **TOLERANCE[dense])


@pytest.mark.parametrize("name", ["int8", "w8a8", "int4-g64", "nf4", "e8", "q4_0"])
def test_a_quantized_weight_says_what_it_cannot(name):
    weight = build_weight(name, (4, 64), dense=torch.bfloat16)
    with pytest.raises(EngineError, match="workspace"):
        weight.linear(torch.zeros(1, 64, dtype=torch.bfloat16))
    with pytest.raises(EngineError, match="gradient"):
        _filled(name, torch.randn(4, 64)).linear(torch.zeros(1, 64, dtype=torch.bfloat16, requires_grad=True))


@given(name=st.sampled_from(NAMES), rows=st.integers(1, 5), columns=WIDTHS)
@settings(max_examples=60, deadline=None)
def test_a_row_does_not_depend_on_its_neighbours_in_the_reference(name, rows, columns):
    columns = _width(name, columns)
    assume(rows > 1)
    weight = _filled(name, torch.randn(9, columns), linear="reference", dense=torch.float32)
    if name in ("bf16", "fp16"):
        return
    x_TC = torch.randn(rows, columns)
    together = weight.linear(x_TC)
    assert all(torch.equal(weight.linear(x_TC[row : row + 1])[0], together[row]) for row in range(rows))


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


@pytest.mark.parametrize("name", [name for name in NAMES if SPECS[name].bits < 5 and SPECS[name].block is None] + ["e8", "e8-3", "e8-4"])
def test_a_search_never_loses(name):
    """Scales by least squares: no larger error than the plain ones, and on the coarse grids a clearly smaller one."""
    values_RC = torch.randn(32, 256, generator=torch.Generator().manual_seed(0)) ** 3
    plain, searched = ((decode(name, round_to_nearest(name, values_RC, search=search)) - values_RC).square().mean() for search in (False, True))
    assert searched <= plain * (1 + 1e-5)
    if name.startswith(("int2", "int3")):
        assert searched < 0.95 * plain
