"""Scales by the error that the outputs see: each group tries narrower ranges and keeps the one with the least Δ H_gg Δᵀ, H_gg its block of the Gram matrix.

AWQ's clipping (arXiv:2306.00978), with the Gram matrix in place of sampled inputs, so that it is exact. R·C·(group)·steps operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tradespace.formats.codes import spread
from tradespace.quantize.grid import affine_grid, encode_affine
from tradespace.spec.formats import WeightFormat

SHARES = tuple(1 - 0.025 * step for step in range(25))  # of the whole range: 1 … 0.4


def can_clip(fmt: WeightFormat) -> bool:
    """Whether the format's groups have scales worth searching for: integers below 8 bits."""
    return fmt.name.startswith("int") and fmt.bits < 8


def affine_values(fmt: WeightFormat, values_RC: Tensor, scale_RG: Tensor, zero_RG: Tensor | None) -> Tensor:
    """`values_RC` as this grid rounds them, fp32."""
    assert fmt.group is not None
    codes = encode_affine(values_RC, fmt, scale_RG, zero_RG)
    columns = values_RC.shape[1]
    zero = 2 ** (int(fmt.bits) - 1) if zero_RG is None else spread(zero_RG, fmt.group, columns).float()
    return codes.codes_RC.float().sub_(zero).mul_(spread(codes.need_scale(), fmt.group, columns))


def group_errors(delta_RC: Tensor, gram_CC: Tensor, group: int) -> Tensor:
    """Δ_g H_gg Δ_gᵀ of each row and group, [R, G]; the last group may be short."""
    columns = delta_RC.shape[1]
    whole = columns // group * group
    delta_GRg = delta_RC[:, :whole].unflatten(1, (-1, group)).transpose(0, 1)
    blocks_Ggg = gram_CC[:whole, :whole].unflatten(1, (-1, group)).unflatten(0, (-1, group)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    found_RG = torch.bmm(delta_GRg, blocks_Ggg).mul_(delta_GRg).sum(2).T
    if whole == columns:
        return found_RG
    rest_Rr = delta_RC[:, whole:]
    return torch.cat([found_RG, (rest_Rr @ gram_CC[whole:, whole:]).mul_(rest_Rr).sum(1, keepdim=True)], dim=1)


def clipped_grid(values_RC: Tensor, fmt: WeightFormat, gram_CC: Tensor, *, shares: tuple[float, ...] = SHARES) -> tuple[Tensor, Tensor | None]:
    """(scale_RG, zero_RG) as `grid.affine_grid`, with the range of each group chosen among `shares` of it."""
    assert fmt.group, f"{fmt.name} has no groups to clip"
    scale_RG, zero_RG = affine_grid(values_RC, fmt)
    best_RG = torch.full_like(scale_RG, torch.inf)
    for share in shares:
        tried_RG, tried_zero_RG = affine_grid(values_RC * share, fmt)
        error_RG = group_errors(affine_values(fmt, values_RC, tried_RG, tried_zero_RG).sub_(values_RC), gram_CC, fmt.group)
        better_RG = error_RG < best_RG
        best_RG = torch.where(better_RG, error_RG, best_RG)
        scale_RG = torch.where(better_RG, tried_RG, scale_RG)
        if zero_RG is not None and tried_zero_RG is not None:
            zero_RG = torch.where(better_RG, tried_zero_RG, zero_RG)
    return scale_RG, zero_RG
