"""The byte ledger of a training step: what a TrainPlan takes, before anything runs. Seconds: `training_time.py`.

always     weights, adapters, gradients (none where the step is fused), optimizer states, workspace, runtime
activations   what every layer keeps for the backward pass, by its checkpointing; counted tensor by tensor (`layer_kept`)
peak       the worst of two kinds of moment: the loss (all that is kept, a chunk of logits and gradients by them), and the backward pass of each segment (what
           it and those before it keep, what is computed again, and the layer's own temporaries)

Several ranks: all of this is one rank's. `spec` is then what a tensor rank builds (`spec.parallel.shard_spec`). Data ranks hold matrices, gradients and states
in parts, embedding and head whole while a step runs ("gathered"), and layers whole while they run: part of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from tradespace.cost.memory import compute_pool, runtime_estimate, tokenizer_estimate
from tradespace.spec.device import DeviceSpec
from tradespace.spec.estimate import Estimate
from tradespace.spec.formats import ELEMENT_BYTES
from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN, LayerSpec, ModelSpec
from tradespace.spec.parallel import held_shape, is_sharded
from tradespace.spec.tensors import model_tensors
from tradespace.spec.training import ADAPTED_ROLES, BY_LAYER, KINDS, OPTIMIZERS, Kind, Segment, TrainPlan, adapters, trained
from tradespace.spec.weights import FLOATS, tile_elements, tile_rows, weight_bytes, workspace_shape
from tradespace.units import KiB

# the CPU's product library keeps compiled code and packing memory for every shape that it meets: seen with torch 2.13
PRODUCT_BYTES = {"bf16": 680 * KiB, "fp32": 150 * KiB}


def parts_of(layer: LayerSpec) -> tuple[Attention, DenseFFN]:
    assert isinstance(layer.mixer, Attention) and isinstance(layer.ffn, DenseFFN), "`spec.training.refusal` was asked"
    return layer.mixer, layer.ffn


def element_bytes(plan: TrainPlan) -> int:
    """Of an activation."""
    return ELEMENT_BYTES[plan.weights.dense]


def layer_kept(layer: LayerSpec, D: int, tokens: int, e: int, kind: Kind = "none") -> int:
    """Bytes that a layer keeps for the backward pass, its input included.

    none: the stream twice (before attention and before the feed-forward), both norms, rotated queries and keys, values, attention's output and its sums, the
    wide product, its activation; norms: the same without the results of both norms; selective: the stream twice, the product of q, k and v, the wide product;
    full: the input.
    """
    attn, ffn = parts_of(layer)
    wide = (2 if ffn.gated else 1) * ffn.F
    if kind in ("full", "offload"):
        return tokens * D * e
    if kind == "selective":
        return tokens * e * (2 * D + (attn.N + attn.K) * attn.H + attn.K * attn.Hv + wide)
    streams = (2 if kind == "norms" else 4) + (2 if layer.arrangement == "sandwich" else 0)
    heads = (attn.N + attn.K) * attn.H + attn.K * attn.Hv + attn.N * attn.Hv
    if attn.qk_norm != "none":  # what the norms of queries and keys came from: views of the whole product
        heads += (attn.N + attn.K) * attn.H + attn.K * attn.Hv
    activated = ffn.F if ffn.activation == "silu" and ffn.gated else (2 if ffn.gated else 1) * ffn.F
    return tokens * (e * (streams * D + heads + wide + activated) + 4 * attn.N)


def layer_transient(
    layer: LayerSpec, D: int, tokens: int, e: int, largest_gradient: int, kind: Kind = "none", *, fused: bool = False, fused_norm: bool = False
) -> int:
    """The worst moment within a layer's backward pass, beside all that the layer keeps (for "selective": beside what that keeps): of the activation, whose own
    result is gone by then (`fused`, one kernel: and in its place lies the gradient by it); of a product with its weight's gradient; of attention, whose inputs
    "selective" computes again; of a norm in fp32 (`fused_norm`: of its input's gradient alone)."""
    attn, ffn = parts_of(layer)
    wide = (2 if ffn.gated else 1) * ffn.F
    stream = tokens * D * e
    in_between = 0 if fused and ffn.gated and ffn.activation == "silu" else 2 * ffn.F
    activation = stream + tokens * e * (in_between + wide)
    # by the wide product's turn its result and the activation are gone: what is left is less than before the product behind them
    product = stream + tokens * e * (wide + D if kind == "selective" else max(ffn.F, D)) + largest_gradient
    heads = tokens * e * (attn.N * attn.Hv + 2 * attn.N * attn.H + 3 * attn.N * attn.Hv + (attn.N + 2 * attn.K) * attn.H)
    if kind == "selective":
        activation += tokens * e * ffn.F  # what was computed again lives as long as its section
        heads += tokens * (e * ((attn.N + attn.K) * attn.H + attn.K * attn.Hv + attn.N * attn.Hv) + 4 * attn.N)
    if kind == "norms":  # the norm's result is there again for the product that takes it
        product += stream
    norm = 3 * stream if fused_norm else 2 * stream + 4 * 4 * tokens * D + (tokens * D * 4 if e < 4 else 0)
    return max(activation, product, stream + heads, norm)


def rope_rows(spec: ModelSpec, tokens: int, e: int) -> int:
    """Angles of a step's tokens, cosines and sines, over all distinct tables."""
    ropes = {layer.mixer.rope for layer in spec.layers if isinstance(layer.mixer, Attention) and layer.mixer.rope is not None}
    return sum(2 * tokens * rope.dims * e for rope in ropes)


def loss_moment(spec: ModelSpec, plan: TrainPlan) -> int:
    """Beside what the layers keep: the last stream, its norm and its gradient, a chunk's logits, and the head's gradient."""
    e, T = element_bytes(plan), plan.tokens
    chunk = min(plan.loss_tokens, T)
    head = spec.V * spec.D * e if plan.method == "full" else 0
    return rope_rows(spec, T, e) + T * spec.D * e * 3 + plan.logit_bytes * chunk * spec.V + chunk * spec.D * e + head + _coded_head(spec, plan, chunk)


def _coded_head(spec: ModelSpec, plan: TrainPlan, chunk: int) -> int:
    """A head in codes is decoded tile by tile: a tile's logits on their way to the others, and the gradient of the chunk's input."""
    head = next(tensor for tensor in reversed(model_tensors(spec)) if tensor.role in ("lm_head", "embed"))
    if plan.weights.format_of(head).name in FLOATS:
        return 0
    rows = tile_rows(spec.V, spec.D, tile_elements(plan.weights))
    # on a device a single tile's logits are written where all are; the scaling of a row's product holds two copies in fp32 beside them
    joined = chunk * rows * element_bytes(plan) if plan.weights.layout == "stored" or rows < spec.V else 0
    return joined + chunk * spec.D * element_bytes(plan)


@dataclass(frozen=True)
class Terms:
    """What the peak is made of, layer by layer: for planning. `after_loss`: what stays from the loss through the backward pass."""

    kept: tuple[dict[str, int], ...]
    transient: tuple[dict[str, int], ...]
    loss: int
    after_loss: int


@lru_cache(maxsize=256)
def _largest_gradient(spec: ModelSpec, plan: TrainPlan) -> int:
    """Of a layer's matrices; computed beside the buffer that it is added to. Over data ranks it is that buffer, and counted in `layer_gathered`."""
    if plan.method != "full" or plan.data_parallel > 1:
        return 0
    e = element_bytes(plan)
    return max(prod(tensor.shape) for tensor in model_tensors(spec) if tensor.layer >= 0) * e


def whole_bytes(spec: ModelSpec, plan: TrainPlan, layer: int) -> int:
    """Of what data ranks hold in parts and gather, in a layer (-1: outside of the layers). 0 on one data rank."""
    if plan.data_parallel == 1:
        return 0
    found = [tensor for tensor in model_tensors(spec) if tensor.layer == layer and is_sharded(tensor.role)]
    return sum(plan.weights.nbytes(tensor) for tensor in found if plan.weights.format_of(tensor).name in FLOATS)


@lru_cache(maxsize=256)
def layer_gathered(spec: ModelSpec, plan: TrainPlan) -> tuple[int, ...]:
    """By layer, what FSDP2 holds at the worst moment of its backward pass: its matrices, the next one's on their way, the last layer's as the forward pass
    gathered them or the gradients that were sent last, and its own gradients, of which a frozen base has none and the last layer not all yet."""
    whole = [whole_bytes(spec, plan, index) for index in range(spec.L)]
    copies = [3 if plan.method != "full" or index == spec.L - 1 else 4 for index in range(spec.L)]
    return tuple(count * size for count, size in zip(copies, whole, strict=True))


def terms(spec: ModelSpec, plan: TrainPlan) -> Terms:
    """All terms of the plan's activations."""
    e, T, D = element_bytes(plan), plan.tokens, spec.D
    kept = tuple({kind: layer_kept(layer, D, T, e, kind) for kind in KINDS} for layer in spec.layers)
    grad, gathered = _largest_gradient(spec, plan), layer_gathered(spec, plan)
    fused = {"fused": plan.fused_kernels, "fused_norm": plan.fused_kernels and spec.norm == "rms"}
    transient = tuple(
        {kind: layer_transient(layer, D, T, e, grad, kind, **fused) + gathered[index] for kind in BY_LAYER} for index, layer in enumerate(spec.layers)
    )
    # the head's gradient stays where the embedding's is added to it, or where both wait for the end of the backward pass
    head = spec.V * D * e if plan.method == "full" and (spec.tied or plan.data_parallel > 1) else 0
    last = whole_bytes(spec, plan, spec.L - 1)  # as it was gathered
    return Terms(kept, transient, loss_moment(spec, plan) + last, head + rope_rows(spec, T, e))


def activation_peak(spec: ModelSpec, plan: TrainPlan, segments: Sequence[Segment] | None = None) -> tuple[int, int]:
    """(bytes kept at the end of the forward pass, bytes at the peak) of everything that a step allocates and forgets."""
    segments = plan.checkpointing if segments is None else segments
    found = terms(spec, plan)
    kept, start, peak = 0, 0, 0
    on_host = 0
    for segment in segments:
        which = range(start, start + segment.layers)
        if segment.kind in BY_LAYER:
            for index in which:
                kept += found.kept[index][segment.kind]
                peak = max(peak, kept + found.transient[index][segment.kind])
        else:
            here = found.kept[start][segment.kind]
            again = sum(found.kept[index]["none"] for index in which) - here
            if segment.kind == "offload":
                on_host += here
                again += here
            else:
                kept += here
            peak = max(peak, kept + again + found.transient[which[-1]]["none"])
        start += segment.layers
    embedding = _embedding_moment(spec, plan)
    return kept, max(peak + found.after_loss, kept + found.loss, embedding)


def _embedding_moment(spec: ModelSpec, plan: TrainPlan) -> int:
    """The gradient of the embedding table, at the end: dense, beside the head's where both are one."""
    if plan.method != "full":
        return 0
    e = element_bytes(plan)
    table = spec.V * spec.D * e
    if plan.data_parallel > 1:  # both gradients whole, once more on their way to their ranks, and the part that comes back
        tables = table * (1 if spec.tied else 2)
        return max(2 * tables + tables // plan.data_parallel, table * 2) + whole_bytes(spec, plan, 0) + plan.tokens * spec.D * e
    return table * (2 if spec.tied else 1) + plan.tokens * spec.D * e


@dataclass(frozen=True, slots=True)
class TrainLine:
    """One line of the ledger."""

    name: str
    bytes: Estimate
    formula: str

    def to_dict(self) -> dict[str, object]:
        return {"name": self.name, "bytes": self.bytes.value, "source": self.bytes.source, "formula": self.formula}


@dataclass(frozen=True)
class TrainLedger:
    """All lines of the pool that the model computes in; they are there together at the peak."""

    lines: tuple[TrainLine, ...]
    pool: str
    host_bytes: int = 0  # of a device's plan: checkpoints that are offloaded, and paged states of the optimizer

    @property
    def total_bytes(self) -> int:
        return round(sum(line.bytes.require() for line in self.lines))

    def line(self, name: str) -> TrainLine:
        return next(line for line in self.lines if line.name == name)

    def to_dict(self) -> dict[str, object]:
        return {"pool": self.pool, "total_bytes": self.total_bytes, "host_bytes": self.host_bytes, "lines": [line.to_dict() for line in self.lines]}


def num_products(spec: ModelSpec, plan: TrainPlan) -> int:
    """Distinct shapes of a step's matrix products: each matrix forward and by its input, by itself where it learns, and six for a pair of adapters."""
    shapes = {tensor.shape[-2:] for tensor in model_tensors(spec) if tensor.role in ADAPTED_ROLES} | {(spec.V, spec.D)}
    if plan.method == "full":
        return 3 * len(shapes)
    return 2 * len(shapes) + 6 * len({(each.rows, each.columns) for each in adapters(spec, plan.targets)})


def _held_bytes(spec: ModelSpec, plan: TrainPlan) -> int:
    """Weights that a data rank holds: rows of float matrices, codes and norms whole."""
    total = 0
    for tensor in model_tensors(spec):
        fmt = plan.weights.format_of(tensor)
        total += fmt.nbytes(held_shape(tensor, plan.data_parallel)) if fmt.name in FLOATS else plan.weights.nbytes(tensor)
    return total


def fixed_lines(
    spec: ModelSpec, plan: TrainPlan, device: DeviceSpec | None = None, *, data_bytes: int = 0, here_bytes: int | None = None
) -> tuple[TrainLine, ...]:
    """What does not depend on tokens. Without a device: the tensors alone. here_bytes: what the process was measured at with its tokenizer and its data, in
    place of their estimates."""
    learns = trained(spec, plan)
    sizes = sum(prod(shape) * ELEMENT_BYTES[dtype] for _, shape, dtype in learns)
    optimizer = OPTIMIZERS[plan.optimizer]
    weights = weight_bytes(spec, plan.weights) if plan.data_parallel == 1 else _held_bytes(spec, plan)
    lines = [TrainLine("weights", Estimate(weights, "exact"), "Σ tensors in their formats" + (", a rank's rows" if plan.data_parallel > 1 else ""))]
    if plan.data_parallel > 1:
        lines.append(TrainLine("gathered", Estimate(whole_bytes(spec, plan, -1), "exact"), "embedding and head, whole while a step runs"))
    if plan.method != "full":
        lines.append(TrainLine("adapters", Estimate(sizes, "exact"), "4 · rank · (rows + columns) a linear"))
    lines.append(TrainLine("gradients", Estimate(0 if plan.fused else sizes, "exact"), "0: the step is fused" if plan.fused else "as what learns"))
    moved = [optimizer.state_bytes(shape, dtype) for _, shape, dtype in learns]
    states, formula = (max(moved, default=0), f"the largest parameter's, on its way; {optimizer.idea}") if optimizer.pages else (sum(moved), optimizer.idea)
    lines.append(TrainLine("optimizer", Estimate(states, "exact"), formula))
    shapes = [tensor.shape for tensor in model_tensors(spec) if plan.weights.format_of(tensor).name not in ("fp32", "bf16", "fp16")]
    if shapes:
        elements, rows = workspace_shape(shapes, tile_elements(plan.weights))
        lines.append(TrainLine("dequantizing", Estimate((elements + rows) * element_bytes(plan), "exact"), "largest tile + most rows"))
    ropes = {layer.mixer.rope for layer in spec.layers if isinstance(layer.mixer, Attention) and layer.mixer.rope is not None}
    lines.append(TrainLine("rotary tables", Estimate(sum(4 * plan.context * rope.dims for rope in ropes), "exact"), "context · dims · 4"))
    if device is not None:
        runtime = runtime_estimate(device) if here_bytes is None else Estimate(here_bytes, "measured")
        lines.append(TrainLine("runtime", runtime, "interpreter, libraries, context"))
        if compute_pool(device) == "host":
            lines.append(
                TrainLine("products", Estimate(num_products(spec, plan) * PRODUCT_BYTES[plan.weights.dense], "modelled"), "code for each shape of a product")
            )
            if here_bytes is None:
                lines += [TrainLine("tokenizer", tokenizer_estimate(spec.V, None), ""), TrainLine("data", Estimate(data_bytes, "exact"), "8 bytes a token")]
    return tuple(lines)


def paged_bytes(spec: ModelSpec, plan: TrainPlan) -> int:
    """The optimizer's states in the host's memory; 0 where they are on the device."""
    optimizer = OPTIMIZERS[plan.optimizer]
    return sum(optimizer.state_bytes(shape, dtype) for _, shape, dtype in trained(spec, plan)) if optimizer.pages else 0


def train_ledger(spec: ModelSpec, plan: TrainPlan, device: DeviceSpec | None = None, *, data_bytes: int = 0, here_bytes: int | None = None) -> TrainLedger:
    """Every line of `plan`. Without a device: of the tensors alone, as an allocator counts them."""
    kept, peak = activation_peak(spec, plan)
    lines = [*fixed_lines(spec, plan, device, data_bytes=data_bytes, here_bytes=here_bytes)]
    lines.append(TrainLine("activations", Estimate(kept, "exact"), "what layers keep, by their checkpointing"))
    lines.append(TrainLine("step", Estimate(peak - kept, "modelled: the worst moment of loss and backward pass"), "recomputed, temporaries, a chunk of logits"))
    pool = "device" if device is not None and compute_pool(device) == "device" else "host"
    offloaded = plan.tokens * spec.D * element_bytes(plan) * sum(segment.kind == "offload" for segment in plan.checkpointing)
    return TrainLedger(tuple(lines), pool, offloaded + paged_bytes(spec, plan))


def with_segments(plan: TrainPlan, segments: Sequence[Segment]) -> TrainPlan:
    return replace(plan, checkpointing=tuple(segments))
