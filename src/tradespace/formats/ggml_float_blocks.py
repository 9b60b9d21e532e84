"""GGUF blocks that are read as floats and held in another format: Q2_K, Q3_K, IQ4_NL, IQ4_XS and MXFP4. No kernel computes with them as stored.

The arithmetic is ggml's, operation by operation in float32, so values are bitwise those of the `gguf` package. MXFP4: OCP Microscaling Formats 1.0, 4-bit
floats (e2m1) under a power of two per 32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# the 16 values that a 4-bit code stands for
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the float's value: whole numbers
_AT_ONCE = 4  # columns looked up together: indices and values of a tile's eighth are all that stands beside the floats


def _halves(blocks_NB: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block, as float32 [N, 1]."""
    return blocks_NB.view(torch.float16)[:, start // 2 : start // 2 + 1].float()


def _look_up(packed_NB: Tensor, values: tuple[int, ...], out_NE: Tensor) -> None:
    """Elements 0…15 of 32 are named by the low nibbles of 16 bytes, elements 16…31 by the high ones."""
    table = torch.tensor(values, dtype=torch.float32, device=packed_NB.device)
    for start in range(0, 16, _AT_ONCE):
        codes = packed_NB[:, start : start + _AT_ONCE]
        for first, nibbles in ((start, codes & 15), (start + 16, codes >> 4)):
            out_NE[:, first : first + _AT_ONCE] = table.index_select(0, nibbles.flatten().int()).view(nibbles.shape)


def _iq4_nl(blocks_NB: Tensor, out_NE: Tensor) -> None:
    _look_up(blocks_NB[:, 2:], IQ4_VALUES, out_NE)
    out_NE.mul_(_halves(blocks_NB, 0))


def _mxfp4(blocks_NB: Tensor, out_NE: Tensor) -> None:
    _look_up(blocks_NB[:, 1:], E2M1_TWICE, out_NE)
    exponent_N1 = blocks_NB[:, :1].int()
    # half of 2^(e - 127), as bits of a float32: the table holds twice the values; below 2^-126 the number is subnormal
    bits_N1 = torch.where(exponent_N1 < 2, torch.full_like(exponent_N1, 0x200000) << exponent_N1.clamp(max=1), (exponent_N1 - 1) << 23)
    out_NE.mul_(bits_N1.view(torch.float32))


def _iq4_xs(blocks_NB: Tensor, out_NE: Tensor) -> None:
    """A 6-bit scale per 32: four low bits in a nibble, two high bits in a 16-bit word."""
    high_N1 = blocks_NB[:, 2:3].int() | (blocks_NB[:, 3:4].int() << 8)
    out_N8G = out_NE.unflatten(1, (8, 32))
    for group in range(8):
        low_N1 = (blocks_NB[:, 4 + group // 2 : 5 + group // 2].int() >> (4 * (group % 2))) & 15
        scale_N1 = (low_N1 | (((high_N1 >> (2 * group)) & 3) << 4)) - 32
        _look_up(blocks_NB[:, 8 + 16 * group : 24 + 16 * group], IQ4_VALUES, out_N8G[:, group])
        out_N8G[:, group].mul_(_halves(blocks_NB, 0) * scale_N1)


def _q2_k(blocks_NB: Tensor, out_NE: Tensor) -> None:
    """Sixteen groups of 16: a byte holds a 4-bit scale and, above it, a 4-bit minimum."""
    quants_N2G, out_N24G = blocks_NB[:, 16:80].unflatten(1, (2, 32)), out_NE.unflatten(1, (2, 4, 32))
    for place in range(4):
        out_N24G[:, :, place] = (quants_N2G >> (2 * place)) & 3
    scales_N16, minima_N16 = _halves(blocks_NB, 80) * (blocks_NB[:, :16] & 15), _halves(blocks_NB, 82) * (blocks_NB[:, :16] >> 4)
    out_NE.unflatten(1, (16, 16)).mul_(scales_N16.unsqueeze(-1)).sub_(minima_N16.unsqueeze(-1))


def _q3_k(blocks_NB: Tensor, out_NE: Tensor) -> None:
    """Two bits in `quants`, the third in a mask (0: four less); sixteen 6-bit scales in 12 bytes, low nibbles first."""
    mask_NG, quants_N2G, packed = blocks_NB[:, :32], blocks_NB[:, 32:96].unflatten(1, (2, 32)), blocks_NB[:, 96:108]
    out_N8G = out_NE.unflatten(1, (8, 32))
    for group in range(8):
        half, place = divmod(group, 4)
        out_N8G[:, group] = ((quants_N2G[:, half] >> (2 * place)) & 3) | (((mask_NG >> group) & 1) << 2)
    low_N16 = torch.cat([packed[:, :8] & 15, packed[:, :8] >> 4], dim=1)
    high_N16 = torch.cat([(packed[:, 8:] >> (2 * place)) & 3 for place in range(4)], dim=1)
    scales_N16 = _halves(blocks_NB, 108) * ((low_N16 | (high_N16 << 4)).to(torch.int8) - 32)
    out_NE.sub_(4).unflatten(1, (16, 16)).mul_(scales_N16.unsqueeze(-1))


FLOAT_DEQUANTIZERS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "Q2_K": _q2_k, "Q3_K": _q3_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip
