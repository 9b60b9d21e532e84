"""What a step needs beside weights and cache: the tensors of the largest step that are live at once, on one device.

Eager execution frees a tensor when its last reference goes, so the peak is that of the worst moment, not the sum of all tensors. The moments that compete are
written down one by one, as `model/layer.py` lives through them: the rotation, the attention kernel and the projection out; the feed-forward's wide product, its
activation and the product down; after the layers the head's product, then sampling. A conformance test holds each against torch's own record of allocations.

T: tokens of the step, S: keys of one sequence, e: bytes of an activation. Scores, softmax and logits are fp32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from tradespace.cost import calibration
from tradespace.cost.summary import Product, Summary, heads_per_device
from tradespace.spec import cuda, native
from tradespace.spec.attention_workspace import workspace_bytes
from tradespace.spec.buckets import bucket, buckets_up_to
from tradespace.spec.formats import ELEMENT_BYTES, FORMATS, WeightFormat
from tradespace.spec.kv import PLAIN, KVPlan
from tradespace.spec.kv_workspace import REBUILD_ROWS, decoding_bytes, evicting_bytes, keys_read, rebuild_bytes
from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN, LayerSpec, RoutedFFN
from tradespace.spec.plan import Plan
from tradespace.spec.products import fused_rows, is_coded, scales_products
from tradespace.spec.weights import WeightPlan, tile_rows

SCALING_BYTES = 8  # an in-place product of a 16-bit tensor with an fp32 scale: torch holds both sides in fp32 meanwhile


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """The largest step: T tokens; one sequence brings at most all of them as queries against S keys. e: bytes of an activation.

    rows is the number of sequences at once (each has one row of logits), threads those of the CPU.
    """

    T: int
    S: int
    e: int
    kernel: str
    gathered: bool  # keys and values are copied together before the kernel sees them: paged, or held in another dtype
    rows: int = 1
    degree: int = 1
    linear: str = "torch"
    activations: str = "auto"
    threads: int = 1
    kv: KVPlan = PLAIN  # what reading it takes beside that copy; layout and block size are of no interest

    @property
    def padded(self) -> int:
        """Rows that a product of the step really has: 16-bit products of torch run at few numbers of rows."""
        return bucket(self.T) if self.linear == "torch" and self.e == 2 else self.T


def step_shape(plan: Plan, threads: int = 1) -> StepShape:
    """The largest step that `plan` allows; `threads` where the plan does not say."""
    return StepShape(
        T=plan.step_tokens,
        S=plan.max_context,
        e=ELEMENT_BYTES[plan.weights.dense],
        kernel=plan.attention,
        gathered=plan.kv.copies(plan.weights.dense),
        kv=plan.kv,
        rows=plan.max_sequences * (1 + plan.speculation),
        degree=plan.tensor_parallel,
        linear=plan.linear,
        activations=plan.activations,
        threads=plan.threads or threads,
    )


# ---------------------------------------------------------------------------------------------------------------- products


@lru_cache(maxsize=4096)
def formats_of(weights: WeightPlan, role: str) -> tuple[WeightFormat, ...]:
    """All formats in which some layer holds matrices of `role`, without repeats."""
    by_layer = [name for key, name in weights.exceptions.items() if key.endswith(f":{role}")]
    return tuple(FORMATS[name] for name in dict.fromkeys((weights.exceptions.get(role, weights.default), *by_layer)))


def product_bytes(held: Iterable[WeightFormat], outputs: int, columns: int, rows: int, shape: StepShape) -> int:
    """What a product of `rows` with a matrix (outputs, columns) takes at most beside its result.

    reference   the fp32 tiles rows · outputs that its result is put together from
    coded       tiles of the result until they are one tensor; a scale per row is applied in fp32, tile by tile; integer sums are 32 bits wide
    """
    most = 4 * rows * outputs if shape.linear == "reference" else 0
    for fmt in held:
        if not is_coded(fmt):
            continue
        tile = tile_rows(outputs, columns)
        extra = 0 if tile >= outputs else rows * outputs * shape.e
        if fmt.activations:
            extra = 2 * 4 * rows * outputs + rows * columns * 5
        elif scales_products(fmt) and shape.e < 4:
            whole = min(rows, fused_rows(fmt, columns)) * outputs if shape.linear == "torch" else 0
            extra = max(extra, SCALING_BYTES * max(rows * tile, whole))
            if fmt.rounded:
                extra += rows * columns * (4 + 1 + shape.e) + rows * outputs * 4
        elif fmt.group == 0:  # rotated inputs of a lattice
            extra += 2 * 4 * rows * columns
        most = max(most, extra)
    return most


def native_buffers_bytes(summary: Summary, weights: WeightPlan, shape: StepShape) -> int:
    """What a step of the native kernels holds (`spec/native.py`): allocated once for the largest step, logits and partial results included."""
    model = summary.model
    forms = frozenset(native.activation_form(name, shape.activations) for name in weights.names)
    return native.buffers(model).nbytes(shape.T, min(shape.rows, shape.T), forms, shape.threads, native.value_width(model))


def cuda_buffers_bytes(summary: Summary, weights: WeightPlan, shape: StepShape, block_size: int) -> int:
    """What a step on a CUDA device holds (`spec/cuda.py`): its buffers with the logits, what products and split attention share, what steps read and leave."""
    sequences = min(shape.rows, shape.T)
    blocks = -(-shape.S // block_size)
    return cuda.step_bytes(summary.model, weights.names, shape.T, min(shape.rows, shape.T), sequences, shape.S) + cuda.inbox_bytes(
        shape.T, sequences, min(shape.rows, shape.T), blocks, summary.model.V
    )


def reference_tile_bytes(columns: int, dense: str) -> float:
    """Rows of a matrix that the reference product widens to fp32 at a time; none where it is fp32 already."""
    return 0.0 if dense == "fp32" else calibration.REFERENCE_WEIGHT_ROWS.value * columns * 4


def dequantize_bytes(elements: int, dense: str) -> int:
    """The shared workspace that quantized matrices are dequantized into, tile by tile, for steps with many rows: in the activations' dtype."""
    return elements * ELEMENT_BYTES[dense]


