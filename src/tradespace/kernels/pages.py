"""Huge pages for large tensors: a cache read in pieces of a few KB misses the processor's address cache at nearly every piece; with pages of 2 MiB it does not.

Only whole aligned pages inside the tensor are asked for, so its bytes stay what they are. Linux gives them where it is set to "madvise" or "always"; elsewhere
nothing happens.
"""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor

PAGE_BYTES = 2 << 20
_MADV_HUGEPAGE = 14


def prefer_huge_pages(tensor: Tensor) -> Tensor:
    """`tensor`, whose memory must not have been touched yet for this to help."""
    start = -(-tensor.data_ptr() // PAGE_BYTES) * PAGE_BYTES
    length = (tensor.data_ptr() + tensor.nbytes) // PAGE_BYTES * PAGE_BYTES - start
    if sys.platform == "linux" and length > 0:
        # a kernel without them refuses, and nothing is lost
        ctypes.CDLL(None, use_errno=True).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return tensor
