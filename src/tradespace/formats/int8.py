"""int8 codes with one fp32 scale per output row or per matrix, symmetric: w ≈ code · scale, codes -127 … 127 (arXiv:2208.07339 without its outliers).

A few rows of bf16 go through torch's fused CPU kernel, which reads the codes as they are: half of bf16's traffic. More rows, and dtypes for which that kernel
is slow, are decoded in tiles as in every other format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tradespace.formats.scaled import ScaledWeight

# rows of x up to which the fused kernel wins over decoding: measured with 2 threads on an AVX-512 CPU, where they meet at about 16
FUSED_ROWS = 12
# the fused kernel reads whole vectors: past the end of a row that is no multiple of 16 (found on guarded pages). Twice that, for other instruction sets
FUSED_COLUMNS = 32
MAX_CODE = 127


class Int8Weight(ScaledWeight):
    """As `ScaledWeight`, with torch's fused kernel where it is safe and wins."""

    @property
    def fused(self) -> bool:
        on_cpu = self.weight.device.type == "cpu" and self.kernel.__module__.endswith("linear.torch")
        return on_cpu and self.dtype == torch.bfloat16 and self.shape[-1] % FUSED_COLUMNS == 0

    def _product(self, x_TC: Tensor, first_row: int) -> Tensor:
        if not self.fused or len(x_TC) > FUSED_ROWS:
            return super()._product(x_TC, first_row)
        assert self.workspace is not None, "checked by linear"
        codes = self._codes(slice(first_row, first_row + self.shape[-2]))
        # the kernel's own scales would be rounded to bf16: it gets ones, and the product is scaled in fp32
        return torch.ops.aten._weight_int8pack_mm(x_TC, codes.codes_RC, self.workspace.ones_R[: len(codes)]).mul_(codes.need_scale()[:, 0])
