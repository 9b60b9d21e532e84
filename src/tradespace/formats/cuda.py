"""A weight in any format that the CUDA kernels read, laid out once for them (`kernels/linear/packed.py`) in place of the format's own layout.

Bytes: `spec.cuda.packed_bytes`. Codes, scales and zero points are those of the format, unchanged: only where they lie differs.
Triton is imported where a kernel runs: this module is there without it. Few rows of activations meet the
codes in registers; many rows meet the matrix dequantized once into the shared workspace, or torch's own 8-bit product.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from tradespace.errors import EngineError, UnsupportedError
from tradespace.formats.codes import Codes
from tradespace.formats.nf4 import quantize_scales
from tradespace.formats.workspace import Workspace
from tradespace.kernels.linear import packed
from tradespace.kernels.linear.scratch import Scratch
from tradespace.spec import cuda


class CudaWeight(nn.Module):
    """One matrix (R, C), or a stack of experts' matrices (E, R, C) whose rows lie one after the other. Never trainable. Activations are bf16."""

    bias: nn.Parameter | None

    def __init__(
        self, format_name: str, shape: tuple[int, ...], *, device: torch.device | str, scratch: Scratch | None = None, workspace: Workspace | None = None
    ):
        """Unfilled. A product of few rows needs the `scratch`, one of many rows of a coded weight the `workspace`; look-ups need neither."""
        super().__init__()
        if not cuda.runs(format_name):
            raise UnsupportedError(f"the CUDA kernels do not read {format_name}. They read {', '.join(cuda.FORMATS)}")
        if len(shape) == 3 and shape[1] % cuda.CHUNK_ROWS and not cuda.FORMATS[format_name].plain:
            raise UnsupportedError(f"experts of {shape[1]} rows do not fill whole chunks of {cuda.CHUNK_ROWS}; the CUDA kernels cannot hold them")
        self.format_name, self.shape, self.scratch, self.workspace = format_name, shape, scratch, workspace
        self.packed = packed.allocate(format_name, shape, device)
        self._waiting: Tensor | None = None  # plain scales of nf4, until all are known
        for name in ("codes", "scale", "zero", "nested", "offset"):
            part = getattr(self.packed, name)
            if part is not None:
                self.register_buffer(name, part)
        self.register_parameter("bias", None)

    @property
    def needs_workspace(self) -> bool:
        return not self.packed.layout.plain

    @property
    def num_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def set_rows(self, rows: slice | Tensor, codes: Codes | Tensor) -> None:
        """Fills whole rows (a slice, or indices): codes as the format has them, or numbers where it is dense."""
        if isinstance(codes, Tensor):
            packed.fill(self.packed, rows, codes, {})
            return
        parts: dict[str, Tensor] = {}
        if self.packed.layout.nested:
            parts["scale"] = self._nest(rows, codes)
        elif codes.scale_RG is not None and self.packed.scale is not None:
            parts["scale"] = codes.scale_RG
        if codes.zero_RG is not None:
            parts["zero"] = codes.zero_RG
        packed.fill(self.packed, rows, codes.codes_RC, parts)

    def _nest(self, rows: slice | Tensor, codes: Codes) -> Tensor:
        """nf4's codes of scales, with what they refer to put in its place."""
        nested, offset = self.packed.nested, self.packed.offset
        assert nested is not None and offset is not None
        groups = self.packed.layout.groups(self.shape[-1])
        if codes.nested_RG is None:
            return self._nest_plain(rows, codes.need_scale().to(nested.device), groups)
        ids_R = torch.arange(self.num_rows, device=nested.device)[rows]
        places_RG = (ids_R[:, None] * groups + torch.arange(groups, device=nested.device)) // self.packed.layout.nested
        nested[places_RG] = codes.need_scale().to(nested.device)
        offset.fill_(codes.offset)
        return codes.nested_RG

    def _nest_plain(self, rows: slice | Tensor, scale_RG: Tensor, groups: int) -> Tensor:
        """Codes of these rows' scales, once all rows' are known (they are held relative to the mean of all); until then zeros, and the scales wait."""
        nested, offset = self.packed.nested, self.packed.offset
        assert nested is not None and offset is not None and self.packed.scale is not None
        if len(scale_RG) < self.num_rows:
            if self._waiting is None:
                self._waiting = torch.full((self.num_rows, groups), float("nan"), device=nested.device)
            self._waiting[rows if isinstance(rows, slice) else rows.to(nested.device)] = scale_RG
            if self._waiting.isnan().any():
                return torch.zeros_like(scale_RG, dtype=torch.uint8)
            scale_RG, self._waiting = self._waiting, None
        scales, held, mean = quantize_scales(scale_RG.reshape(-1), self.packed.layout.nested)
        nested.copy_(held)
        offset.copy_(mean.reshape(1))
        scales = scales.view(self.num_rows, groups)
        packed.fill_scales(self.packed, torch.arange(self.num_rows, device=nested.device), scales)
        return scales[rows if isinstance(rows, slice) else rows.to(nested.device)]

    def get_rows(self, start: int, stop: int) -> Codes:
        """What `set_rows` was given for rows start … stop - 1."""
        layout = self.packed.layout
        codes_RC, scale_RG, zero_RG = packed.codes_of(self.packed, slice(start, stop))
        if layout.kind == "fp8":
            codes_RC = codes_RC.contiguous().view(torch.float8_e4m3fn)
        elif layout.kind == "int8":
            codes_RC = codes_RC.contiguous().view(torch.int8)
        if not layout.nested:
            return Codes(codes_RC, None if scale_RG is None else scale_RG.float(), zero_RG)
        assert self.packed.nested is not None and self.packed.offset is not None
        groups = layout.groups(self.shape[-1])
        places = torch.arange(start * groups, stop * groups, device=self.packed.nested.device).view(-1, groups) // layout.nested
        return Codes(codes_RC, self.packed.nested[places], nested_RG=scale_RG, offset=float(self.packed.offset))

    def linear(self, x_TC: Tensor, bias_R: Tensor | None = None, *, expert: int | None = None) -> Tensor:
        """y_TR = x @ W.T (+ bias) in x's dtype; of one matrix of the stack where `expert` names it."""
        from tradespace.kernels.linear.large import large_linear
        from tradespace.kernels.linear.triton_codes import quantize_rows
        from tradespace.kernels.linear.triton_rows import rows_linear

        weight = self.packed if expert is None else self.packed.part(expert * self.shape[-2], (expert + 1) * self.shape[-2])
        if 0 < len(x_TC) <= cuda.FEW_ROWS and (self.scratch is not None or self.workspace is None):  # training has no scratch: it decodes for few rows, too
            if self.scratch is None:
                raise EngineError(f"a product of few rows in {self.format_name} needs scratch for partial sums; give the weight one")
            if weight.layout.kind not in ("w8a8", "f8a8"):
                return rows_linear(x_TC, weight, self.scratch, bias_R=bias_R)
            codes_TC, scale_T = torch.empty(x_TC.shape, dtype=weight.codes.dtype, device=x_TC.device), torch.empty(len(x_TC), device=x_TC.device)
            quantize_rows(x_TC, codes_TC, scale_T)
            out_TR = torch.empty((len(x_TC), weight.rows), dtype=x_TC.dtype, device=x_TC.device)
            return rows_linear(codes_TC, weight, self.scratch, x_scale_T=scale_T, out_TR=out_TR, bias_R=bias_R)
        if self.workspace is None and self.needs_workspace:
            raise EngineError(f"a product of many rows in {self.format_name} needs a workspace to decode into; give the weight one")
        return large_linear(x_TC, weight, x_TC if self.workspace is None else self.workspace.flat, bias_R)

    def transposed(self, dy_TR: Tensor) -> Tensor:
        """dx_TC = dy @ W, for gradients: as many rows of W at once as the workspace has room for."""
        if self.workspace is None:
            raise EngineError(f"a product in {self.format_name} needs a workspace to decode into; give the weight one")
        from tradespace.kernels.linear.large import transposed_linear

        return transposed_linear(dy_TR, self.packed, self.workspace.flat)

    def rows(self, ids_T: Tensor) -> Tensor:
        """The rows of these ids (T, C) as bf16: an embedding's look-up."""
        from tradespace.kernels.linear.triton_unpack import unpack_into

        out_TC = torch.empty((len(ids_T), self.shape[-1]), dtype=torch.bfloat16, device=self.packed.codes.device)
        return unpack_into(self.packed, out_TC, ids_T=ids_T)

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Rows start … stop - 1 as bf16."""
        from tradespace.kernels.linear.triton_unpack import unpack_into

        out_RC = torch.empty((stop - start, self.shape[-1]), dtype=torch.bfloat16, device=self.packed.codes.device)
        return unpack_into(self.packed, out_RC, first=start)
