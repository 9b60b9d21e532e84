"""What a step needs beside weights and cache: the tensors of the largest step that are live at once, on one device.

Eager execution frees a tensor when its last reference goes, so the peak is that of the worst moment, not the sum of all tensors. Two moments compete in
a layer: attention (q, k, v, one sequence's gathered keys and values, the kernel's own tensors, its output) and the feed-forward (the fused projection
and its products); a third comes after the layers, at the logits. How many copies of a kind are live is a constant of `cost/calibration.py`; the shapes
are exact. T: tokens of the step, S: keys of one sequence, e: bytes of an activation. Scores, softmax and logits are fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

from tradespace.cost import calibration
from tradespace.cost.summary import Summary, heads_per_device
from tradespace.spec.attention import chunk_size
from tradespace.spec.buckets import buckets_up_to
from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN, LayerSpec, RoutedFFN
from tradespace.spec.plan import Plan
from tradespace.spec.weights import ELEMENT_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """The largest step: T tokens; one sequence brings at most all of them as queries against S keys. e: bytes of an activation."""

    T: int
    S: int
    e: int
    kernel: str
    gathered: bool  # keys and values are copied together before the kernel sees them: paged, or held in another dtype
    degree: int = 1
    linear: str = "torch"

    @property
    def queries(self) -> int:
        """Most queries that one sequence has in the step."""
        return min(self.T, self.S)


def step_shape(plan: Plan) -> StepShape:
    """The largest step that `plan` allows."""
    return StepShape(
        T=plan.step_tokens,
        S=plan.max_context,
        e=ELEMENT_BYTES[plan.weights.dense],
        kernel=plan.attention,
        gathered=plan.kv.layout == "paged" or plan.kv.store != plan.weights.dense,
        degree=plan.tensor_parallel,
        linear=plan.linear,
    )


def residual_bytes(D: int, shape: StepShape) -> float:
    """The stream, its norm and a sublayer's result: copies · T · D · e."""
    return calibration.RESIDUAL_COPIES.value * shape.T * D * shape.e


def product_bytes(outputs: int, shape: StepShape) -> int:
    """What a product of `outputs` columns takes beside its result: nothing, or in the reference the fp32 tiles T·R that its result is put together from."""
    return 4 * shape.T * outputs if shape.linear == "reference" else 0


def qkv_bytes(mixer: Attention, shape: StepShape) -> float:
    """The fused projection T·(N·H + K·(H + Hv))·e, and rotated copies of q and k."""
    N, K = heads_per_device(mixer.N, shape.degree), heads_per_device(mixer.K, shape.degree)
    rotated = calibration.ROTATED_COPIES.value * (N + K) * mixer.H if mixer.rope is not None else 0
    gate = N * mixer.Hv if mixer.output_gate else 0
    return shape.T * (N * mixer.H + K * (mixer.H + mixer.Hv) + rotated + gate) * shape.e


def gather_bytes(mixer: Attention, shape: StepShape) -> int:
    """One sequence's keys and values side by side, S·K·(H + Hv)·e: nothing where the cache lies in one piece and in the activations' dtype."""
    return shape.S * heads_per_device(mixer.K, shape.degree) * (mixer.H + mixer.Hv) * shape.e if shape.gathered else 0


def kernel_bytes(mixer: Attention, shape: StepShape) -> float:
    """The kernel's own tensors for one sequence, t queries at a time (`calibration.QUERY_BLOCK`); its output is counted apart.

    reference  fp32: scores N·t·S, padded copies of the keys and values, and all output tiles twice (T·N·Hv) until they are one tensor
    chunked    fp32: scores over √S keys, the running output and its update, queries, maximum and sum
    sdpa       one call's queries and output, and a mask vector twice as long as the keys; scores stay in tiles
    flash      one log-sum per query and head
    """
    N, K = heads_per_device(mixer.N, shape.degree), heads_per_device(mixer.K, shape.degree)
    t, S = min(shape.queries, calibration.QUERY_BLOCK[shape.kernel].value), shape.S
    copies = calibration.SCORE_COPIES.value
    if shape.kernel == "reference":
        return copies * N * t * S * 4 + K * S * (mixer.H + mixer.Hv) * 4 + 2 * shape.T * N * mixer.Hv * 4
    if shape.kernel == "chunked":
        block = chunk_size(S)
        widened = 0 if shape.e == 4 else K * block * (mixer.H + mixer.Hv) * 4
        return copies * N * t * block * 4 + N * t * (2 * mixer.Hv + mixer.H + 2) * 4 + widened
    if shape.kernel == "sdpa":
        return N * t * (mixer.H + mixer.Hv) * shape.e + 2 * S * shape.e
    return N * t * 4