def product_kernels_bytes(layer_shapes: frozenset[Product], head_shapes: frozenset[Product], shape: StepShape, *, kind: str, dense: str) -> float:
    """What torch's CPU library keeps for its products.

    bf16: a compiled kernel for each matrix shape and bucket of rows. fp32: packing buffers that do not grow with the shapes. fp16 keeps nothing.
    The shapes are those of `spec.products.dense_shapes`.
    """
    if kind != "cpu" or shape.linear != "torch" or not layer_shapes:
        return 0.0
    if dense == "fp32":
        return calibration.FP32_PRODUCT_BYTES.value
    if dense != "bf16":
        return 0.0
    return num_product_kernels(layer_shapes, head_shapes, shape.T, min(shape.rows, shape.T)) * calibration.PRODUCT_KERNEL_BYTES.value


@lru_cache(maxsize=4096)
def num_product_kernels(layer_shapes: frozenset[Product], head_shapes: frozenset[Product], step_tokens: int, rows: int) -> int:
    """Different (outputs, columns, rows) among the products of all steps."""
    found = {(R, C, rows_T) for R, C, above in layer_shapes for rows_T in buckets_up_to(step_tokens) if rows_T > above}
    found |= {(R, C, rows_T) for R, C, above in head_shapes for rows_T in buckets_up_to(rows) if rows_T > above}
    return len(found)


# ---------------------------------------------------------------------------------------------------------------- the moments of a layer


def residual_bytes(D: int, shape: StepShape, copies: int) -> int:
    """Copies of the stream T · D · e."""
    return copies * shape.T * D * shape.e


def rope_rows_bytes(rope_dims: int, shape: StepShape) -> int:
    """Cosines and sines of the step's positions, there as long as the layers run: T · 2 · dims · e over all distinct tables."""
    return shape.T * 2 * rope_dims * shape.e


@lru_cache(maxsize=4096)
def kernel_bytes(mixer: Attention, shape: StepShape) -> int:
    """The attention kernel's own tensors, its output included (`spec/attention_workspace.py`)."""
    N, K = heads_per_device(mixer.N, shape.degree), heads_per_device(mixer.K, shape.degree)
    num_keys = keys_read(shape.kv, shape.T, shape.S)
    return workspace_bytes(
        shape.kernel,
        mixer if shape.degree == 1 else replace(mixer, N=N, K=K),
        step_tokens=shape.T,
        max_context=num_keys,
        max_sequences=shape.rows,
        kv_tokens=shape.rows * num_keys,
        element_bytes=shape.e,
        copies=shape.gathered,
        threads=shape.threads,
        kept=shape.kv.retain.capacity is not None and not shape.kv.retain.rebuilds,
        weighed=shape.kv.retain.evicts,
    )


