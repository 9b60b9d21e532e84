"""Weights drawn at random, in place, in whatever format and layout a model holds them: for speed and memory, which do not depend on their values.

Matrices get a standard deviation of about 0.02 (codes uniform, or normal where they are floats), norms one, biases zero. No file is read and no staging is
held: 16 GB on a GPU take as long as writing them once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tradespace.errors import UnsupportedError
from tradespace.formats import CudaWeight, DenseWeight

DEVIATION = 0.02
PIECE = 2**26  # numbers drawn at once, where a format cannot be drawn in place


@torch.no_grad()
def fill_random(model: nn.Module, *, seed: int = 0, progress: Callable[[int, int], None] | None = None) -> None:
    """Fills every parameter and code of `model`. `progress` is called with (bytes written, of how many). Raises UnsupportedError for a packed layout that it
    does not know (NativeWeight, QuantizedWeight: quantize a random checkpoint instead).
    """
    weights = {name: module for name, module in model.named_modules() if hasattr(module, "set_rows")}
    held = {id(parameter) for module in weights.values() for parameter in module.parameters(recurse=False)}
    plain = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in held]
    total = sum(module.nbytes for module in weights.values()) + sum(parameter.nbytes for _, parameter in plain)  # pyright: ignore[reportCallIssue, reportArgumentType]
    done = 0
    for name, parameter in plain:
        parameter.fill_(1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0)
        done += parameter.nbytes
    generator: torch.Generator | None = None
    for name, module in weights.items():
        if isinstance(module, CudaWeight):
            part = module.packed.codes
        elif isinstance(module, DenseWeight):
            part = module.weight
        else:
            raise UnsupportedError(f"{name}: random weights are drawn for floats and for the CUDA layout, not for {type(module).__name__}")
        if generator is None:
            generator = torch.Generator(part.device).manual_seed(seed)
        if isinstance(module, CudaWeight):
            _fill_packed(module, generator)
        else:
            part.normal_(0, DEVIATION, generator=generator)
        if module.bias is not None:
            module.bias.zero_()
        done += module.nbytes
        if progress is not None:
            progress(done, total)


def _fill_packed(weight: CudaWeight, generator: torch.Generator) -> None:
    packed, kind = weight.packed, weight.packed.layout.kind
    if kind == "bf16":
        packed.codes.normal_(0, DEVIATION, generator=generator)
        return
    if kind in ("fp8", "f8a8"):  # not every byte is a number
        flat = packed.codes.view(torch.uint8).view(-1)
        for start in range(0, flat.numel(), PIECE):
            part = flat[start : start + PIECE]
            drawn = torch.empty(part.numel(), dtype=torch.bfloat16, device=part.device).normal_(0, 1, generator=generator)
            part.copy_(drawn.to(torch.float8_e4m3fn).view(torch.uint8))
        deviation = 1.0
    else:
        packed.codes.view(torch.uint8).random_(0, 256, generator=generator)
        deviation = {"int8": 74.0, "w8a8": 74.0, "int4": 4.6, "nf4": 0.6}[kind]
    scale = DEVIATION / deviation
    if packed.nested is not None and packed.offset is not None:  # scales relative to nothing: all are the offset
        packed.nested.zero_()
        packed.offset.fill_(scale)
    _fill(packed.scale, 0.0 if packed.layout.nested else scale)
    _fill(packed.zero, 8.0)


def _fill(part: Tensor | None, value: float) -> None:
    if part is not None:
        part.fill_(value)
