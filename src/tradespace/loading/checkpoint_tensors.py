"""Strips of stored tensors in bounded memory, and codes packed into 32-bit words, as GPTQ, AWQ and compressed-tensors pack them.

A bit stream is dense and little-endian: code i of b bits lies at bits i·b … i·b + b - 1 of its row, across the borders of words where b does not divide 32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tradespace.errors import CorruptFileError, UnsupportedError
from tradespace.formats.codes import Codes
from tradespace.formats.packing import pack, unpack
from tradespace.loading.rawfile import open_weight_file, read_exactly, shown
from tradespace.loading.safetensors import SafetensorsFile, SafetensorsTensor

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
FLOATS = ("F16", "BF16", "F32")
Unpack = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True, slots=True)
class Part:
    """One of the stored tensors that make up a quantized weight: its name's ending, the dtypes it may have, its shapes (any of them)."""

    suffix: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


def check_parts(source: SafetensorsFile, module: str, parts: Sequence[Part]) -> None:
    """Raises CorruptFileError (name, need, have) where a part is missing, or has another shape or dtype."""
    for part in parts:
        name = f"{module}.{part.suffix}"
        stored = source.tensors.get(name)
        need = " or ".join(dict.fromkeys(str(list(shape)) for shape in part.shapes)) + f" as {' or '.join(part.dtypes)}"
        if stored is None:
            raise CorruptFileError(f"{source.path}: tensor {shown(name)} {need} is missing, and quantization_config says that {module} is quantized")
        if stored.shape not in part.shapes or stored.dtype not in part.dtypes:
            raise CorruptFileError(
                f"{source.path}: tensor {shown(name)} must be {need}; it is {list(stored.shape)} as {stored.dtype}. "
                "The file is damaged, or its quantization_config belongs to another one"
            )


def read_strip(tensor: SafetensorsTensor, rows: tuple[int, int], columns: tuple[int, int] | None = None) -> Tensor:
    """Rows and columns [start, stop) of a stored matrix (a vector is a column), in its dtype: one read where the columns are all, else one per row."""
    dtype = TORCH_DTYPES[tensor.dtype]
    width = 1
    for size in tensor.shape[1:]:
        width *= size
    first, last = columns or (0, width)
    strip = torch.empty(rows[1] - rows[0], last - first, dtype=dtype)
    view = strip.view(torch.uint8).view(-1).numpy().data if strip.numel() else memoryview(b"")
    what = f"{tensor.path}: tensor {shown(tensor.name)}"
    row_bytes, strip_bytes = width * dtype.itemsize, (last - first) * dtype.itemsize
    with open_weight_file(tensor.path, buffering=0) as (file, _):
        if (first, last) == (0, width):
            read_exactly(file, view, tensor.offset_bytes + rows[0] * row_bytes, what)
            return strip
        for index, row in enumerate(range(*rows)):
            start = tensor.offset_bytes + row * row_bytes + first * dtype.itemsize
            read_exactly(file, view[index * strip_bytes : (index + 1) * strip_bytes], start, what)
    return strip