def attention_moment_bytes(mixer: Attention, weights: WeightPlan, D: int, shape: StepShape) -> int:
    """The worst moment of attention: the fused product, the rotation (two copies of q and k beside it), the kernel, or the projection out."""
    N, K, T, e = heads_per_device(mixer.N, shape.degree), heads_per_device(mixer.K, shape.degree), shape.T, shape.e
    rows = N * mixer.H + K * (mixer.H + mixer.Hv)
    qkv = shape.padded * rows * e + (T * N * mixer.Hv * e if mixer.output_gate else 0)
    qk, out = T * (N + K) * mixer.H * e, T * N * mixer.Hv * e
    turned = qk if mixer.rope is not None or mixer.qk_norm != "none" else 0
    product = product_bytes(formats_of(weights, "qkv"), rows, D, shape.padded, shape)
    rotation = 2 * qk if mixer.rope is not None else 0
    if mixer.qk_norm != "none":  # in fp32: the widened queries, and their norm
        rotation = qk + max(rotation, 2 * 4 * T * N * mixer.H)
    beyond = residual_bytes(D, shape, 1) + out + product_bytes(formats_of(weights, "attn_out"), D, N * mixer.Hv, shape.padded, shape)
    beyond += 0 if shape.padded == T else shape.padded * N * mixer.Hv * e
    attending = kernel_bytes(mixer, shape) + cache_moment_bytes(mixer, D, shape)
    rebuilt = rebuild_bytes(shape.kv, mixer, D, shape.S, e)  # older tokens' stream and keys, as long as the layer runs
    return residual_bytes(D, shape, 2) + rebuilt + qkv + max(product, rotation, turned + max(attending, beyond))


def cache_moment_bytes(mixer: Attention, D: int, shape: StepShape) -> int:
    """What decoding the cache and choosing among its tokens takes beside the copy that the kernel reads."""
    return decoding_bytes(shape.kv, mixer, D, shape.e) + evicting_bytes(shape.kv, mixer, keys_read(shape.kv, shape.T, shape.S))


