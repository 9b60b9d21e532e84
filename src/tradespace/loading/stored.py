"""How a checkpoint itself holds its weights, as a WeightPlan: what runs as it is, re-quantized nowhere.

A fused tensor whose parts are stored unlike is held in the format that has all of their values exactly: q4_0, q5_0 and q8_0 share their scales per 32, so
q8_0 holds the other two's codes unchanged.
"""

from __future__ import annotations

from collections import Counter
from itertools import groupby

from tradespace.formats.ggml_widen import INSIDE_Q8_0
from tradespace.loading.names import Piece
from tradespace.loading.weights import Source, check_pieces, stored_format
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import QUANTIZABLE_ROLES, TensorSpec, model_tensors
from tradespace.spec.weights import WeightPlan

DENSE = ("fp32", "bf16", "fp16")


def _one_format(source: Source, pieces: tuple[Piece, ...]) -> str | None:
    names = {stored_format(source, piece) for piece in pieces}
    if len(names) == 1:
        return names.pop()
    return "q8_0" if names <= set(INSIDE_Q8_0) else None


def stored_plan(source: Source, spec: ModelSpec) -> WeightPlan | None:
    """The formats that `source` holds its matrices in; None where they are floats throughout, or some tensor cannot be held as it is."""
    tensors: dict[str, TensorSpec] = {tensor.name: tensor for tensor in model_tensors(spec)}
    found: dict[tuple[int, str], str] = {}
    weights: Counter[str] = Counter()
    for target, parts in groupby(check_pieces(source, spec), key=lambda piece: piece.target):
        tensor = tensors[target]
        if tensor.role not in QUANTIZABLE_ROLES:
            continue
        name = _one_format(source, tuple(parts))
        if name is None or found.setdefault((tensor.layer, tensor.role), name) != name:
            return None
        weights[name] += tensor.num_elements if tensor.layer >= 0 else 0
    if not weights or all(name in DENSE for name in found.values()):
        return None
    default = weights.most_common(1)[0][0]
    exceptions: dict[str, str] = {}
    for role in dict.fromkeys(role for _, role in found):
        names = {name for (_, other), name in found.items() if other == role}
        if len(names) == 1:
            if (name := names.pop()) != default:
                exceptions[role] = name
        else:
            exceptions |= {f"{layer}:{role}": name for (layer, other), name in found.items() if other == role and name != default}
    return WeightPlan(default=default, exceptions=exceptions)
