"""Low-rank adapters beside linears: y = x @ W.T + (alpha/rank) · (x @ A.T) @ B.T. arXiv:2106.09685; over codes QLoRA, arXiv:2305.14314

Our fused matrices hold several published linears (q, k and v; gate and up), so one wrapper holds several pairs. Kept for the backward pass: x alone; x @ A.T is
computed again. Several adapters stand side by side, and each sequence of a batch names its own (`Span.adapter`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tradespace.adapt.frozen import frozen_product
from tradespace.errors import InputError, UnsupportedError
from tradespace.formats import DenseWeight, Weight
from tradespace.kernels.view import StepBatch
from tradespace.model.transformer import Transformer
from tradespace.spec.model import ModelSpec
from tradespace.spec.training import ADAPTED_ROLES, AdapterSpec, adapters


class Pairs(nn.Module):
    """One adapter's matrices beside one fused matrix: for each part A (rank, C) and B (rows, rank), fp32; None where a part has none."""

    def __init__(self, parts: Sequence[AdapterSpec], rank: int, alpha: float, device: torch.device | str):
        super().__init__()
        self.parts, self.scale = tuple(parts), alpha / rank
        for part in parts:
            self.register_parameter(f"A{part.part}", nn.Parameter(torch.empty(rank, part.columns, device=device), requires_grad=False))
            self.register_parameter(f"B{part.part}", nn.Parameter(torch.empty(part.rows, rank, device=device), requires_grad=False))

    def pairs(self) -> list[tuple[AdapterSpec, Tensor, Tensor]]:
        return [(part, self.get_parameter(f"A{part.part}"), self.get_parameter(f"B{part.part}")) for part in self.parts]


class LoraWeight(nn.Module):
    """Stands where the weight stood. `learning`: the adapter that sequences without a name of their own pass through; None: the base alone."""

    def __init__(self, base: Weight):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.learning: str | None = None
        self.names: list[str] = []

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base.bias

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def nbytes(self) -> int:
        return self.base.nbytes

    def adapted(self, x_TC: Tensor, batch: StepBatch) -> Tensor:
        """y_TR of the base, and what each sequence's adapter adds."""
        y_TR = frozen_product(self.base, x_TC)
        if self.learning is not None:
            return _added(self._of(self.learning), x_TC, y_TR)
        for number, name in enumerate(self.names):
            if name not in self.adapters:
                continue
            spans = [span for span in batch.spans if span.adapter == number and span.num_queries]
            if not spans:
                continue
            rows_R = torch.cat([torch.arange(span.query_start, span.query_start + span.num_queries, device=x_TC.device) for span in spans])
            y_TR = y_TR.index_copy(0, rows_R, _added(self._of(name), x_TC[rows_R], y_TR[rows_R]))
        return y_TR

    def _of(self, name: str) -> Pairs:
        found = self.adapters[name]
        assert isinstance(found, Pairs), "adapters are pairs"
        return found

    def linear(self, x_TC: Tensor, bias_R: Tensor | None = None) -> Tensor:
        """The base alone."""
        return self.base.linear(x_TC, bias_R)


def _added(adapter: Pairs, x_TC: Tensor, y_TR: Tensor) -> Tensor:
    found = adapter.pairs()
    layout = tuple((part.row_start, part.rows) for part, _, _ in found)
    return _LowRank.apply(y_TR, x_TC, layout, adapter.scale, *(matrix for _, A, B in found for matrix in (A, B)))  # pyright: ignore[reportReturnType]


class _LowRank(torch.autograd.Function):
    """Adds to y in place. Products in x's dtype, the matrices' gradients in theirs."""

    @staticmethod
    def forward(ctx: Any, y_TR: Tensor, x_TC: Tensor, layout: tuple[tuple[int, int], ...], scale: float, *matrices: Tensor) -> Tensor:
        u_TK, at = x_TC @ _joined(matrices[::2], x_TC.dtype).T, 0
        for (start, rows), B in zip(layout, matrices[1::2], strict=True):
            rank = B.shape[1]
            y_TR[:, start : start + rows].addmm_(u_TK[:, at : at + rank], B.to(x_TC.dtype).T, alpha=scale)
            at += rank
        ctx.mark_dirty(y_TR)
        ctx.save_for_backward(x_TC, *matrices)
        ctx.layout, ctx.scale = layout, scale
        return y_TR

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_TC, *matrices = ctx.saved_tensors
        dy_TR, joined_KC = gradients[0], _joined(matrices[::2], x_TC.dtype)
        u_TK, at = x_TC @ joined_KC.T, 0
        du_TK = torch.empty_like(u_TK)
        slopes_B: list[Tensor] = []
        for (start, rows), B in zip(ctx.layout, matrices[1::2], strict=True):
            part_TR, here = dy_TR[:, start : start + rows], slice(at, at + B.shape[1])
            du_TK[:, here] = part_TR @ B.to(x_TC.dtype)
            slopes_B.append((part_TR.T @ u_TK[:, here]).mul_(ctx.scale).to(B.dtype))
            at += B.shape[1]
        du_TK.mul_(ctx.scale)
        slopes_A = (du_TK.T @ x_TC).to(matrices[0].dtype).split([A.shape[0] for A in matrices[::2]])
        dx_TC = du_TK @ joined_KC if ctx.needs_input_grad[1] else None
        return dy_TR, dx_TC, None, None, *(slope for pair in zip(slopes_A, slopes_B, strict=True) for slope in pair)


