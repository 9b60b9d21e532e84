"""How a weight is held: `FORMATS` maps every name of `spec.formats.FORMATS` that runs to what builds it, from (shape, dtype of the activations, device).

A weight has `weight`, `nbytes` (== `spec.formats.FORMATS[name].nbytes(shape)`), `needs_workspace`, `set_rows`, `get_rows`, `linear`, `rows` and `dense_rows`.
It is a `DenseWeight`, a `QuantizedWeight` with the codec of its format, a `NativeWeight` packed for the CPU kernels, or a `CudaWeight` for those of a GPU.
Who fills it, and how the codes
are chosen, is `quantize/`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tradespace.errors import UnsupportedError
from tradespace.formats.affine import AffineCodec
from tradespace.formats.codes import Codes
from tradespace.formats.cuda import CudaWeight
from tradespace.formats.dense import DenseWeight
from tradespace.formats.e8 import E8Codec
from tradespace.formats.fp8_a8 import FP8A8Weight
from tradespace.formats.ggml_blocks import BlockCodec
from tradespace.formats.int8 import Int8Weight
from tradespace.formats.native import NativeWeight
from tradespace.formats.nf4 import NF4Codec, NF4Weight
from tradespace.formats.quantized import Codec, QuantizedWeight, decode_values
from tradespace.formats.scaled import ScaledCodec, ScaledWeight
from tradespace.formats.w8a8 import W8A8Weight
from tradespace.formats.workspace import Workspace
from tradespace.spec.formats import ALIASES, find_format
from tradespace.spec.formats import FORMATS as SPECS

__all__ = [
    "DTYPES",
    "FORMATS",
    "Codes",
    "CudaWeight",
    "DenseWeight",
    "Format",
    "Int8Weight",
    "NativeWeight",
    "QuantizedWeight",
    "ScaledWeight",
    "Weight",
    "Workspace",
    "build_weight",
    "decode",
]

Weight = DenseWeight | QuantizedWeight | NativeWeight | CudaWeight

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Format:
    """What holds a format: the module, and the codec that tells it what its codes mean (None: floats)."""

    module: type[DenseWeight] | type[QuantizedWeight]
    codec: Codec | None = None

    @property
    def needs_workspace(self) -> bool:
        return self.module.needs_workspace

    def build(self, shape: tuple[int, ...], dtype: torch.dtype, *, device: torch.device | str, linear: str, workspace: Workspace | None) -> Weight:
        """An unfilled weight; `dtype` is its own where it is held as floats, else that of the activations."""
        if self.codec is None:
            return DenseWeight(shape, dtype, device=device, linear=linear, workspace=workspace)
        assert issubclass(self.module, QuantizedWeight), f"{self.module.__name__} takes no codec"
        return self.module(self.codec, shape, dtype, device=device, linear=linear, workspace=workspace)


FORMATS: dict[str, Format] = {name: Format(DenseWeight) for name in DTYPES}
FORMATS |= {name: Format(Int8Weight, ScaledCodec(SPECS[name], torch.int8)) for name in ("int8", "int8-tensor")}
FORMATS |= {"w8a8": Format(W8A8Weight, ScaledCodec(SPECS["w8a8"], torch.int8))}
FORMATS |= {"fp8-a8": Format(FP8A8Weight, ScaledCodec(SPECS["fp8-a8"], torch.float8_e4m3fn))}
FORMATS |= {name: Format(ScaledWeight, ScaledCodec(SPECS[name], torch.float8_e4m3fn)) for name in ("fp8", "fp8-tensor", "fp8-block")}
FORMATS |= {
    name: Format(QuantizedWeight, AffineCodec(SPECS[name]))
    for name in (f"int{bits}-g{group}{zero}" for bits in (4, 3, 2) for group in (32, 64, 128) for zero in ("", "-zp"))
}
FORMATS |= {"nf4": Format(NF4Weight, NF4Codec(SPECS["nf4"])), "nf4-plain": Format(QuantizedWeight, NF4Codec(SPECS["nf4-plain"]))}
FORMATS |= {name: Format(QuantizedWeight, E8Codec(SPECS[name])) for name in ("e8", "e8-3", "e8-4")}
FORMATS |= {name: Format(QuantizedWeight, BlockCodec(SPECS[name])) for name in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k")}
FORMATS |= {short: FORMATS[name] for short, name in ALIASES.items()}


def build_weight(
    name: str,
    shape: tuple[int, ...],
    *,
    dense: torch.dtype,
    device: torch.device | str = "cpu",
    linear: str = "torch",
    workspace: Workspace | None = None,
) -> Weight:
    """An unfilled weight in format `name`; `dense` is the dtype of the activations. Raises UnsupportedError for a format that nothing implements, InputError
    for rows that are no whole blocks of it.
    """
    if name not in FORMATS:
        raise UnsupportedError(f"weight format {name} is priced but cannot run yet. Runs: {', '.join(FORMATS)}")
    # a dense format is its own dtype; a quantized one computes in that of the activations
    return FORMATS[name].build(shape, DTYPES.get(name, dense), device=device, linear=linear, workspace=workspace)


def decode(name: str, codes: Codes) -> Tensor:
    """values_RC in fp32 that `codes` of format `name` stand for: what a weight that holds them multiplies with, before any rounding to activations' dtype.

    The width of a row is that of the codes; for formats of packed bytes (GGUF blocks, e8) that of whole blocks. Raises InputError for an unknown name.
    """
    fmt = find_format(name)
    codec = FORMATS[name].codec
    if codec is None:
        return codes.codes_RC.float()
    width = codes.codes_RC.shape[1]
    columns = width if fmt.block is None else width // fmt.block[1] * fmt.block[0]
    return decode_values(codec, codes, columns)
