"""Room for one tile of a matrix, dequantized: shared by all weights of a model, allocated once, a line of the ledger.

Bytes: (largest tile + most rows) · element bytes over the quantized matrices of the model, `workspace_shape` times the dtype's size.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tradespace.errors import EngineError

# a matrix is dequantized in tiles of rows of about this many elements: a tile stays in the cache between dequantizing and multiplying
TILE_ELEMENTS = 2**21


def tile_rows(rows: int, columns: int) -> int:
    """Rows of the tile in which a (rows, columns) matrix is dequantized: at most TILE_ELEMENTS elements, at least one row.

    >>> tile_rows(960, 576), tile_rows(49152, 576), tile_rows(2, 2**22)
    (960, 3640, 1)
    """
    return min(rows, max(1, TILE_ELEMENTS // columns))


def workspace_shape(shapes: Iterable[tuple[int, ...]]) -> tuple[int, int]:
    """(elements of the largest tile, most rows) over the shapes of all quantized matrices; (0, 0) for none.

    >>> workspace_shape([(960, 576), (49152, 576)])
    (2096640, 49152)
    """
    matrices = [shape[-2:] for shape in shapes]
    return max((tile_rows(R, C) * C for R, C in matrices), default=0), max((R for R, _ in matrices), default=0)


class Workspace:
    """Scratch for a tile, and a vector of ones, in the activations' dtype. A tile's content is valid until the next call that asks for one."""

    def __init__(self, num_elements: int, num_rows: int, dtype: torch.dtype, device: torch.device | str = "cpu"):
        # written, so that its pages count from the start
        self.flat = torch.zeros(num_elements, dtype=dtype, device=device)
        self.ones_R = torch.ones(num_rows, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.flat.nbytes + self.ones_R.nbytes

    def tile(self, rows: int, columns: int) -> Tensor:
        """A (rows, columns) view. Raises EngineError where the workspace was built for smaller matrices."""
        if rows * columns > self.flat.numel():
            raise EngineError(f"dequantizing {rows} rows of {columns} needs {rows * columns} elements; the workspace has {self.flat.numel()}")
        return self.flat[: rows * columns].view(rows, columns)