def _joined(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The A of all parts, one under the other: they read the same x."""
    return (matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))).to(dtype)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An adapter's numbers."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ADAPTED_ROLES


def lora(
    model: Transformer, shape: Shape, *, name: str = "default", learn: bool = False, seed: int = 0, specs: Sequence[AdapterSpec] | None = None
) -> list[LoraWeight]:
    """Puts one more adapter beside the model's linears: A drawn as PEFT draws it (uniform, Kaiming with √5), B zero. With `learn` it is what is trained.

    `specs`: only these parts. Returns the wrappers in the order of the model's tensors.
    """
    specs = adapters(model.spec, shape.targets) if specs is None else specs
    grouped: dict[str, list[AdapterSpec]] = {}
    for spec in specs:
        grouped.setdefault(spec.tensor, []).append(spec)
    device = model.final_norm.weight.device if model.final_norm is not None else "cpu"
    generator = torch.Generator().manual_seed(seed)
    found = []
    for tensor, parts in grouped.items():
        wrapper = _wrapped(model, tensor)
        pairs = Pairs(parts, shape.rank, shape.alpha, device)
        for _, A, B in pairs.pairs():
            bound = A.shape[1] ** -0.5
            A.data.copy_((torch.rand(A.shape, generator=generator) * 2 - 1) * bound)
            B.data.zero_()
            A.requires_grad_(learn)
            B.requires_grad_(learn)
        wrapper.adapters[name] = pairs
        wrapper.learning = name if learn else wrapper.learning
        found.append(wrapper)
    _number(model, name)
    return found


def _wrapped(model: Transformer, tensor: str) -> LoraWeight:
    stem, _, last = tensor.rpartition(".")
    parent = model.get_submodule(stem)
    held = getattr(parent, last)
    if not isinstance(held, LoraWeight):
        held = LoraWeight(held)
        setattr(parent, last, held)
    return held


def _number(model: Transformer, name: str) -> None:
    """All wrappers know all names, so that a number means the same adapter everywhere."""
    wrappers = [module for module in model.modules() if isinstance(module, LoraWeight)]
    names = list(dict.fromkeys([known for wrapper in wrappers for known in wrapper.names] + [name]))
    for wrapper in wrappers:
        wrapper.names = list(names)


def adapter_names(model: Transformer) -> list[str]:
    """Names by number: what `Span.adapter` counts."""
    return next((list(module.names) for module in model.modules() if isinstance(module, LoraWeight)), [])


def adapter_parameters(model: Transformer, name: str = "default") -> dict[str, Tensor]:
    """The matrices of an adapter: "layers.0.attn.qkv.lora_A.0" → A of its first part, in the order of `spec.training.trained`."""
    found: dict[str, Tensor] = {}
    for tensor, wrapper in _wrappers(model).items():
        if name in wrapper.adapters:
            for part, A, B in wrapper._of(name).pairs():
                found[f"{tensor}.lora_A.{part.part}"], found[f"{tensor}.lora_B.{part.part}"] = A, B
    return found


def _wrappers(model: Transformer) -> dict[str, LoraWeight]:
    return {tensor: module for tensor, module in model.named_modules() if isinstance(module, LoraWeight)}


@torch.no_grad()
def merge(model: Transformer, name: str = "default") -> None:
    """Adds an adapter's product to its weights, rounded once, and takes all wrappers away. Raises UnsupportedError for a base in codes."""
    for tensor, wrapper in _wrappers(model).items():
        base = wrapper.base
        if not isinstance(base, DenseWeight):
            raise UnsupportedError(f"{tensor} is held in {base.format_name}: a merged adapter would be rounded away. Merge into a base in bf16, then quantize")
        if name in wrapper.adapters:
            adapter = wrapper._of(name)
            for part, A, B in adapter.pairs():
                rows = base.weight.data[part.row_start : part.row_start + part.rows]
                rows.copy_(rows.float().addmm_(B, A, alpha=adapter.scale))
        stem, _, last = tensor.rpartition(".")
        setattr(model.get_submodule(stem), last, base)


def check_adapter(spec: ModelSpec, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises InputError where an adapter's matrices are not those that the model takes."""
    for key, shape in found.items():
        if key not in wanted:
            raise InputError(f"{where}: {key} stands beside no linear of {spec.name} that takes an adapter")
        if tuple(shape) != tuple(wanted[key]):
            raise InputError(f"{where}: {key} has shape {list(shape)}; {spec.name} needs {list(wanted[key])}. It was trained on another model")
