"""Flash attention, forward and backward, against the reference: under Triton's interpreter here, compiled on a machine with CUDA (`lab/flash_device.py`)."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conformance.attention_cases import make_case
from conformance.test_attention_workspace import peak_bytes
from tradespace.kernels.attention import reference, supports, triton_flash, triton_flash_layout
from tradespace.kernels.attention.triton_flash_layout import lay_out
from tradespace.kernels.attention.triton_flash_tiles import PHASES, Tiles, find_tiles
from tradespace.kernels.view import PackedView, StepBatch
from tradespace.spec import attention_workspace
from tradespace.spec.attention_pattern import BlockSparse, Documents, Prefix, Selected, Sliding
from tradespace.spec.attention_workspace import key_bytes, workspace_bytes
from tradespace.spec.mixers import Attention

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter (conftest.py sets TRITON_INTERPRET=1)")
torch.set_num_threads(1)

PATTERNS = [
    None,
    Sliding(window=9),
    BlockSparse(block=16, local=1, leading=1, random=1),
    Prefix(length=37),
    Documents(boundaries=(5, 33)),
    Selected(block=16, share=0.3),
]


@st.composite
def mixers(draw) -> Attention:
    K, G = draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    pattern = draw(st.sampled_from(PATTERNS))
    window = draw(st.sampled_from([None, None, 1, 7, 40]))
    return Attention(
        N=G * K,
        K=K,
        H=draw(st.sampled_from([16, 24, 64, 96, 256])),
        value_H=draw(st.sampled_from([None, None, 8, 40])),
        window=window,
        chunked=window is not None and not isinstance(pattern, Sliding) and draw(st.booleans()),
        pattern=pattern,
        scale=draw(st.sampled_from([None, 0.3])),
        logit_softcap=draw(st.sampled_from([None, 4.0])),
        sinks=draw(st.booleans()),
    )


def both(mixer: Attention, lengths: list[int], dtype: torch.dtype, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(flash's, reference's) output and gradients. The reference reads the same values in fp32."""
    gen = torch.Generator().manual_seed(seed)
    T, found = sum(lengths), []
    shapes = [(T, mixer.N, mixer.H), (T, mixer.K, mixer.H), (T, mixer.K, mixer.Hv), *([(mixer.N,)] if mixer.sinks else [])]
    leaves = [torch.randn(shape, generator=gen).to(dtype) for shape in shapes]
    weight = torch.randn((T, mixer.N, mixer.Hv), generator=gen).to(dtype)
    for kernel, held in ((triton_flash.attend, dtype), (reference.attend, torch.float32)):
        own = [leaf.to(held).requires_grad_() for leaf in leaves]
        out = kernel(own[0], PackedView(own[1], own[2]), StepBatch.packed(lengths), mixer, own[3] if mixer.sinks else None)
        found.append([out.detach(), *torch.autograd.grad((out * weight.to(held)).sum(), own)])
    return list(zip(*found, strict=True))


