"""Weight formats: how many bytes a matrix takes in each, to the byte, and whether it can run. How a format is stored is `formats/<name>.py`.

Every format is a function from a shape (output rows, input columns; leading dimensions are a stack of such) to bytes, scales and zero points included.
A group never crosses a row: a row of 576 in groups of 128 has five groups, the last one short but paid in full scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil, prod

from tradespace.errors import InputError
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import QUANTIZABLE_ROLES, TensorSpec, model_tensors

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """bits: of one code. group: codes that share a scale along a row; 0: the whole row; None: no scale at all.

    scale_bytes and zero_bytes are per group, row_bytes per row, tensor_bytes per matrix. `compute` is the dtype of the activations that multiply it.
    `runs_since` is the version whose engine runs it; None: priced, cannot run yet.
    """

    name: str
    bits: float
    group: int | None = None
    scale_bytes: float = 0.0
    zero_bytes: float = 0.0
    tensor_bytes: int = 0
    compute: str = "bf16"
    runs_since: str | None = None
    idea: str = ""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape, codes, scales and zero points included. Codes of a row start on a whole byte."""
        if self.group is None:
            return ceil(prod(shape) * self.bits / 8)
        rows, columns = prod(shape[:-1]), shape[-1]
        groups = ceil(columns / self.group) if self.group else 1
        row_bytes = ceil(columns * self.bits / 8)
        return rows * row_bytes + ceil(rows * groups * (self.scale_bytes + self.zero_bytes)) + self.tensor_bytes

    @property
    def bits_per_weight(self) -> float:
        """Of a large matrix, scales included."""
        return self.bits + (8 * (self.scale_bytes + self.zero_bytes) / self.group if self.group else 0.0)


FORMATS: dict[str, WeightFormat] = {
    fmt.name: fmt
    for fmt in (
        WeightFormat(name="fp32", bits=32, compute="fp32", runs_since="0.1", idea="as the mathematics has it"),
        WeightFormat(name="bf16", bits=16, runs_since="0.1", idea="as most models are published"),
        WeightFormat(name="fp16", bits=16, compute="fp16", runs_since="0.1", idea="more mantissa, less range than bf16"),
        WeightFormat(name="int8", bits=8, group=0, scale_bytes=4, runs_since="0.1", idea="one scale per row, symmetric; arXiv:2208.07339 without outliers"),
        WeightFormat(name="fp8", bits=8, group=0, scale_bytes=4, idea="e4m3, one scale per output row; arXiv:2209.05433"),
        WeightFormat(name="int4", bits=4, group=128, scale_bytes=2, idea="groups of 128 with a 16-bit scale, symmetric"),
        WeightFormat(name="int4-g32", bits=4, group=32, scale_bytes=2, idea="groups of 32, as Q4_0 has them"),
        WeightFormat(name="nf4", bits=4, group=64, scale_bytes=1 + 4 / 256, idea="normal-float codes, doubly quantized scales; arXiv:2305.14314"),
        WeightFormat(name="int3", bits=3, group=128, scale_bytes=2, idea="groups of 128"),
        WeightFormat(name="int2", bits=2, group=64, scale_bytes=2, zero_bytes=2, idea="groups of 64 with zero points"),
        WeightFormat(name="e8", bits=2, group=0, scale_bytes=4, idea="E8 lattice codebook after Hadamard rotation; arXiv:2402.04396"),
    )
}


def find_format(name: str) -> WeightFormat:
    """The format of this name, or InputError with the list."""
    if name not in FORMATS:
        raise InputError(f"unknown weight format '{name}'. Known: {', '.join(FORMATS)}")
    return FORMATS[name]


@dataclass(frozen=True, kw_only=True)
class WeightPlan:
    """Which format holds which tensor: `default` for every quantizable role, exceptions by role ("lm_head") or "layer:role" ("0:down").

    Norms are held in fp32; biases, sinks, position tables and routers in `dense` (the dtype of the activations).
    """

    default: str = "bf16"
    exceptions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        find_format(self.default)
        for key, name in self.exceptions.items():
            find_format(name)
            role = key.rsplit(":", 1)[-1]
            if role not in QUANTIZABLE_ROLES:
                raise InputError(f"'{key}': no role '{role}' takes a weight format. Roles: {', '.join(QUANTIZABLE_ROLES)}")

    def __hash__(self):
        return hash((self.default, tuple(sorted(self.exceptions.items()))))

    @property
    def dense(self) -> str:
        """Dtype of activations and of what no format holds."""
        return FORMATS[self.default].compute

    @property
    def names(self) -> tuple[str, ...]:
        """All formats in use, without repeats."""
        return tuple(dict.fromkeys((self.default, *self.exceptions.values())))

    def format_of(self, tensor: TensorSpec) -> WeightFormat:
        if tensor.role == "norm":
            return FORMATS["fp32"]
        if tensor.role not in QUANTIZABLE_ROLES:
            return FORMATS[self.dense]
        name = self.exceptions.get(f"{tensor.layer}:{tensor.role}") or self.exceptions.get(tensor.role) or self.default
        return FORMATS[name]

    def nbytes(self, tensor: TensorSpec) -> int:
        return self.format_of(tensor).nbytes(tensor.shape)

    def describe(self) -> str:
        return self.default + "".join(f", {key} {name}" for key, name in self.exceptions.items())


# a quantized matrix is dequantized in tiles of rows of about this many elements: a tile stays in the cache between dequantizing and multiplying
TILE_ELEMENTS = 2**21


def tile_rows(rows: int, columns: int) -> int:
    """Rows of the tile in which a (rows, columns) matrix is dequantized: at most TILE_ELEMENTS elements, at least one row.

    >>> tile_rows(960, 576), tile_rows(49152, 576), tile_rows(2, 2**22)
    (960, 3640, 1)
    """
    return min(rows, max(1, TILE_ELEMENTS // columns))


def workspace_shape(shapes: Iterable[tuple[int, ...]]) -> tuple[int, int]:
    """(elements of the largest tile, most rows) over the shapes of all quantized matrices: what `formats.Workspace` holds. (0, 0) for none.

    >>> workspace_shape([(960, 576), (49152, 576)])
    (2096640, 49152)
    """
    matrices = [shape[-2:] for shape in shapes]
    return max((tile_rows(R, C) * C for R, C in matrices), default=0), max((R for R, _ in matrices), default=0)


def weight_bytes(model: ModelSpec, plan: WeightPlan) -> int:
    """Bytes of all tensors of `model` under `plan`."""
    return sum(plan.nbytes(tensor) for tensor in model_tensors(model))


def weight_bytes_by_role(model: ModelSpec, plan: WeightPlan) -> dict[str, int]:
    """Bytes per role, in the order in which the roles appear in the model."""
    found: dict[str, int] = {}
    for tensor in model_tensors(model):
        found[tensor.role] = found.get(tensor.role, 0) + plan.nbytes(tensor)
    return found
