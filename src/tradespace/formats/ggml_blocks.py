"""GGUF's blocks, as stored: q8_0 q4_0 q4_1 q5_0 q5_1 (32 weights) and q4_k q5_k q6_k (256). A row is whole blocks of bytes; nothing is re-quantized.

The arithmetic is ggml's, operation by operation in float32 (no fused multiply-add), so values are bitwise those of the `gguf` package.
Block layouts: ggml-common.h and ggml-quants.c of the ggml project.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tradespace.errors import InputError
from tradespace.formats.codes import Codes
from tradespace.formats.quantized import Part
from tradespace.spec.formats import WeightFormat, refusal


def _halves(blocks_NB: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block, as float32 [N, 1]."""
    return blocks_NB.view(torch.float16)[:, start // 2 : start // 2 + 1].float()


def _nibbles(packed_NB: Tensor, out_NE: Tensor) -> None:
    """Elements 0…15 of 32 are the low nibbles of 16 bytes, elements 16…31 the high ones."""
    out_NE[:, :16] = packed_NB & 15
    out_NE[:, 16:] = packed_NB >> 4


def _q4_0(blocks_NB: Tensor, out_NE: Tensor) -> None:
    _nibbles(blocks_NB[:, 2:], out_NE)
    out_NE.sub_(8).mul_(_halves(blocks_NB, 0))


def _q4_1(blocks_NB: Tensor, out_NE: Tensor) -> None:
    _nibbles(blocks_NB[:, 4:], out_NE)
    out_NE.mul_(_halves(blocks_NB, 0)).add_(_halves(blocks_NB, 2))


def _five_bits(packed_NB: Tensor, high_NB: Tensor) -> Tensor:
    """Quants 0…31 of 32 elements: nibbles as in `_nibbles`, and bit e of four little-endian bytes as the fifth bit of element e. uint8 [N, 32]."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed_NB.device)
    fifth_NE = (high_NB.unsqueeze(-1) >> bits).bitwise_and_(1).bitwise_left_shift_(4).flatten(1)
    fifth_NE[:, :16] |= packed_NB & 15
    fifth_NE[:, 16:] |= packed_NB >> 4
    return fifth_NE


def _q5_0(blocks_NB: Tensor, out_NE: Tensor) -> None:
    out_NE.copy_(_five_bits(blocks_NB[:, 6:], blocks_NB[:, 2:6])).sub_(16).mul_(_halves(blocks_NB, 0))


def _q5_1(blocks_NB: Tensor, out_NE: Tensor) -> None:
    out_NE.copy_(_five_bits(blocks_NB[:, 8:], blocks_NB[:, 4:8])).mul_(_halves(blocks_NB, 0)).add_(_halves(blocks_NB, 2))


def _q8_0(blocks_NB: Tensor, out_NE: Tensor) -> None:
    out_NE.copy_(blocks_NB[:, 2:].view(torch.int8)).mul_(_halves(blocks_NB, 0))


def _k_scales(blocks_NB: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of the 8 groups of a Q4_K or Q5_K block, float32 [N, 8, 1] each.

    12 bytes hold sixteen 6-bit numbers: scales 0…3 and minima 0…3 in the low 6 bits of bytes 0…7, whose top 2 bits belong to scales and minima 4…7;
    the low 4 bits of those are the low (scales) and high (minima) nibbles of bytes 8…11.
    """
    low_scales, low_minima, rest = blocks_NB[:, 4:8], blocks_NB[:, 8:12], blocks_NB[:, 12:16]
    scales_N8 = torch.cat([low_scales & 63, (rest & 15) | ((low_scales >> 2) & 48)], dim=1)
    minima_N8 = torch.cat([low_minima & 63, (rest >> 4) | ((low_minima >> 2) & 48)], dim=1)
    return (_halves(blocks_NB, 0) * scales_N8).unsqueeze(-1), (_halves(blocks_NB, 2) * minima_N8).unsqueeze(-1)


def _k_nibbles(packed_NB: Tensor, out_N8G: Tensor) -> None:
    """Of each 32 bytes, the low nibbles are one group of 32 and the high nibbles the next."""
    packed_N4G = packed_NB.unflatten(1, (4, 32))
    out_N8G[:, 0::2] = packed_N4G & 15
    out_N8G[:, 1::2] = packed_N4G >> 4


def _q4_k(blocks_NB: Tensor, out_NE: Tensor) -> None:
    scales_N81, minima_N81 = _k_scales(blocks_NB)
    out_N8G = out_NE.unflatten(1, (8, 32))
    _k_nibbles(blocks_NB[:, 16:], out_N8G)
    out_N8G.mul_(scales_N81).sub_(minima_N81)


def _q5_k(blocks_NB: Tensor, out_NE: Tensor) -> None:
    scales_N81, minima_N81 = _k_scales(blocks_NB)
    out_N8G = out_NE.unflatten(1, (8, 32))
    _k_nibbles(blocks_NB[:, 48:], out_N8G)
    for group in range(8):  # bit g of 32 bytes is the fifth bit of group g
        out_N8G[:, group] += ((blocks_NB[:, 16:48] >> group) & 1) << 4
    out_N8G.mul_(scales_N81).sub_(minima_N81)


def _q6_k(blocks_NB: Tensor, out_NE: Tensor) -> None:
    low_N22G, high_N2G = blocks_NB[:, :128].unflatten(1, (2, 2, 32)), blocks_NB[:, 128:192].unflatten(1, (2, 32))
    scales_N16 = blocks_NB[:, 192:208].view(torch.int8) * _halves(blocks_NB, 208)
    out_N24G = out_NE.unflatten(1, (2, 4, 32))
    # of each half block: groups 0, 1 are the low nibbles of 64 bytes, groups 2, 3 the high ones; 32 more bytes hold the top 2 bits of all four
    for group in range(4):
        nibbles_N2G = low_N22G[:, :, group % 2] & 15 if group < 2 else low_N22G[:, :, group % 2] >> 4
        out_N24G[:, :, group] = nibbles_N2G.bitwise_or_(((high_N2G >> (2 * group)) & 3) << 4)
    out_NE.sub_(32).unflatten(1, (16, 16)).mul_(scales_N16.unsqueeze(-1))


# GGML type → writes the float32 elements [N, block elements] of N blocks, uint8 [N, block bytes]
DEQUANTIZERS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip

# format → bytes of a block at which its 16-bit floats begin
FLOATS_AT = {"q8_0": (0,), "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}


def finite_blocks(rows_RB: Tensor, fmt: WeightFormat) -> bool:
    """Whether stored rows decode to finite numbers only: a block does where its scales are finite, since fp32 holds every product of them."""
    assert fmt.block is not None, f"{fmt.name} is stored in blocks"
    blocks_NB = rows_RB.reshape(-1, fmt.block[1])
    return all(bool(_halves(blocks_NB, start).isfinite().all()) for start in FLOATS_AT[fmt.name])


@dataclass(frozen=True, slots=True)
class BlockCodec:
    """One part: `weight`, a row's blocks one after the other. Codes are those very bytes; scales and minima lie within."""

    fmt: WeightFormat
    row_scale = False

    def rotation(self, columns: int) -> None:
        return None

    def parts(self, columns: int) -> dict[str, Part]:
        """Raises InputError for a width that is not whole blocks."""
        if (why := refusal(self.fmt, columns)) is not None:
            raise InputError(why)
        return {"weight": Part(torch.uint8, self.fmt.row_bytes(columns))}

    def pack(self, codes: Codes) -> dict[str, Tensor]:
        return {"weight": codes.codes_RC}

    def unpack(self, parts: Mapping[str, Tensor], columns: int) -> Codes:
        return Codes(parts["weight"])

    def decode(self, codes: Codes, out_RC: Tensor) -> None:
        assert self.fmt.block is not None, f"{self.fmt.name} is stored in blocks"
        elements, num_bytes = self.fmt.block
        DEQUANTIZERS[self.fmt.name.upper()](codes.codes_RC.reshape(-1, num_bytes), out_RC.view(-1, elements))
