"""Triton's interpreter, which runs kernels as NumPy on the CPU for tests, and what it needs to run here.

Of Triton 3.6's interpreter two things are put right. NumPy 2.4 no longer turns arrays of one element into numbers, which the bounds of loops are. And bf16,
held as 16-bit integers, is multiplied as those.
"""

from __future__ import annotations

import os
from functools import lru_cache

import numpy as np


def interprets() -> bool:
    """Whether kernels run under the interpreter. Triton asks when a kernel is defined: set TRITON_INTERPRET=1 before anything is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def prepare() -> None:
    """Puts both right. Does nothing unless kernels are interpreted."""
    if not interprets():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched

    dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(wide.reshape(handle.data.shape), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)  # noqa: B010 - a type checker would want all its parameters named