def feed_forward_moment_bytes(layer: LayerSpec, weights: WeightPlan, D: int, shape: StepShape) -> int:
    """The worst moment of the feed-forward: the wide product T·2F (T·F ungated), its activation (act(gate) and the product with up), or the product down.

    Three copies of the stream stand beside it: the layer's input, what attention made of it, and its norm; a fourth where what attention gave is normed itself
    or waits. Routed: all tokens at one expert.
    """
    ffn = layer.ffn
    assert ffn is not None, "only called for layers with a feed-forward"
    F, e, P = -(-ffn.F // shape.degree), shape.e, shape.padded
    wide = (2 if ffn.gated else 1) * F
    roles = ("gate_up", "down") if isinstance(ffn, DenseFFN) else ("experts", "experts")
    product = product_bytes(formats_of(weights, roles[0]), wide, D, P, shape)
    activation = (2 if ffn.gated else 1) * shape.T * F * e
    down = shape.T * F * e + P * D * e + product_bytes(formats_of(weights, roles[1]), D, F, P, shape)
    down += 0 if shape.linear != "torch" or e != 2 else P * F * e  # steps between two buckets pad their rows
    residual = residual_bytes(D, shape, 3 if layer.arrangement in ("pre", "parallel") else 4)
    found = residual + P * wide * e + max(product, activation, down)
    if isinstance(ffn, RoutedFFN):
        found += shape.T * (ffn.E * 4 + ffn.top_k * (4 + 8))  # the router's logits in fp32; chosen weights and ids
        found += 2 * shape.T * (ffn.latent_D or D) * e  # an expert's tokens, and the sum over experts
    return found


def other_mixer_moment_bytes(layer: LayerSpec, D: int, shape: StepShape) -> int:
    """A mechanism that states only its tensors: the outputs of all its matrices for all tokens."""
    assert layer.mixer is not None, "only called for layers that mix"
    rows = sum(tensor.shape[0] for tensor in layer.mixer.tensors(D) if len(tensor.shape) == 2)
    return residual_bytes(D, shape, 3) + shape.T * rows * shape.e


def activation_bytes(summary: Summary, weights: WeightPlan, shape: StepShape) -> int:
    """The worst moment over all layers, rotary rows included. Native steps work in their buffers alone, CUDA steps but for whole prompts' attention."""
    if weights.layout == "cuda":
        return cuda.whole_prompts_bytes(summary.model, shape.T)
    if weights.layout != "stored":
        return 0
    worst = max(mixing_bytes(summary, weights, shape), feeding_bytes(summary, weights, shape))
    return worst + rope_rows_bytes(summary.rope_dims, passing(shape))


def passing(shape: StepShape) -> StepShape:
    """The step as the layers see it: where older tokens are rebuilt, these pass in blocks of their own, larger than a small step."""
    return replace(shape, T=max(shape.T, min(shape.S, REBUILD_ROWS))) if shape.kv.retain.rebuilds else shape


def mixing_bytes(summary: Summary, weights: WeightPlan, shape: StepShape) -> int:
    """The worst moment of attention, or of what a layer has instead, over all layers."""
    D, worst, seen = summary.model.D, 0, passing(shape)
    for group in summary.groups:
        mixer = group.layer.mixer
        if isinstance(mixer, Attention):
            worst = max(worst, attention_moment_bytes(mixer, weights, D, seen))
        elif mixer is not None:
            worst = max(worst, other_mixer_moment_bytes(group.layer, D, seen))
    return worst


def feeding_bytes(summary: Summary, weights: WeightPlan, shape: StepShape) -> int:
    """The worst moment of a feed-forward over all layers: nothing of the attention's kernel or its cache matters to it, but that rebuilt tokens pass, too."""
    seen = passing(shape)
    return max((feed_forward_moment_bytes(g.layer, weights, summary.model.D, seen) for g in summary.groups if g.layer.ffn is not None), default=0)


# ---------------------------------------------------------------------------------------------------------------- after the layers


def sampler_bytes(rows: int, V: int) -> float:
    """Copies that sampling makes of the logits, of so many at a time."""
    at_once = max(calibration.SAMPLER_LOGITS_AT_ONCE.value, V)
    return min(rows * V, at_once) * calibration.SAMPLER_BYTES_PER_LOGIT.value


def head_bytes(summary: Summary, weights: WeightPlan, shape: StepShape) -> float:
    """The moments after the layers: the stream and the logits of `rows` positions (the product's result and its fp32 copy), then logits and sampling."""
    V, D, e = summary.model.V, summary.model.D, shape.e
    rows = min(shape.rows, shape.T)
    if weights.layout == "native":
        # the logits lie in the step's buffers; rows that are adjusted are copied, so many at a time
        return native.sample_bytes(V, rows, shape.threads) + 4 * min(rows * V, max(calibration.SAMPLER_LOGITS_AT_ONCE.value, V))
    if weights.layout == "cuda":  # likewise
        return 2 * 4 * min(rows * V, max(calibration.SAMPLER_LOGITS_AT_ONCE.value, V))
    padded = bucket(rows) if shape.linear == "torch" and e == 2 else rows
    widened = 4 * rows * V if e < 4 else 0
    product = product_bytes(formats_of(weights, "embed" if summary.model.tied else "lm_head"), V, D, padded, shape)
    return max(residual_bytes(D, shape, 1) + padded * V * e + max(widened, product), 4 * rows * V + sampler_bytes(rows, V))


def engine_bytes(*, max_context: int, max_sequences: int, step_tokens: int, block_size: int, rope_dims: int) -> int:
    """What the engine holds for its lifetime: rotary tables (dims/2 cosines and sines, fp32), block tables and starts (int32), ids, positions, slots (int64).

    `block_size` is the tokens of a block; contiguous: max_context, one block a sequence.
    """
    tables = max_context * rope_dims * 4
    blocks = max_sequences * -(-max_context // block_size) * 4
    return tables + blocks + 2 * 4 * (max_sequences + 1) + 3 * 8 * step_tokens
