"""What runs where is declared, resolved at build and said out loud."""

from __future__ import annotations

import pytest
import torch

from tradespace.errors import InputError, UnsupportedError
from tradespace.kernels.attention import KERNELS, Choice, choose, dispatch, make_kernels, resolve_kernels, supports
from tradespace.spec.mixers import Attention
from tradespace.spec.model import LayerSpec, ModelSpec

PLAIN = Attention(N=4, K=2, H=16)
CAPPED = Attention(N=4, K=2, H=16, logit_softcap=50.0)


def model(*mixers) -> ModelSpec:
    return ModelSpec(name="m", family="llama", D=8, V=8, layers=tuple(LayerSpec(mixer=m, ffn=None) for m in mixers), max_context=64)


def test_a_layer_that_the_request_cannot_take_gets_another_kernel_and_says_why():
    choices = resolve_kernels(model(PLAIN, CAPPED, None, PLAIN), "sdpa", torch.bfloat16)
    assert [choice.kernel for choice in choices] == ["sdpa", "chunked", None, "sdpa"]
    assert choices[1].reason is not None and "softcap" in choices[1].reason
    assert choices[0].reason is None
    first, capped, nothing, last = make_kernels(choices)
    assert first is last and nothing is None and capped is not first  # one object serves the layers that share a step


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_a_request_that_fits_is_obeyed(kernel):
    assert choose(kernel, PLAIN, torch.float32) == Choice(kernel)


@pytest.mark.parametrize(
    ("mixer", "word"),
    [(CAPPED, "softcap"), (Attention(N=4, K=2, H=16, sinks=True), "sinks"), (Attention(N=4, K=2, H=16, alibi=True), "ALiBi")],
)
def test_sdpa_declares_what_it_cannot_do(mixer, word):
    why = supports("sdpa", mixer, torch.float32)
    assert why is not None and word in why
    assert "cuda" in str(supports("sdpa", PLAIN, torch.float32, "cuda"))


def test_flash_is_for_cuda(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    choice = choose("flash", PLAIN, torch.float32)
    assert choice.kernel == "sdpa" and "CUDA" in str(choice.reason)
    assert choose("sdpa", PLAIN, torch.bfloat16, "cuda").kernel == "flash"


def test_when_nothing_fits_every_reason_is_listed():
    with pytest.raises(UnsupportedError) as caught:
        choose("sdpa", Attention(N=4, K=2, H=16, alibi=True), torch.float32)
    # the native kernel comes with its own weights and cache, flash and paged are for CUDA: they stand in for nobody here
    assert all(name in str(caught.value) for name in KERNELS if name not in ("native", "flash", "paged"))


def test_a_kernel_that_nobody_wrote_is_never_replaced(monkeypatch):
    monkeypatch.delitem(dispatch.KERNELS, "flash")
    with pytest.raises(UnsupportedError, match="flash"):
        choose("flash", PLAIN, torch.float32)
    with pytest.raises(InputError, match="unknown attention kernel"):
        choose("flesh", PLAIN, torch.float32)


def test_a_mixer_that_is_no_attention_is_refused():
    class State:
        cache_elements_per_token, state_bytes_per_sequence, window = 0, 64, None

        def tensors(self, D: int):
            return ()

    with pytest.raises(UnsupportedError, match="State"):
        resolve_kernels(model(PLAIN, State()), "sdpa", torch.float32)
