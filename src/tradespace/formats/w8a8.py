"""W8A8: int8 weights with a scale per row, and activations in int8 with a scale per token, symmetric; sums in int32, exact (arXiv:2211.10438).

y = (x_codes @ w_codes.T) · x_scale · w_scale, x_scale = max|x| / 127.5 of each token, codes -128 … 127: the arithmetic of compressed-tensors, which halves its
range of 255 steps for a symmetric scale, so that the largest positive magnitude is half a step too large and is cut. Then its checkpoints give the same
logits here as in transformers. The integer product is torch's where the CPU has instructions for it; else the same integers come out of fp32 products over
runs of columns so short that no sum leaves the 24 bits in which fp32 is exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tradespace.formats.scaled import ScaledWeight
from tradespace.spec.buckets import bucket
from tradespace.spec.weights import tile_rows

# half of the 255 steps between -128 and 127
HALF_RANGE = 127.5
# columns whose products of two codes, at most 128 · 127 each, sum up to less than 2^24
EXACT_COLUMNS = 1024
# torch's integer product is wrong for a width of 1 (found by test), and reads whole vectors: it is trusted with whole ones only
INTEGER_COLUMNS = 32


def quantize_tokens(x_TC: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 codes [T, C], fp32 scales [T, 1]): each token by its own largest magnitude. Takes 8 bytes a value beside x."""
    scale_T1 = x_TC.abs().amax(dim=1, keepdim=True).float() / HALF_RANGE
    codes_TC = (x_TC.float() / scale_T1.masked_fill(scale_T1 == 0, torch.inf)).clamp_(-128, 127).round_()
    return codes_TC.to(torch.int8), scale_T1


class W8A8Weight(ScaledWeight):
    """As `ScaledWeight`, with integer products. The same bits whatever the linear kernel and whatever else is in the batch."""

    @property
    def integer_kernel(self) -> bool:
        """Whether torch's integer product uses the CPU's own instructions (elsewhere it is a plain loop), on a width for which it is right."""
        return self.weight.device.type == "cpu" and torch.cpu._is_vnni_supported() and self.shape[-1] % INTEGER_COLUMNS == 0

    def _product(self, x_TC: Tensor, first_row: int) -> Tensor:
        num_rows = self.shape[-2]
        if not len(x_TC):
            return x_TC.new_empty(0, num_rows)
        codes_TC, scale_T1 = quantize_tokens(x_TC)
        held = self._codes(slice(first_row, first_row + num_rows))
        sums_TR = _sums(codes_TC, held.codes_RC) if self.integer_kernel else self._sums_in_fp32(codes_TC, held.codes_RC)
        return sums_TR.float().mul_(scale_T1).mul_(held.need_scale()[:, 0]).to(x_TC.dtype)

    def _sums_in_fp32(self, codes_TC: Tensor, weight_RC: Tensor) -> Tensor:
        """The integer product, exact, from fp32 products of at most EXACT_COLUMNS columns; the weights become fp32 in the workspace, tile by tile."""
        assert self.workspace is not None, "checked by linear"
        num_rows, num_columns = weight_RC.shape
        room = self.workspace.flat.view(torch.float32) if self.workspace.flat.numel() % 2 == 0 else self.workspace.flat[:-1].view(torch.float32)
        width = min(EXACT_COLUMNS, num_columns)
        if room.numel() < width:  # a matrix of a row or two: its workspace is smaller than a run of columns
            room = torch.empty(width, device=codes_TC.device)
        step = max(1, min(tile_rows(num_rows, num_columns), room.numel() // width))
        sums_TR = torch.zeros(len(codes_TC), num_rows, dtype=torch.int32, device=codes_TC.device)
        for column in range(0, num_columns, width):
            part_TC = codes_TC[:, column : column + width].float()
            for row in range(0, num_rows, step):
                part_RC = weight_RC[row : row + step, column : column + width]
                tile_RC = room[: part_RC.numel()].view(part_RC.shape).copy_(part_RC)
                sums_TR[:, row : row + step] += F.linear(part_TC, tile_RC).int()
        return sums_TR


def _sums(codes_TC: Tensor, weight_RC: Tensor) -> Tensor:
    """int32 codes @ weight.T. Rows are padded to a few numbers of them: the library compiles a kernel for each (`spec/buckets.py`)."""
    padded = bucket(len(codes_TC))
    return torch.ops.aten._int_mm(F.pad(codes_TC, (0, 0, 0, padded - len(codes_TC))), weight_RC.T)[: len(codes_TC)]
