"""GPTQ: columns rounded one by one, most excited first, each one's error made good by the rest (arXiv:2210.17323). See `feedback.py` for the mathematics.

Activation order with static groups: a column keeps the scale and zero point of the group in which it lies, chosen before any column is rounded, so the
codes are stored as any others. Scales are searched for by the Gram matrix (`clip.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tradespace.errors import UnsupportedError
from tradespace.formats.codes import Codes
from tradespace.formats.nf4 import levels
from tradespace.quantize.clip import can_clip, clipped_grid
from tradespace.quantize.feedback import Factor, factorize, round_with_feedback
from tradespace.quantize.rtn import round_to_nearest
from tradespace.spec.formats import WeightFormat

DAMPING = 0.01


def activation_order(gram_CC: Tensor) -> Tensor:
    """Columns by the energy of their inputs, largest first; of equals the first first."""
    return gram_CC.diagonal().sort(descending=True, stable=True).indices


def gptq_factor(gram_CC: Tensor, *, damping: float = DAMPING) -> Factor:
    """What `gptq` needs of the inputs, in activation order: shared by all matrices that they go into."""
    return factorize(gram_CC, damping=damping, order_C=activation_order(gram_CC))


def gptq(fmt: WeightFormat, weight_RC: Tensor, gram_CC: Tensor, factor: Factor) -> Codes:
    """Codes of `fmt` (integers of 2 to 8 bits, fp8, nf4) for a matrix whose inputs have this Gram matrix. Raises UnsupportedError for another format."""
    plain = _grid(fmt, weight_RC, gram_CC)
    if weight_RC.device.type == "cpu":
        return _rounded(fmt, plain, weight_RC, factor)
    # on an accelerator a column costs a dozen launches, each of which takes longer than its few numbers, so they run on the host
    with torch.device("cpu"):
        return on(_rounded(fmt, on(plain, "cpu"), weight_RC.cpu(), factor.on_host()), weight_RC.device)


def on(codes: Codes, device: torch.device | str) -> Codes:
    """The same codes, scales and zero points on a device."""
    scale_RG, zero_RG = (None if part is None else part.to(device) for part in (codes.scale_RG, codes.zero_RG))
    return Codes(codes.codes_RC.to(device), scale_RG, zero_RG)


def _rounded(fmt: WeightFormat, plain: Codes, weight_RC: Tensor, factor: Factor) -> Codes:
    rounder = _rounder(fmt, plain, tuple(weight_RC.shape))
    places = range(weight_RC.shape[1]) if factor.order_C is None else factor.order_C.tolist()

    def column(position: int, values_R1: Tensor) -> Tensor:
        return rounder.column(places[position], values_R1[:, 0]).unsqueeze(1)

    round_with_feedback(weight_RC, factor, column)
    return rounder.codes()


class AffineRounder:
    """Columns to integers on a grid that is fixed beforehand."""

    def __init__(self, fmt: WeightFormat, shape: tuple[int, ...], scale_RG: Tensor, zero_RG: Tensor | None):
        assert fmt.group is not None
        self.group, self.scale_RG, self.zero_RG = fmt.group or shape[1], scale_RG, zero_RG
        signed = fmt.bits == 8
        self.low, self.high = (-127, 127) if signed else (0, 2 ** int(fmt.bits) - 1)
        self.middle = 0 if signed else 2 ** (int(fmt.bits) - 1)
        self.codes_CR = torch.empty(shape[1], shape[0], dtype=torch.int8 if signed else torch.uint8)
        # columns as rows, and divided by infinity where a group is all zeros
        self.scale_GR = scale_RG.T.contiguous()
        self.divisor_GR = self.scale_GR.masked_fill(self.scale_GR == 0, torch.inf)
        self.zero_GR = None if zero_RG is None else zero_RG.T.float().contiguous()

    def column(self, place: int, values_R: Tensor) -> Tensor:
        """Keeps the codes of column `place` and returns their values."""
        g = place // self.group if len(self.scale_GR) > 1 else 0
        zero = self.middle if self.zero_GR is None else self.zero_GR[g]
        code_R = (values_R / self.divisor_GR[g]).round_().add_(zero).clamp_(self.low, self.high)
        self.codes_CR[place] = code_R
        return code_R.sub_(zero).mul_(self.scale_GR[g])

    def codes(self) -> Codes:
        return Codes(self.codes_CR.T.contiguous(), self.scale_RG, self.zero_RG)


class LevelRounder:
    """Columns to the nearest of a few levels times a scale, or to another float type: `encode(w / scale) -> codes`, `decode(codes) -> levels`."""

    def __init__(self, plain: Codes, group: int, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]):
        self.scale_RG, self.group, self.encode, self.decode = plain.need_scale(), group, encode, decode
        self.codes_RC = plain.codes_RC.clone()
        self.scale_GR = self.scale_RG.T.contiguous()
        self.divisor_GR = self.scale_GR.masked_fill(self.scale_GR == 0, torch.inf)

    def column(self, place: int, values_R: Tensor) -> Tensor:
        """Keeps the codes of column `place` and returns their values."""
        g = place // self.group if self.group and len(self.scale_GR) > 1 else 0
        code_R = self.encode(values_R / self.divisor_GR[g])
        self.codes_RC[:, place] = code_R
        return self.decode(code_R).mul_(self.scale_GR[g])

    def codes(self) -> Codes:
        return Codes(self.codes_RC, self.scale_RG)


def takes_feedback(fmt: WeightFormat) -> bool:
    """Whether gptq (or, for e8, `ldlq`) can fill the format: not GGUF's blocks, whose scales hang together."""
    return fmt.block is None or fmt.name.startswith("e8")


def _grid(fmt: WeightFormat, weight_RC: Tensor, gram_CC: Tensor) -> Codes:
    """Scales and zero points to round to; the codes beside them are not used but for their dtype."""
    if can_clip(fmt):
        scale_RG, zero_RG = clipped_grid(weight_RC, fmt, gram_CC)
        return Codes(torch.empty(0, dtype=torch.uint8), scale_RG, zero_RG)
    if not takes_feedback(fmt) or fmt.block is not None:
        raise UnsupportedError(f"gptq cannot fill {fmt.name}. Use rtn")
    return round_to_nearest(fmt.name, weight_RC)


def _rounder(fmt: WeightFormat, plain: Codes, shape: tuple[int, ...]) -> AffineRounder | LevelRounder:
    if can_clip(fmt) or plain.codes_RC.dtype == torch.int8:
        return AffineRounder(fmt, shape, plain.need_scale(), plain.zero_RG)
    if fmt.name.startswith("fp8"):
        return LevelRounder(plain, fmt.group or 0, lambda x_R: x_R.clamp_(-448, 448).to(torch.float8_e4m3fn), lambda code_R: code_R.float())
    table_L = levels(plain.codes_RC.device)
    edges_L = (table_L[:-1] + table_L[1:]) / 2
    return LevelRounder(plain, fmt.group or 0, lambda x_R: torch.bucketize(x_R, edges_L).to(torch.uint8), lambda code_R: table_L[code_R.int()])
