"""Memory in huge pages: what is read in pieces of a few KB misses the processor's address cache at nearly every piece; with pages of 2 MiB it does not.

A matrix of a small model, or one layer's keys, is smaller than such a page. So tensors are laid one after the other into mappings of CHUNK_BYTES, and none
of a mapping's memory is used before a tensor touches it. A mapping ends with the last tensor in it, so those that live and die together share them and no
others. Linux gives huge pages where it is set to "madvise" or "always"; elsewhere these are plain tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import threading
import weakref

import torch
from torch import Tensor

PAGE_BYTES = 2 << 20
CHUNK_BYTES = 64 << 20  # room for tensors of up to half of it; larger ones have mappings of their own
ALIGNMENT = 64

_lock = threading.Lock()
_chunks: dict[str, tuple[weakref.ref[mmap.mmap], int]] = {}  # by purpose: the last mapping, and how much of it is taken


def huge_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu", *, purpose: str) -> Tensor:
    """Zeros on a cache line of their own, beside others of the same purpose. Their memory is not touched yet.

    Raises what torch and the system raise where there is none.
    """
    if sys.platform != "linux" or torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = 1
    for size in shape:
        count *= size
    nbytes = count * dtype.itemsize
    if nbytes == 0:
        return torch.zeros(shape, dtype=dtype)
    if nbytes > CHUNK_BYTES // 2:
        mapping, start = _map(nbytes)
    else:
        mapping, start = _carve(nbytes, purpose)
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=start).view(shape)


def _map(nbytes: int) -> tuple[mmap.mmap, int]:
    """A mapping of at least `nbytes`, and where its first whole page begins."""
    mapping = mmap.mmap(-1, nbytes + PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    with contextlib.suppress(OSError):  # a kernel without them refuses, and nothing is lost
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping, -address % PAGE_BYTES


def _carve(nbytes: int, purpose: str) -> tuple[mmap.mmap, int]:
    with _lock:
        last, start = _chunks.get(purpose, (None, 0))
        mapping = None if last is None else last()
        if mapping is None or start + nbytes > len(mapping):
            mapping, start = _map(CHUNK_BYTES)
            last = weakref.ref(mapping)
        assert last is not None
        _chunks[purpose] = last, -(-(start + nbytes) // ALIGNMENT) * ALIGNMENT
        return mapping, start
