"""The ways to compute attention that the experiment compares, one head, causal, each with the bytes that it holds beyond q, k, v and the output.

`whole` and `blocked` are the textbook's: the matrix of scores written out, and rows of it √n at a time. The others are the engine's kernels and torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tradespace.kernels.attention import chunked, native
from tradespace.kernels.view import PackedView, StepBatch
from tradespace.spec.mixers import Attention
from tradespace.spec.native import SLOTS_PER_THREAD, partial_floats

H = 64
MIXER = Attention(N=1, K=1, H=H)
Attends = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (n, H) → out (n, H)


def rows_of_scores(q_TH: Tensor, k_SH: Tensor, v_SH: Tensor, first: int) -> Tensor:
    """Queries at first … over the keys up to the last of them, in one matrix and in place: what a careful program without tiles holds."""
    stop = first + q_TH.shape[0]
    scores_TS = torch.mm(q_TH, k_SH[:stop].T).mul_(H**-0.5)
    for start in range(0, stop - first, 512):  # the future, a few rows at a time, so that the mask costs no matrix of its own
        rows = scores_TS[start : start + 512]
        hidden = torch.arange(first, stop)[None, :] > torch.arange(first + start, first + start + rows.shape[0])[:, None]
        rows[:, first:].masked_fill_(hidden, float("-inf"))
    scores_TS.sub_(scores_TS.amax(dim=1, keepdim=True)).exp_()
    total_T1 = scores_TS.sum(dim=1, keepdim=True)
    return torch.mm(scores_TS, v_SH[:stop]).div_(total_T1)


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All n² scores at once."""
    return rows_of_scores(q, k, v, 0)


def blocked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """√n blocks of √n queries, each over all its keys: n^1.5 scores at once."""
    size, out = max(1, isqrt(q.shape[0])), torch.empty_like(v)
    for first in range(0, q.shape[0], size):
        out[first : first + size] = rows_of_scores(q[first : first + size], k, v, first)
    return out


def rabe_staats(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The engine's chunked kernel: 64 queries by √n keys at once, an online softmax."""
    batch = StepBatch.packed([q.shape[0]])
    return chunked.attend(q[:, None], PackedView(k[:, None], v[:, None]), batch, MIXER, queries=64)[:, 0]


def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's flash attention on the CPU: tiles of both, and a log-sum per query."""
    return scaled_dot_product_attention(q[None, None], k[None, None], v[None, None], is_causal=True)[0, 0]


def paged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The engine's C++ kernel over tiles of 16 keys, which are copied together first."""
    return native.attend(q[:, None], PackedView(k[:, None], v[:, None]), StepBatch.packed([q.shape[0]]), MIXER)[:, 0]


def paged_bytes(n: int) -> int:
    """What the native kernel is given beside queries, cache and output: partial results for each thread, whatever the length."""
    return torch.get_num_threads() * SLOTS_PER_THREAD * partial_floats(H) * 4


@dataclass(frozen=True, kw_only=True)
class Kind:
    """`growth`: the power of n in which its bytes should grow; `counted`: bytes stated by the kernel instead of read off torch's record of allocations."""

    name: str
    attend: Attends
    growth: float
    idea: str
    counted: Callable[[int], int] | None = None


KINDS: tuple[Kind, ...] = (
    Kind(name="whole matrix", attend=whole, growth=2.0, idea="n² scores"),
    Kind(name="blocked on one side", attend=blocked, growth=1.5, idea="√n queries × n keys"),
    Kind(name="chunked", attend=rabe_staats, growth=0.5, idea="64 queries × √n keys (Rabe–Staats)"),
    Kind(name="flash (torch, CPU)", attend=tiled, growth=1.0, idea="fixed tiles; one log-sum per query"),
    Kind(name="native (C++, paged)", attend=paged, growth=0.0, idea="fixed tiles; no log-sums: forward only", counted=paged_bytes),
)


def peak_bytes(run: Callable[[], Tensor]) -> int:
    """Most bytes alive at once that `run` allocated through torch, the output left out; temporaries inside operators are included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # pyright: ignore[reportOptionalMemberAccess]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, live)
    return peak - out.numel() * out.element_size()
