"""Weight formats: how many bytes a matrix takes in each, to the byte, and whether it can run. How a format is stored is `formats/`.

Every format is a function from a shape (output rows, input columns; leading dimensions are a stack of such) to bytes, scales and zero points included.
A group never crosses a row: a row of 576 in groups of 128 has five groups, the last one short but paid in full scales. Nor does a block: a row that is not
whole blocks (of GGUF, or eights of the lattice) is priced as padded, and refused by `refusal`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from math import ceil, prod

from tradespace.errors import InputError

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How codes and scales lie. A code takes `bits`; or `block` = (weights, bytes): so many weights together take so many bytes.

    group         weights that share a scale along a row; 0: the whole row; None: no scale beside the codes (floats, and GGUF blocks, which hold theirs)
    scale_rows    rows that share a scale; 0: all rows of a matrix
    scale_bytes   of one scale
    zero_bits     of one group's zero point; those of a row are packed and start on a whole byte. 0: symmetric
    nested        scales that share a scale of 4 bytes themselves (and 4 bytes of offset a tensor); 0: scales are plain
    activations   bits of an activation in the product where they are quantized, too; 0: they stay floats
    rounded       the 8-bit float that activations are rounded to, a scale per token, before the product ("e4m3"); "": they are not
    compute       dtype of the activations that come in and go out
    runs_since    the version whose engine runs it; None: priced, cannot run yet
    """

    name: str
    bits: float
    block: tuple[int, int] | None = None
    group: int | None = None
    scale_rows: int = 1
    scale_bytes: int = 0
    zero_bits: int = 0
    nested: int = 0
    activations: int = 0
    rounded: str = ""
    compute: str = "bf16"
    runs_since: str | None = None
    idea: str = ""

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row's codes, which start on a whole byte.

        >>> FORMATS["int3-g64"].row_bytes(9), FORMATS["q4_0"].row_bytes(64)
        (4, 36)
        """
        if self.block is not None:
            return ceil(columns / self.block[0]) * self.block[1]
        return ceil(columns * self.bits / 8)

    def groups(self, columns: int) -> int:
        """Scales along a row; the last group may be short."""
        if self.group is None:
            return 0
        return ceil(columns / self.group) if self.group else 1

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape, codes, scales and zero points included."""
        if self.group is None and self.block is None:
            return ceil(prod(shape) * self.bits / 8)
        *stack, rows, columns = (1, *shape) if len(shape) == 1 else shape
        matrices, groups = prod(stack), self.groups(columns)
        scales = matrices * (ceil(rows / self.scale_rows) if self.scale_rows else min(rows, 1)) * groups
        nested_bytes = 4 * ceil(scales / self.nested) + 4 if self.nested else 0
        return matrices * rows * (self.row_bytes(columns) + ceil(groups * self.zero_bits / 8)) + scales * self.scale_bytes + nested_bytes

    @property
    def bits_per_weight(self) -> float:
        """Of a large matrix, scales included."""
        group_bits = 8 * (self.scale_bytes + (4 / self.nested if self.nested else 0)) / max(1, self.scale_rows) + self.zero_bits
        return self.bits + (group_bits / self.group if self.group and self.scale_rows else 0.0)


def refusal(fmt: WeightFormat, columns: int) -> str | None:
    """Why a matrix with rows of so many columns cannot be held in `fmt` (need, have, remedy); None: it can.

    >>> refusal(FORMATS["q6_k"], 512), refusal(FORMATS["int4-g128"], 48)
    (None, None)
    """
    if fmt.block is not None and columns % fmt.block[0]:
        other = "q8_0 or q4_0 (blocks of 32)" if fmt.block[0] > 32 and columns % 32 == 0 else "int4-g64 or int8, which take any width"
        return f"{fmt.name} needs rows that are a multiple of {fmt.block[0]} wide; these have {columns} columns. Use {other}"
    return None


def _affine() -> Iterator[WeightFormat]:
    for bits in (4, 3, 2):
        for group in (32, 64, 128):
            name, like = f"int{bits}-g{group}", {"bits": bits, "group": group, "scale_bytes": 2, "runs_since": "0.2"}
            yield WeightFormat(name=name, **like, idea=f"groups of {group} with a 16-bit scale, symmetric")
            yield WeightFormat(name=f"{name}-zp", **like, zero_bits=bits, idea=f"groups of {group} with a 16-bit scale and a zero point of {bits} bits")


