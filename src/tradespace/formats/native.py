"""A weight in any format that the native CPU kernels read, packed in panels of 16 rows in place of the format's own layout.

Bytes: `spec.native.packed_bytes`. The codes, scales and minima are those of the format, unchanged: only where they lie differs. Products quantize the
activations to 8 bits per 32 where codes are whole numbers, unless the weight was built with activations="fp32".
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from tradespace.errors import UnsupportedError
from tradespace.formats.codes import Codes
from tradespace.kernels.native import load
from tradespace.kernels.native.library import Matrix, Operand
from tradespace.kernels.pages import huge_zeros
from tradespace.spec import native
from tradespace.spec.native import LANES, ROW_BLOCK, SECTION, SECTION_SUMS, round_up

FORMS = {"fp32": 0, "bf16": 1, "int8": 2}
_DENSE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class NativeWeight(nn.Module):
    """One matrix (R, C), or a stack of experts' matrices (E, R, C) whose rows lie one after the other. Never trainable."""

    bias: nn.Parameter | None
    packed: Tensor
    needs_workspace = False

    def __init__(self, format_name: str, shape: tuple[int, ...], *, activations: str = "auto", threads: int = 0):
        super().__init__()
        if not native.runs(format_name):
            raise UnsupportedError(f"the native kernels do not read {format_name}. They read {', '.join(native.FORMAT_KINDS)}")
        rows = 1
        for size in shape[:-1]:
            rows *= size
        if len(shape) == 3 and shape[1] % LANES:
            raise UnsupportedError(f"experts of {shape[1]} rows do not fill whole panels of {LANES}; the native kernels cannot hold them")
        self.format_name, self.shape, self.form, self.threads = format_name, shape, native.activation_form(format_name, activations), threads
        self.library = load()
        self.kind, self.group = native.FORMAT_KINDS[format_name]
        nbytes = native.packed_bytes(format_name, rows, shape[-1])
        self.register_buffer("packed", huge_zeros((nbytes + 64,), torch.uint8, purpose="weights"))
        self._offset = -self.packed.data_ptr() % 64  # panels begin on a cache line
        self._nbytes = nbytes
        self.register_parameter("bias", None)
        self.num_rows = rows

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def matrix(self, expert: int | None = None) -> Matrix:
        """The C view of the matrix, or of one expert's."""
        rows, columns = self.num_rows, self.shape[-1]
        panel = native.panel_bytes(self.format_name, columns)
        data = self.packed.data_ptr() + self._offset
        if expert is not None:
            rows = self.shape[-2]
            data += expert * rows // LANES * panel
        return Matrix(data, rows, columns, native.KINDS[self.kind].number, self.group, panel)

    def set_rows(self, rows: slice | Tensor, codes: Codes | Tensor) -> None:
        """Fills whole rows (a slice, or indices): codes as the format has them, raw GGUF blocks, or numbers where the format is dense."""
        ids = torch.arange(rows.start, rows.stop, dtype=torch.int64) if isinstance(rows, slice) else rows.to(torch.int64)
        matrix, pack = ctypes.byref(self.matrix()), self.library
        if self.format_name in _DENSE:
            values = (codes if isinstance(codes, Tensor) else codes.codes_RC).to(_DENSE[self.format_name]).contiguous()
            pack.ts_pack_dense(matrix, ids.data_ptr(), len(ids), values.data_ptr())
            return
        assert isinstance(codes, Codes), f"{self.format_name} is filled with codes"
        raw = codes.codes_RC.contiguous()
        if codes.scale_RG is None:
            pack.ts_pack_gguf(matrix, ids.data_ptr(), len(ids), raw.data_ptr(), raw.shape[1])
            return
        if raw.dtype == torch.int8:
            raw = (raw.to(torch.int16) + 128).to(torch.uint8)
        scales = codes.scale_RG.float().contiguous()
        zeros = None if codes.zero_RG is None else codes.zero_RG.to(torch.uint8).contiguous()
        pack.ts_pack_codes(matrix, ids.data_ptr(), len(ids), raw.data_ptr(), scales.data_ptr(), None if zeros is None else zeros.data_ptr(), scales.shape[1])

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Rows start … stop - 1 as fp32."""
        return self.rows(torch.arange(start, stop))

    def rows(self, ids_T: Tensor) -> Tensor:
        """The rows of these ids (T, C) as fp32: an embedding's look-up."""
        ids = ids_T.to(torch.int64).contiguous()
        out_TC = torch.empty(len(ids), self.shape[-1])
        self.library.ts_unpack_rows(ctypes.byref(self.matrix()), ids.data_ptr(), len(ids), out_TC.data_ptr())
        return out_TC

    def linear(self, x_TC: Tensor, bias_R: Tensor | None = None, *, expert: int | None = None) -> Tensor:
        """y_TR = x @ W.T (+ bias) in x's dtype; of one matrix of the stack where `expert` names it."""
        matrix = self.matrix(expert)
        tokens, columns, padded = len(x_TC), matrix.columns, round_up(matrix.columns, SECTION)
        x = torch.nn.functional.pad(x_TC.float(), (0, padded - columns)).contiguous()
        y = torch.empty(tokens, round_up(matrix.rows, LANES))
        bias = None if bias_R is None else torch.nn.functional.pad(bias_R.float(), (0, y.shape[1] - matrix.rows)).contiguous()
        held = OperandBuffers(tokens, padded, {self.form})
        if tokens:
            self.library.ts_linear(
                ctypes.byref(matrix),
                ctypes.byref(held.operand()),
                x.data_ptr(),
                padded,
                tokens,
                FORMS[self.form],
                None if bias is None else bias.data_ptr(),
                y.data_ptr(),
                y.shape[1],
                self.threads or torch.get_num_threads(),
            )
        return y[:, : matrix.rows].to(x_TC.dtype)


class OperandBuffers:
    """Room for activations of `tokens` rows, `width` columns (a multiple of 32), in the forms that products ask for."""

    def __init__(self, tokens: int, width: int, forms: set[str] | frozenset[str]):
        sections = width // SECTION
        self.tokens, self.width = tokens, width
        self.tensors: dict[str, Tensor] = {}
        if "fp32" in forms:
            self.tensors["f32"] = torch.zeros(tokens * width)
        if "bf16" in forms:
            self.tensors["bf16"] = torch.zeros(tokens * width, dtype=torch.bfloat16)
        if "int8" in forms:
            self.tensors["codes"] = torch.zeros(tokens * width, dtype=torch.int8)
            for name, count in (("scales", 1), ("weighted", 1), ("sums", SECTION_SUMS)):
                self.tensors[name] = torch.zeros(round_up(tokens, ROW_BLOCK) * sections * count, dtype=torch.int32)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def operand(self) -> Operand:
        """The C view. Rows lie as far apart as the widest needs, whatever is in them: threads may be at different operations, each with tokens of its own."""
        found = {name: self.tensors[name].data_ptr() if name in self.tensors else None for name in ("f32", "bf16", "codes", "scales", "weighted", "sums")}
        return Operand(*found.values(), self.width, self.width // SECTION)
