"""x @ W.T + b as the library does it best. Reads W once for all rows; a row's last bits may depend on how many rows there are.

On a CPU, 16-bit products run at a few numbers of rows only (`spec/buckets.py` says why); the rows added are zeros, and dropped.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tradespace.spec.buckets import bucket

BUCKETED = (torch.bfloat16, torch.float16)


def linear(x_TC: Tensor, weight_RC: Tensor, bias_R: Tensor | None = None) -> Tensor:
    """y_TR in the dtype that x and W share."""
    rows = len(x_TC)
    if x_TC.dtype not in BUCKETED or x_TC.device.type != "cpu" or (padded := bucket(rows)) == rows:
        return F.linear(x_TC, weight_RC, bias_R)
    return F.linear(F.pad(x_TC, (0, 0, 0, padded - rows)), weight_RC, bias_R)[:rows]
