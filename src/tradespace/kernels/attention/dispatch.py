"""Which kernel runs in which layer. Every kernel declares what it cannot take; what was chosen, and why not what was asked for, is returned for the record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tradespace.errors import UnsupportedError
from tradespace.kernels.attention import chunked, native, paged_view, reference, sdpa, triton_flash
from tradespace.kernels.view import KVView, StepBatch
from tradespace.spec.attention import find_kernel, weights_refusal
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec


class Attend(Protocol):
    """The signature of every attention kernel: q (T, N, H) in, (T, N, Hv) out, in q's dtype."""

    def __call__(self, q_TNH: Tensor, view: KVView, batch: StepBatch, mixer: Attention, sinks_N: Tensor | None = None) -> Tensor: ...


# name → maker: a kernel may keep what the layers of a step share, so each engine makes its own
KERNELS: dict[str, Callable[[], Attend]] = {
    "reference": lambda: reference.attend,
    "chunked": lambda: chunked.attend,
    "sdpa": sdpa.Sdpa,
    "native": lambda: native.attend,
    "flash": lambda: triton_flash.attend,
    "paged": lambda: paged_view.attend,
}
_SUPPORTS = {
    "reference": reference.supports,
    "chunked": chunked.supports,
    "sdpa": sdpa.supports,
    "native": native.supports,
    "flash": triton_flash.supports,
    "paged": paged_view.supports,
}
# tried in this order where the requested kernel cannot take a layer; under the interpreter flash is for tests alone
_INSTEAD = {"cuda": ("flash", "chunked", "reference"), "cpu": ("sdpa", "chunked", "reference")}


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel of one layer; None where the layer has no attention. `reason` says why it is not the one that was requested."""

    kernel: str | None
    reason: str | None = None


def supports(kernel: str, mixer: Attention, dtype: torch.dtype, device: torch.device | str = "cpu", *, weights: bool = False) -> str | None:
    """Why `kernel` cannot compute such a layer; None: it can. `weights`: the cache evicts by attention weights, which the kernel must return."""
    if kernel not in KERNELS:
        find_kernel(kernel)  # InputError for a name that nobody knows
        return f"attention kernel {kernel} is priced but has no implementation yet"
    if weights and (reason := weights_refusal(kernel)) is not None:
        return reason
    return _SUPPORTS[kernel](mixer, dtype, torch.device(device))


def choose(requested: str, mixer: Attention, dtype: torch.dtype, device: torch.device | str = "cpu", *, weights: bool = False) -> Choice:
    """`requested` where it can compute the layer, else the first that can, with the reason; UnsupportedError with every reason when none can.

    A kernel that has no implementation is never replaced: that request is an error.
    """
    reasons = {requested: supports(requested, mixer, dtype, device, weights=weights)}
    if requested not in KERNELS:
        raise UnsupportedError(f"{reasons[requested]}. Choose one of {', '.join(KERNELS)}")
    if reasons[requested] is None:
        return Choice(requested)
    for name in _INSTEAD.get(torch.device(device).type, _INSTEAD["cpu"]):
        reasons[name] = supports(name, mixer, dtype, device, weights=weights)
        if reasons[name] is None:
            return Choice(name, reasons[requested])
    raise UnsupportedError("no attention kernel can compute this layer: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))


def resolve_kernels(model: ModelSpec, requested: str, dtype: torch.dtype, device: torch.device | str = "cpu", *, weights: bool = False) -> tuple[Choice, ...]:
    """One Choice per layer, fixed at build and written into the record. `weights`: see `supports`."""
    choices = []
    for index, layer in enumerate(model.layers):
        if layer.mixer is None:
            choices.append(Choice(None))
        elif not isinstance(layer.mixer, Attention):
            raise UnsupportedError(f"layer {index} of {model.name} mixes tokens by {type(layer.mixer).__name__}, which no attention kernel computes")
        else:
            choices.append(choose(requested, layer.mixer, dtype, device, weights=weights))
    return tuple(choices)


def make_kernels(choices: tuple[Choice, ...]) -> tuple[Attend | None, ...]:
    """One callable per layer, the same one for all layers that chose alike."""
    made = {name: KERNELS[name]() for name in {choice.kernel for choice in choices} if name is not None}
    return tuple(None if choice.kernel is None else made[choice.kernel] for choice in choices)
