"""nf4 against bitsandbytes' functional API on the CPU: codes, block scales, doubly quantized scales and decoded values, bit for bit."""

from __future__ import annotations

import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st

from tradespace.formats import build_weight
from tradespace.formats.nf4 import dynamic_levels, levels
from tradespace.quantize.rtn import fill_rtn
from tradespace.spec.formats import FORMATS

CPU = torch.device("cpu")
KINDS = ("normal", "rows of many sizes", "few distinct values", "tiny", "with zeros")


def _values(kind: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values_RC = torch.randn(rows, columns, generator=generator)
    if kind == "rows of many sizes":
        values_RC *= 10 ** (6 * torch.rand(rows, 1, generator=generator) - 4)
    elif kind == "few distinct values":
        values_RC = (values_RC * 2).round()
    elif kind == "tiny":
        values_RC *= 1e-30
    elif kind == "with zeros":
        values_RC[: rows // 2] = 0
    return values_RC


def test_tables():
    assert torch.equal(levels(CPU), functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_levels(CPU), functional.create_dynamic_map())


@given(rows=st.integers(1, 300), blocks=st.integers(1, 12), kind=st.sampled_from(KINDS), seed=st.integers(0, 9999))
@settings(max_examples=80, deadline=None)
def test_nf4_bit_for_bit(rows, blocks, kind, seed):
    values_RC = _values(kind, rows, 64 * blocks, seed)
    packed, state = functional.quantize_4bit(values_RC.clone(), blocksize=64, compress_statistics=True, quant_type="nf4")
    weight = build_weight("nf4", tuple(values_RC.shape), dense=torch.float32)
    half = rows // 2
    fill_rtn(weight, 0, values_RC[:half].clone())
    fill_rtn(weight, half, values_RC[half:].clone())
    assert torch.equal(weight.weight.flatten(), packed.flatten())
    assert torch.equal(weight.scale.flatten(), state.absmax)
    assert torch.equal(weight.nested_scale, state.state2.absmax)
    assert float(weight.offset) == float(state.offset)
    assert torch.equal(weight.dense_rows(0, rows), functional.dequantize_4bit(packed, state))


@given(rows=st.integers(1, 100), blocks=st.integers(1, 12), kind=st.sampled_from(KINDS), seed=st.integers(0, 9999))
@settings(max_examples=40, deadline=None)
def test_nf4_with_plain_scales_bit_for_bit(rows, blocks, kind, seed):
    values_RC = _values(kind, rows, 64 * blocks, seed)
    packed, state = functional.quantize_4bit(values_RC.clone(), blocksize=64, compress_statistics=False, quant_type="nf4")
    weight = build_weight("nf4-plain", tuple(values_RC.shape), dense=torch.float32)
    fill_rtn(weight, 0, values_RC.clone())
    assert torch.equal(weight.weight.flatten(), packed.flatten()) and torch.equal(weight.scale.flatten(), state.absmax)
    assert torch.equal(weight.dense_rows(0, rows), functional.dequantize_4bit(packed, state))


def test_bytes_of_a_large_matrix():
    """49,152 × 576, as SmolLM2's embedding: what bitsandbytes holds for it, 4.127 bits a weight."""
    values_RC = _values("normal", 49152, 576, 0) * 0.1
    packed, state = functional.quantize_4bit(values_RC, blocksize=64, compress_statistics=True, quant_type="nf4")
    held = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes + state.offset.nbytes
    assert FORMATS["nf4"].nbytes((49152, 576)) == held
    assert round(8 * held / values_RC.numel(), 3) == 4.127
    weight = build_weight("nf4", (49152, 576), dense=torch.float32)
    fill_rtn(weight, 0, values_RC.clone())
    assert torch.equal(weight.scale.flatten(), state.absmax) and torch.equal(weight.weight.flatten(), packed.flatten())
