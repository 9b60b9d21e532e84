"""e8: eight weights at a time as a point of the E8 lattice, after a random Hadamard rotation along the row: 2 bits a weight (QuIP#, arXiv:2402.04396).

A code of 16 bits names a point: 8 bits for its magnitudes, all half-integers, among the 256 of least norm (227 up to norm 10, 29 of norm 12); 7 bits for
signs, the eighth following from the parity that the lattice asks for; 1 bit that shifts the point by +1/4 or -1/4 everywhere. e8-4 adds a second such point,
3.5 times finer, for what the first one misses; e8-3 the nearest of 256 short vectors: zero, the 240 roots of E8, 15 of its next shell. One fp32 scale a row.

Only columns are rotated: every row has its own scale, so what rotating rows as well would even out is even already, and rows can be filled and looked up apart.
All values are small integers times the row's scale: a quarter of the lattice's unit (e8, e8-3), or a 28th (e8-4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

from tradespace.errors import InputError
from tradespace.formats.codes import Codes
from tradespace.formats.hadamard import Rotation, rotation_of
from tradespace.formats.quantized import Part
from tradespace.spec.formats import WeightFormat, refusal

# integers of a value per unit of the lattice, and per unit of the residual's: bits → (first, second)
UNITS = {2: (4, 0), 3: (4, 2), 4: (28, 8)}


@lru_cache(maxsize=1)
def magnitudes() -> Tensor:
    """The 256 vectors of half-integers, in halves: uint8 [256, 8] of 1, 3, 5. First k threes (k = 0 … 4), then one 5, then a 5 and a 3, then norm 12."""
    found = []
    for k in range(5):
        found += [[3 if place in places else 1 for place in range(8)] for places in combinations(range(8), k)]
    found += [[5 if place == five else 1 for place in range(8)] for five in range(8)]
    found += [[5 if place == five else 3 if place == three else 1 for place in range(8)] for five in range(8) for three in range(8) if five != three]
    # norm 12: five threes. Of the 56, the 28 whose ones stand at places of even sum (every place as often as any other), and one more
    triples = [triple for triple in combinations(range(8), 3) if sum(triple) % 2 == 0] + [(0, 1, 2)]
    found += [[1 if place in triple else 3 for place in range(8)] for triple in triples]
    return torch.tensor(found, dtype=torch.uint8)


@lru_cache(maxsize=1)
def odd_sums() -> Tensor:
    """For each row of `magnitudes`, whether its sum is odd: then an odd number of its coordinates is negative. bool [256]."""
    return magnitudes().int().sum(dim=1) // 2 % 2 == 1


@lru_cache(maxsize=4)
def points(device: torch.device) -> Tensor:
    """Every code's point in quarters: int8 [65536, 8], magnitudes at most 11. Half a MiB."""
    found_SIX8 = torch.empty(2, 128, 256, 8, dtype=torch.int8)  # shift, signs, index of the magnitudes
    bits = (torch.arange(128)[:, None] >> torch.arange(8)) & 1  # the eighth is zero so far
    for signs in range(128):
        negative_N8 = bits[signs].expand(256, 8).clone()
        negative_N8[:, 7] = (bits[signs].sum() + odd_sums().int()) % 2
        signed_N8 = magnitudes().int() * 2 * (1 - 2 * negative_N8)
        found_SIX8[0, signs], found_SIX8[1, signs] = signed_N8 + 1, signed_N8 - 1
    return found_SIX8.view(2**16, 8).to(device)


@lru_cache(maxsize=4)
def short_vectors(device: torch.device) -> Tensor:
    """The residual's 256 vectors of e8-3, in halves: int8 [256, 8]. Zero, the 240 roots of E8, and 15 vectors (0 … ±2 … 0) of norm 4."""
    found = [[0] * 8]
    for first, second in combinations(range(8), 2):
        for a in (2, -2):
            for b in (2, -2):
                found.append([a if place == first else b if place == second else 0 for place in range(8)])
    for bits in range(256):
        if bin(bits).count("1") % 2 == 0:
            found.append([-1 if bits >> place & 1 else 1 for place in range(8)])
    found += [[sign * 4 if place == at else 0 for place in range(8)] for at in range(8) for sign in (1, -1)][:15]
    return torch.tensor(found, dtype=torch.int8, device=device)


def split_bytes(codes_RB: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Stored rows → (codes of points [R, N] int32, codes of the residual [R, N] int32 or None), N eights of weights a row."""
    eights = codes_RB.shape[1] // bits
    first_RN, rest_RB = _joined_bytes(codes_RB[:, : 2 * eights]), codes_RB[:, 2 * eights :]
    if bits == 2:
        return first_RN, None
    return first_RN, rest_RB.int() if bits == 3 else _joined_bytes(rest_RB)


def join_bytes(first_RN: Tensor, rest_RN: Tensor | None, bits: int) -> Tensor:
    """The inverse of `split_bytes`: uint8 [R, bits · N]."""
    parts = [_low_bytes(first_RN)]
    if rest_RN is not None:
        parts.append(rest_RN.to(torch.uint8) if bits == 3 else _low_bytes(rest_RN))
    return torch.cat(parts, dim=1)


def _joined_bytes(bytes_RB: Tensor) -> Tensor:
    return bytes_RB[:, 0::2].int() | bytes_RB[:, 1::2].int() << 8


def _low_bytes(codes_RN: Tensor) -> Tensor:
    return torch.stack([codes_RN & 255, codes_RN >> 8], dim=2).to(torch.uint8).flatten(1)


@dataclass(frozen=True, slots=True)
class E8Codec:
    """Parts: `weight`, a row's 16-bit codes (low byte first) and then its residuals' codes; `scale` in fp32."""

    fmt: WeightFormat
    row_scale = True

    def rotation(self, columns: int) -> Rotation:
        return rotation_of(columns)

    def parts(self, columns: int) -> dict[str, Part]:
        """Raises InputError for a width that is no multiple of 8."""
        if (why := refusal(self.fmt, columns)) is not None:
            raise InputError(why)
        return {"weight": Part(torch.uint8, self.fmt.row_bytes(columns)), "scale": Part(torch.float32, 1)}

    def pack(self, codes: Codes) -> dict[str, Tensor]:
        return {"weight": codes.codes_RC, "scale": codes.need_scale()}

    def unpack(self, parts: Mapping[str, Tensor], columns: int) -> Codes:
        return Codes(parts["weight"], parts["scale"])

    def decode(self, codes: Codes, out_RC: Tensor) -> None:
        bits = int(self.fmt.bits)
        first_RN, rest_RN = split_bytes(codes.codes_RC, bits)
        found_RC = _looked_up(points(out_RC.device), first_RN)
        if rest_RN is not None:
            table = points(out_RC.device) if bits == 4 else short_vectors(out_RC.device)
            # integers of at most 99: a quarter is 7 parts of a 28th, and a quarter of the finer lattice 2
            found_RC = found_RC * (UNITS[bits][0] // 4) + _looked_up(table, rest_RN) * (UNITS[bits][1] // (4 if bits == 4 else 2))
        out_RC.copy_(found_RC)


def _looked_up(table: Tensor, codes_RN: Tensor) -> Tensor:
    return table.index_select(0, codes_RN.flatten()).view(len(codes_RN), -1)
