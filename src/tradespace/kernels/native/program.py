"""Operations of a step as C structures: numbers that `source/program.cpp` knows, and small constructors that fill a field only where it means something."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tradespace.kernels.native.library import Library, Op, Step

EMBED, NORM, PRODUCT, HEADS, ATTEND, PREPARE, ACTIVATE, FINISH_LOGITS = range(8)
ROWS, ADD, INTERLEAVED, GATED, ACCUMULATE, NORM_FULL = 1, 2, 4, 8, 32, 64
NORMS = {"none": 0, "rms": 1, "layer": 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "identity": 5}
STORES = {"fp32": 0, "fp16": 1, "bf16": 2, "int8": 3, "fp8": 4}
# operations that a thread does for its own rows of the step: one after the other, they need not wait for the other threads
_BY_ROW = (EMBED, NORM)


@dataclass(frozen=True, slots=True)
class Buffer:
    """Rows of floats that operations read and write: where, and how far apart."""

    tensor: Tensor
    stride: int

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()


class Program:
    """Operations in the order in which they run. `keep` holds what their pointers point to."""

    def __init__(self, library: Library):
        self.library = library
        self.ops: list[Op] = []
        self.keep: list[Any] = []
        self._array: ctypes.Array[Op] | None = None

    def add(self, kind: int, **fields: Any) -> None:
        """Appends an operation; it waits for all threads unless it and its predecessor both go by rows."""
        op = Op(kind=kind, scale=1.0)
        for name, value in fields.items():
            if isinstance(value, Buffer):
                self.keep.append(value.tensor)
                setattr(op, name, value.address)
                setattr(op, f"{name.rstrip('_')}_stride", value.stride)
            elif isinstance(value, Tensor):
                self.keep.append(value)
                setattr(op, name, value.data_ptr())
            elif value is not None:
                setattr(op, name, value)
        before = self.ops[-1] if self.ops else None
        by_row = before is not None and kind in _BY_ROW and before.kind in _BY_ROW and (before.flags & ROWS) == (op.flags & ROWS)
        op.wait = int(before is not None and not by_row)
        self.ops.append(op)

    def then(self, other: Program) -> Program:
        """Both, one after the other."""
        both = Program(self.library)
        both.ops, both.keep = [*self.ops, *map(Op.from_buffer_copy, other.ops)], [*self.keep, *other.keep]
        if self.ops and other.ops:
            both.ops[len(self.ops)].wait = 1
        return both

    def run(self, step: Step, scratch: Tensor, threads: int, nanoseconds: Tensor | None = None) -> None:
        """One call into the library for all operations. `scratch` is (threads, floats); `nanoseconds`, int64, one per operation, is added to."""
        if self._array is None:
            self._array = (Op * len(self.ops))(*self.ops)
        times = None if nanoseconds is None else nanoseconds.data_ptr()
        self.library.ts_run(self._array, len(self.ops), ctypes.byref(step), scratch.data_ptr(), scratch.shape[1], threads, times)
