"""The nearest point of the E8 codebooks, without looking at all 65,536: sorting eight magnitudes tells the best point of each shape at once.

A point's magnitudes are a permutation of one of a few shapes (k times 3/2; a 5/2; a 5/2 and a 3/2), and the largest products come from pairing the largest with
the largest. Where the signs of the vector have the wrong parity, the sign of its smallest coordinate is the cheapest to flip. See formats/e8.py.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tradespace.errors import InputError
from tradespace.formats.codes import Codes
from tradespace.formats.e8 import UNITS, E8Codec, join_bytes, magnitudes, odd_sums, points, short_vectors
from tradespace.formats.hadamard import rotation_of
from tradespace.spec.formats import WeightFormat, refusal

# lattice units per standard deviation of the row: what loses least on a normal law (found by trying; `search` looks around it row by row)
SPREAD = {2: 1.04, 3: 0.98, 4: 0.9}
SEARCHED = (0.88, 0.94, 1.06, 1.12)
NUM_SHAPES = 7  # k = 0 … 4 threes, a five, a five and a three
# of each: squared norm, whether the sum is odd
_NORMS = (2.0, 4.0, 6.0, 8.0, 10.0, 8.0, 10.0)
_ODD = (False, True, False, True, False, False, True)
NORM_12 = 227  # the first of the 29 explicit vectors
TILE_VECTORS = 2**14
# against a table of 256, whose products are what there is to hold: 4 MiB
SHORT_TILE_VECTORS = 2**12


@lru_cache(maxsize=1)
def _index_tables() -> tuple[Tensor, Tensor]:
    """(index by the bit mask of threes [256], index by 8 · place of the five + place of the three [64], the same place twice where there is no three)."""
    rows = magnitudes()
    threes, fives = torch.zeros(256, dtype=torch.int64), torch.zeros(64, dtype=torch.int64)
    for index, row in enumerate(rows[:NORM_12].tolist()):
        mask = sum(1 << place for place in range(8) if row[place] == 3)
        if 5 not in row:
            threes[mask] = index
        else:
            five = row.index(5)
            fives[8 * five + (row.index(3) if 3 in row else five)] = index
    return threes, fives


def _best_shape(shifted_N8: Tensor) -> tuple[Tensor, Tensor]:
    """For vectors (already shifted by a quarter): (score = |z|² - distance² of the best point of the codebook's half [N], its code's low 15 bits [N])."""
    threes, fives = _index_tables()
    size_N8 = shifted_N8.abs()
    sorted_N8, order_N8 = size_N8.sort(dim=1, descending=True)
    negative_N8 = shifted_N8 < 0
    odd_N = negative_N8.sum(dim=1) % 2 == 1
    base_N, tops_N8 = 0.5 * size_N8.sum(dim=1), sorted_N8.cumsum(dim=1)
    largest_N, second_N, smallest_N = sorted_N8[:, 0], sorted_N8[:, 1], sorted_N8[:, 7]
    gains = [torch.zeros_like(base_N), *(tops_N8[:, k] for k in range(4)), 2 * largest_N, 2 * largest_N + second_N]
    scores_SN = torch.empty(NUM_SHAPES, len(base_N))
    penalty_N = 2 * smallest_N
    for shape, gain_N in enumerate(gains):
        scores_SN[shape] = 2 * (base_N + gain_N) - _NORMS[shape] - penalty_N * (odd_N != _ODD[shape])
    score_N, shape_N = scores_SN.max(dim=0)

    bits_N8 = torch.ones_like(order_N8) << order_N8
    masks_N = torch.cat([torch.zeros_like(bits_N8[:, :1]), bits_N8[:, :4].cumsum(dim=1)], dim=1).gather(1, shape_N.clamp(max=4)[:, None])[:, 0]
    pair_N = 8 * order_N8[:, 0] + torch.where(shape_N == 6, order_N8[:, 1], order_N8[:, 0])
    index_N = torch.where(shape_N < 5, threes[masks_N], fives[pair_N])
    flipped_N = torch.where(odd_N != odd_sums()[index_N], order_N8[:, 7], 8)

    # five threes: worth a look where the best arrangement of them, of which the codebook holds half, would win
    bound_N = 2 * (base_N + tops_N8[:, 4]) - 12 - penalty_N * ~odd_N
    rows = (bound_N > score_N).nonzero()[:, 0]
    if len(rows):
        _try_norm_12(rows, size_N8, odd_N, score_N, index_N, flipped_N)
    negative_N8[torch.arange(len(flipped_N)), flipped_N.clamp(max=7)] ^= flipped_N < 8
    sign_bits_N = (negative_N8[:, :7].int() << torch.arange(7)).sum(dim=1)
    return score_N, index_N | sign_bits_N << 8


def _try_norm_12(rows: Tensor, size_N8: Tensor, odd_N: Tensor, score_N: Tensor, index_N: Tensor, flipped_N: Tensor) -> None:
    """Replaces the choice for those of `rows` that one of the 29 vectors of norm 12 suits better."""
    table_M8 = magnitudes()[NORM_12:].float() / 2
    size_n8 = size_N8[rows]
    cost_nM, place_nM = (size_n8[:, None] * table_M8).min(dim=2)
    scores_nM = 2 * size_n8 @ table_M8.T - 12 - 4 * cost_nM * ~odd_N[rows][:, None]  # nine halves or eleven, less an odd sum: (3·5 + 3)/2 = 9 is odd
    best_n, which_n = scores_nM.max(dim=1)
    better = best_n > score_N[rows]
    rows, which_n, best_n = rows[better], which_n[better], best_n[better]
    score_N[rows] = best_n
    index_N[rows] = NORM_12 + which_n
    flipped_N[rows] = torch.where(odd_N[rows], 8, place_nM[better].gather(1, which_n[:, None])[:, 0])


def nearest_points(x_N8: Tensor) -> Tensor:
    """Codes (int32 [N], below 2^16) of the codebook's points nearest to fp32 vectors, in lattice units: points are `formats.e8.points(…)[code] / 4`."""
    found = torch.empty(len(x_N8), dtype=torch.int32)
    for start in range(0, len(x_N8), TILE_VECTORS):
        here_N8 = x_N8[start : start + TILE_VECTORS]
        up_score_N, up_N = _best_shape(here_N8 - 0.25)
        down_score_N, down_N = _best_shape(here_N8 + 0.25)
        # |x - 1/4|² - score against |x + 1/4|² - score: the squares differ by the sum of x
        is_down_N = down_score_N - here_N8.sum(dim=1) > up_score_N
        found[start : start + TILE_VECTORS] = torch.where(is_down_N, down_N | 1 << 15, up_N)
    return found


