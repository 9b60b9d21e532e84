"""cos and sin of every position, in fp32, one table per distinct `Rope` of a model. Cost: 4 · dims bytes per position of max_context.

Two scalings depend on a length. transformers takes the longest sequence that a call has seen, so keys that are cached already keep angles of another base
than the queries that meet them, and what a request answers depends on its neighbours. Here the length is the engine's `max_context`, fixed at build: all
positions of all sequences share one base, and the cache is consistent. With max_context within the trained context both are as trained; beyond it,
"dynamic" has the base of a sequence of max_context tokens (equal to transformers on one such sequence without a cache) and "longrope" its long factors.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, floor, log, pi, sqrt

import torch
from torch import Tensor

from tradespace.errors import InputError
from tradespace.kernels.rope.rotate import RopeRows
from tradespace.spec.mixers import Rope, RopeScaling


def _plain(theta: float, dims: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.int64).float() / dims)


def _dynamic(rope: Rope, scaling: RopeScaling, max_context: int) -> Tensor:
    """NTK-aware: the base grows with the length, so that the slowest dimension is interpolated and the fastest is not."""
    stretch = scaling.factor * max(max_context, scaling.original_context) / scaling.original_context - (scaling.factor - 1)
    return _plain(rope.theta * stretch ** (rope.dims / (rope.dims - 2)), rope.dims)


def _llama3(rope: Rope, scaling: RopeScaling) -> Tensor:
    """Short wavelengths stay, long ones are divided by `factor`, those between are blended."""
    frequencies = _plain(rope.theta, rope.dims)
    wavelengths = 2 * pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((scaling.original_context / wavelengths - low) / (high - low)).clamp(0, 1)
    blended = (1 - keep) * frequencies / scaling.factor + keep * frequencies
    stretched = torch.where(wavelengths > scaling.original_context / low, frequencies / scaling.factor, blended)
    return torch.where(wavelengths < scaling.original_context / high, frequencies, stretched)


def _yarn(rope: Rope, scaling: RopeScaling) -> Tensor:
    """Dimensions that turn more than beta_fast times in the trained context stay, those below beta_slow are divided by `factor`, a ramp lies between."""

    def dimension(rotations: float) -> float:
        return rope.dims * log(scaling.original_context / (rotations * 2 * pi)) / (2 * log(rope.theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = floor(first), ceil(last)
    first, last = max(first, 0), min(last, rope.dims - 1)
    width = last - first or 0.001  # a ramp of no width is a step
    ramp = ((torch.arange(rope.dims // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    periods = rope.theta ** (torch.arange(0, rope.dims, 2).float() / rope.dims)
    keep = 1 - ramp
    return 1.0 / (scaling.factor * periods) * (1 - keep) + 1.0 / periods * keep


def _yarn_magnitude(scaling: RopeScaling) -> float:
    def magnitude(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)


def _longrope(rope: Rope, scaling: RopeScaling, max_context: int) -> Tensor:
    factors = scaling.long_factor if max_context > scaling.original_context else scaling.short_factor
    if len(factors) != rope.dims // 2:
        raise InputError(f"longrope scaling has {len(factors)} factors; {rope.dims // 2} are needed for {rope.dims} rotary dimensions")
    powers = rope.theta ** (torch.arange(0, rope.dims, 2, dtype=torch.int64).float() / rope.dims)
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * powers)


def _longrope_magnitude(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 1.0 if scaling.factor <= 1 else sqrt(1 + log(scaling.factor) / log(scaling.original_context))


def inverse_frequencies(rope: Rope, max_context: int) -> tuple[Tensor, float]:
    """Radians per position of each pair (dims/2, fp32), and the factor on cos and sin. Raises InputError where the scaling lacks what its kind needs."""
    scaling = rope.scaling
    if scaling is None:
        return _plain(rope.theta, rope.dims), 1.0
    if scaling.kind != "linear" and scaling.original_context < 1:
        raise InputError(f"rope scaling '{scaling.kind}' needs original_context, the context that the model was trained with; it is {scaling.original_context}")
    if scaling.kind == "linear":
        return _plain(rope.theta, rope.dims) / scaling.factor, 1.0
    if scaling.kind == "dynamic":
        return _dynamic(rope, scaling, max_context), 1.0
    if scaling.kind == "llama3":
        return _llama3(rope, scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn(rope, scaling), _yarn_magnitude(scaling)
    return _longrope(rope, scaling, max_context), _longrope_magnitude(scaling)


def rope_table_bytes(ropes: Iterable[Rope], max_context: int) -> int:
    """Bytes of the tables of all distinct `ropes`: dims/2 cosines and as many sines, fp32, per position.

    >>> rope_table_bytes([Rope(dims=64), Rope(dims=64), Rope(dims=64, theta=5e5)], 1024)
    524288
    """
    return sum(4 * rope.dims * max_context for rope in set(ropes))


class RopeTable:
    """cos and sin of positions 0 … max_context - 1, halves only: (max_context, dims/2, 2) fp32."""

    def __init__(self, rope: Rope, max_context: int, device: torch.device | str = "cpu"):
        frequencies, magnitude = inverse_frequencies(rope, max_context)
        angles_SH = torch.arange(max_context).float()[:, None] * frequencies
        # filled half by half: no transient beyond one half's angles
        self.table_SH2 = torch.empty(*angles_SH.shape, 2, device=device)
        self.table_SH2[..., 0] = angles_SH.cos().mul_(magnitude)
        self.table_SH2[..., 1] = angles_SH.sin_().mul_(magnitude)
        self.rope = rope

    @property
    def nbytes(self) -> int:
        return self.table_SH2.nbytes

    def rows(self, positions_T: Tensor, dtype: torch.dtype) -> RopeRows:
        """What `rotate` needs at these positions, in the activations' dtype; gathered once per step, shared by all layers with this rope."""
        cos_TH, sin_TH = self.table_SH2[positions_T].to(dtype).unbind(-1)
        if self.rope.interleaved:
            cos, sin = cos_TH.repeat_interleave(2, dim=-1), torch.stack((-sin_TH, sin_TH), dim=-1).flatten(-2)
        else:
            cos, sin = torch.cat((cos_TH, cos_TH), dim=-1), torch.cat((-sin_TH, sin_TH), dim=-1)
        return RopeRows(cos.unsqueeze(1), sin.unsqueeze(1), self.rope.interleaved)
