"""The grids of the integer formats: which scale and zero point each group gets, and which code each value. No data, one pass.

Symmetric: scale = max|w| / ((2^bits - 1) / 2), so that both ends are off by at most half a step (the lowest code reaches half a step further than needed, the
highest half a step less). With zero points: scale = (max - min) / (2^bits - 1) over a range that includes 0, zero = round(-min / scale).
`search` tries narrower ranges and keeps, group by group, the one with the least squared error.
Scales are rounded to the 16 bits in which they are stored before any code is chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tradespace.errors import InputError
from tradespace.formats.codes import Codes, group_extremes, spread
from tradespace.spec.formats import WeightFormat

SHRINK_STEPS = 40
# the narrowest range that a search tries: 2-bit grids gain down to about here, wider ones stop long before
LEAST_SHARE = 0.4


def stored_scales(scale_RG: Tensor, fmt: WeightFormat) -> Tensor:
    """Scales (fp32) rounded as `fmt` stores them. Raises InputError where 16 bits cannot hold one."""
    if fmt.scale_bytes != 2:
        return scale_RG
    found_RG = scale_RG.half().float()
    if not found_RG.isfinite().all():
        raise InputError(f"a scale of {scale_RG.max():.4g} does not fit the 16 bits that {fmt.name} gives it (at most 65504). Use int8 or bf16")
    return found_RG


def _divisors(scale_RG: Tensor) -> Tensor:
    """Scales to divide by: a group of zeros (or one whose scale underflows) gets the code of zero whatever it is divided by."""
    return scale_RG.masked_fill(scale_RG == 0, torch.inf)


def affine_grid(values_RC: Tensor, fmt: WeightFormat, *, search: bool = False) -> tuple[Tensor, Tensor | None]:
    """(scale_RG fp32, as stored; zero_RG uint8, or None where `fmt` is symmetric) for float values. For int2/3/4 and int8 (one group a row).

    Raises InputError where a scale does not fit its 16 bits. Takes four numbers a group beside the values; with `search` about three copies of them.
    """
    assert fmt.group is not None, f"{fmt.name} has no grid"
    if fmt.bits == 8:
        return stored_scales(_magnitudes(values_RC, fmt.group) / 127, fmt), None
    levels = 2 ** int(fmt.bits) - 1
    low_RG, high_RG = (extreme.float() for extreme in group_extremes(values_RC, fmt.group))
    if not fmt.zero_bits:
        low_RG = torch.maximum(-low_RG, high_RG).neg_()
        high_RG = -low_RG
    else:
        low_RG, high_RG = low_RG.clamp_(max=0), high_RG.clamp_(min=0)
    scale_RG, zero_RG = _grid_of(low_RG, high_RG, levels, fmt)
    if not search:
        return scale_RG, zero_RG
    best_RG = _errors(values_RC, fmt, scale_RG, zero_RG)
    for share in torch.linspace(1, LEAST_SHARE, SHRINK_STEPS + 1)[1:].tolist():
        tried_RG, tried_zero_RG = _grid_of(low_RG * share, high_RG * share, levels, fmt)
        error_RG = _errors(values_RC, fmt, tried_RG, tried_zero_RG)
        better_RG = error_RG < best_RG
        best_RG = torch.where(better_RG, error_RG, best_RG)
        scale_RG = torch.where(better_RG, tried_RG, scale_RG)
        if zero_RG is not None and tried_zero_RG is not None:
            zero_RG = torch.where(better_RG, tried_zero_RG, zero_RG)
    return scale_RG, zero_RG


def _magnitudes(values_RC: Tensor, group: int) -> Tensor:
    low_RG, high_RG = group_extremes(values_RC, group)
    return torch.maximum(-low_RG, high_RG).float()


def _grid_of(low_RG: Tensor, high_RG: Tensor, levels: int, fmt: WeightFormat) -> tuple[Tensor, Tensor | None]:
    scale_RG = stored_scales((high_RG - low_RG) / levels, fmt)
    if not fmt.zero_bits:
        return scale_RG, None
    return scale_RG, (-low_RG / _divisors(scale_RG)).round_().clamp_(0, levels).to(torch.uint8)


def encode_affine(values_RC: Tensor, fmt: WeightFormat, scale_RG: Tensor, zero_RG: Tensor | None = None) -> Codes:
    """The nearest codes to float values on this grid: int2/3/4 (uint8, zero points included) and int8 (int8, symmetric). Ties go to the even code offset.

    `scale_RG` is rounded as it is stored first. Takes about 12 bytes a value beside them.
    """
    assert fmt.group is not None, f"{fmt.name} has no grid"
    scale_RG = stored_scales(scale_RG.float(), fmt)
    steps_RC = values_RC.float() / spread(_divisors(scale_RG), fmt.group, values_RC.shape[1])
    if fmt.bits == 8:
        return Codes(steps_RC.round_().clamp_(-127, 127).to(torch.int8), scale_RG)
    levels = 2 ** int(fmt.bits) - 1
    zero = (levels + 1) // 2 if zero_RG is None else spread(zero_RG, fmt.group, values_RC.shape[1])
    return Codes(steps_RC.round_().add_(zero).clamp_(0, levels).to(torch.uint8), scale_RG, zero_RG)


def _errors(values_RC: Tensor, fmt: WeightFormat, scale_RG: Tensor, zero_RG: Tensor | None) -> Tensor:
    """Squared error of each group on this grid, [R, G]."""
    assert fmt.group is not None, f"{fmt.name} has no grid"
    columns, levels = values_RC.shape[1], 2 ** int(fmt.bits) - 1
    zero = (levels + 1) // 2 if zero_RG is None else spread(zero_RG, fmt.group, columns).float()
    spread_RC = spread(scale_RG, fmt.group, columns)
    off_RC = (values_RC / spread(_divisors(scale_RG), fmt.group, columns)).round_().add_(zero).clamp_(0, levels).sub_(zero).mul_(spread_RC).sub_(values_RC)
    squares_RC = torch.nn.functional.pad(off_RC.square_(), (0, -columns % (fmt.group or columns)))
    return squares_RC.unflatten(1, (-1, fmt.group or columns)).sum(dim=2)
