"""Operations a second of the native kernels' products by many tokens, per form of the activations: what a plan that runs on them is predicted by.

A library's products say little about them: where it lacks an instruction, or has a better one, the two differ severalfold, and by another factor on each CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from tradespace.formats.codes import Codes
from tradespace.formats.native import FORMS, NativeWeight, OperandBuffers
from tradespace.measure.timer import time_repeats

COLUMNS, TOKENS = 1024, 256  # of the matrix; a prompt's chunk
ROWS, ROWS_PER_THREAD = 1024, 256  # of the matrix, so that all threads have panels, and those lie in their caches
# activations in this form → the format they are multiplied with
WEIGHTS = {"int8": "q4_0", "bf16": "bf16", "fp32": "fp32"}


def rows_of(threads: int) -> int:
    return max(ROWS, ROWS_PER_THREAD * threads)


def product(form: str, threads: int) -> Callable[[], None]:
    """One product of TOKENS rows of activations, rounded to `form` on the way, by a matrix for so many threads. Raises EngineError without kernels."""
    rows = rows_of(threads)
    weight = NativeWeight(WEIGHTS[form], (rows, COLUMNS))
    weight.set_rows(slice(0, rows), q4_0_blocks(rows) if form == "int8" else torch.randn(rows, COLUMNS))
    x_TC, y_TR, held = torch.randn(TOKENS, COLUMNS), torch.empty(TOKENS, rows), OperandBuffers(TOKENS, COLUMNS, {weight.form})

    def multiply() -> None:
        by_reference = ctypes.byref(weight.matrix()), ctypes.byref(held.operand())
        weight.library.ts_linear(*by_reference, x_TC.data_ptr(), COLUMNS, TOKENS, FORMS[weight.form], None, y_TR.data_ptr(), rows, threads)

    return multiply


def q4_0_blocks(rows: int) -> Codes:
    """Rows of random codes with the scale 1/64, as GGUF has them: 18 bytes for 32 columns."""
    blocks = torch.randint(0, 256, (rows, COLUMNS // 32, 18), dtype=torch.uint8)
    blocks[..., :2] = torch.tensor([1 / 64], dtype=torch.float16).view(torch.uint8)
    return Codes(blocks.view(rows, -1))


def product_rate(form: str, threads: int, budget_s: float = 0.3) -> float:
    """Operations a second, best of those that fit into the budget."""
    return 2 * TOKENS * rows_of(threads) * COLUMNS / min(time_repeats(product(form, threads), repeats=100, budget_s=budget_s))
