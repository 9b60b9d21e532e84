"""How this package's Triton kernels are launched, and how one that follows another may be prepared while that still runs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tradespace.kernels.attention.triton_interpreter import prepare
from tradespace.kernels.cuda_module import prefer_shared

try:
    from torch._C import _cuda_getCurrentRawStream as raw_stream  # as Triton asks for it: without an object for the stream  # pyright: ignore
except ImportError:  # torch for CPUs

    def raw_stream(device: int) -> int:
        return torch.cuda.current_stream(device).cuda_stream


def launch(
    kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, pdl: bool | None = None, beside: bool = False, same: Any = None, **options: Any
) -> None:
    """Runs `kernel` on the device that holds `like`, on its current stream.

    arguments: the kernel's first, in order; options: its constants, and Triton's own. pdl: None: the kernel knows nothing of it. True: programmatic dependent
    launch (Hopper): the kernel is set up while the one before it drains. beside: with pdl, a kernel that one with much shared memory may follow, which then
    finds room on every multiprocessor. same: an object that goes with the same options every time.

    Triton looks at every argument and option to find the compiled kernel, which takes longer than most of our kernels run. Here that is done once for each kind
    of call: what Triton compiles for are the constants, and of an argument its type, whether it is 1, and whether 16 divides it.
    """
    if pdl is not None:
        options["PDL"] = pdl
        if pdl:
            options["launch_pdl"] = True
    if not like.is_cuda:
        prepare()
        kernel[grid](*arguments, **options)
        return
    device = like.get_device()
    with nullcontext() if torch.cuda.current_device() == device else torch.cuda.device(device):
        names = (same,) if same is not None else (*options, *options.values())
        key = (id(kernel), device, beside, pdl, *names, *[kind_of(argument) for argument in arguments])
        ready = _READY.get(key)
        if ready is None or getattr(knobs.runtime.launch_enter_hook, "calls", None):  # a profiler's hook wants to hear of it
            compiled = kernel[grid](*arguments, **options)
            if pdl and beside:
                prefer_shared(compiled.function)
            rest = [options[name] for name in kernel.arg_names[len(arguments) :]]
            _READY[key] = kernel, compiled.run, compiled.function, compiled.packed_metadata, rest
            return
        _, run, function, metadata, rest = ready
        stream = raw_stream(device)
        run(grid[0], grid[1] if len(grid) > 1 else 1, grid[2] if len(grid) > 2 else 1, stream, function, metadata, None, None, None, *arguments, *rest)


_READY: dict[tuple[Any, ...], tuple[Any, Any, Any, Any, list[Any]]] = {}  # by kind of call: the kernel (its id is in the key), and how it is launched


def kind_of(argument: Any) -> Any:
    """What Triton may compile for of an argument; two of one kind get the same kernel.

    >>> kind_of(1) == kind_of(2), kind_of(16) == kind_of(2048), kind_of(3) == kind_of(5), kind_of(32) == kind_of(2**31), kind_of(0.5) == kind_of(1.0)
    (False, True, True, False, True)
    """
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() & 15 == 0
    if type(argument) is int:
        return argument if argument == 1 else (argument & 15 == 0, argument >> 31)
    return type(argument)


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
