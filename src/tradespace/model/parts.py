"""The pieces of a layer, built by name from `spec/tensors.py`'s list, so that a module holds exactly the tensors that the spec counts.

Every width comes from the tensor list and the LayerSpec (its N, K, F): a shard of a layer over several devices is a LayerSpec with fewer heads and columns.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tradespace.formats import DTYPES, FORMATS, CudaWeight, DenseWeight, NativeWeight, QuantizedWeight, Weight, Workspace, build_weight
from tradespace.kernels.linear.scratch import Scratch
from tradespace.kernels.norm import NORMS
from tradespace.kernels.view import StepBatch
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import QUANTIZABLE_ROLES, TensorSpec, model_tensors
from tradespace.spec.weights import FLOATS, WeightPlan, tile_elements, unpacked_elements, workspace_shape

PLAIN = (DenseWeight, QuantizedWeight, NativeWeight, CudaWeight)


class Norm(nn.Module):
    """RMS or layer norm over the last dimension; weight and bias in fp32, the weight being what multiplies (the loader adds Gemma's 1)."""

    def __init__(self, width: int, bias: bool, *, kind: str, eps: float, kernel: str, device: torch.device | str):
        super().__init__()
        self.kernel, self.kind, self.eps = NORMS[kernel, kind], kind, eps
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(width, dtype=torch.float32, device=device), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x, self.weight, self.bias, self.eps)


class Parts:
    """Builds a model's weights and norms by their canonical names, uninitialised. All that dequantize share one `workspace`."""

    def __init__(self, spec: ModelSpec, plan: WeightPlan, *, linear: str, device: torch.device | str, activations: str = "auto"):
        self.spec, self.plan, self.device = spec, plan, device
        self.native, self.cuda = linear == "native", linear == "cuda"
        # what such a step does between its products has no counterpart in modules: outside of it torch does it
        self.linear = "torch" if self.native or self.cuda else linear
        self.activations = activations
        self.dense = DTYPES[plan.dense]
        self.tensors: dict[str, TensorSpec] = {tensor.name: tensor for tensor in model_tensors(spec)}
        self.scratch = Scratch(device) if self.cuda else None
        self.workspace = None if self.native else cuda_workspace(spec, plan, device) if self.cuda else build_workspace(spec, plan, device)

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.tensors

    def weight(self, name: str) -> Weight:
        """The weight of this name, with its `bias` parameter (or None) beside it."""
        tensor = self.tensors[f"{name}.weight"]
        fmt = self.plan.format_of(tensor).name
        found: Weight
        if self.native and tensor.role in QUANTIZABLE_ROLES:
            found = NativeWeight(fmt, tensor.shape, activations=self.activations)
        elif self.cuda and tensor.role in QUANTIZABLE_ROLES:
            found = CudaWeight(fmt, tensor.shape, device=self.device, scratch=self.scratch, workspace=self.workspace)
        elif self.plan.layout == "cuda-codes" and tensor.role in QUANTIZABLE_ROLES and fmt not in FLOATS:
            found = CudaWeight(fmt, tensor.shape, device=self.device, workspace=self.workspace)
        else:
            found = build_weight(fmt, tensor.shape, dense=self.dense, device=self.device, linear=self.linear, workspace=self.workspace)
        found.bias = self.vector(f"{name}.bias")
        return found

    def vector(self, name: str) -> nn.Parameter | None:
        """A dense parameter of this very name, or None where the model has none."""
        if name not in self.tensors:
            return None
        dtype = DTYPES[self.plan.format_of(self.tensors[name]).name]
        return nn.Parameter(torch.empty(self.tensors[name].shape, dtype=dtype, device=self.device), requires_grad=False)

    def norm(self, name: str, *, kind: str | None = None) -> Norm | None:
        """The norm of this name, or None where the model has none."""
        if not self.has(name):
            return None
        width = self.tensors[f"{name}.weight"].shape[0]
        bias = f"{name}.bias" in self.tensors
        return Norm(width, bias, kind=kind or self.spec.norm, eps=self.spec.norm_eps, kernel=self.linear, device=self.device)


def build_workspace(spec: ModelSpec, plan: WeightPlan, device: torch.device | str = "cpu") -> Workspace | None:
    """What the model's quantized weights dequantize into; None where there are none."""
    formats = ((tensor, plan.format_of(tensor).name) for tensor in model_tensors(spec))
    shapes = [tensor.shape for tensor, name in formats if name in FORMATS and FORMATS[name].needs_workspace]
    return Workspace(*workspace_shape(shapes, tile_elements(plan)), DTYPES[plan.dense], device) if shapes else None


def cuda_workspace(spec: ModelSpec, plan: WeightPlan, device: torch.device | str) -> Workspace | None:
    """What coded matrices are decoded into for steps of many rows on a CUDA device; None where there are none."""
    elements = unpacked_elements(spec, plan)
    return Workspace(elements, 0, DTYPES[plan.dense], device) if elements else None


@runtime_checkable
class Adapted(Protocol):
    """A weight that `adapt/` wrapped: what it adds depends on whose tokens these are."""

    def adapted(self, x_TC: Tensor, batch: StepBatch) -> Tensor: ...


def project(weight: Weight | Adapted, x_TC: Tensor, batch: StepBatch | None = None) -> Tensor:
    """x @ W.T with the bias that `Parts.weight` put beside W, and what the batch's adapters add to it."""
    if batch is not None and not isinstance(weight, PLAIN) and isinstance(weight, Adapted):
        return weight.adapted(x_TC, batch)
    return weight.linear(x_TC, weight.bias)  # pyright: ignore[reportAttributeAccessIssue]
