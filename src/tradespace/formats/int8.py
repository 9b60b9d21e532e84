"""int8 codes with one fp32 scale per output row, symmetric: w ≈ code · scale, codes -127 … 127. C + 4 bytes a row (arXiv:2208.07339 without its outliers).

y = (x @ codes.T) · scale, in two ways. A few rows of bf16 go through torch's fused CPU kernel, which reads the codes as they are: half of bf16's traffic.
More rows, and dtypes for which that kernel is slow, dequantize tiles of rows into the shared workspace and multiply densely.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tradespace.errors import EngineError
from tradespace.formats.workspace import Workspace
from tradespace.kernels.linear import LINEAR, Linear
from tradespace.spec.weights import tile_rows

# rows of x up to which the fused kernel wins over dequantizing: measured with 2 threads on an AVX-512 CPU, where they meet at about 16
FUSED_ROWS = 12
# the fused kernel reads whole vectors: past the end of a row that is no multiple of 16 (found on guarded pages). Twice that, for other instruction sets
FUSED_COLUMNS = 32
MAX_CODE = 127


class Int8Weight(nn.Module):
    """As `DenseWeight`, with `weight` int8 and `scale` fp32 over the leading dimensions. Never trainable."""

    bias: nn.Parameter | None
    weight: Tensor
    scale: Tensor
    needs_workspace = True

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, *, device: torch.device | str = "cpu", linear: str = "torch", workspace: Workspace | None = None
    ):
        """Uninitialised; `dtype` is that of the activations. A product needs the `workspace`, a look-up does not."""
        super().__init__()
        self.shape, self.dtype, self.workspace = shape, dtype, workspace
        self.kernel: Linear = LINEAR[linear]
        self.fused = linear == "torch" and dtype == torch.bfloat16 and torch.device(device).type == "cpu" and shape[-1] % FUSED_COLUMNS == 0
        self.register_parameter("bias", None)  # as DenseWeight's
        self.register_buffer("weight", torch.empty(shape, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(shape[:-1], dtype=torch.float32, device=device))

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scale.nbytes

    @property
    def rows_RC(self) -> Tensor:
        """The codes as rows of the last dimension, experts stacked."""
        return self.weight.view(-1, self.shape[-1])

    def set_rows(self, rows: slice | Tensor, codes_RC: Tensor, scale_R: Tensor) -> None:
        """Fills whole rows (a slice, or indices) with codes (whole numbers of any dtype) and scales."""
        if isinstance(rows, slice):
            self.rows_RC[rows].copy_(codes_RC)
            self.scale.view(-1)[rows].copy_(scale_R)
        else:
            self.rows_RC.index_copy_(0, rows, codes_RC.to(torch.int8))
            self.scale.view(-1).index_copy_(0, rows, scale_R.float())

    def linear(self, x_TC: Tensor, bias_R: Tensor | None = None, *, expert: int | None = None) -> Tensor:
        """y_TR = x @ W.T (+ bias), in x's dtype; of one matrix of the stack where `expert` names it."""
        codes_RC, scale_R = (self.weight, self.scale) if expert is None else (self.weight[expert], self.scale[expert])
        if self.workspace is None:
            raise EngineError("an int8 product needs a workspace to dequantize into; give Int8Weight one")
        if x_TC.requires_grad:
            raise EngineError("int8 weights pass no gradient on; hold what lies above the trained parameters in bf16 or fp32")
        if self.fused and len(x_TC) <= FUSED_ROWS:
            # the kernel's own scales would be rounded to bf16: it gets ones, and the product is scaled in fp32
            y_TR = torch.ops.aten._weight_int8pack_mm(x_TC, codes_RC, self.workspace.ones_R[: len(codes_RC)]).mul_(scale_R)
        else:
            y_TR = self._dequantized(x_TC, codes_RC, scale_R)
        return y_TR if bias_R is None else y_TR.add_(bias_R)

    def _dequantized(self, x_TC: Tensor, codes_RC: Tensor, scale_R: Tensor) -> Tensor:
        assert self.workspace is not None
        num_rows, num_columns = codes_RC.shape
        tiles, step = [], tile_rows(num_rows, num_columns)
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            tile_RC = self.workspace.tile(stop - start, num_columns).copy_(codes_RC[start:stop])
            if x_TC.dtype == torch.float16:  # a product of bare codes could overflow: scale the weights
                tiles.append(self.kernel(x_TC, tile_RC.mul_(scale_R[start:stop, None]), None))
            else:  # codes are exact in bf16, scaled weights would not be
                tiles.append(self.kernel(x_TC, tile_RC, None).mul_(scale_R[start:stop]))
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1)

    def rows(self, ids_T: Tensor) -> Tensor:
        """The rows of these ids (T, C) as floats of the activations' dtype: an embedding's look-up."""
        return (self.rows_RC[ids_T] * self.scale.view(-1)[ids_T].unsqueeze(-1)).to(self.dtype)

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Rows start … stop - 1 as floats of the activations' dtype."""
        return (self.rows_RC[start:stop] * self.scale.view(-1)[start:stop, None]).to(self.dtype)
