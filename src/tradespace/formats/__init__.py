"""How a weight is held: one module class per format, built from (shape, dtype of the activations, device) and then filled row by row.

Every class has `weight`, `nbytes` (== `spec.weights.FORMATS[name].nbytes(shape)`), `needs_workspace`, `set_rows`, `linear`, `rows` and `dense_rows`. Who fills
it, and how the codes are chosen, is `quantize/`'s business.
"""

from __future__ import annotations

import torch

from tradespace.errors import UnsupportedError
from tradespace.formats.dense import DenseWeight
from tradespace.formats.int8 import Int8Weight
from tradespace.formats.workspace import Workspace

__all__ = ["DTYPES", "FORMATS", "DenseWeight", "Int8Weight", "Weight", "Workspace", "build_weight"]

Weight = DenseWeight | Int8Weight

FORMATS: dict[str, type[DenseWeight] | type[Int8Weight]] = {"fp32": DenseWeight, "bf16": DenseWeight, "fp16": DenseWeight, "int8": Int8Weight}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_weight(
    name: str,
    shape: tuple[int, ...],
    *,
    dense: torch.dtype,
    device: torch.device | str = "cpu",
    linear: str = "torch",
    workspace: Workspace | None = None,
) -> Weight:
    """An unfilled weight in format `name`; `dense` is the dtype of the activations. Raises UnsupportedError for a format that nothing implements."""
    if name not in FORMATS:
        raise UnsupportedError(f"weight format {name} is priced but cannot run yet. Runs: {', '.join(FORMATS)}")
    # a dense format is its own dtype; a quantized one computes in that of the activations
    return FORMATS[name](shape, DTYPES.get(name, dense), device=device, linear=linear, workspace=workspace)
