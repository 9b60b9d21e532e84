"""What a step needs beside weights and cache: the tensors of the largest step that are live at once, on one device.

Eager execution frees a tensor when its last reference goes, so the peak is that of the worst moment, not the sum of all tensors. Two moments compete in a layer:
attention (q, k, v, one sequence's gathered keys and values, the kernel's own tensors, its output) and the feed-forward (the fused projection and its
products). How many copies of a kind are live is a constant of `cost/calibration.py`; the shapes are exact. T: tokens of the step, S: keys of one
sequence, e: bytes of an activation. Scores, softmax and logits are fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

from tradespace.cost import calibration
from tradespace.cost.summary import Summary, heads_per_device
from tradespace.spec.attention import chunk_size
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
    )


def residual_bytes(D: int, shape: StepShape) -> float:
    """The stream, its norm and a sublayer's result: copies · T · D · e."""
    return calibration.RESIDUAL_COPIES.value * shape.T * D * shape.e


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
    """The kernel's own tensors for one sequence, by its growth in S; its output is counted apart.

    reference  scores and softmax N·t·S in fp32, fp32 copies of q, k, v where the activations are narrower, and the mask
    chunked    the same over √S keys, and running output, maximum and sum per query
    sdpa       the mask t·S; scores stay in tiles
    flash      one log-sum per query and head
    """
    N, K = heads_per_device(mixer.N, shape.degree), heads_per_device(mixer.K, shape.degree)
    t, S = shape.queries, shape.S
    mask = calibration.MASK_BYTES_PER_SCORE.value
    widen = 0 if shape.e == 4 else 1
    if shape.kernel == "reference":
        return calibration.SCORE_COPIES.value * N * t * S * 4 + mask * t * S + widen * 4 * (N * t * mixer.H + K * S * (mixer.H + mixer.Hv))
    if shape.kernel == "chunked":
        block = chunk_size(S)
        scores = calibration.SCORE_COPIES.value * N * t * block * 4 + mask * t * block
        running = N * t * (mixer.Hv + 2) * 4
        return scores + running + widen * 4 * (N * t * mixer.H + K * block * (mixer.H + mixer.Hv))
    if shape.kernel == "sdpa":
        return (mask + shape.e) * t * S if t > 1 else 0.0
    return N * t * 4


def attention_moment_bytes(mixer: Attention, D: int, shape: StepShape) -> float:
    """All that is live inside attention."""
    output = calibration.ATTENTION_OUTPUT_COPIES.value * shape.T * heads_per_device(mixer.N, shape.degree) * mixer.Hv * shape.e
    return residual_bytes(D, shape) + qkv_bytes(mixer, shape) + gather_bytes(mixer, shape) + kernel_bytes(mixer, shape) + output


def feed_forward_moment_bytes(ffn: DenseFFN | RoutedFFN, D: int, shape: StepShape) -> float:
    """All that is live inside the feed-forward: the fused projection T·2F (T·F ungated), its products, for routed ones all tokens at one expert."""
    F = -(-ffn.F // shape.degree)
    projection = (2 if ffn.gated else 1) * F
    hidden = shape.T * (projection + calibration.HIDDEN_COPIES.value * F) * shape.e
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


def dequantize_bytes(largest_elements: int, dense: str, linear: str) -> int:
    """The shared workspace that one matrix is widened into: a quantized one to the activations' dtype, any to fp32 for the reference product."""
    return largest_elements * (4 if linear == "reference" else ELEMENT_BYTES[dense])


def logits_bytes(rows: int, V: int, e: int) -> int:
    """Logits of `rows` positions in fp32, and the product's own result where activations are narrower."""
    return rows * V * (4 + (e if e < 4 else 0))


def sampler_bytes(rows: int, V: int) -> float:
    """Copies that sampling makes of the logits."""
    return rows * V * calibration.SAMPLER_BYTES_PER_LOGIT.value


def engine_bytes(plan: Plan, rope_dims: int) -> int:
    """What the engine holds for its lifetime: rotary tables (cosine and sine, fp32), block tables and starts (int32), token ids, positions, slots (int64)."""
    tables = plan.max_context * rope_dims * 2 * 4
    blocks = plan.max_sequences * -(-plan.max_context // plan.kv.block_size) * 4 if plan.kv.layout == "paged" else plan.max_sequences * 4
    return tables + blocks + 2 * 4 * (plan.max_sequences + 1) + 3 * 8 * plan.step_tokens
