"""Products of few rows with packed weights, and rows of them as floats, against fp64 arithmetic on the codes: under Triton's interpreter here."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tradespace.errors import UnsupportedError
from tradespace.formats import decode
from tradespace.formats.codes import Codes
from tradespace.formats.workspace import Workspace
from tradespace.spec import cuda
from tradespace.spec.cuda import packed_bytes, squares_tiles

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter (conftest.py sets TRITON_INTERPRET=1)")
torch.set_num_threads(1)

from tradespace.formats.cuda import CudaWeight  # noqa: E402
from tradespace.kernels.linear.triton_codes import quantize_rows  # noqa: E402
from tradespace.kernels.linear.triton_rows import NextNorm, Scratch, rows_linear  # noqa: E402
from tradespace.kernels.linear.triton_rows_tiles import RowTiles, find_tiles  # noqa: E402

NAMES = [name for name in cuda.FORMATS if name != "int4"]
MEANT = {"fp8-a8": "fp8"}  # whose codes these are
SCRATCH = Scratch("cpu")
LIMITS = {"nf4": 8e-3, "nf4-plain": 8e-3}  # its levels are rounded to bf16 before the scale meets them


def codes_for(name: str, rows: int, columns: int, gen: torch.Generator) -> Codes:
    """Random codes of a format, their scales as the format holds them."""
    layout = cuda.FORMATS[name]
    groups = layout.groups(columns)
    scale_RG = torch.rand(rows, max(1, groups), generator=gen).half().float() * 0.1 + 0.01
    if layout.kind == "bf16":
        return Codes(torch.randn(rows, columns, generator=gen).bfloat16())
    if layout.kind in ("int8", "w8a8"):
        return Codes(torch.randint(-127, 128, (rows, columns), generator=gen, dtype=torch.int8), scale_RG)
    if layout.kind in ("fp8", "f8a8"):
        return Codes(torch.randn(rows, columns, generator=gen).to(torch.float8_e4m3fn), scale_RG)
    codes_RC = torch.randint(0, 16, (rows, columns), generator=gen, dtype=torch.uint8)
    if layout.nested:
        ids = torch.arange(rows * groups).view(rows, groups) // layout.nested
        nested = torch.rand(int(ids.max()) + 1, generator=gen)
        return Codes(codes_RC, nested[ids], nested_RG=torch.randint(0, 256, (rows, groups), generator=gen, dtype=torch.uint8), offset=0.25)
    zero_RG = torch.randint(0, 16, (rows, groups), generator=gen, dtype=torch.uint8) if layout.zero_bytes else None
    return Codes(codes_RC, scale_RG.half().float(), zero_RG)


def weight_of(name: str, rows: int, columns: int, seed: int) -> tuple[CudaWeight, Tensor]:
    """A filled weight and its values in fp64."""
    codes = codes_for(name, rows, columns, torch.Generator().manual_seed(seed))
    weight = CudaWeight(name, (rows, columns), device="cpu", scratch=SCRATCH, workspace=Workspace(columns * 40, rows, torch.bfloat16))
    weight.set_rows(slice(0, rows), codes)
    return weight, decode(MEANT.get(name, name), codes).double()


def off(got: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(got.double() - expected) / torch.linalg.vector_norm(expected))


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_the_spec_and_rows_come_back(name):
    for rows, columns in ((33, 200), (64, 128), (5, 72)):
        weight, values = weight_of(name, rows, columns, 1)
        assert weight.nbytes == packed_bytes(name, (rows, columns))
        back = weight.get_rows(2, 5)
        assert torch.equal(decode(MEANT.get(name, name), back).double(), values[2:5])
        ids = torch.tensor([3, 0, 3])
        assert off(weight.rows(ids), values[ids]) < LIMITS.get(name, 8e-3)
        assert torch.equal(weight.dense_rows(1, 4), weight.rows(torch.arange(1, 4)))
    stack = CudaWeight(name, (3, 32, 128), device="cpu")
    assert stack.nbytes == packed_bytes(name, (3, 32, 128))


@pytest.mark.parametrize("name", NAMES)
def test_rows_filled_apart_in_any_order(name):
    codes = codes_for(name, 40, 130, torch.Generator().manual_seed(2))
    whole, apart = (CudaWeight(name, (40, 130), device="cpu") for _ in range(2))
    whole.set_rows(slice(0, 40), codes)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    for part in order.split(17):
        apart.set_rows(part, codes[part])
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), apart.buffers(), strict=True))


@settings(max_examples=24, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(NAMES),
    rows=st.sampled_from([1, 31, 48, 70]),
    columns=st.sampled_from([64, 72, 200, 384]),
    tokens=st.sampled_from([1, 2, 9, 20, 100]),
    seed=st.integers(0, 10**6),
    bias=st.booleans(),
    programs=st.sampled_from([1, 3]),
)
def test_few_rows(name, rows, columns, tokens, seed, bias, programs):
    weight, values = weight_of(name, rows, columns, seed)
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=gen).bfloat16()
    b = torch.randn(rows, generator=gen) if bias else None
    exact = x.double()
    if name in ("w8a8", "fp8-a8"):
        codes, scale = torch.empty(tokens, columns, dtype=weight.packed.codes.dtype), torch.empty(tokens)
        quantize_rows(x, codes, scale)
        exact = codes.double() * scale.double()[:, None]
        assert float((exact - x.double()).abs().max()) <= (0.51 if name == "w8a8" else 16.1) * float(scale.max())
    expected = exact @ values.T + (0 if b is None else b.double())
    assert off(weight.linear(x, b), expected) < LIMITS.get(name, 8e-3)
    codes, scale = (codes, scale) if name in ("w8a8", "fp8-a8") else (x, None)
    tiles = RowTiles(N=32, K=64, programs=programs, stages=1)
    assert off(rows_linear(codes, weight.packed, SCRATCH, x_scale_T=scale, bias_R=b, tiles=tiles), expected) < LIMITS.get(name, 8e-3)


@pytest.mark.parametrize("name", ["bf16", "int8", "int4-g64-zp", "nf4"])
def test_many_rows_dequantize_once(name):
    weight, values = weight_of(name, 70, 200, 5)
    x = torch.randn(66, 200, generator=torch.Generator().manual_seed(6)).bfloat16()
    assert off(weight.linear(x), x.double() @ values.T) < LIMITS.get(name, 8e-3)


def test_what_surrounds_a_product():
    """Gated activation, the norm before and the norm after, residual in place; split columns give the same bits every time."""
    gen = torch.Generator().manual_seed(7)
    weight, values = weight_of("int4-g64", 96, 256, 7)
    x = torch.randn(3, 256, generator=gen).bfloat16()
    squares = torch.rand(3, squares_tiles(256), generator=gen)
    root = (squares.double().sum(1, keepdim=True) / 256 + 1e-5).rsqrt()
    gate, up = (x.double() @ values.T * root).chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    for programs in (1, 9):
        tiles = RowTiles(N=32, programs=programs, stages=1)
        found = [rows_linear(x, weight.packed, SCRATCH, gated="silu", squares_TS=squares, eps=1e-5, tiles=tiles) for _ in range(2)]
        assert torch.equal(*found) and off(found[0], expected) < 6e-3
        residual = torch.randn(3, 96, generator=gen).bfloat16()
        after = NextNorm(weight_R=torch.rand(96), x_TR=torch.empty(3, 96).bfloat16(), squares_TS=torch.full((3, squares_tiles(96)), float("nan")))
        summed = residual.double() + x.double() @ values.T
        out = rows_linear(x, weight.packed, SCRATCH, out_TR=residual, residual_TR=residual, next_norm=after, tiles=tiles)
        assert off(out, summed) < 6e-3
        torch.testing.assert_close(after.squares_TS.sum(1), out.float().square().sum(1), rtol=1e-5, atol=1e-5)
        assert off(after.x_TR, out.double() * after.weight_R.double()) < 6e-3
    assert int(SCRATCH.counters.sum()) == 0


def test_tiles_are_data_and_splits_fit_the_scratch():
    for device in (torch.device("cpu"),):
        for rows, columns, M in ((28672, 4096, 64), (4096, 14336, 8), (40, 64, 8), (128256, 4096, 16)):
            tiles = find_tiles("int4", 128, M, rows, columns, gated=False, device=device)
            split = tiles.split_for(rows, columns, 128, M, gated=False)
            padded = -(-rows // tiles.N) * tiles.N
            assert split == 1 or padded * M * split <= cuda.PARTIALS


def test_what_it_cannot_take_is_said():
    with pytest.raises(UnsupportedError, match="do not read q4_0"):
        CudaWeight("q4_0", (32, 64), device="cpu")
    with pytest.raises(UnsupportedError, match="chunks of 32"):
        CudaWeight("int8", (2, 33, 64), device="cpu")
    weight, _ = weight_of("int8", 32, 64, 1)
    with pytest.raises(UnsupportedError, match="at most 128"):
        rows_linear(torch.zeros(129, 64).bfloat16(), weight.packed, SCRATCH)
