"""Sampling noise from a counter: what is drawn depends on (seed, sample, position, token) and on nothing else.

Gumbel-max: argmax of logit + g, with g = -log(-log u) drawn for each token, is a draw from the softmax. Because every token has its own number, a request's
draws do not change with its neighbours, with preemption or with the set of candidates, and two models that draw with the same numbers mostly draw the same
token, which is what makes a drafted token likely to be accepted.

u comes from SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): the request's key is the generator's state, the token id its counter. 52 bits of u, in float64: a
token of probability 1e-15 is still drawn as often as it should be.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK64 = 2**64 - 1


def mix64(state: int) -> int:
    """SplitMix64's output function on the host."""
    state = ((state ^ (state >> 30)) * FIRST) & MASK64
    state = ((state ^ (state >> 27)) * SECOND) & MASK64
    return state ^ (state >> 31)


def noise_key(seed: int, sample: int, position: int) -> int:
    """The 64-bit generator state for the token at `position` of a sequence, as a signed integer that fits an int64 tensor."""
    state = mix64((seed + GOLDEN) & MASK64)
    state = mix64((state ^ sample) + GOLDEN & MASK64)
    return _signed(mix64((state ^ position) + GOLDEN & MASK64))


def gumbel(keys: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, for int64 `keys` and int64 token ids that broadcast with them."""
    state = (tokens + 1) * _signed(GOLDEN) + keys  # int64 arithmetic wraps, which is what SplitMix64 is defined by
    scratch = torch.empty_like(state)
    for shift, factor in ((30, FIRST), (27, SECOND)):
        _xor_shifted_(state, shift, scratch)
        state *= _signed(factor)
    _xor_shifted_(state, 31, scratch)
    # the upper 52 bits; half a step more keeps u off 0 and 1
    torch.bitwise_right_shift(state, 12, out=scratch)
    scratch &= 2**52 - 1
    del state
    uniform = scratch.to(torch.float64).add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_()


def _xor_shifted_(state: Tensor, shift: int, scratch: Tensor) -> None:
    """state ^= state >>> shift; torch shifts arithmetically, so the sign's copies are masked off."""
    torch.bitwise_right_shift(state, shift, out=scratch)
    scratch &= 2 ** (64 - shift) - 1
    state ^= scratch


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
