"""Floats → GGUF's blocks. q8_0 q4_0 q4_1 q5_0 q5_1 are bitwise what the `gguf` package writes; K-quants are fitted by weighted least squares, as ggml's are.

q4_k and q5_k: each group of 32 is code · scale - minimum, with 6-bit scales and minima; q6_k: each group of 16 is (code - 32) · scale with 8-bit scales. A
group's scale is the best of a few around the one that its range suggests, errors counting more where weights are large; then the scales themselves are rounded,
and codes are chosen last, for the scales as they are stored. Layouts: ggml-common.h of the ggml project.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tradespace.errors import InputError
from tradespace.formats.codes import Codes
from tradespace.spec.formats import WeightFormat, refusal

# how far around its range's own scale a K-quant's group looks, in steps of the grid
K_SHIFTS = tuple(step / 8 for step in range(-8, 9))


def _halves(values_N1: Tensor) -> Tensor:
    """A float16 per block, as its two bytes. Raises InputError where it does not fit."""
    halves_N1 = values_N1.half()
    if not halves_N1.isfinite().all():
        raise InputError(f"a block's scale of {values_N1.abs().max():.4g} does not fit its 16 bits (at most 65504). Use int8 or bf16")
    return halves_N1.view(torch.uint8)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _nibbles(codes_NE: Tensor) -> Tensor:
    """16 bytes of 32 codes: the first 16 in the low halves."""
    return (codes_NE[:, :16] & 15) | (codes_NE[:, 16:] << 4)


def _fifth_bits(codes_NE: Tensor) -> Tensor:
    """4 bytes of 32 codes: bit e is the fifth bit of code e."""
    bits_N48 = (codes_NE >> 4).view(-1, 4, 8) << torch.arange(8, dtype=torch.uint8, device=codes_NE.device)
    return bits_N48.sum(dim=2, dtype=torch.uint8)


def _signed_grid(values_NE: Tensor, lowest: int) -> tuple[Tensor, Tensor]:
    """(scale [N, 1], codes uint8): the value of largest magnitude gets the code of `-lowest`, whatever its sign is."""
    largest_N1 = values_NE.gather(1, values_NE.abs().argmax(dim=1, keepdim=True))
    scale_N1 = largest_N1 / -lowest
    return scale_N1, (values_NE * _inverse(scale_N1)).add_(lowest + 0.5).trunc_().clamp_(0, 2 * lowest - 1).to(torch.uint8)


def _ranged_grid(values_NE: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """(scale [N, 1], minimum [N, 1], codes uint8) over the range of each block."""
    low_N1, high_N1 = values_NE.aminmax(dim=1, keepdim=True)
    scale_N1 = (high_N1 - low_N1) / levels
    return scale_N1, low_N1, ((values_NE - low_N1) * _inverse(scale_N1)).add_(0.5).trunc_().clamp_(0, levels).to(torch.uint8)


def _q8_0(values_NE: Tensor) -> Tensor:
    scale_N1 = values_NE.abs().amax(dim=1, keepdim=True) / 127
    scaled_NE = values_NE * _inverse(scale_N1)
    size_NE = scaled_NE.abs()
    whole_NE = size_NE.floor()
    # halves go away from zero
    codes_NE = scaled_NE.sign() * (whole_NE + (2 * (size_NE - whole_NE)).floor())
    return torch.cat([_halves(scale_N1), codes_NE.to(torch.int8).view(torch.uint8)], dim=1)


def _q4_0(values_NE: Tensor) -> Tensor:
    scale_N1, codes_NE = _signed_grid(values_NE, 8)
    return torch.cat([_halves(scale_N1), _nibbles(codes_NE)], dim=1)


def _q4_1(values_NE: Tensor) -> Tensor:
    scale_N1, low_N1, codes_NE = _ranged_grid(values_NE, 15)
    return torch.cat([_halves(scale_N1), _halves(low_N1), _nibbles(codes_NE)], dim=1)


def _q5_0(values_NE: Tensor) -> Tensor:
    scale_N1, codes_NE = _signed_grid(values_NE, 16)
    return torch.cat([_halves(scale_N1), _fifth_bits(codes_NE), _nibbles(codes_NE)], dim=1)


def _q5_1(values_NE: Tensor) -> Tensor:
    scale_N1, low_N1, codes_NE = _ranged_grid(values_NE, 31)
    return torch.cat([_halves(scale_N1), _halves(low_N1), _fifth_bits(codes_NE), _nibbles(codes_NE)], dim=1)


def _ranged_fit(values_NGE: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """(scale, minimum) [N, G, 1] of x ≈ scale · code - minimum, codes 0 … levels, minimum ≥ 0, by weighted least squares over a few grids."""
    weights_NGE = values_NGE.square().mean(dim=2, keepdim=True).sqrt() + values_NGE.abs()
    low_NG1, high_NG1 = values_NGE.amin(dim=2, keepdim=True).clamp_(max=0), values_NGE.amax(dim=2, keepdim=True)
    range_NG1 = high_NG1 - low_NG1
    best_scale, best_min = range_NG1 / levels, -low_NG1
    best_error = torch.full_like(range_NG1, torch.inf)
    total, total_x = weights_NGE.sum(dim=2, keepdim=True), (weights_NGE * values_NGE).sum(dim=2, keepdim=True)
    for shift in K_SHIFTS:
        codes = ((values_NGE - low_NG1) * ((levels + shift) * _inverse(range_NG1))).round_().clamp_(0, levels)
        weighted = weights_NGE * codes
        sum_q, sum_qq, sum_qx = (part.sum(dim=2, keepdim=True) for part in (weighted, weighted * codes, weighted * values_NGE))
        determinant = total * sum_qq - sum_q * sum_q
        scale = torch.where(determinant > 0, (total * sum_qx - total_x * sum_q) / determinant, best_scale)
        offset = torch.where(determinant > 0, (sum_qq * total_x - sum_q * sum_qx) / determinant, -best_min)
        # a minimum above zero cannot be stored: then the line goes through it
        through_zero = offset > 0
        scale = torch.where(through_zero, sum_qx / sum_qq.clamp(min=1e-30), scale)
        offset = offset.clamp_(max=0)
        error = (weights_NGE * (codes * scale + offset - values_NGE).square_()).sum(dim=2, keepdim=True)
        better = error < best_error
        best_error, best_scale, best_min = (torch.where(better, new, old) for new, old in ((error, best_error), (scale, best_scale), (-offset, best_min)))
    return best_scale.clamp_(min=0), best_min


def _six_bits(values_N8: Tensor) -> tuple[Tensor, Tensor]:
    """(float16 bytes [N, 2], codes 0 … 63 [N, 8] as int32): non-negative numbers over a common scale."""
    half_bytes_N2 = _halves(values_N8.amax(dim=1, keepdim=True) / 63)
    unit_N1 = half_bytes_N2.view(torch.float16).float()
    return half_bytes_N2, (values_N8 * _inverse(unit_N1)).round_().clamp_(0, 63).int()


def _k_block(values_NE: Tensor, bits: int) -> Tensor:
    values_N8G = values_NE.view(-1, 8, 32)
    levels = 2**bits - 1
    scale_N81, min_N81 = _ranged_fit(values_N8G, levels)
    (scale_unit, scale_N8), (min_unit, min_N8) = _six_bits(scale_N81[:, :, 0]), _six_bits(min_N81[:, :, 0])
    held_scale_N81 = (scale_unit.view(torch.float16).float() * scale_N8).unsqueeze(2)
    held_min_N81 = (min_unit.view(torch.float16).float() * min_N8).unsqueeze(2)
    codes_N8G = ((values_N8G + held_min_N81) * _inverse(held_scale_N81)).round_().clamp_(0, levels).to(torch.uint8)
    packed_scales = torch.cat(
        [
            scale_N8[:, :4] | (scale_N8[:, 4:] >> 4 << 6),
            min_N8[:, :4] | (min_N8[:, 4:] >> 4 << 6),
            (scale_N8[:, 4:] & 15) | (min_N8[:, 4:] & 15) << 4,
        ],
        dim=1,
    ).to(torch.uint8)
    nibbles = ((codes_N8G[:, 0::2] & 15) | (codes_N8G[:, 1::2] << 4)).flatten(1)
    parts = [scale_unit, min_unit, packed_scales, nibbles]
    if bits == 5:
        places = torch.arange(8, dtype=torch.uint8, device=codes_N8G.device)[:, None]
        parts.insert(3, ((codes_N8G >> 4) << places).sum(dim=1, dtype=torch.uint8))
    return torch.cat(parts, dim=1)


def _symmetric_fit(values_NGE: Tensor, lowest: int) -> Tensor:
    """scale [N, G, 1] of x ≈ scale · code, codes -lowest … lowest - 1, by least squares weighted with x² over a few grids; of either sign."""
    largest = values_NGE.gather(2, values_NGE.abs().argmax(dim=2, keepdim=True))
    weights_NGE = values_NGE.square()
    best_scale, best_gain = largest / -lowest, torch.zeros_like(largest)
    for shift in K_SHIFTS:
        codes = (values_NGE * ((-lowest + shift) * _inverse(largest))).round_().clamp_(-lowest, lowest - 1)
        weighted = weights_NGE * codes
        sum_qx, sum_qq = (weighted * values_NGE).sum(dim=2, keepdim=True), (weighted * codes).sum(dim=2, keepdim=True)
        gain = sum_qx.square() / sum_qq.clamp(min=1e-30)  # what the error loses by this grid
        better = gain > best_gain
        best_gain, best_scale = torch.where(better, gain, best_gain), torch.where(better, sum_qx / sum_qq.clamp(min=1e-30), best_scale)
    return best_scale


def _q6_k(values_NE: Tensor) -> Tensor:
    values_NGE = values_NE.view(-1, 16, 16)
    scale_NG = _symmetric_fit(values_NGE, 32)[:, :, 0]
    largest_N1 = scale_NG.gather(1, scale_NG.abs().argmax(dim=1, keepdim=True))
    unit_bytes = _halves(largest_N1 / -128)
    unit_N1 = unit_bytes.view(torch.float16).float()
    held_NG = (scale_NG * _inverse(unit_N1)).round_().clamp_(-128, 127)
    codes = (values_NGE * _inverse(unit_N1 * held_NG).unsqueeze(2)).round_().clamp_(-32, 31).add_(32).to(torch.uint8).view(-1, 2, 4, 32)
    # of each half of the block: groups of 32 a, b, c, d; low nibbles of a and b lie under those of c and d, and their top 2 bits in one byte
    low = ((codes[:, :, :2] & 15) | (codes[:, :, 2:] << 4)).flatten(1)
    places = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=codes.device)[:, None]
    high = ((codes >> 4) << places).sum(dim=2, dtype=torch.uint8).flatten(1)
    return torch.cat([low, high, held_NG.to(torch.int8).view(torch.uint8), unit_bytes], dim=1)


ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q4_k": lambda values_NE: _k_block(values_NE, 4),
    "q5_k": lambda values_NE: _k_block(values_NE, 5),
    "q6_k": _q6_k,
}


def encode_blocks(values_RC: Tensor, fmt: WeightFormat) -> Codes:
    """Codes of a GGUF format for float values. Raises InputError for rows that are no whole blocks, and for scales that 16 bits cannot hold."""
    if (why := refusal(fmt, values_RC.shape[1])) is not None:
        raise InputError(why)
    assert fmt.block is not None, f"{fmt.name} is stored in blocks"
    blocks_NB = ENCODERS[fmt.name](values_RC.float().reshape(-1, fmt.block[0]))
    return Codes(blocks_NB.view(len(values_RC), -1))