def unpack_words(words_RW: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of each row of a dense bit stream: int32 (R, W) → uint8 (R, count). bits: 2, 3, 4, 5 or 8."""
    bytes_RB = words_RW.contiguous().view(torch.uint8).view(len(words_RW), -1)
    if bits == 5:
        fives_RN5 = torch.nn.functional.pad(bytes_RB, (0, -bytes_RB.shape[1] % 5)).unflatten(1, (-1, 5)).long()
        eights_RN = (fives_RN5 << 8 * torch.arange(5)).sum(-1)
        return torch.stack([(eights_RN >> 5 * index & 31).to(torch.uint8) for index in range(8)], dim=-1).flatten(1)[:, :count]
    return bytes_RB[:, :count] if bits == 8 else unpack(bytes_RB, bits, count)


def unpack_whole_codes(words_RW: Tensor, bits: int, count: int) -> Tensor:
    """As `unpack_words` where no code crosses a word: 10 of 3 bits in each, two bits left over (compressed-tensors before its dense packing)."""
    return torch.stack([(words_RW >> bits * i & 2**bits - 1).to(torch.uint8) for i in range(32 // bits)], dim=-1).flatten(1)[:, :count]


def pack_words(codes_RC: Tensor, bits: int) -> Tensor:
    """The dense bit stream of each row: uint8 (R, C) → int32 (R, ceil(C · bits / 32)), the rest of the last word zero.

    >>> pack_words(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0, 1]], dtype=torch.uint8), 4).tolist()
    [[124076833, 1]]
    """
    if bits == 5:  # eight codes to five bytes
        eights_RN8 = torch.nn.functional.pad(codes_RC, (0, -codes_RC.shape[1] % 8)).unflatten(1, (-1, 8)).long()
        sums_RN = (eights_RN8 << 5 * torch.arange(8)).sum(-1)
        fives_RB = torch.stack([(sums_RN >> 8 * index & 255).to(torch.uint8) for index in range(5)], dim=-1).flatten(1)
        bytes_RB = fives_RB[:, : -(-codes_RC.shape[1] * 5 // 8)]
    else:
        bytes_RB = codes_RC if bits == 8 else pack(codes_RC, bits)
    # a fresh tensor: one row of a wider one counts as contiguous whatever its stride, and cannot be viewed as words
    words_RW = torch.zeros(len(bytes_RB), -(-bytes_RB.shape[1] // 4), dtype=torch.int32)
    words_RW.view(torch.uint8)[:, : bytes_RB.shape[1]] = bytes_RB
    return words_RW


def half_scales(scale_RG: Tensor, is_zero_RG: Tensor, name: str) -> Tensor:
    """The scales as fp32 values that fp16 holds exactly, as our grouped formats keep them. The scale of a group whose weights are all zero does not matter.

    Raises UnsupportedError (the tensor, the scale) where one has no exact 16-bit form.
    """
    scale_RG = scale_RG.float().masked_fill(is_zero_RG, 0.0)
    inexact_RG = scale_RG.half().float() != scale_RG
    if inexact_RG.any():
        value = float(scale_RG[inexact_RG][0])
        why = "has no exact fp16 form, in which group scales are held"
        raise UnsupportedError(f"tensor {shown(name)}: the scale {value:.9g} {why}. Use the model's bf16 weights")
    return scale_RG


def repeat_groups(stored_RG: Tensor, repeat: int, num_groups: int) -> Tensor:
    """Each stored number of a group as often as our smaller groups need it; -1: one number for the whole row."""
    return stored_RG.expand(-1, num_groups) if repeat == -1 else stored_RG.repeat_interleave(repeat, dim=1)[:, :num_groups]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How one quantized matrix lies in a checkpoint, and what it becomes: codes of our format `fmt`, value by value those that the checkpoint means.

    read       rows [start, stop) → Codes; or values fp32, where the checkpoint's grouping cannot be held and `fmt` is a dense format
    row_bytes  most that reading one row takes on top of what it returns
    """

    fmt: str
    parts: tuple[Part, ...]
    read: Callable[[int, int], Codes | Tensor]
    row_bytes: int


class Convention(Protocol):
    """One way in which checkpoints are quantized, with the config read. `notes` is what a user should know about how it is honoured."""

    notes: list[str]

    def format_of(self, module: str, *, whole: Sequence[str]) -> str | None:
        """Our format of a module's matrix (named as the checkpoint does); None: stored as floats. `whole`: the modules, it among them, whose rows make ours."""
        ...

    def stored(self, module: str, shape: tuple[int, int], *, whole: Sequence[str]) -> Stored:
        """Of a module whose `format_of` is not None. Raises UnsupportedError, naming the field, where this shape cannot be held."""
        ...


def read_packed_rows(source: SafetensorsFile, name: str, rows: tuple[int, int], bits: int, unpacker: Unpack = unpack_words) -> Tensor:
    """Rows [start, stop) of codes that are packed along the rows: stored int32 (ceil(R · bits / 32), G) → uint8 (stop - start, G)."""
    per_run = 32 // bits if unpacker is unpack_whole_codes else 32
    words_per_run = 1 if unpacker is unpack_whole_codes else bits
    first, last = rows[0] // per_run, -(-rows[1] // per_run)
    tensor = source.tensors[name]
    words_WG = read_strip(tensor, (first * words_per_run, min(last * words_per_run, tensor.shape[0])))
    start = first * per_run
    return unpacker(words_WG.T, bits, rows[1] - start)[:, rows[0] - start :].T.contiguous()
