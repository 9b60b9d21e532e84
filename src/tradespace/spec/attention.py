"""Attention kernels: what each one holds beside q, k, v and the output, and whether it runs. All are exact for the patterns that they take.

Implementations: `kernels/attention/<name>.py`; `reference.py` there is the specification.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

from tradespace.errors import InputError
from tradespace.spec.mixers import Attention
from tradespace.spec.paged import mixer_refusal


@dataclass(frozen=True, kw_only=True)
class AttentionKernel:
    """`memory` is the growth of the transient in the key length n; `idea` names the source."""

    name: str
    memory: str
    runs_since: str | None
    idea: str


KERNELS: dict[str, AttentionKernel] = {
    kernel.name: kernel
    for kernel in (
        AttentionKernel(name="reference", memory="O(T·n)", runs_since="0.1", idea="scores written out in fp32, fixed tiles: bit for bit whatever the batch"),
        AttentionKernel(name="chunked", memory="O(T·√n)", runs_since="0.1", idea="online softmax over blocks of keys, √n by default; arXiv:2112.05682"),
        AttentionKernel(name="sdpa", memory="O(T + n)", runs_since="0.1", idea="torch's fused kernel"),
        AttentionKernel(
            name="native", memory="O(T)", runs_since="0.2", idea="C++, online softmax over the cache's own pages, split over keys; arXiv:2311.01282"
        ),
        AttentionKernel(
            name="paged", memory="O(T)", runs_since="0.3", idea="Triton, over the cache's own pages, split over keys; arXiv:2309.06180, 2311.01282"
        ),
        AttentionKernel(name="flash", memory="O(T)", runs_since="0.2", idea="tiles in SRAM, forward and backward, Triton; arXiv:2205.14135, 2307.08691"),
    )
}

FLASH_WIDTH = 256  # a wider head's tiles do not fit beside each other


def find_kernel(name: str) -> AttentionKernel:
    if name not in KERNELS:
        raise InputError(f"unknown attention kernel '{name}'. Known: {', '.join(KERNELS)}")
    return KERNELS[name]


def refusal(kernel: str, mixer: Attention) -> str | None:
    """Why `kernel` cannot compute such a layer, whatever the device and the dtype; None: it can. Both the planner and the kernels ask here."""
    if kernel == "sdpa" and mixer.logit_softcap is not None:
        return "torch's fused attention cannot cap the scores (logit_softcap)"
    if kernel == "sdpa" and mixer.sinks:
        return "torch's fused attention has no learned sinks"
    if kernel in ("sdpa", "native") and mixer.pattern is not None:
        held = "would need a mask of n² elements" if kernel == "sdpa" else "knows causal attention and windows only"
        return f"{kernel} {held}: no {mixer.pattern.kind} pattern"
    if kernel == "flash" and max(mixer.H, mixer.Hv) > FLASH_WIDTH:
        return f"flash takes heads of up to {FLASH_WIDTH}, not {max(mixer.H, mixer.Hv)}"
    if kernel == "flash" and mixer.softmax_scale <= 0:
        return f"flash takes a positive scale of the scores, not {mixer.softmax_scale}"
    if kernel == "flash" and mixer.chunked and mixer.pattern is not None and mixer.pattern.kind == "sliding":
        return "flash knows one kind of window at a time: chunks or a sliding pattern"
    if kernel == "paged":
        return mixer_refusal(mixer)
    return f"{kernel} has no linear position biases (ALiBi)" if mixer.alibi else None


def weights_refusal(kernel: str) -> str | None:
    """Why `kernel` cannot serve a cache that evicts by attention weights; None: it returns them."""
    return None if kernel in ("reference", "chunked") else f"{kernel} does not return the attention weights that the cache's retention chooses by"


def chunk_size(num_keys: int) -> int:
    """√n keys per block, rounded up: the block that balances what is held against how many partial results are kept (arXiv:2112.05682).

    >>> chunk_size(1), chunk_size(1024), chunk_size(1025)
    (1, 32, 33)
    """
    root = isqrt(num_keys)
    return max(1, root if root * root == num_keys else root + 1)


def score_matrix_bytes(num_queries: int, num_keys: int, element_bytes: int = 4) -> int:
    """Bytes of one head's full score matrix, which only the reference writes out.

    >>> score_matrix_bytes(32768, 32768)
    4294967296
    """
    return num_queries * num_keys * element_bytes
