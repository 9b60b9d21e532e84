"""Attention of whole prompts on a CUDA device, through torch's fused kernels: cuDNN's, or FlashAttention-2 where that cannot take the shape.

They are faster than ours over a paged cache where a step holds a few long prompts from their first token on; they know no pages. One call for each run of
prompts of the same length. cuDNN plans each shape anew, and nobody gets a token meanwhile (PyTorch's pull request 155958 is about that): a shape goes there
when it comes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tradespace.spec.cuda import WHOLE_PROMPT_TOKENS
from tradespace.spec.mixers import Attention

MOST_RUNS = 8


def runs_of(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(length, how many follow each other).

    >>> runs_of((512, 512, 700, 512))
    [(512, 2), (700, 1), (512, 1)]
    """
    return [(length, sum(1 for _ in run)) for length, run in groupby(lengths)]


class RecurringPrompts:
    """Which runs of prompts have come before."""

    def __init__(self) -> None:
        self._met: set[tuple[int, int]] = set()

    def expect(self, lengths: Sequence[int]) -> None:
        """From now on these have come before."""
        if lengths and min(lengths) >= WHOLE_PROMPT_TOKENS:
            self._met.update(runs_of(lengths))

    def of(self, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """`lengths`, where all of their runs have come before; else none. They have now.

        >>> prompts = RecurringPrompts()
        >>> prompts.of((700, 700)), prompts.of((700, 700)), prompts.of((700,)), prompts.of((700, 700, 800))
        ((), (700, 700), (), ())
        """
        known = self._met.issuperset(runs_of(lengths))
        self.expect(lengths)
        return lengths if known else ()


def fused_prefill(mixer: Attention, lengths: tuple[int, ...], sinks_N: Tensor | None) -> bool:
    """Whether a step of whole prompts of these lengths does better here."""
    plain = mixer.logit_softcap is None and sinks_N is None and mixer.pattern is None and mixer.Hv == mixer.H and mixer.H <= 128 and mixer.H % 8 == 0
    if not plain or not lengths or min(lengths) < WHOLE_PROMPT_TOKENS or len(runs_of(lengths)) > MOST_RUNS:
        return False
    return mixer.window is None or max(lengths) <= mixer.window


def prefill(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, lengths: tuple[int, ...], mixer: Attention, out_TNHv: Tensor) -> Tensor:
    """Each prompt's queries over its own keys and values, causally: in `out_TNHv`, or, where one call does all, as it leaves them (in one piece)."""
    start = 0
    for length, count in runs_of(lengths):
        rows = slice(start, start + count * length)
        q, k, v = (x[rows].unflatten(0, (count, length)).transpose(1, 2) for x in (q_TNH, k_TKH, v_TKH))
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            found = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=mixer.softmax_scale, enable_gqa=mixer.G > 1)
        found_BSNHv = found.transpose(1, 2)
        if rows == slice(0, len(q_TNH)) and found_BSNHv.is_contiguous():
            return found_BSNHv.flatten(0, 1)
        out_TNHv[rows].unflatten(0, (count, length)).copy_(found_BSNHv)
        start = rows.stop
    return out_TNHv