def nearest_short(x_N8: Tensor) -> Tensor:
    """Codes (int32 [N], below 256) of the nearest short vectors, those being `formats.e8.short_vectors(…)[code] / 2` in lattice units."""
    table_M8 = short_vectors(x_N8.device).float() / 2
    norms_M = table_M8.square().sum(dim=1)
    found = torch.empty(len(x_N8), dtype=torch.int32)
    for start in range(0, len(x_N8), SHORT_TILE_VECTORS):
        here_N8 = x_N8[start : start + SHORT_TILE_VECTORS]
        found[start : start + SHORT_TILE_VECTORS] = torch.addmm(norms_M, here_N8, table_M8.T, beta=-1, alpha=2).argmax(dim=1)
    return found


def nearest_codes(x_N8: Tensor, bits: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """(codes of points, codes of residuals or None, values in lattice units [N, 8]) for vectors in lattice units; bits 2, 3 or 4.

    With a residual, the nearest points of both shifts are tried: the second nearest may leave a residual that is nearer to one of its own.
    """
    if bits == 2:
        first_N = nearest_points(x_N8)
        return first_N, None, points(x_N8.device)[first_N].float() / 4
    (up_N, up_rest_N, up_N8), (down_N, down_rest_N, down_N8) = (_with_residual(x_N8, first_N, bits) for first_N in _nearest_of_both(x_N8))
    is_down_N = (down_N8 - x_N8).square_().sum(dim=1) < (up_N8 - x_N8).square_().sum(dim=1)
    rest_N = torch.where(is_down_N, down_rest_N, up_rest_N)
    return torch.where(is_down_N, down_N, up_N), rest_N, torch.where(is_down_N[:, None], down_N8, up_N8)


def _nearest_of_both(x_N8: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the nearest points that are shifted up, and down."""
    found = torch.empty(2, len(x_N8), dtype=torch.int32)
    for start in range(0, len(x_N8), TILE_VECTORS):
        here_N8 = x_N8[start : start + TILE_VECTORS]
        found[0, start : start + TILE_VECTORS] = _best_shape(here_N8 - 0.25)[1]
        found[1, start : start + TILE_VECTORS] = _best_shape(here_N8 + 0.25)[1] | 1 << 15
    return found[0], found[1]


def _with_residual(x_N8: Tensor, first_N: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    unit = UNITS[bits][1] / UNITS[bits][0]  # lattice units per unit of the residual
    values_N8 = points(x_N8.device)[first_N].float() / 4
    left_N8 = (x_N8 - values_N8) / unit
    rest_N = nearest_short(left_N8) if bits == 3 else nearest_points(left_N8)
    rest_N8 = short_vectors(x_N8.device)[rest_N].float() / 2 if bits == 3 else points(x_N8.device)[rest_N].float() / 4
    return first_N, rest_N, values_N8 + rest_N8 * unit


def encode_rotated(rotated_RC: Tensor, fmt: WeightFormat, scale_R1: Tensor) -> Codes:
    """Codes of rows that are rotated already, for scales that are lattice units: the value of a code is `scale` · point. Takes about 40 bytes a value."""
    rows, columns = rotated_RC.shape
    bits = int(fmt.bits)
    scaled_RC = rotated_RC / scale_R1.masked_fill(scale_R1 == 0, torch.inf)
    first_N, rest_N, values_N8 = nearest_codes(scaled_RC.view(-1, 8), bits)
    stored = join_bytes(first_N.view(rows, -1), None if rest_N is None else rest_N.view(rows, -1), bits)
    return Codes(stored, _refit(rotated_RC, values_N8.view(rows, columns), scale_R1) / UNITS[bits][0])


def _refit(rotated_RC: Tensor, values_RC: Tensor, scale_R1: Tensor) -> Tensor:
    """The scale with the least squared error for codes that are chosen: <x, v> / <v, v>; as it was where that is not above zero."""
    found_R1 = (rotated_RC * values_RC).sum(dim=1, keepdim=True) / values_RC.square().sum(dim=1, keepdim=True).clamp_(min=1e-30)
    return torch.where((found_R1 > 0) & (scale_R1 > 0), found_R1, scale_R1)


def encode_lattice(values_RC: Tensor, fmt: WeightFormat, *, search: bool = False) -> Codes:
    """Codes of e8, e8-3 or e8-4 for float values: rotated, scaled by each row's deviation, nearest points, scale refitted. `search`: five times the work."""
    if (why := refusal(fmt, values_RC.shape[1])) is not None:
        raise InputError(why)
    rotated_RC = rotation_of(values_RC.shape[1]).apply(values_RC.float())
    deviation_R1 = rotated_RC.square().mean(dim=1, keepdim=True).sqrt_()
    scale_R1 = deviation_R1 / SPREAD[int(fmt.bits)]
    found = encode_rotated(rotated_RC, fmt, scale_R1)
    if not search:
        return found
    best_R = _errors(rotated_RC, fmt, found)
    for share in SEARCHED:
        tried = encode_rotated(rotated_RC, fmt, scale_R1 * share)
        error_R = _errors(rotated_RC, fmt, tried)
        better_R1 = (error_R < best_R)[:, None]
        best_R = torch.minimum(best_R, error_R)
        found = Codes(torch.where(better_R1, tried.codes_RC, found.codes_RC), torch.where(better_R1, tried.need_scale(), found.need_scale()))
    return found


def _errors(rotated_RC: Tensor, fmt: WeightFormat, codes: Codes) -> Tensor:
    """Squared error of each row."""
    values_RC = torch.empty_like(rotated_RC)
    E8Codec(fmt).decode(codes, values_RC)
    return values_RC.mul_(codes.need_scale()).sub_(rotated_RC).square_().sum(dim=1)
