"""Tokens that the host does not know yet: taken from where the last step left them on the device (Triton)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tradespace.kernels.triton_launch import ceil_div, launch

TOKENS = 128


@triton.jit
def resolve_kernel(tokens, sources, chosen, count, N: tl.constexpr):
    """One program per N tokens."""
    index = tl.program_id(0) * N + tl.arange(0, N)
    source = tl.load(sources + index, mask=index < count, other=-1)
    found = tl.load(chosen + source, mask=source >= 0, other=0)
    tl.store(tokens + index, found, mask=source >= 0)


def resolve(tokens_T: Tensor, sources_T: Tensor, chosen_R: Tensor) -> None:
    """tokens_T = chosen_R[sources_T] where a source is no less than 0; the others stay. All int64."""
    if len(tokens_T):
        launch(resolve_kernel, (ceil_div(len(tokens_T), TOKENS),), tokens_T, tokens_T, sources_T, chosen_R, len(tokens_T), N=TOKENS, num_warps=1)
