"""How a model is trained: the choices that decide bytes and seconds of a step, frozen. No torch.

Axes: method (full, LoRA, QLoRA) · optimizer · checkpointing, layer by layer · micro-batch · whether the optimizer's step is fused into the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod, sqrt
from typing import Any, Literal

from tradespace.errors import InputError
from tradespace.spec.attention import find_kernel
from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN, LayerSpec, ModelSpec
from tradespace.spec.parallel import held_shape
from tradespace.spec.tensors import TensorSpec, model_tensors
from tradespace.spec.weights import WeightPlan

METHODS = ("full", "lora", "qlora")
# the linears that an adapter can stand beside, by the role of our fused matrices
ADAPTED_ROLES = ("qkv", "attn_out", "gate_up", "down")
BLOCK_8BIT = 256  # numbers of a state that share an 8-bit optimizer's scale


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """`idea` names the source. Small vectors keep fp32 states under every optimizer."""

    name: str
    runs_since: str | None
    idea: str
    moments: int = 0  # fp32 numbers a parameter
    coded: bool = False  # moments in 8 bits, a scale for each BLOCK_8BIT
    factored: bool = False  # a matrix's second moment as a row and a column
    pages: str = ""  # the optimizer whose states these are, held in the host's memory and moved to the device one parameter at a time

    @property
    def arithmetic(self) -> str:
        """The name of the optimizer whose steps these are."""
        return self.pages or self.name

    def state_bytes(self, shape: tuple[int, ...], dtype: str) -> int:
        """Bytes of one parameter's state, its fp32 master copy where it is held in 16 bits included."""
        count = prod(shape)
        master = 4 * count if dtype != "fp32" and self.name not in ("sgd", "adafactor") else 0
        if self.factored:
            return 4 * (prod(shape[:-1]) + prod((*shape[:-2], shape[-1]))) if len(shape) > 1 else 4 * count
        if self.coded and count >= 4096:
            blocks = -(-count // BLOCK_8BIT)
            return master + self.moments * (count + 4 * blocks)
        return master + 4 * self.moments * count


OPTIMIZERS: dict[str, OptimizerSpec] = {
    entry.name: entry
    for entry in (
        OptimizerSpec(name="adamw", moments=2, runs_since="0.3", idea="two fp32 moments; arXiv:1711.05101"),
        OptimizerSpec(name="adamw8bit", moments=2, coded=True, runs_since="0.3", idea="moments in 8-bit dynamic codes, blocks of 256; arXiv:2110.02861"),
        OptimizerSpec(name="adafactor", factored=True, runs_since="0.3", idea="the second moment as an outer product of rows and columns; arXiv:1804.04235"),
        OptimizerSpec(name="sgd", runs_since="0.3", idea="no state"),
        OptimizerSpec(name="paged-adamw", moments=2, pages="adamw", runs_since="0.3", idea="adamw's states in host memory; arXiv:2305.14314"),
        OptimizerSpec(name="paged-adamw8bit", moments=2, coded=True, pages="adamw8bit", runs_since="0.3", idea="adamw8bit's states in host memory"),
    )
}

Kind = Literal["none", "norms", "selective", "full", "offload"]
CHECKPOINTING: dict[str, str] = {
    "none": "every activation is kept",
    "norms": "norms are computed again from the stream; everything else is kept",
    "selective": "outputs of matrix products are kept; norms, rotations, activations and attention are computed again; arXiv:2205.05198",
    "full": "a segment keeps its input alone and is computed again; arXiv:1604.06174",
    "offload": "as full, its input in host memory",
}
BY_LAYER: tuple[Kind, ...] = ("none", "norms", "selective")  # each layer for itself: how many a segment has changes nothing
KINDS: tuple[Kind, ...] = (*BY_LAYER, "full", "offload")


@dataclass(frozen=True, slots=True)
class Segment:
    """`layers` consecutive layers that are checkpointed together, or each for itself (BY_LAYER)."""

    kind: Kind
    layers: int

    def __post_init__(self):
        if self.kind not in CHECKPOINTING:
            raise InputError(f"unknown checkpointing '{self.kind}'. Known: {', '.join(CHECKPOINTING)}")
        if self.layers < 1:
            raise InputError(f"a checkpointed segment of {self.layers} layers; at least 1 is needed")

    def __str__(self) -> str:
        return f"{self.kind}:{self.layers}"


def every(k: int, L: int, kind: Kind = "full") -> tuple[Segment, ...]:
    """L layers in segments of k, the last one shorter where k does not divide L.

    >>> [str(segment) for segment in every(4, 10)]
    ['full:4', 'full:4', 'full:2']
    """
    return tuple(Segment(kind, min(k, L - start)) for start in range(0, L, k))


def best_k(L: int, input_bytes: float, activation_bytes: float) -> float:
    """k* = √(L·c/a) layers a segment, which makes L/k inputs of c bytes and k layers' activations of a bytes the least together.

    >>> best_k(64, 1, 1), best_k(64, 1, 16)
    (8.0, 2.0)
    """
    return sqrt(L * input_bytes / activation_bytes)


def parse_checkpointing(text: str, L: int) -> tuple[Segment, ...]:
    """ "none", "norms", "selective", "full" (each layer), "every-4", "offload", or a list such as "full:4,selective:2,none:26" that covers the L layers."""
    if text in CHECKPOINTING:
        return every(1, L, text)  # pyright: ignore[reportArgumentType]
    if text.startswith("every-") and text[6:].isdigit() and int(text[6:]) > 0:
        return every(min(int(text[6:]), L), L)
    found = []
    for part in text.split(","):
        kind, _, count = part.strip().partition(":")
        if kind not in CHECKPOINTING or not count.isdigit():
            raise InputError(f"checkpointing '{text}': write none, norms, selective, full, offload, every-K, or a list such as full:4,none:{max(1, L - 4)}")
        found.append(Segment(kind, int(count)))  # pyright: ignore[reportArgumentType]
    if sum(segment.layers for segment in found) != L:
        raise InputError(f"checkpointing '{text}' covers {sum(segment.layers for segment in found)} layers; the model has {L}")
    return tuple(found)


def describe_segments(segments: Sequence[Segment]) -> str:
    """Equal neighbours counted.

    >>> describe_segments(every(4, 10))
    '2 × full:4, full:2'
    """
    found: list[list[Any]] = []
    for segment in segments:
        merged = segment.kind in BY_LAYER
        if found and found[-1][0] == segment.kind and (merged or found[-1][1] == segment.layers):
            found[-1][1 if merged else 2] += segment.layers if merged else 1
        else:
            found.append([segment.kind, segment.layers, 1])
    return ", ".join(f"{count} × {kind}:{layers}" if count > 1 else f"{kind}:{layers}" for kind, layers, count in found)


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """One way to train. memory_bytes: the budget of the pool that the model computes in.

    weights       how the base is held: bf16 or fp32; for qlora its linears in nf4 (or int8, int4 …)
    context       tokens of a packed sequence; micro_batch sequences are computed at once, accumulation of them make a step
    fused         each parameter is updated as soon as its gradient is there, and the gradient forgotten: no gradients are held; needs accumulation 1
    data_parallel, tensor_parallel  ranks (`spec.parallel`): micro_batch and accumulation are each rank's, memory_bytes too
    fused_kernels  backward passes of RMS norms and gated SiLUs are one kernel each that keeps nothing in between, as on a CUDA device
    loss_tokens   tokens whose logits exist at once, each logit in logit_bytes (two fp32 copies; on a device one in bf16; beside a teacher's more)
    """

    model: str
    method: str = "full"
    weights: WeightPlan = field(default_factory=lambda: WeightPlan(default="bf16"))
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ADAPTED_ROLES
    optimizer: str = "adamw"
    context: int = 512
    micro_batch: int = 1
    accumulation: int = 1
    checkpointing: tuple[Segment, ...] = ()
    fused: bool = False
    fused_kernels: bool = False
    loss_tokens: int = 512
    logit_bytes: int = 8
    attention: str = "sdpa"
    device: str = "cpu"
    memory_bytes: int = 0
    data_parallel: int = 1
    tensor_parallel: int = 1

    def __post_init__(self):
        if self.method not in METHODS:
            raise InputError(f"unknown method '{self.method}'. Known: {', '.join(METHODS)}")
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"unknown optimizer '{self.optimizer}'. Known: {', '.join(OPTIMIZERS)}")
        find_kernel(self.attention)
        for name in ("rank", "context", "micro_batch", "accumulation", "loss_tokens", "data_parallel", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.context < 2:
            raise InputError("a sequence of one token has nothing to predict. Give --context of at least 2")
        if self.fused and self.accumulation > 1:
            raise InputError("an optimizer step that is fused into the backward pass cannot wait for more micro-batches: accumulation must be 1")
        if self.fused and self.data_parallel > 1:
            raise InputError("a fused step has no gradient that could be summed over --data-parallel ranks. Give --no-fused")
        if self.tensor_parallel > 1 and self.method != "full":
            raise InputError(f"--method {self.method} over --tensor-parallel {self.tensor_parallel} ranks is not computed yet. Use --data-parallel")
        if self.ranks > 1 and self.optimizer == "adafactor":
            raise InputError("adafactor's rows and columns are those of whole matrices, and a rank has a part. Use --optimizer adamw, adamw8bit or sgd")
        if strange := [role for role in self.targets if role not in ADAPTED_ROLES]:
            raise InputError(f"no adapter stands beside {', '.join(strange)}. Known: {', '.join(ADAPTED_ROLES)}")
        if self.method == "full" and any(name not in ("fp32", "bf16") for name in self.weights.names):
            raise InputError(f"all weights are trained as floats: fp32 or bf16, not {self.weights.describe()}. Use --method qlora for coded ones")

    @property
    def ranks(self) -> int:
        return self.data_parallel * self.tensor_parallel

    @property
    def tokens(self) -> int:
        """Tokens that a rank computes at once."""
        return self.context * self.micro_batch

    def describe(self) -> str:
        """One line: what a table of plans shows."""
        method = self.method if self.method == "full" else f"{self.method} r{self.rank}"
        batch = f"{self.micro_batch} × {self.context}" + (f" × {self.accumulation}" if self.accumulation > 1 else "")
        fused = " fused" if self.fused else ""
        axes = (("data", self.data_parallel), ("tensor", self.tensor_parallel))
        ranks = "".join(f" · {count} {axis} ranks" for axis, count in axes if count > 1)
        return f"{method} · {self.weights.describe()} · {self.optimizer}{fused} · {batch} tokens · {describe_segments(self.checkpointing)}{ranks}"

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        found["weights"]["exceptions"] = dict(self.weights.exceptions)
        found["checkpointing"] = [str(segment) for segment in self.checkpointing]
        return found


def plan_of(values: Mapping[str, Any], L: int) -> TrainPlan:
    """The TrainPlan that `to_dict` wrote."""
    fields = dict(values)
    fields["weights"] = WeightPlan(**fields["weights"])
    fields["checkpointing"] = parse_checkpointing(",".join(fields["checkpointing"]), L)
    fields["targets"] = tuple(fields["targets"])
    return TrainPlan(**fields)


def refusal(spec: ModelSpec) -> str | None:
    """Why a model cannot be trained; None: it can."""
    if spec.plan_only:
        return spec.plan_only
    for index, layer in enumerate(spec.layers):
        if not isinstance(layer.mixer, Attention) or not isinstance(layer.ffn, DenseFFN):
            return f"layer {index} is not attention and a dense feed-forward; no other kind is trained yet"
    return None


def selective_refusal(layer: LayerSpec) -> str | None:
    """Why a layer has no sections to recompute."""
    return None if layer.arrangement in ("pre", "sandwich", "post") else f"a layer of the arrangement {layer.arrangement} is computed in one piece"


def qlora_weights(fmt: str, tables: str = "bf16", layout: str = "stored") -> WeightPlan:
    """A base whose linears are coded, with embedding and head in the format `tables`: as floats, or coded, too."""
    return WeightPlan(default=fmt, exceptions=dict.fromkeys(("embed", "lm_head"), tables), layout=layout)


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """One pair of adapter matrices beside some rows of one of our fused matrices: B (rows, rank) · A (rank, columns). `part` counts within the matrix."""

    tensor: str
    part: int
    row_start: int
    rows: int
    columns: int


def adapters(spec: ModelSpec, targets: Sequence[str] = ADAPTED_ROLES) -> tuple[AdapterSpec, ...]:
    """The adapters of a model: one for each published linear, of which our fused matrices hold several."""
    found: list[AdapterSpec] = []
    for tensor in model_tensors(spec):
        if tensor.role in targets and tensor.role in ADAPTED_ROLES and tensor.layer >= 0:
            start = 0
            for part, rows in enumerate(_parts(spec.layers[tensor.layer], tensor)):
                found.append(AdapterSpec(tensor.name.removesuffix(".weight"), part, start, rows, tensor.shape[-1]))
                start += rows
    return tuple(found)


def _parts(layer: LayerSpec, tensor: TensorSpec) -> tuple[int, ...]:
    mixer, ffn = layer.mixer, layer.ffn
    if tensor.role == "qkv" and isinstance(mixer, Attention):
        return mixer.N * mixer.H, mixer.K * mixer.H, mixer.K * mixer.Hv
    if tensor.role == "gate_up" and isinstance(ffn, DenseFFN) and ffn.gated:
        return ffn.F, ffn.F
    return (tensor.shape[0],)


def trained(spec: ModelSpec, plan: TrainPlan) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """(name, shape, dtype) of every parameter that is trained, in shape what a data rank holds of it. Norms and adapters are fp32 and whole."""
    if plan.method == "full":
        return tuple((tensor.name, held_shape(tensor, plan.data_parallel), plan.weights.format_of(tensor).name) for tensor in model_tensors(spec))
    found = []
    for adapter in adapters(spec, plan.targets):
        found.append((f"{adapter.tensor}.lora_A.{adapter.part}", (plan.rank, adapter.columns), "fp32"))
        found.append((f"{adapter.tensor}.lora_B.{adapter.part}", (adapter.rows, plan.rank), "fp32"))
    return tuple(found)


def matmul_parameters(spec: ModelSpec) -> int:
    """Parameters of matrices that every token is multiplied with, the head included."""
    count = sum(prod(tensor.shape) for tensor in model_tensors(spec) if tensor.role in ADAPTED_ROLES or tensor.role == "lm_head")
    return count + (spec.V * spec.D if spec.tied else 0)


def flops_per_token(spec: ModelSpec, context: int) -> float:
    """6·(matmul parameters) + 6·T·N·H a layer: forward and backward of a token in a causal sequence of T, recomputation not counted."""
    attention = sum(6 * context * layer.mixer.N * layer.mixer.H for layer in spec.layers if isinstance(layer.mixer, Attention))
    return 6 * matmul_parameters(spec) + attention
