"""From codes to bf16 in registers: pairs of weights at a time, by bit tricks instead of conversions. Plain arithmetic under the interpreter and for fp16.

Codes come as 16-bit elements that hold two bytes or four nibbles, of columns a half or a quarter of a chunk apart (`packed.py` lays them out). So each tensor
that comes out pairs with one run of activations, and no lane ever exchanges anything with another.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from tradespace.kernels.linear.levels import LEVELS

# bf16 128 + n is the bit pattern 0x4300 | n for n < 128: one logical operation puts the magic in, one subtraction takes 128 (and the zero point 8) out
_NIBBLES: Any = tl.constexpr("""
{
.reg .b32 a, b, c, m;
mov.b32 m, 0x43084308;
shr.u32 a, $4, 4;
shr.u32 b, $4, 8;
shr.u32 c, $4, 12;
lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $1, a, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $2, b, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $3, c, 0x000f000f, 0x43004300, 0xea;
sub.rn.bf16x2 $0, $0, m;
sub.rn.bf16x2 $1, $1, m;
sub.rn.bf16x2 $2, $2, m;
sub.rn.bf16x2 $3, $3, m;
}
""")

# a signed byte is its low seven bits less 128 where the sign is set, and that bit alone makes 256 of 128
_BYTES: Any = tl.constexpr("""
{
.reg .b32 h, x, y;
shr.u32 h, $2, 8;
lop3.b32 x, $2, 0x007f007f, 0x43004300, 0xea;
lop3.b32 y, $2, 0x00800080, 0x43004300, 0xea;
sub.rn.bf16x2 $0, x, y;
lop3.b32 x, h, 0x007f007f, 0x43004300, 0xea;
lop3.b32 y, h, 0x00800080, 0x43004300, 0xea;
sub.rn.bf16x2 $1, x, y;
}
""")

# e4m3 with its fields moved to where bf16 has them is 2^-120 of its value, subnormals included
_FLOATS: Any = tl.constexpr("""
{
.reg .b32 l, x, y, m;
mov.b32 m, 0x7b807b80;
shl.b32 l, $2, 8;
shr.u32 x, l, 4;
and.b32 x, x, 0x07f007f0;
lop3.b32 y, l, 0x80008000, x, 0xea;
mul.rn.bf16x2 $0, y, m;
shr.u32 x, $2, 4;
and.b32 x, x, 0x07f007f0;
lop3.b32 y, $2, 0x80008000, x, 0xea;
mul.rn.bf16x2 $1, y, m;
}
""")

# nf4: byte look-ups by permutation. Of four nibbles at once: low and high byte of the level, from levels 0-7 and from 8-15, then the one that bit 3 chooses
_LEVELS: Any = tl.constexpr("""
{
.reg .b32 s, t, u, a, b, l0, h0, l1, h1, p, q;
and.b32 s, $4, 0x7777;
shr.u32 t, $4, 1;
lop3.b32 t, t, 0x4444, 0x3210, 0xea;
prmt.b32 a, LOW0, LOW1, s;
prmt.b32 b, LOW2, LOW3, s;
prmt.b32 l0, a, b, t;
prmt.b32 a, HIGH0, HIGH1, s;
prmt.b32 b, HIGH2, HIGH3, s;
prmt.b32 h0, a, b, t;
shr.u32 u, $4, 16;
and.b32 s, u, 0x7777;
shr.u32 t, u, 1;
lop3.b32 t, t, 0x4444, 0x3210, 0xea;
prmt.b32 a, LOW0, LOW1, s;
prmt.b32 b, LOW2, LOW3, s;
prmt.b32 l1, a, b, t;
prmt.b32 a, HIGH0, HIGH1, s;
prmt.b32 b, HIGH2, HIGH3, s;
prmt.b32 h1, a, b, t;
prmt.b32 p, l0, h0, 0x5140;
prmt.b32 q, l1, h1, 0x5140;
prmt.b32 $0, p, q, 0x5410;
prmt.b32 $1, p, q, 0x7632;
prmt.b32 p, l0, h0, 0x7362;
prmt.b32 q, l1, h1, 0x7362;
prmt.b32 $2, p, q, 0x5410;
prmt.b32 $3, p, q, 0x7632;
}
""")


def _filled(asm: str, levels: list[float]) -> str:
    """`_LEVELS` with the table's bytes as numbers."""
    import numpy as np

    bits = np.array(levels, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest even, as torch rounds
    for name, part in (("LOW", rounded & 255), ("HIGH", rounded >> 8)):
        for index in range(4):
            asm = asm.replace(f"{name}{index}", hex(int.from_bytes(part[4 * index : 4 * index + 4].astype(np.uint8).tobytes(), "little")))
    return asm


_NF4: Any = tl.constexpr(_filled(_LEVELS.value, list(LEVELS)))


@triton.jit
def four(words, table, NF4: tl.constexpr, FAST: tl.constexpr, TYPE: tl.constexpr):
    """Four tensors like `words` (uint16) of TYPE: the nibbles from the lowest on, less 8; or the levels of `table` (fp32) that they name."""
    if FAST:
        if NF4:
            a, b, c, d = tl.inline_asm_elementwise(
                _NF4, "=&r,=&r,=&r,=&r,r", [words], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
            )
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                _NIBBLES, "=&r,=&r,=&r,=&r,r", [words], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
            )
    else:
        wide = words.to(tl.int32) & 0xFFFF
        a, b, c, d = wide & 15, (wide >> 4) & 15, (wide >> 8) & 15, wide >> 12
        if NF4:
            a, b, c, d = (tl.load(table + a).to(TYPE), tl.load(table + b).to(TYPE), tl.load(table + c).to(TYPE), tl.load(table + d).to(TYPE))
        else:
            a, b, c, d = (a - 8.0).to(TYPE), (b - 8.0).to(TYPE), (c - 8.0).to(TYPE), (d - 8.0).to(TYPE)
    return a, b, c, d


@triton.jit
def two(words, FLOAT: tl.constexpr, FAST: tl.constexpr, TYPE: tl.constexpr):
    """Two tensors like `words` (uint16) of TYPE: the low and the high byte as signed numbers, or as e4m3."""
    if FAST:
        if FLOAT:
            a, b = tl.inline_asm_elementwise(_FLOATS, "=&r,=&r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2)
        else:
            a, b = tl.inline_asm_elementwise(_BYTES, "=&r,=&r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2)
    else:
        wide = words.to(tl.int32) & 0xFFFF
        if FLOAT:
            a, b = e4m3(wide & 255).to(TYPE), e4m3(wide >> 8).to(TYPE)
        else:
            a, b = (((wide & 255) ^ 128) - 128.0).to(TYPE), ((wide >> 8 ^ 128) - 128.0).to(TYPE)
    return a, b


@triton.jit
def e4m3(byte):
    """fp32 of an e4m3 bit pattern (int32, no NaN), by moving its fields: 2^-120 of the value, then scaled."""
    bits = ((byte & 128) << 24) | ((byte & 127) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
