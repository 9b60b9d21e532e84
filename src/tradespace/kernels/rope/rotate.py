"""The rotation: each pair (a, b) of a head becomes (a cos - b sin, b cos + a sin). Elementwise, so a row's bits do not depend on its neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RopeRows:
    """One step's angles, broadcast over heads. The sine's sign is that of the pair's first member negated, so that a rotation is x·cos + partner·sin."""

    cos_T1H: Tensor
    sin_T1H: Tensor
    interleaved: bool


def rotate(x_TNH: Tensor, rows: RopeRows) -> Tensor:
    """x with its first `dims` elements per head rotated; the rest passes through."""
    if x_TNH.is_cuda and x_TNH.requires_grad and not rows.interleaved and torch.is_grad_enabled():
        from tradespace.kernels.rope.triton_rotate import Rotation

        return Rotation.apply(x_TNH, rows.cos_T1H, rows.sin_T1H)  # pyright: ignore[reportReturnType]
    dims = rows.cos_T1H.shape[-1]
    head = x_TNH if dims == x_TNH.shape[-1] else x_TNH[..., :dims]
    if rows.interleaved:
        partner = head.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        partner = head.roll(dims // 2, dims=-1)
    # two products and a sum, not addcmul: a fused multiply-add rounds differently in a vectorized loop and in its scalar tail
    rotated = (head * rows.cos_T1H).add_(partner.mul_(rows.sin_T1H))
    return rotated if dims == x_TNH.shape[-1] else torch.cat((rotated, x_TNH[..., dims:]), dim=-1)
