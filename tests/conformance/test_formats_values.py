"""What codes mean, held against arithmetic that is not ours: torch's casts, the `gguf` package, integers, brute force over a codebook."""

from __future__ import annotations

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tradespace.errors import InputError
from tradespace.formats import FORMATS, Codes, Workspace, build_weight, decode
from tradespace.formats.codes import spread
from tradespace.formats.e8 import UNITS, magnitudes, points, short_vectors
from tradespace.formats.ggml_blocks import finite_blocks
from tradespace.formats.hadamard import block_size, hadamard, rotation_of, signs
from tradespace.formats.packing import pack, unpack
from tradespace.formats.w8a8 import W8A8Weight, quantize_tokens
from tradespace.quantize.grid import affine_grid, encode_affine
from tradespace.quantize.lattice import nearest_points, nearest_short
from tradespace.quantize.rtn import fill_rtn, round_to_nearest
from tradespace.spec.formats import FORMATS as SPECS
from tradespace.spec.weights import workspace_shape

CPU = torch.device("cpu")
AFFINE = [f"int{bits}-g{group}{zero}" for bits in (4, 3, 2) for group in (32, 64, 128) for zero in ("", "-zp")]


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(bits=st.sampled_from([2, 3, 4]), rows=st.integers(0, 5), columns=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_packed_row_is_one_number(bits, rows, columns, seed):
    """Read as one little-endian number, code i takes bits i·b and on."""
    codes_RC = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed_RB = pack(codes_RC, bits)
    assert packed_RB.shape == (rows, -(-columns * bits // 8))
    for row in range(rows):
        number = int.from_bytes(bytes(packed_RB[row].tolist()), "little")
        assert number == sum(code << (bits * index) for index, code in enumerate(codes_RC[row].tolist()))
    assert torch.equal(unpack(packed_RB, bits, columns), codes_RC)


@pytest.mark.parametrize("name", AFFINE)
@given(columns=st.integers(1, 200), seed=st.integers(0, 99), search=st.booleans())
@settings(max_examples=8, deadline=None)
def test_affine_codes_are_the_nearest(name, columns, seed, search):
    """Of all codes none is nearer to the value, scales and zero points being what they are, in float64."""
    fmt, values_RC = SPECS[name], _normal(4, columns, seed=seed)
    scale_RG, zero_RG = affine_grid(values_RC, fmt, search=search)
    assert torch.equal(scale_RG, scale_RG.half().float()) and scale_RG.shape == (4, fmt.groups(columns))
    codes = encode_affine(values_RC, fmt, scale_RG, zero_RG)
    scale_RC = spread(scale_RG, fmt.group or 0, columns).double()
    zero_RC = torch.full_like(scale_RC, 2 ** (int(fmt.bits) - 1)) if zero_RG is None else spread(zero_RG, fmt.group or 0, columns).double()
    grid_RCK = (torch.arange(2 ** int(fmt.bits)) - zero_RC.unsqueeze(-1)) * scale_RC.unsqueeze(-1)
    errors_RCK = (grid_RCK - values_RC.double().unsqueeze(-1)).abs()
    mine_RC = errors_RCK.gather(2, codes.codes_RC.long().unsqueeze(-1))[:, :, 0]
    assert (mine_RC <= errors_RCK.amin(2) + 1e-6).all()
    assert ((decode(name, codes).double() - values_RC).abs() - mine_RC).abs().max() < 1e-6
    if not search:
        assert (mine_RC <= 0.5 * scale_RC * 1.01 + (scale_RC if zero_RG is not None else 0)).all()


@pytest.mark.parametrize("name", ["fp8", "fp8-tensor", "fp8-block"])
@given(rows=st.integers(1, 300), columns=st.integers(1, 300), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_fp8_is_torchs_cast(name, rows, columns, seed):
    values_RC = _normal(rows, columns, seed=seed) * 0.05
    found = round_to_nearest(name, values_RC)
    assert found.scale_RG is not None
    for row in range(0, rows, 128 if name == "fp8-block" else rows if name == "fp8-tensor" else 1):
        for column in range(0, columns, 128 if name == "fp8-block" else columns):
            height = 128 if name == "fp8-block" else rows if name == "fp8-tensor" else 1
            part = values_RC[row : row + height, column : column + (128 if name == "fp8-block" else columns)]
            scale = part.abs().max() / 448
            want = (part / scale).to(torch.float8_e4m3fn)
            have = found.codes_RC[row : row + height, column : column + part.shape[1]]
            assert torch.equal(have.view(torch.uint8), want.view(torch.uint8))
            assert (found.scale_RG[row : row + height, column // 128 if name == "fp8-block" else 0] == scale).all()
    assert torch.equal(decode(name, found), found.codes_RC.float() * spread(found.scale_RG, 128 if name == "fp8-block" else 0, columns))


@given(rows=st.integers(1, 40), columns=st.one_of(st.integers(1, 100), st.sampled_from([64, 1056, 2500])), tokens=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_w8a8_sums_are_exact(rows, columns, tokens, seed):
    """Both integer products equal the one in int64, and the result is its scaling in fp32."""
    values_RC, x_TC = _normal(rows, columns, seed=seed), _normal(tokens, columns, seed=seed + 1)
    weight = build_weight("w8a8", (rows, columns), dense=torch.float32, workspace=Workspace(*workspace_shape([(rows, columns)]), torch.float32))
    assert isinstance(weight, W8A8Weight)
    fill_rtn(weight, 0, values_RC.clone())
    codes_TC, scale_T1 = quantize_tokens(x_TC)
    assert ((codes_TC * scale_T1 - x_TC).abs() <= scale_T1 * 0.5001).all()
    assert torch.equal(scale_T1, x_TC.abs().amax(dim=1, keepdim=True) / 127.5)
    sums_TR = codes_TC.long() @ weight.weight.long().T
    assert torch.equal(weight._sums_in_fp32(codes_TC, weight.weight).long(), sums_TR)
    assert torch.equal(weight.linear(x_TC), sums_TR.float() * scale_T1 * weight.scale[:, 0])


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
@given(rows=st.integers(1, 20), blocks=st.integers(1, 4), seed=st.integers(0, 999), scale=st.sampled_from([1.0, 1e-3, 300.0, 1e-8]), whole=st.booleans())
@settings(max_examples=30, deadline=None)
def test_simple_blocks_are_what_the_gguf_package_writes(name, rows, blocks, seed, scale, whole):
    values_RC = _normal(rows, 32 * blocks, seed=seed) * scale
    if whole:  # ties everywhere
        values_RC = (values_RC / scale * 2).round()
    values_RC[0, :32] = 0
    want = gguf.quants.quantize(values_RC.numpy(), gguf.GGMLQuantizationType[name.upper()])
    assert torch.equal(round_to_nearest(name, values_RC).codes_RC, torch.from_numpy(want))


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"])
def test_blocks_decode_as_the_gguf_package_does(name):
    codes = round_to_nearest(name, _normal(8, 512) * torch.rand(8, 1))
    want = gguf.quants.dequantize(codes.codes_RC.numpy(), gguf.GGMLQuantizationType[name.upper()])
    assert torch.equal(decode(name, codes), torch.from_numpy(want))


@pytest.mark.parametrize(("name", "simple", "share"), [("q4_k", "q4_0", 0.75), ("q5_k", "q5_0", 0.75), ("q6_k", "q5_1", 0.25), ("q6_k", "q8_0", 12)])
@pytest.mark.parametrize("power", [1, 3])
def test_k_quants_err_less_than_simple_ones_of_their_size(name, simple, share, power):
    """At the same bits (4.5, 5.5), or one more: on a normal law, and on one with heavy tails."""
    values_RC = _normal(64, 1024) ** power
    error, other = (float((decode(each, round_to_nearest(each, values_RC)) - values_RC).square().mean()) for each in (name, simple))
    assert error < share * other


def test_k_quants_keep_exact_values():
    """Values that lie on a grid that the format can hold are found."""
    grid = torch.arange(256) % 16
    values_RC = torch.stack([grid * 0.5 - 3.0, grid * 0.25, -(grid * 0.125)]).float()
    found_RC = decode("q4_k", round_to_nearest("q4_k", values_RC))
    assert (found_RC - values_RC).abs().max() < 0.02 * values_RC.abs().max()
    codes_RC = (torch.arange(256).float() % 64 - 32).expand(2, 256) * 0.25
    assert (decode("q6_k", round_to_nearest("q6_k", codes_RC)) - codes_RC).abs().max() < 0.02 * 8


@pytest.mark.parametrize(("name", "columns"), [("q4_0", 48), ("q4_k", 576), ("e8", 12), ("e8-4", 7)])
def test_rows_that_are_no_whole_blocks_are_refused(name, columns):
    with pytest.raises(InputError, match=rf"{name} needs rows that are a multiple of {SPECS[name].block[0]} wide; these have {columns}"):
        build_weight(name, (2, columns), dense=torch.float32)
    with pytest.raises(InputError, match=rf"{columns} columns"):
        round_to_nearest(name, torch.ones(2, columns))


def test_blocks_with_bad_scales_are_seen():
    for name in ("q8_0", "q4_1", "q4_k", "q6_k"):
        rows_RB = round_to_nearest(name, _normal(3, 256)).codes_RC
        assert finite_blocks(rows_RB, SPECS[name])
        at = 208 if name == "q6_k" else 2 if name in ("q4_1", "q4_k") else 0
        rows_RB[1, at : at + 2] = torch.tensor([0, 0x7C], dtype=torch.uint8)  # infinity
        assert not finite_blocks(rows_RB, SPECS[name])
        assert not decode(name, Codes(rows_RB)).isfinite().all()


# ------------------------------------------------------------------------------------------------------------------------------ lattices


def test_the_codebooks_are_lattice_points():
    table = points(CPU)
    assert len(table.unique(dim=0)) == 2**16
    for shift in (1, -1):
        half = (table[: 2**15] if shift == 1 else table[2**15 :]).int() - shift
        assert (half % 4 == 2).all()  # all half-integers, in quarters
        assert (half.sum(1) % 8 == 0).all()  # whose sum is even
    norms = magnitudes().int().square().sum(1).bincount()  # four times the norm
    assert {norm // 4: int(norms[norm]) for norm in norms.nonzero()[:, 0].tolist()} == {2: 1, 4: 8, 6: 28, 8: 56 + 8, 10: 70 + 56, 12: 29}
    short = short_vectors(CPU).int()
    assert len(short.unique(dim=0)) == 256 and (short.sum(1) % 4 == 0).all()
    assert short.square().sum(1).bincount().nonzero()[:, 0].tolist() == [0, 8, 16]
    assert ((short % 2 == 0).all(1) | (short % 2 == 1).all(1)).all()


@given(deviation=st.sampled_from([0.2, 0.6, 1.0, 1.5, 3.0, 10.0]), seed=st.integers(0, 999))
@settings(max_examples=12, deadline=None)
def test_nearest_points_are_the_nearest_of_all(deviation, seed):
    x_N8 = _normal(60, 8, seed=seed) * deviation
    table = points(CPU).double() / 4
    distances = torch.cdist(x_N8.double(), table)
    found = distances.gather(1, nearest_points(x_N8).long()[:, None])[:, 0]
    assert (found <= distances.amin(1) + 1e-6).all()
    short = torch.cdist(x_N8.double(), short_vectors(CPU).double() / 2)
    assert (short.gather(1, nearest_short(x_N8).long()[:, None])[:, 0] <= short.amin(1) + 1e-6).all()


@pytest.mark.parametrize(("name", "most"), [("e8", 0.0925), ("e8-3", 0.0300), ("e8-4", 0.0083)])
def test_lattices_on_a_normal_law(name, most):
    """Mean squared error on a unit normal law: below the best scalar grids of as many bits (0.1175, 0.0345, 0.0095)."""
    values_RC = _normal(64, 1024)
    assert float((decode(name, round_to_nearest(name, values_RC)) - values_RC).square().mean()) < most


def test_rotation_tames_outliers():
    """One weight of a hundred is ten times as large: a grid per group suffers, a rotated row does not."""
    values_RC = _normal(64, 1024) * torch.where(torch.rand(64, 1024, generator=torch.Generator().manual_seed(1)) < 0.01, 10.0, 1.0)
    error = {name: float((decode(name, round_to_nearest(name, values_RC)) - values_RC).square().mean()) for name in ("e8", "int2-g64-zp")}
    assert error["e8"] < 0.1 * float(values_RC.square().mean())
    assert error["e8"] < 0.5 * error["int2-g64-zp"]


@given(columns=st.integers(1, 600), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_rotation_is_orthogonal_and_known(columns, seed):
    x_TC, rotation = _normal(3, columns, seed=seed), rotation_of(columns)
    rotated_TC = rotation.apply(x_TC)
    torch.testing.assert_close(rotation.undo(rotated_TC), x_TC, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotated_TC.norm(dim=1), x_TC.norm(dim=1))
    block = block_size(columns)
    matrix = torch.block_diag(*[hadamard(block)] * (columns // block))
    torch.testing.assert_close(rotated_TC, (x_TC * signs(columns)) @ matrix, rtol=1e-5, atol=1e-5)


def test_signs_are_the_same_everywhere():
    """Files depend on them: these are splitmix64's, by hand for the first columns."""
    assert signs(16).tolist() == signs(32)[:16].tolist()
    assert abs(float(signs(4096).mean())) < 0.05
    assert "".join("+" if sign > 0 else "-" for sign in signs(24).tolist()) == SIGNS


SIGNS = "+----++-++++-++----+++++"


def test_values_of_e8_are_small_integers():
    """So that they are exact in bf16, and only the product is scaled."""
    for name, bits in (("e8", 2), ("e8-3", 3), ("e8-4", 4)):
        codes = round_to_nearest(name, _normal(16, 512))
        held = torch.empty(16, 512)
        codec = FORMATS[name].codec
        assert codec is not None and UNITS[bits][0] in (4, 28)
        codec.decode(codes, held)
        assert torch.equal(held, held.round()) and held.abs().max() < 128
