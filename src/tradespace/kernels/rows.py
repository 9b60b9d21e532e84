"""One row at a time: the tile in which a row's bits cannot depend on its neighbours.

A matrix product gives the same row different last bits at different places of a tile (measured for tiles of 8 to 64 rows and narrow outputs: the library's
kernels treat edges apart), and vectorized loops finish with scalar tails whose exp and tanh round differently. So the reference kernels hand the library
one row per call, each in memory of its own, so that shape and alignment are equal too. Cost: the weights are read once per row.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def each_row(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function` of the t-th rows (1, …) of all `inputs` (T, …), stacked again; gradients flow. An empty batch goes through `function` as it is."""
    num_rows = len(inputs[0])
    if num_rows == 0:
        return function(*inputs)
    # clone: a slice of a wider tensor starts at any address, and kernels peel to alignment
    return torch.cat([function(*(x[t : t + 1].clone() for x in inputs)) for t in range(num_rows)])
