"""What surrounds products and attention in a step on the device: norms, rotation and cache writes, activations, sampling. Under Triton's interpreter here."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tradespace.kernels.activation import reference as activations
from tradespace.kernels.norm import reference as norms
from tradespace.kernels.rope import RopeTable, rotate
from tradespace.kernels.sample.noise import noise_key
from tradespace.kernels.sample.reference import TorchSampling
from tradespace.kv.store.dense import Dense
from tradespace.kv.store.fp8 import Fp8
from tradespace.kv.store.int8 import Int8
from tradespace.spec.mixers import Attention, Rope

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter (conftest.py sets TRITON_INTERPRET=1)")
torch.set_num_threads(1)

from tradespace.kernels.activation.triton_gated import gated  # noqa: E402
from tradespace.kernels.attention.paged import Planes  # noqa: E402
from tradespace.kernels.norm.triton_add_norm import add_norm  # noqa: E402
from tradespace.kernels.rope.triton_write import rope_write  # noqa: E402
from tradespace.kernels.sample.triton_sample import DeviceSampling  # noqa: E402

CODECS = {"fp32": Dense(torch.float32), "bf16": Dense(torch.bfloat16), "int8": Int8(), "fp8": Fp8()}


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_a_sum(kind, dtype):
    gen = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(5, 100, generator=gen).to(dtype) for _ in range(2))
    weight, bias = torch.randn(100, generator=gen), torch.randn(100, generator=gen)
    function = norms.rms_norm if kind == "rms" else norms.layer_norm
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 2e-2}
    out = torch.empty_like(x)
    torch.testing.assert_close(add_norm(x, weight, None, 1e-5, kind, out_TD=out), function(x, weight, None, 1e-5), **tolerance)
    summed = residual.clone()
    add_norm(x, weight, bias, 1e-5, kind, out_TD=out, residual_TD=summed)
    torch.testing.assert_close(summed.float(), x.float() + residual.float(), atol=1e-6 if dtype == torch.float32 else 4e-2, rtol=1e-2)
    torch.testing.assert_close(out, function(summed, weight, bias, 1e-5), **tolerance)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_gated_activation(name):
    x = torch.randn(3, 2 * 70, generator=torch.Generator().manual_seed(2)) * 4
    torch.testing.assert_close(gated(x, name, torch.empty(3, 70)), activations.activate(x, name, True), atol=2e-5, rtol=1e-5)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    mixer=st.sampled_from(
        [
            Attention(N=4, K=2, H=32, rope=Rope(dims=32)),
            Attention(N=2, K=1, H=24, value_H=16, rope=Rope(dims=16, interleaved=True)),
            Attention(N=2, K=1, H=40, rope=Rope(dims=20)),
            Attention(N=3, K=3, H=16),
        ]
    ),
    store=st.sampled_from(list(CODECS)),
    headed=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_rotation_and_cache_writes(mixer, store, headed, seed):
    """q rotated; keys and values as their store's codec would hold them, in their slots and nowhere else; slot -1 writes nothing."""
    gen = torch.Generator().manual_seed(seed)
    widths = [mixer.N * mixer.H, mixer.K * mixer.H, mixer.K * mixer.Hv]
    qkv = torch.randn(4, sum(widths), generator=gen)
    positions, slots = torch.tensor([0, 17, 3, 99]), torch.tensor([3, 0, -1, 7])
    table = RopeTable(mixer.rope, 128) if mixer.rope else None
    q_norm, k_norm = (torch.rand(mixer.H, generator=gen) + 0.5 for _ in range(2))
    codec = CODECS[store]
    held = [codec.allocate(9, mixer.K, width, "cpu") for width in (mixer.H, mixer.Hv)]
    scales = [planes[1][..., 0] if store == "int8" else None for planes in held]
    planes = Planes(keys=held[0][0], values=held[1][0], key_scales=scales[0], value_scales=scales[1], store=store, block_size=3)
    out = torch.empty(4, mixer.N, mixer.H)
    given_norms = {"q_norm_H": q_norm, "k_norm_H": k_norm, "eps": 1e-6} if headed else {}
    rotated = torch.empty(4, mixer.K, mixer.H)
    rope_write(qkv, None if table is None else table.table_SH2, positions, slots, planes, out, mixer, k_out_TKH=rotated, **given_norms)
    q, k, v = (part.view(4, heads, -1) for part, heads in zip(qkv.split(widths, dim=1), (mixer.N, mixer.K, mixer.K), strict=True))
    if headed:
        q, k = norms.rms_norm(q, q_norm, None, 1e-6), norms.rms_norm(k, k_norm, None, 1e-6)
    if table is not None:
        rows = table.rows(positions, torch.float32)
        q, k = rotate(q, rows), rotate(k, rows)
    torch.testing.assert_close(out, q, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotated, k, atol=1e-5, rtol=1e-5)
    there = slots >= 0
    for parts, x, width in ((held[0], k, mixer.H), (held[1], v, mixer.Hv)):
        for part, expected in zip(parts, codec.encode(x.reshape(-1, width)), strict=True):
            expected = expected.view(4, mixer.K, -1)[there]
            found = part[slots[there]]
            if expected.dtype.is_floating_point:
                torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-2 if store == "bf16" else 1e-3)
            else:  # a sum that rounds otherwise in its last bit may tip a code
                assert float((found != expected).float().mean()) < 0.02
        assert not parts[0][torch.tensor([1, 2, 4, 5, 6, 8])].any()


@dataclass
class Shape:
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


SHAPES = [
    Shape(0.0),
    Shape(1.0),
    Shape(0.7, top_k=5),
    Shape(1.3, top_p=0.8),
    Shape(1.0, top_k=40, top_p=0.9),
    Shape(0.5, min_p=0.1),
    Shape(1.0, 10**6, 0.3, 0.05),
]


@pytest.mark.parametrize("V", [40, 2500])
def test_draws_are_those_of_the_reference(V):
    gen = torch.Generator().manual_seed(V)
    logits = torch.randn(len(SHAPES), V, generator=gen) * 3
    logits[4] = logits[4].round()  # many ties at the limit
    keys = [(5 * row + 3 - (2**62 if row == 1 else 0), row, 100 + row) for row in range(len(SHAPES))]
    expected = TorchSampling().draw(logits, range(len(SHAPES)), SHAPES, [noise_key(*key) for key in keys])
    device = DeviceSampling("cpu", len(SHAPES), V)
    tokens = device.draw(
        logits,
        torch.full((len(SHAPES),), -7),
        temperature_R=torch.tensor([shape.temperature for shape in SHAPES]),
        top_k_R=torch.tensor([shape.top_k for shape in SHAPES], dtype=torch.int32),
        top_p_R=torch.tensor([shape.top_p for shape in SHAPES]),
        min_p_R=torch.tensor([shape.min_p for shape in SHAPES]),
        key_R=torch.tensor([noise_key(*key) for key in keys]),
    )
    assert tokens.tolist() == expected


def test_greedy_takes_the_first_of_ties_and_says_what_is_no_number():
    logits = torch.randn(4, 2500, generator=torch.Generator().manual_seed(3))
    logits[0, 10] = logits[0, 2400] = 9.0
    logits[1, 5], logits[2, 7], logits[3] = float("nan"), float("inf"), float("-inf")
    device = DeviceSampling("cpu", 4, 3000)
    assert device.greedy(logits, torch.zeros(4, dtype=torch.int64)).tolist() == [10, -1, -1, -1]
