"""Which weight format holds which tensor of a model, and what all of them take. The formats themselves are in `spec/formats.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

from tradespace.errors import InputError
from tradespace.spec import cuda, native
from tradespace.spec.formats import FORMATS, WeightFormat, find_format
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import QUANTIZABLE_ROLES, TensorSpec, model_tensors

FLOATS = ("fp32", "bf16", "fp16")
LAYOUTS = ("stored", "native", "cuda")  # that the planner of inference chooses from
TRAINING_LAYOUT = "cuda-codes"


@dataclass(frozen=True, kw_only=True)
class WeightPlan:
    """Which format holds which tensor: `default` for every quantizable role, exceptions by role ("lm_head") or "layer:role" ("0:down").

    Norms are held in fp32; biases, sinks, position tables and routers in `dense` (the dtype of the activations). `layout` is how the formats lie in memory:
    "stored" as `formats/` has them, "native" packed for the CPU kernels (`spec/native.py`), whose activations are fp32, "cuda" packed for the CUDA kernels
    (`spec/cuda.py`), whose activations are bf16, "cuda-codes" with codes packed for those and floats as stored: what adapters learn beside on a device.
    """

    default: str = "bf16"
    exceptions: Mapping[str, str] = field(default_factory=dict)
    layout: str = "stored"

    def __post_init__(self):
        find_format(self.default)
        if self.layout not in (*LAYOUTS, TRAINING_LAYOUT):
            raise InputError(f"unknown weight layout '{self.layout}'. Known: {', '.join((*LAYOUTS, TRAINING_LAYOUT))}")
        if self.layout == "native" and (strange := [name for name in (self.default, *self.exceptions.values()) if not native.runs(name)]):
            raise InputError(f"the native kernels do not read {', '.join(strange)}. They read {', '.join(native.FORMAT_KINDS)}")
        floats = FLOATS if self.layout == TRAINING_LAYOUT else ()
        named = (self.default, *self.exceptions.values())
        if self.layout in ("cuda", TRAINING_LAYOUT) and (strange := [name for name in named if name not in floats and not cuda.runs(name)]):
            raise InputError(f"the CUDA kernels do not read {', '.join(strange)}. They read {', '.join(cuda.FORMATS)}")
        for key, name in self.exceptions.items():
            find_format(name)
            role = key.rsplit(":", 1)[-1]
            if role not in QUANTIZABLE_ROLES:
                raise InputError(f"'{key}': no role '{role}' takes a weight format. Roles: {', '.join(QUANTIZABLE_ROLES)}")

    def __hash__(self):
        return hash((self.default, tuple(sorted(self.exceptions.items())), self.layout))

    @property
    def dense(self) -> str:
        """Dtype of activations and of what no format holds."""
        return {"native": "fp32", "cuda": "bf16"}.get(self.layout) or FORMATS[self.default].compute

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
        if self.layout == "native" and tensor.role in QUANTIZABLE_ROLES:
            return native.packed_bytes(self.format_of(tensor).name, prod(tensor.shape[:-1]), tensor.shape[-1])
        coded = self.layout == "cuda" or (self.layout == TRAINING_LAYOUT and self.format_of(tensor).name not in FLOATS)
        if coded and tensor.role in QUANTIZABLE_ROLES:
            return cuda.packed_bytes(self.format_of(tensor).name, tensor.shape)
        return self.format_of(tensor).nbytes(tensor.shape)

    def describe(self) -> str:
        """The default, then the exceptions; those of single layers counted, not listed."""
        layers = Counter((key.split(":")[1], name) for key, name in self.exceptions.items() if ":" in key)
        parts = [f"{key} {name}" for key, name in self.exceptions.items() if ":" not in key]
        return ", ".join([self.default, *parts, *(f"{role} {name} in {count} layers" for (role, name), count in layers.items())])


# a quantized matrix is dequantized in tiles of rows of about this many elements: a tile stays in the cache between dequantizing and multiplying
TILE_ELEMENTS = 2**21
CUDA_TILE_ELEMENTS = 2**27  # on a device it is the product that wants to be large


def tile_rows(rows: int, columns: int, elements: int = 0) -> int:
    """Rows of the tile in which a (rows, columns) matrix is dequantized: at most `elements` elements (0: TILE_ELEMENTS), at least one row.

    >>> tile_rows(960, 576), tile_rows(49152, 576), tile_rows(2, 2**22)
    (960, 3640, 1)
    """
    return min(rows, max(1, (elements or TILE_ELEMENTS) // columns))


def tile_elements(plan: WeightPlan) -> int:
    """Of the tile that a plan's matrices are dequantized in."""
    return CUDA_TILE_ELEMENTS if plan.layout == TRAINING_LAYOUT else TILE_ELEMENTS


def workspace_shape(shapes: Iterable[tuple[int, ...]], elements: int = 0) -> tuple[int, int]:
    """(elements of the largest tile, most rows) over the shapes of all quantized matrices: what `formats.Workspace` holds. (0, 0) for none.

    >>> workspace_shape([(960, 576), (49152, 576)])
    (2096640, 49152)
    """
    matrices = [shape[-2:] for shape in shapes]
    return max((tile_rows(R, C, elements) * C for R, C in matrices), default=0), max((R for R, _ in matrices), default=0)


def unpacked_elements(model: ModelSpec, plan: WeightPlan) -> int:
    """Elements of the workspace that a CUDA step decodes coded matrices into for products of many rows: the largest of them, or a tile of it. 0 for none."""
    found = [tensor.shape[-2:] for tensor in model_tensors(model) if tensor.role in QUANTIZABLE_ROLES and not cuda.FORMATS[plan.format_of(tensor).name].plain]
    return max((max(cuda.CHUNK_ROWS * columns, min(rows * columns, cuda.UNPACK_ELEMENTS)) for rows, columns in found), default=0)


def weight_bytes(model: ModelSpec, plan: WeightPlan) -> int:
    """Bytes of all tensors of `model` under `plan`."""
    return sum(plan.nbytes(tensor) for tensor in model_tensors(model))


def weight_bytes_by_role(model: ModelSpec, plan: WeightPlan) -> dict[str, int]:
    """Bytes per role, in the order in which the roles appear in the model."""
    found: dict[str, int] = {}
    for tensor in model_tensors(model):
        found[tensor.role] = found.get(tensor.role, 0) + plan.nbytes(tensor)
    return found
