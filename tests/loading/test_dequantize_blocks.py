"""Every dequantizer, bit for bit, against the `gguf` package."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tradespace.errors import InputError, UnsupportedError
from tradespace.loading import dequantize as ours
from tradespace.loading.dequantize import DEQUANTIZERS, PLAIN_DTYPES, dequantize_into
from tradespace.loading.gguf import GGML_TYPES

FLOAT_16_AT = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
    "Q2_K": [80, 82], "Q3_K": [108], "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [],
}  # fmt: skip
# zero, both signs, the least subnormal, the least normal, one, the greatest
EXTREME = np.array([0.0, -0.0, 2.0**-24, -(2.0**-24), 2.0**-14, 1.0, -1.0, 65504.0, -65504.0], np.float16)


def blocks(type_name: str, num_blocks: int, seed: int, *, extreme: bool = False) -> np.ndarray:
    """Random blocks whose scales are finite: any float16 but inf and NaN, or extreme ones only."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (num_blocks, GGML_TYPES[type_name][2]), dtype=np.uint8)
    for start in FLOAT_16_AT[type_name]:
        scales = rng.choice(EXTREME, num_blocks) if extreme else rng.integers(0, 0x7C00, num_blocks, dtype=np.uint16).view(np.float16) * rng.choice([1, -1])
        raw[:, start : start + 2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return raw


def oracle(raw: np.ndarray, type_name: str) -> np.ndarray:
    return gguf.dequantize(raw, gguf.GGMLQuantizationType[type_name])


def ours_of(raw: np.ndarray, type_name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    _, block_elements, block_bytes = GGML_TYPES[type_name]
    out = torch.full((raw.size // block_bytes * block_elements,), float("nan"), dtype=dtype)
    dequantize_into(torch.from_numpy(raw.reshape(-1).view(np.uint8)), type_name, out)
    return out


def test_all_block_types_are_tried():
    assert set(FLOAT_16_AT) == set(DEQUANTIZERS)


@pytest.mark.parametrize("type_name", DEQUANTIZERS)
@settings(max_examples=15, deadline=None)
@given(num_blocks=st.integers(1, 40), seed=st.integers(0, 2**32 - 1), extreme=st.booleans())
def test_bitwise_equal_to_the_gguf_package(type_name, num_blocks, seed, extreme):
    raw = blocks(type_name, num_blocks, seed, extreme=extreme)
    want, have = oracle(raw, type_name).reshape(-1), ours_of(raw, type_name)
    np.testing.assert_array_equal(have.numpy().view(np.uint32), want.view(np.uint32))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(ours_of(raw, type_name, dtype), torch.from_numpy(want).to(dtype))


@pytest.mark.parametrize("type_name", DEQUANTIZERS)
def test_every_byte_value_in_every_place(type_name):
    """256 blocks of one repeated byte each, with a scale of its own: every pattern of nibbles and high bits."""
    raw = np.repeat(np.arange(256, dtype=np.uint8)[:, None], GGML_TYPES[type_name][2], axis=1)
    for start in FLOAT_16_AT[type_name]:
        raw[:, start : start + 2] = np.array([0.0123 + start], np.float16).view(np.uint8)
    np.testing.assert_array_equal(ours_of(raw, type_name).numpy().view(np.uint32), oracle(raw, type_name).reshape(-1).view(np.uint32))


@pytest.mark.parametrize("type_name", DEQUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_meet_without_a_seam(type_name, dtype, monkeypatch):
    monkeypatch.setattr(ours, "TILE_ELEMENTS", 1024)
    raw = blocks(type_name, 70, seed=1)  # the last tile is a part of one for either size of block
    assert torch.equal(ours_of(raw, type_name, dtype), torch.from_numpy(oracle(raw, type_name).reshape(-1)).to(dtype))


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])
def test_plain_floats(type_name):
    values = torch.randn(257, generator=torch.Generator().manual_seed(0)).to(PLAIN_DTYPES[type_name])
    raw = values.view(torch.uint8).numpy()
    np.testing.assert_array_equal(ours_of(raw, type_name).numpy(), oracle(raw, type_name).reshape(-1))
    assert torch.equal(ours_of(raw, type_name, torch.bfloat16), values.to(torch.bfloat16))


def test_refuses_other_types_and_sizes():
    with pytest.raises(UnsupportedError, match="IQ3_S"):
        dequantize_into(torch.zeros(110, dtype=torch.uint8), "IQ3_S", torch.empty(256))
    for num_bytes, num_elements in ((17, 32), (18, 31), (36, 32)):
        with pytest.raises(InputError, match="Q4_0"):
            dequantize_into(torch.zeros(num_bytes, dtype=torch.uint8), "Q4_0", torch.empty(num_elements))
