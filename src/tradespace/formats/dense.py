"""Weights as floats: fp32, bf16, fp16. No codes, no scales; the product is the linear kernel's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tradespace.formats.codes import Codes
from tradespace.formats.workspace import Workspace
from tradespace.kernels.linear import LINEAR, Linear


class DenseWeight(nn.Module):
    """A matrix (R, C), or a stack of experts' matrices (E, R, C). Not trainable until someone sets `weight.requires_grad`.

    The tensor is called `weight` so that a module `layers.0.attn.qkv` in this format has the state `layers.0.attn.qkv.weight`. A product is computed
    in the weight's dtype; activations of another one are cast to it and back.
    """

    bias: nn.Parameter | None
    weight: nn.Parameter
    needs_workspace = False

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, *, device: torch.device | str = "cpu", linear: str = "torch", workspace: Workspace | None = None
    ):
        """Uninitialised; `dtype` is how it is held. `workspace` is for formats that dequantize: here it goes unused."""
        super().__init__()
        self.shape = shape
        self.kernel: Linear = LINEAR[linear]
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
        self.register_parameter("bias", None)  # whoever builds a model puts the bias beside its weight; `linear` takes it as an argument

    @property
    def format_name(self) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.weight.dtype]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    @property
    def rows_RC(self) -> Tensor:
        """The weight as rows of its last dimension, experts stacked."""
        return self.weight.detach().view(-1, self.shape[-1])

    @torch.no_grad()
    def set_rows(self, rows: slice | Tensor, codes: Codes | Tensor) -> None:
        """Fills whole rows (a slice, or indices) with floats (bare, or as `codes_RC`), cast to the weight's dtype."""
        values_RC = codes.codes_RC if isinstance(codes, Codes) else codes
        if isinstance(rows, slice):
            self.rows_RC[rows].copy_(values_RC)
        else:
            self.rows_RC.index_copy_(0, rows.to(self.weight.device), values_RC.to(self.weight.device, self.weight.dtype))

    def get_rows(self, start: int, stop: int) -> Codes:
        """Rows start … stop - 1 as they are held."""
        return Codes(self.rows_RC[start:stop])

    def linear(self, x_TC: Tensor, bias_R: Tensor | None = None, *, expert: int | None = None) -> Tensor:
        """y_TR = x @ W.T (+ bias), in x's dtype; of one matrix of the stack where `expert` names it."""
        weight_RC = self.weight if expert is None else self.weight[expert]
        if weight_RC.dtype == x_TC.dtype:
            return self.kernel(x_TC, weight_RC, bias_R)
        bias_R = None if bias_R is None else bias_R.to(weight_RC.dtype)
        return self.kernel(x_TC.to(weight_RC.dtype), weight_RC, bias_R).to(x_TC.dtype)

    def rows(self, ids_T: Tensor) -> Tensor:
        """The rows of these ids (T, C), in the weight's dtype: an embedding's look-up."""
        return F.embedding(ids_T, self.weight.view(-1, self.shape[-1]))

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Rows start … stop - 1 as floats."""
        return self.rows_RC[start:stop]
