"""How this package's Triton kernels are launched, and how one that follows another may be prepared while that still runs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tradespace.kernels.attention.triton_interpreter import prepare


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, pdl: bool | None = None, **options: Any) -> None:
    """Runs `kernel` on the device that holds `like`, on its current stream.

    pdl: None: the kernel knows nothing of it. True: programmatic dependent launch (Hopper): the kernel is set up while the one before it drains.
    """
    prepare()
    if pdl is not None:
        options["PDL"] = pdl
        if pdl:
            options["launch_pdl"] = True
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        kernel[grid](*arguments, **options)


@triton.jit
def follow(PDL: tl.constexpr):
    """First of all in a kernel: lets the next one be set up, and waits for the one before."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def after(PDL: tl.constexpr):
    """First of all in a kernel: waits for the one before."""
    if PDL:
        gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):
    """Once a kernel has read all it reads: lets the next one be set up. Earlier, the next one's programs would lie unevenly over the processors, as some of
    these are still full (measured: 10% of the bandwidth of products of one row).
    """
    if PDL:
        gdc_launch_dependents()


def ceil_div(n: int, by: int) -> int:
    return -(-n // by)


def padded(n: int) -> int:
    """n or the next power of two.

    >>> padded(1), padded(96), padded(128)
    (1, 128, 128)
    """
    return 1 << (n - 1).bit_length()


def present(part: Tensor | None, other: Tensor) -> Tensor:
    """Something to point at where there is nothing to read."""
    return other if part is None else part