def assert_close(pairs: list[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype) -> None:
    """fp32 within 1e-4 of the largest value. bf16 within 1e-2 in the root of the mean square: rounding makes single values differ by more."""
    for name, (got, expected) in zip(("output", "dq", "dk", "dv", "dsinks"), pairs, strict=False):
        assert got.dtype == dtype and bool(got.isfinite().all()), name
        size = torch.linalg.vector_norm(expected)
        difference = torch.linalg.vector_norm(got.float() - expected) / size.clamp(min=1e-2 * expected.numel() ** 0.5)
        assert float(difference) <= (1e-4 if dtype == torch.float32 else 1e-2), f"{name}: {float(difference)}"


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(mixer=mixers(), lengths=st.sampled_from([[40], [33, 1], [17, 20]]), seed=st.integers(0, 10**6))
def test_forward_and_backward_match_the_reference(mixer, lengths, seed):
    assert supports("flash", mixer, torch.float32) is None
    assert_close(both(mixer, lengths, torch.float32, seed), torch.float32)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_in_both_dtypes(pattern):
    mixer = Attention(N=2, K=1, H=32, pattern=pattern)
    for dtype in (torch.float32, torch.bfloat16):
        assert_close(both(mixer, [41, 30], dtype, 3), dtype)


@pytest.mark.parametrize("pattern", [*PATTERNS[:3], *PATTERNS[4:]])
def test_steps_over_a_paged_cache(pattern):
    """Decode, later chunks of a prefill and short sequences in one ragged step."""
    mixer = Attention(N=2, K=1, H=16, pattern=pattern, window=None if pattern else 20)
    case = make_case(mixer, [(40, 1), (16, 20), (0, 9), (7, 0), (33, 3)], "paged", torch.float32, 1)
    out, expected = (kernel(case.q_TNH, case.cache.view(0), case.batch, mixer) for kernel in (triton_flash.attend, reference.attend))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_sequences_are_copied_together_a_few_at_a_time(monkeypatch):
    """The copy is what the ledger books, and the output does not depend on who is computed with whom."""
    mixer = Attention(N=2, K=1, H=16)
    case = make_case(mixer, [(70, 1), (20, 3), (30, 1), (0, 0), (0, 9), (25, 2)], "paged", torch.float32, 4)
    whole = triton_flash.attend(case.q_TNH, case.cache.view(0), case.batch, mixer)
    most = 64 * key_bytes(mixer, 4)
    monkeypatch.setattr(triton_flash_layout, "GATHER_BYTES", most)
    monkeypatch.setattr(attention_workspace, "GATHER_BYTES", most)
    view = case.cache.view(0)
    together = triton_flash_layout.groups(view, case.batch, mixer, 4)
    assert [[span.length for span in spans] for spans in together] == [[71], [23, 31, 9], [27]]
    sizes: dict[str, Any] = {"step_tokens": 16, "max_context": 71, "max_sequences": 6, "kv_tokens": 161, "element_bytes": 4, "threads": 1}
    booked = workspace_bytes("flash", mixer, **sizes, copies=True) - workspace_bytes("flash", mixer, **(sizes | {"kv_tokens": 0}), copies=False)
    held = max(peak_bytes(lambda spans=spans: triton_flash_layout.pack(view, spans)) for spans in together)
    assert 0 < held <= booked + 8 * 161  # rows to gather, int64
    torch.testing.assert_close(triton_flash.attend(case.q_TNH, view, case.batch, mixer), whole, atol=1e-6, rtol=1e-5)


def test_a_prefix_longer_than_its_sequence_and_a_decode_after_it():
    mixer = Attention(N=2, K=1, H=16, pattern=Prefix(length=40))
    case = make_case(mixer, [(0, 60), (0, 11), (50, 1)], "paged", torch.float32, 2)
    out, expected = (kernel(case.q_TNH, case.cache.view(0), case.batch, mixer) for kernel in (triton_flash.attend, reference.attend))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_descriptors_give_what_pointers_give():
    """The path through the tensor memory accelerator, whose boxes reach past a sequence's end into the next one."""
    mixer = Attention(N=2, K=1, H=16)
    lengths, gen = [20, 45], torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((65, heads, 16), generator=gen) for heads in (2, 1, 1))
    batch = StepBatch.packed(lengths)
    found = []
    for tma in (False, True):
        tiles = {phase: Tiles(M=16, N=16, tma=tma) for phase in PHASES}
        own = [x.clone().requires_grad_() for x in (q, k, v)]
        out = triton_flash.flash(*own, lay_out(q, k, (0, 20), batch.spans, mixer), mixer, None, tiles)
        found.append([out, *torch.autograd.grad(out.square().sum(), own)])
    for pointers, boxes in zip(*found, strict=True):
        torch.testing.assert_close(boxes, pointers, atol=1e-6, rtol=1e-6)


def test_gradients_are_the_same_bits_every_time():
    mixer = Attention(N=2, K=1, H=16)
    first, second = both(mixer, [30], torch.float32, 5), both(mixer, [30], torch.float32, 5)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))


def test_what_it_cannot_take_is_said():
    plain = Attention(N=2, K=1, H=16)
    assert "256" in str(supports("flash", replace(plain, H=320), torch.float32))
    assert "ALiBi" in str(supports("flash", replace(plain, alibi=True), torch.float32))
    assert "positive" in str(supports("flash", replace(plain, scale=-1.0), torch.float32))
    assert "float64" in str(supports("flash", plain, torch.float64))


def test_tiles_are_data_for_every_width_and_block():
    for phase in PHASES:
        for width in (16, 32, 64, 128, 256):
            tiles = find_tiles(phase, width, torch.bfloat16, torch.device("cpu"), block=16)
            assert tiles.M == tiles.N == 16


def test_memory_beside_the_output_is_linear_in_the_length():
    """The planner's formula: doubling the tokens doubles it, and it is one number per query and head (the device's own count is in results/flash.json)."""
    mixer = Attention(N=8, K=2, H=128)

    def beside(n: int) -> int:
        whole = workspace_bytes("flash", mixer, step_tokens=n, max_context=n, max_sequences=1, kv_tokens=n, element_bytes=2, copies=False, threads=1)
        return whole - n * mixer.N * mixer.Hv * 2

    assert beside(8192) - beside(4096) == 4096 * mixer.N * 4
