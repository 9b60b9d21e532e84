"""Rotary positions against transformers: frequencies, magnitudes, tables, and the rotation itself with partial and interleaved dimensions."""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from model.family_configs import CONTEXT, SCALINGS
from tradespace.errors import InputError
from tradespace.kernels.rope import RopeTable, inverse_frequencies, rope_table_bytes, rotate
from tradespace.spec.families import model_spec_from_config
from tradespace.spec.mixers import Attention, Rope, RopeScaling

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 16,
    "factor": 4.0,
}
ALL = {**SCALINGS, "longrope": LONGROPE, "longrope_magnitude": {**LONGROPE, "attention_factor": 1.3}}


def _config(scaling: dict, theta: float = 10_000.0) -> transformers.LlamaConfig:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "head_dim": 16, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 8}
    return transformers.LlamaConfig(**sizes, max_position_embeddings=CONTEXT, rope_parameters={"rope_theta": theta, **scaling})


def _rope(config: transformers.LlamaConfig) -> Rope:
    mixer = model_spec_from_config(config.to_dict(), "tiny").layers[0].mixer
    assert isinstance(mixer, Attention) and mixer.rope is not None
    return mixer.rope


@pytest.mark.parametrize("length", [7, 16, 17, 64, 65, 200])
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("kind", sorted(ALL))
def test_frequencies_are_transformers(kind, theta, length):
    """`length` is the engine's max_context here, and one sequence of that length there."""
    config = _config(ALL[kind], theta)
    found, magnitude = inverse_frequencies(_rope(config), length)
    if ALL[kind]["rope_type"] == "default":
        expected, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[ALL[kind]["rope_type"]](config, torch.device("cpu"), seq_len=length)
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-6)
    assert magnitude == pytest.approx(factor, rel=1e-9)


@pytest.mark.parametrize("kind", sorted(ALL))
def test_rotation_is_transformers(kind):
    config = _config(ALL[kind])
    length = 80 if kind in ("dynamic", "longrope", "longrope_magnitude") else CONTEXT
    table = RopeTable(_rope(config), length)
    positions_T = torch.arange(length)
    q_TNH, k_TKH = torch.randn(length, 2, 16), torch.randn(length, 1, 16)
    cos, sin = LlamaRotaryEmbedding(config)(q_TNH, positions_T[None])
    expected_q, expected_k = apply_rotary_pos_emb(q_TNH.transpose(0, 1)[None], k_TKH.transpose(0, 1)[None], cos, sin)
    rows = table.rows(positions_T, torch.float32)
    torch.testing.assert_close(rotate(q_TNH, rows), expected_q[0].transpose(0, 1), atol=2e-5, rtol=0)
    torch.testing.assert_close(rotate(k_TKH, rows), expected_k[0].transpose(0, 1), atol=2e-5, rtol=0)


@given(seed=st.integers(0, 999), T=st.integers(1, 9), interleaved=st.booleans())
@settings(max_examples=60, deadline=None)
def test_rotation_is_that_of_complex_numbers(seed, T, interleaved):
    """Each pair turns by position · frequency; what is not rotated passes; the order of rows and their number change no bit."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    H = rng.choice([2, 6, 10, 16])
    rope = Rope(dims=rng.choice(range(2, H + 1, 2)), theta=rng.choice([100.0, 1e4]), interleaved=interleaved)
    x_TNH = torch.randn(T, 3, H, generator=generator)
    positions_T = torch.randint(0, 50, (T,), generator=generator)
    found = rotate(x_TNH, RopeTable(rope, 50).rows(positions_T, torch.float32))
    half = rope.dims // 2
    first, second = (x_TNH[..., 0 : rope.dims : 2], x_TNH[..., 1 : rope.dims : 2]) if interleaved else (x_TNH[..., :half], x_TNH[..., half : rope.dims])
    frequencies = rope.theta ** (-torch.arange(0, rope.dims, 2, dtype=torch.float64) / rope.dims)
    turned = torch.complex(first.double(), second.double()) * torch.exp(1j * positions_T[:, None] * frequencies)[:, None]
    parts = [turned.real, turned.imag]
    expected = torch.cat([torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1), x_TNH[..., rope.dims :].double()], -1)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)
    for t in range(T):
        alone = rotate(x_TNH[t : t + 1].clone(), RopeTable(rope, 50).rows(positions_T[t : t + 1], torch.float32))
        assert torch.equal(alone[0], found[t])


@given(dims=st.integers(1, 40).map(lambda half: 2 * half), context=st.integers(1, 300))
@settings(max_examples=20, deadline=None)
def test_bytes_are_those_of_the_formula(dims, context):
    assert RopeTable(Rope(dims=dims), context).nbytes == rope_table_bytes([Rope(dims=dims)], context)


def test_lengths_decide_once_for_all():
    """Within the trained context as trained; beyond it one base for all positions, so that cached keys and new queries agree."""
    dynamic = Rope(dims=16, scaling=RopeScaling(kind="dynamic", factor=3.0, original_context=64))
    plain, _ = inverse_frequencies(Rope(dims=16), 64)
    torch.testing.assert_close(inverse_frequencies(dynamic, 64)[0], plain)
    assert (inverse_frequencies(dynamic, 128)[0][1:] < plain[1:]).all()


@pytest.mark.parametrize("scaling", [RopeScaling(kind="yarn", factor=2.0), RopeScaling(kind="longrope", original_context=4, short_factor=(1.0,))])
def test_incomplete_scalings_are_refused(scaling):
    with pytest.raises(InputError, match=r"needs original_context|are needed"):
        inverse_frequencies(Rope(dims=8, scaling=scaling), 4)
