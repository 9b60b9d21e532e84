"""Round to nearest: each row scaled by its largest magnitude and rounded. No data, one pass; the baseline that other quantizers must beat.

int8: scale = max|w| / 127, error at most scale / 2 per weight. Dense formats are cast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tradespace.errors import InputError
from tradespace.formats import DenseWeight, Weight
from tradespace.formats.int8 import MAX_CODE


def _magnitudes(values_RC: Tensor, name: str) -> Tensor:
    """max|w| of each row. Raises InputError for NaN and infinities, which `aminmax` lets through to here."""
    low_R, high_R = values_RC.aminmax(dim=1)
    found_R = torch.maximum(-low_R, high_R)
    if not found_R.isfinite().all():
        row = int((~found_R.isfinite()).nonzero()[0])
        raise InputError(f"tensor {name}: row {row} of a chunk holds NaN or infinity. The checkpoint is damaged, or training had diverged")
    return found_R


@torch.no_grad()
def fill_rtn(weight: Weight, rows: int | Tensor, values_RC: Tensor, *, name: str = "?") -> None:
    """Fills `weight` from dense `values_RC` (float, overwritten): from row `rows` on, or at the rows that an index tensor names.

    Takes no transient beside a number or two per row. Raises InputError (with `name`) for NaN, infinities, and values that fp16 cannot hold.
    """
    if not values_RC.numel():
        return
    magnitudes_R = _magnitudes(values_RC, name)
    target = slice(rows, rows + len(values_RC)) if isinstance(rows, int) else rows
    if isinstance(weight, DenseWeight):
        largest = torch.finfo(weight.weight.dtype).max
        if magnitudes_R.max() > largest:
            raise InputError(f"tensor {name}: a weight of magnitude {magnitudes_R.max():.4g} does not fit fp16 (at most {largest:.0f}). Use bf16")
        weight.set_rows(target, values_RC)
        return
    scale_R = magnitudes_R.float().div_(MAX_CODE)
    # a row of zeros has codes 0 whatever it is divided by; so has one whose scale underflows
    divisor_R = scale_R.masked_fill(scale_R == 0, 1.0)
    weight.set_rows(target, values_RC.div_(divisor_R[:, None]).round_().clamp_(-MAX_CODE, MAX_CODE), scale_R)
