"""Weights on their way to the L2 cache before the kernel that reads them has begun.

Between two kernels of a decode step the memory would be idle: one drains, the next is set up and waits for its first loads. Weights are known beforehand, so
the programs of one kernel ask for the beginnings of what every program of the next will read. A hint: nothing is computed from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

LINE = 128  # bytes that one request brings


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """What is asked for: of `codes` so many stripes, `lines` lines from each multiple of `stride` bytes on; and the first `scale_lines` of `scale`.

    early: before the kernel that asks reads anything itself (it finds its own weights in L2 already), not after its last read.
    """

    codes: Tensor
    stripes: int
    stride: int
    lines: int
    scale: Tensor | None = None
    scale_lines: int = 0
    early: bool = False


@triton.jit
def prefetch(source, stripes, stride, lines, program, programs, LANES: tl.constexpr):
    """This program's share of stripes · lines requests. LANES: threads of a program."""
    total = stripes * lines
    each = (total + programs - 1) // programs
    first = program * each
    last = tl.minimum(first + each, total)
    for start in tl.range(first, last, LANES):
        line = tl.minimum(start + tl.arange(0, LANES), last - 1)
        address = source.to(tl.int64) + (line // lines).to(tl.int64) * stride + line % lines * 128
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def ask(source, offset):
    """Asks for the line at each of these offsets (in elements)."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [(source + offset).to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
