"""What is known beforehand, on its way to the L2 cache before it is needed: a hint, nothing is computed from it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ask(source, offset):
    """Asks for the line at each of these offsets (in elements)."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [(source + offset).to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
