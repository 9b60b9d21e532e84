"""One token of one sequence on Hopper cards and later ones: rotation, cache write and attention in one kernel, `one_query.cu`, which says how.

Same meaning as `rope/triton_write.py` and then `paged_decode`. For contexts that eight blocks of threads a key-value head read soon enough
(`spec.cuda.one_query_context`); what it does not take goes the other way (`takes`).
"""

from __future__ import annotations

import ctypes
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from tradespace.kernels.attention.paged import Planes
from tradespace.kernels.cuda_module import Function, find_kernel
from tradespace.spec.attention_pattern import Causal, Sliding
from tradespace.spec.cuda import ONE_QUERY_BYTES, ONE_QUERY_CONTEXT, padded_heads
from tradespace.spec.cuda import ONE_QUERY_RANKS as RANKS
from tradespace.spec.cuda import ONE_QUERY_TILE as TILE
from tradespace.spec.mixers import Attention

SOURCE = Path(__file__).with_name("one_query.cu")
SHAPES = ((1, 64), (2, 64), (3, 64), (4, 64), (8, 64), (1, 128), (2, 128), (4, 128), (5, 128), (7, 128), (8, 128))  # (G, H) that were tested
THREADS = 128  # as in the source


class _Query(ctypes.Structure):
    """`Query` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "table", "position", "slot", "length", "blocks", "keys", "values", "out")),
        *((name, ctypes.c_uint64) for name in ("key_slot", "key_head", "value_slot", "value_head")),
        *((name, ctypes.c_float) for name in ("scale", "cap")),
        *((name, ctypes.c_int) for name in ("window", "block_size", "num_kv", "most", "early")),
    )


def kernel_of(mixer: Attention) -> tuple[str, str]:
    """Its name in the source, and the line that makes it."""
    return f"one_query_{mixer.G}_{mixer.H}", f"ONE({mixer.G}, {mixer.H})"


def _kernel(mixer: Attention, device: torch.device) -> Function | None:
    return find_kernel(SOURCE, *kernel_of(mixer), device)


def most_keys(context: int) -> int:
    """Keys of a sequence of so many tokens that one block of threads meets."""
    return ceil(context / (TILE * RANKS)) * TILE


def takes(mixer: Attention, planes: Planes, context: int, *, norms: bool, sinks: bool) -> bool:
    """Whether the kernel computes such a layer for sequences of up to `context` tokens: a causal or sliding layer over a bf16 cache, rotated whole or not."""
    rope, pattern = mixer.rope, mixer.pattern
    plain = pattern is None or isinstance(pattern, Causal | Sliding)
    if norms or sinks or not plain or mixer.chunked or planes.store != "bf16" or mixer.Hv != mixer.H or (mixer.G, mixer.H) not in SHAPES:
        return False
    if rope is not None and (rope.dims != mixer.H or rope.interleaved):
        return False
    if context > ONE_QUERY_CONTEXT or 4 * (padded_heads(mixer.G) + 1) * most_keys(context) > ONE_QUERY_BYTES:
        return False
    whole = all(plane.dtype == torch.bfloat16 and plane.stride(0) % 8 == plane.stride(1) % 8 == 0 for plane in (planes.keys, planes.values))
    return whole and _kernel(mixer, planes.keys.device) is not None


def one_query(
    qkv_1X: Tensor,
    table_SH2: Tensor | None,
    positions_1: Tensor,
    slots_1: Tensor,
    planes: Planes,
    tables_1M: Tensor,
    lengths_1: Tensor,
    mixer: Attention,
    out_1NH: Tensor,
    *,
    context: int,
    early: bool = False,
    pdl: bool = True,
) -> Tensor:
    """What `rope_write` writes, and attention of the rotated queries into `out_1NH`; `takes` comes first.

    context: no sequence is longer. early: the kernel that follows fills its shared memory meanwhile (`linear/stream_row.py`); others would be in the way.
    """
    kernel = _kernel(mixer, qkv_1X.device)
    assert kernel is not None and qkv_1X.is_contiguous() and out_1NH.is_contiguous(), "takes() comes first"
    parameters = parameters_of(qkv_1X, table_SH2, positions_1, slots_1, planes, tables_1M, lengths_1, mixer, out_1NH, context, early)
    with torch.cuda.device(qkv_1X.device):
        stream = torch.cuda.current_stream().cuda_stream
        kernel((RANKS, mixer.K), THREADS, shared_bytes(mixer, context), parameters, stream, pdl=pdl)
    return out_1NH


def shared_bytes(mixer: Attention, context: int) -> int:
    """Shared memory of a block of threads: queries and results, the newest key and value, peaks and totals, and of each key its slot and scores."""
    G, H = mixer.G, mixer.H
    return 4 * (2 * G * H + H + 2 * G + 2 + (padded_heads(G) + 1) * most_keys(context))


def parameters_of(
    qkv_1X: Tensor,
    table_SH2: Tensor | None,
    positions_1: Tensor,
    slots_1: Tensor,
    planes: Planes,
    tables_1M: Tensor,
    lengths_1: Tensor,
    mixer: Attention,
    out_1NH: Tensor,
    context: int,
    early: bool,
) -> ctypes.Structure:
    """What the kernel is given."""
    windows = [w for w in (mixer.window, getattr(mixer.pattern, "window", None)) if w is not None]
    return _Query(
        qkv_1X.data_ptr(), None if table_SH2 is None else table_SH2.data_ptr(), positions_1.data_ptr(), slots_1.data_ptr(), lengths_1.data_ptr(),
        tables_1M.data_ptr(), planes.keys.data_ptr(), planes.values.data_ptr(), out_1NH.data_ptr(),
        planes.keys.stride(0), planes.keys.stride(1), planes.values.stride(0), planes.values.stride(1),
        mixer.softmax_scale, mixer.logit_softcap or 0.0, min(windows, default=0), planes.block_size, mixer.K, most_keys(context), early,
    )  # fmt: skip