def _ggml() -> Iterator[WeightFormat]:
    for name, block, idea in (
        ("q8_0", (32, 34), "8 bits, a scale per 32"),
        ("q4_0", (32, 18), "4 bits, a scale per 32"),
        ("q4_1", (32, 20), "4 bits, a scale and a minimum per 32"),
        ("q5_0", (32, 22), "5 bits, a scale per 32"),
        ("q5_1", (32, 24), "5 bits, a scale and a minimum per 32"),
        ("q4_k", (256, 144), "4 bits, 6-bit scales and minima per 32 under two 16-bit ones per 256"),
        ("q5_k", (256, 176), "5 bits, 6-bit scales and minima per 32 under two 16-bit ones per 256"),
        ("q6_k", (256, 210), "6 bits, 8-bit scales per 16 under a 16-bit one per 256"),
    ):
        yield WeightFormat(name=name, bits=8 * block[1] / block[0], block=block, runs_since="0.2", idea=f"GGUF's block, as stored: {idea}")


_CODED = {"group": 0, "scale_bytes": 4, "runs_since": "0.2"}
_LATTICE = "after Hadamard rotation; arXiv:2402.04396"

FORMATS: dict[str, WeightFormat] = {
    fmt.name: fmt
    for fmt in (
        WeightFormat(name="fp32", bits=32, compute="fp32", runs_since="0.1", idea="as the mathematics has it"),
        WeightFormat(name="bf16", bits=16, runs_since="0.1", idea="as most models are published"),
        WeightFormat(name="fp16", bits=16, compute="fp16", runs_since="0.1", idea="more mantissa, less range than bf16"),
        WeightFormat(name="int8", bits=8, group=0, scale_bytes=4, runs_since="0.1", idea="one scale per row, symmetric; arXiv:2208.07339 without outliers"),
        WeightFormat(name="int8-tensor", bits=8, **_CODED, scale_rows=0, idea="one scale per matrix, symmetric"),
        WeightFormat(name="w8a8", bits=8, **_CODED, activations=8, idea="one scale per row, activations in int8 per token; arXiv:2211.10438"),
        WeightFormat(name="fp8", bits=8, **_CODED, idea="e4m3, one scale per output row; arXiv:2209.05433"),
        WeightFormat(name="fp8-a8", bits=8, **_CODED, rounded="e4m3", idea="e4m3, one scale per output row, activations in e4m3 per token; arXiv:2209.05433"),
        WeightFormat(name="fp8-tensor", bits=8, **_CODED, scale_rows=0, idea="e4m3, one scale per matrix; arXiv:2209.05433"),
        WeightFormat(
            name="fp8-block", bits=8, group=128, scale_rows=128, scale_bytes=4, runs_since="0.2", idea="e4m3, a scale per 128 x 128; arXiv:2412.19437"
        ),
        *_affine(),
        WeightFormat(
            name="nf4", bits=4, group=64, scale_bytes=1, nested=256, runs_since="0.2", idea="normal-float codes, doubly quantized scales; arXiv:2305.14314"
        ),
        WeightFormat(name="nf4-plain", bits=4, group=64, scale_bytes=4, runs_since="0.2", idea="normal-float codes, 32-bit scales; arXiv:2305.14314"),
        WeightFormat(name="e8", bits=2, block=(8, 2), **_CODED, idea=f"E8 lattice codebook {_LATTICE}"),
        WeightFormat(name="e8-3", bits=3, block=(8, 3), **_CODED, idea=f"E8 lattice codebook and a residual of 1 bit {_LATTICE}"),
        WeightFormat(name="e8-4", bits=4, block=(8, 4), **_CODED, idea=f"two E8 lattice codebooks, one for the other's residual, {_LATTICE}"),
        *_ggml(),
    )
}
# short names for the common choice of groups
ALIASES = {"int4": "int4-g128", "int3": "int3-g128", "int2": "int2-g64-zp"}
FORMATS |= {short: FORMATS[name] for short, name in ALIASES.items()}


def find_format(name: str) -> WeightFormat:
    """The format of this name, or InputError with the list."""
    if name not in FORMATS:
        close = get_close_matches(str(name)[:40].lower(), FORMATS, n=3, cutoff=0.6)
        hint = f"Closest: {', '.join(close)}. " if close else ""
        raise InputError(f"unknown weight format '{name}'. {hint}Known: {', '.join(FORMATS)}")
    return FORMATS[name]
