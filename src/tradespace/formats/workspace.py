"""Room for one tile of a matrix, dequantized: shared by all weights of a model, allocated once, a line of the ledger.

Bytes: (largest tile + most rows) · element bytes over the quantized matrices of the model, `spec.weights.workspace_shape` times the dtype's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tradespace.errors import EngineError


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
