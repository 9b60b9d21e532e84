"""Every attention kernel against the definition (an fp64 oracle of our own and transformers' eager attention), over drawn shapes, patterns and both layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conformance.attention_cases import LAYOUTS, Case, make_case, mixers, model_of, oracle, sequences
from tradespace.kernels.attention import KERNELS, supports
from tradespace.kernels.attention.dispatch import _SUPPORTS
from tradespace.kernels.view import PackedView, StepBatch
from tradespace.spec import attention as spec
from tradespace.spec.mixers import Attention

torch.set_num_threads(1)
# flash has shapes of its own (test_triton_flash.py): under the interpreter these would take minutes
COMPILED = [name for name in KERNELS if name != "flash"]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def run(name: str, case: Case, mixer: Attention) -> torch.Tensor:
    with torch.inference_mode():
        return KERNELS[name]()(case.q_TNH, case.cache.view(0), case.batch, mixer, case.sinks_N)


def assert_close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert out.shape == expected.shape
    assert out.dtype == dtype
    assert bool(out.isfinite().all())
    if out.numel():
        scale = max(1.0, float(expected.abs().max()))
        worst = float((out.double() - expected).abs().max())
        assert worst <= TOLERANCE[dtype] * scale, f"{worst} from the definition; values up to {scale}"


@pytest.mark.parametrize("kernel", COMPILED)
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(mixer=mixers(), cuts=sequences, dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 10**6))
def test_kernel_matches_the_definition(kernel, layout, mixer, cuts, dtype, seed):
    if supports(kernel, mixer, dtype) is not None:
        mixer = Attention(N=mixer.N, K=mixer.K, H=mixer.H, value_H=mixer.value_H, window=mixer.window, chunked=mixer.chunked, scale=mixer.scale)
    assert supports(kernel, mixer, dtype) is None
    case = make_case(mixer, cuts, layout, dtype, seed)
    assert_close(run(kernel, case, mixer), oracle(case, mixer), dtype)


@pytest.mark.parametrize("kernel", COMPILED)
@settings(max_examples=15, deadline=None)
@given(mixer=mixers(softcap=False, sinks=False), lengths=st.lists(st.sampled_from([1, 2, 9, 64, 129, 300]), max_size=4), seed=st.integers(0, 10**6))
def test_packed_documents_without_a_cache(kernel, mixer, lengths, seed):
    assume(supports(kernel, mixer, torch.float32) is None)
    case = make_case(mixer, [(0, length) for length in lengths], "paged", torch.float32, seed)
    empty = torch.zeros((0, mixer.K, mixer.H)), torch.zeros((0, mixer.K, mixer.Hv))
    view = PackedView(torch.cat([empty[0], *case.keys]), torch.cat([empty[1], *case.values]))
    out = KERNELS[kernel]()(case.q_TNH, view, StepBatch.packed(lengths), mixer)
    assert_close(out, oracle(case, mixer), torch.float32)


def test_many_sequences_of_like_and_unlike_lengths_share_calls():
    """64 sequences decode, drafts of 4 among them, beside a prefill: groups, padding, odd rows. Every layer of a step reuses what the first prepared."""
    cuts = [(before, 4 if i % 5 == 0 else 1) for i, before in enumerate([*range(1, 60), 400, 90, 700, 90, 3])]
    cuts.insert(7, (20, 150))
    mixer = Attention(N=6, K=2, H=16)
    case = make_case(mixer, cuts, "paged", torch.float32, 1)
    sdpa = KERNELS["sdpa"]()
    for _ in range(2):
        assert_close(sdpa(case.q_TNH, case.cache.view(0), case.batch, mixer), oracle(case, mixer), torch.float32)
    other = make_case(mixer, [(9, 1), (3, 1)], "contiguous", torch.float32, 2)  # another cache, the next step
    assert_close(sdpa(other.q_TNH, other.cache.view(0), other.batch, mixer), oracle(other, mixer), torch.float32)


def test_one_kernel_object_serves_layers_of_different_patterns():
    """Gemma's alternation: a window in one layer, none in the next, the same step and object."""
    wide, narrow = Attention(N=4, K=2, H=16), Attention(N=4, K=2, H=16, window=5)
    case = make_case(wide, [(30, 1), (40, 3), (0, 50)], "paged", torch.float32, 3)
    sdpa = KERNELS["sdpa"]()
    for mixer in (wide, narrow, wide, narrow):
        assert_close(sdpa(case.q_TNH, case.cache.view(0), case.batch, mixer), oracle(case, mixer), torch.float32)


@pytest.mark.parametrize("kernel", ["chunked", "reference"])
@pytest.mark.parametrize(("softcap", "window"), [(50.0, None), (20.0, 6), (None, 6)])
def test_against_transformers(kernel, softcap, window):
    """Gemma 2's eager attention, with its own mask."""
    gemma2 = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    mixer = Attention(N=4, K=2, H=16, scale=0.2, logit_softcap=softcap, window=window)
    case = make_case(mixer, [(11, 9)], "paged", torch.float32, 5)
    positions = torch.arange(20)
    hidden = positions[None, :] > positions[11:, None]
    if window is not None:
        hidden |= positions[None, :] <= positions[11:, None] - window
    mask = torch.zeros(1, 1, 9, 20).masked_fill(hidden, torch.finfo(torch.float32).min)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    heads = [x.transpose(0, 1)[None] for x in (case.q_TNH, case.keys[0], case.values[0])]
    expected, _ = gemma2.eager_attention_forward(module.eval(), *heads, mask, scaling=0.2, softcap=softcap)
    torch.testing.assert_close(run(kernel, case, mixer), expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["chunked", "sdpa"])
@settings(max_examples=10, deadline=None)
@given(mixer=mixers(), seed=st.integers(0, 10**6))
def test_gradients_match_the_reference(kernel, mixer, seed):
    if supports(kernel, mixer, torch.float32) is not None:
        mixer = Attention(N=mixer.N, K=mixer.K, H=mixer.H, value_H=mixer.value_H, window=mixer.window, chunked=mixer.chunked)
    lengths, found = [1, 40, 140], []
    batch = StepBatch.packed(lengths)
    for name in ("reference", kernel):
        gen = torch.Generator().manual_seed(seed)
        q, k, v, sinks, weight = (
            torch.randn(shape, generator=gen)
            for shape in ((181, mixer.N, mixer.H), (181, mixer.K, mixer.H), (181, mixer.K, mixer.Hv), (mixer.N,), (181, mixer.N, mixer.Hv))
        )
        leaves = [x.requires_grad_() for x in (q, k, v, sinks)][: 4 if mixer.sinks else 3]
        out = KERNELS[name]()(q, PackedView(k, v), batch, mixer, sinks if mixer.sinks else None)
        found.append(torch.autograd.grad((out * weight).sum(), leaves))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_the_tables_agree():
    runs = {name for name, kernel in spec.KERNELS.items() if kernel.runs_since is not None}
    assert runs == set(KERNELS) == set(_SUPPORTS)


def test_an_empty_step():
    mixer = Attention(N=2, K=1, H=8)
    for kernel in KERNELS:
        out = KERNELS[kernel]()(torch.zeros(0, 2, 8), PackedView(torch.zeros(0, 1, 8), torch.zeros(0, 1, 8)), StepBatch.packed([]), mixer)
        assert out.shape == (0, 2, 8)
    assert model_of(mixer).L == 1
