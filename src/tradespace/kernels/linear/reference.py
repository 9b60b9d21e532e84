"""x @ W.T + b in fp32, row by row: a row's result is the same bit for bit whatever else is in the batch. See `kernels/rows.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tradespace.kernels.rows import each_row

# rows of W that are widened to fp32 at once: bounds the transient to 4 · 1024 · C bytes
WEIGHT_TILE_ROWS = 1024


def linear(x_TC: Tensor, weight_RC: Tensor, bias_R: Tensor | None = None) -> Tensor:
    """y_TR in x's dtype. The product and the bias are computed in fp32 whatever the dtypes are, then rounded once."""
    tiles = []
    for start in range(0, len(weight_RC), WEIGHT_TILE_ROWS):
        tile_RC = weight_RC[start : start + WEIGHT_TILE_ROWS].float()
        bias = None if bias_R is None else bias_R[start : start + WEIGHT_TILE_ROWS].float()
        tiles.append(each_row(lambda x_1C, w=tile_RC, b=bias: F.linear(x_1C, w) if b is None else F.linear(x_1C, w) + b, x_TC.float()))
    return torch.cat(tiles, dim=1).to(x_TC.dtype)