def attention_moment_bytes(mixer: Attention, D: int, shape: StepShape) -> float:
    """All that is live inside attention."""
    output = calibration.ATTENTION_OUTPUT_COPIES.value * shape.T * heads_per_device(mixer.N, shape.degree) * mixer.Hv * shape.e
    return residual_bytes(D, shape) + qkv_bytes(mixer, shape) + gather_bytes(mixer, shape) + kernel_bytes(mixer, shape) + output


def feed_forward_moment_bytes(ffn: DenseFFN | RoutedFFN, D: int, shape: StepShape) -> float:
    """All that is live inside the feed-forward: the fused projection T·2F (T·F ungated), its products, for routed ones all tokens at one expert."""
    F = -(-ffn.F // shape.degree)
    projection = (2 if ffn.gated else 1) * F
    hidden = shape.T * projection * shape.e + max(shape.T * calibration.HIDDEN_COPIES.value * F * shape.e, product_bytes(projection, shape))
    if isinstance(ffn, RoutedFFN):
        routed = shape.T * (ffn.E * 4 + ffn.top_k * (4 + 8))  # the router's logits in fp32; chosen weights and ids
        gathered = 2 * shape.T * (ffn.latent_D or D) * shape.e  # an expert's tokens, and the sum over experts
        return residual_bytes(D, shape) + hidden + routed + gathered
    return residual_bytes(D, shape) + hidden


def other_mixer_moment_bytes(layer: LayerSpec, D: int, shape: StepShape) -> float:
    """A mechanism that states only its tensors: the outputs of all its matrices for all tokens."""
    assert layer.mixer is not None, "only called for layers that mix"
    rows = sum(tensor.shape[0] for tensor in layer.mixer.tensors(D) if len(tensor.shape) == 2)
    return residual_bytes(D, shape) + shape.T * rows * shape.e


def activation_bytes(summary: Summary, shape: StepShape) -> float:
    """The worst moment over all layers."""
    D, worst = summary.model.D, 0.0
    for group in summary.groups:
        mixer, ffn = group.layer.mixer, group.layer.ffn
        if isinstance(mixer, Attention):
            worst = max(worst, attention_moment_bytes(mixer, D, shape))
        elif mixer is not None:
            worst = max(worst, other_mixer_moment_bytes(group.layer, D, shape))
        if ffn is not None:
            worst = max(worst, feed_forward_moment_bytes(ffn, D, shape))
    return worst


def dequantize_bytes(elements: int, dense: str) -> int:
    """The shared workspace that quantized matrices are dequantized into, tile by tile, for steps with many rows: in the activations' dtype."""
    return elements * ELEMENT_BYTES[dense]


def product_kernels_bytes(num_shapes: int, step_tokens: int, rows: int, *, kind: str, dense: str, linear: str) -> float:
    """What torch's CPU library compiles for 16-bit products: one kernel for each matrix shape of the layers and bucket of rows, and for the head."""
    if kind != "cpu" or linear != "torch" or ELEMENT_BYTES[dense] != 2:
        return 0.0
    kernels = num_shapes * len(buckets_up_to(step_tokens)) + len(buckets_up_to(min(rows, step_tokens)))
    return kernels * calibration.PRODUCT_KERNEL_BYTES.value


def reference_tile_bytes(columns: int, dense: str) -> float:
    """Rows of a matrix that the reference product widens to fp32 at a time; none where it is fp32 already."""
    return 0.0 if dense == "fp32" else calibration.REFERENCE_WEIGHT_ROWS.value * columns * 4


def logits_bytes(rows: int, V: int, e: int) -> int:
    """Logits of `rows` positions in fp32, and the product's own result where activations are narrower."""
    return rows * V * (4 + (e if e < 4 else 0))


def sampler_bytes(rows: int, V: int) -> float:
    """Copies that sampling makes of the logits, of so many at a time."""
    at_once = max(calibration.SAMPLER_LOGITS_AT_ONCE.value, V)
    return min(rows * V, at_once) * calibration.SAMPLER_BYTES_PER_LOGIT.value


def head_bytes(rows: int, V: int, D: int, shape: StepShape) -> float:
    """The moment after the layers: the stream and its norm T·D·e, the logits of `rows` positions and what sampling makes of them."""
    return 2 * shape.T * D * shape.e + logits_bytes(rows, V, shape.e) + sampler_bytes(rows, V)


def engine_bytes(*, max_context: int, max_sequences: int, step_tokens: int, block_size: int, rope_dims: int) -> int:
    """What the engine holds for its lifetime: rotary tables (cosine and sine, fp32), block tables and starts (int32), token ids, positions, slots (int64).

    `block_size` is the tokens of a block; contiguous: max_context, one block a sequence.
    """
    tables = max_context * rope_dims * 2 * 4
    blocks = max_sequences * -(-max_context // block_size) * 4
    return tables + blocks + 2 * 4 * (max_sequences + 1) + 3 * 8 * step_tokens
