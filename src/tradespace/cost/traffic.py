"""What a step moves and computes on one device: bytes read and written, operations, bytes over links. Counts only; seconds are `cost/time.py`.

A decode step reads every weight once whatever the number of sequences (of routed experts those that somebody chose), and each sequence's keys and values as far
back as each layer's window looks. A prefill reads the weights once per chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from tradespace.cost import calibration
from tradespace.cost.summary import Summary, WeightShare, cache_token_bytes, heads_per_device, reach, routed_groups
from tradespace.spec import cuda
from tradespace.spec.attention import chunk_size
from tradespace.spec.formats import ELEMENT_BYTES
from tradespace.spec.kv import PLAIN, KVPlan
from tradespace.spec.kv_workspace import REBUILD_ROWS
from tradespace.spec.model import RoutedFFN
from tradespace.spec.plan import Plan
from tradespace.spec.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """One step on one device: bytes through its memory (`paged_bytes` of them keys and values that paged attention reads of several sequences, at a rate of
    their own), operations (beside `paged_flops`, those of paged attention over prompts, likewise), eager calls, and what crosses links.
    """

    read_bytes: float
    flops: float
    num_ops: float
    paged_bytes: float = 0.0
    paged_flops: float = 0.0
    link_bytes: float = 0.0  # streamed layers
    link: str = "host"
    peer_bytes: float = 0.0
    peer_transfers: int = 0

    @property
    def arithmetic_intensity(self) -> float:
        """Operations per byte of memory traffic."""
        return (self.flops + self.paged_flops) / self.read_bytes if self.read_bytes else 0.0


def expected_experts(E: int, top_k: int, tokens: float) -> float:
    """Distinct experts that `tokens` tokens choose, each `top_k` of `E`, if all are equally likely: E·(1 - (1 - k/E)^tokens).

    >>> expected_experts(8, 2, 1), round(expected_experts(8, 2, 16), 2)
    (2.0, 7.92)
    """
    return E * (1 - (1 - top_k / E) ** tokens)


def weight_read_bytes(summary: Summary, share: WeightShare, tokens: float) -> float:
    """Bytes of weights that a step of `tokens` tokens reads: all layers once, chosen experts, the head, and one row of the embedding per token."""
    layers = sum(share.layer_bytes)
    if routed_groups(summary):
        for layer, held in zip(summary.model.layers, share.layers, strict=True):
            if isinstance(layer.ffn, RoutedFFN):
                experts = sum(size for (role, _), size in held.items() if role == "experts")
                layers -= experts * (1 - expected_experts(layer.ffn.E, layer.ffn.top_k, tokens) / layer.ffn.E)
    embed = sum(size for (role, _), size in share.outside.items() if role == "embed")
    rows = tokens * embed / summary.model.V
    return layers + (share.outside_bytes + rows if summary.model.tied else share.outside_bytes - embed + rows)


def cache_read_bytes(token_bytes: tuple[tuple[int | None, int, int], ...], length: float) -> float:
    """Bytes of keys and values that one query of a sequence of `length` tokens reads; `token_bytes` as `cache_token_bytes` gives them."""
    return sum(min(length, window or length) * size * layers for window, size, layers in token_bytes)


def causal_pairs(tokens: float, window: int | None) -> float:
    """Query-key pairs of `tokens` tokens under a causal mask, each looking back at most `window`.

    >>> causal_pairs(4, None), causal_pairs(4, 2)
    (10.0, 7.0)
    """
    if window is None or window >= tokens:
        return tokens * (tokens + 1) / 2
    return window * (window + 1) / 2 + (tokens - window) * window


def attention_flops(summary: Summary, pairs_of: Callable[[int | None], float]) -> float:
    """2·N·(H + Hv) operations per query-key pair; `pairs_of(window)` gives the pairs of one layer. Other mechanisms count with their matrices only."""
    return sum(2 * mixer.N * (mixer.H + mixer.Hv) * pairs_of(mixer.window) * count for mixer, count in summary.attention_groups)


def kernel_traffic_factor(kernel: str, gathered: bool) -> int:
    """How often keys and values pass through memory: once; read, written and read again where they are gathered first. Fused kernels read blocks in place."""
    return 3 if gathered and kernel not in ("flash", "native", "paged") else 1


def score_traffic_bytes(summary: Summary, kernel: str, pairs: float, degree: int) -> float:
    """Scores that the reference writes, reads, writes as softmax and reads: fp32, all layers. The others keep them in tiles."""
    if kernel != "reference":
        return 0.0
    return sum(4 * 4 * heads_per_device(mixer.N, degree) * pairs * count for mixer, count in summary.attention_groups)


def attention_ops(kernel: str, length: float) -> float:
    """Eager operations of one sequence in one layer's attention."""
    constant = calibration.KERNEL_OPS[kernel].value
    return constant * ceil(length / chunk_size(max(1, ceil(length)))) if kernel == "chunked" else constant


def layer_ops(kernel: str, rows: float) -> float:
    """Eager operations of one layer outside of attention in a step of so many rows: none where one call runs the whole step, and for captured kernels what they
    wait for each other, which is more where norms and activations are kernels of their own."""
    paged = calibration.PAGED_LAYER_OPS.value + (calibration.PAGED_MANY_OPS.value if rows > cuda.FEW_ROWS else 0.0)
    return {"native": 0.0, "paged": paged}.get(kernel, calibration.LAYER_OPS.value)


def step_ops(kernel: str) -> float:
    """Operations of a step beside its layers."""
    return calibration.CAPTURED_STEP_OPS.value if kernel == "paged" else calibration.STEP_OPS.value


def peer_work(summary: Summary, tokens: float, e: int, degree: int) -> tuple[float, int]:
    """(bytes, transfers) of tensor parallelism: two ring all-reduces a layer, each moving 2·(d - 1)/d of T·D·e (arXiv:1909.08053)."""
    if degree == 1:
        return 0.0, 0
    transfers = 2 * summary.model.L
    return transfers * 2 * (degree - 1) / degree * tokens * summary.model.D * e, transfers


@dataclass(frozen=True, slots=True)
class Axes:
    """The parts of a plan that traffic depends on."""

    kernel: str
    gathered: bool
    dense: str
    degree: int
    streamed_layers: int
    stream_from: str
    kv: KVPlan = PLAIN  # its retention and stores; the layout is in `gathered`

    @classmethod
    def of(cls, plan: Plan) -> Axes:
        gathered, placement = plan.kv.copies(plan.weights.dense), plan.placement
        return cls(plan.attention, gathered, plan.weights.dense, plan.tensor_parallel, placement.streamed_layers, placement.stream_from, plan.kv)


def remade_work(summary: Summary, share: WeightShare, axes: Axes, length: float) -> tuple[float, float]:
    """(operations, bytes) of making again what the cache does not hold as keys and values, for one query step of a sequence that holds `length` tokens.

    A layer's input: K and V of all tokens projected from it, written and read. Rebuilding: a prefill of all tokens older than what is kept, whose every block
    of rows reads the layers' weights again.
    """
    kv, e = axes.kv, ELEMENT_BYTES[axes.dense]
    pairs = [(mixer, count) for mixer, count in summary.attention_groups]
    if kv.retain.rebuilds:
        old = max(0, round(length) - kv.retain.recent)
        body = summary.active_parameters - summary.head_parameters
        flops = 2 * body * old + attention_flops(summary, lambda window: causal_pairs(old, window))
        held = sum(mixer.K * (mixer.H + mixer.Hv) * count for mixer, count in pairs)
        return flops, ceil(old / REBUILD_ROWS) * sum(share.layer_bytes) + old * e * (2 * summary.model.D * summary.model.L + 3 * held)
    if kv.of_input:
        kept = length if kv.retain.capacity is None else min(length, kv.retain.capacity)
        rows = sum(mixer.K * (mixer.H + mixer.Hv) * count for mixer, count in pairs)
        return 2 * summary.model.D * rows * kept, 2 * rows * kept * e
    return 0.0, 0.0


def decode_work(summary: Summary, share: WeightShare, cache: tuple[tuple[int | None, int, int], ...], axes: Axes, sequences: float, length: float) -> StepWork:
    """One decode step: one token for each of `sequences`, each holding `length` tokens."""
    return with_weights(decode_beside(summary, share, cache, axes, sequences, length), weight_read_bytes(summary, share, sequences), share, axes, steps=1)


def prefill_work(
    summary: Summary, share: WeightShare, cache: tuple[tuple[int | None, int, int], ...], axes: Axes, prompt_tokens: int, step_tokens: int
) -> StepWork:
    """The prompt of one sequence in chunks of `step_tokens`; logits of its last token only. Each chunk reads the keys and values before it once."""
    chunk = min(step_tokens, prompt_tokens)
    beside = prefill_beside(summary, share, cache, axes, prompt_tokens, chunk)
    return with_weights(beside, weight_read_bytes(summary, share, chunk), share, axes, steps=ceil(prompt_tokens / chunk))


def with_weights(beside: StepWork, read_bytes: float, share: WeightShare, axes: Axes, *, steps: int) -> StepWork:
    """`beside` and the weights: `read_bytes` of them in each of `steps`, the streamed layers over their link."""
    return StepWork(
        read_bytes=steps * read_bytes + beside.read_bytes,
        paged_bytes=beside.paged_bytes,
        paged_flops=beside.paged_flops,
        flops=beside.flops,
        num_ops=beside.num_ops,
        link_bytes=steps * share.streamed_bytes[axes.streamed_layers],
        link=axes.stream_from,
        peer_bytes=beside.peer_bytes,
        peer_transfers=beside.peer_transfers,
    )


def decode_beside(
    summary: Summary, share: WeightShare, cache: tuple[tuple[int | None, int, int], ...], axes: Axes, sequences: float, length: float
) -> StepWork:
    """A decode step without reading its weights: the same for all weights of one dtype of activations, unless older tokens are rebuilt with them."""
    model, e, degree = summary.model, ELEMENT_BYTES[axes.dense], axes.degree
    cached = cache_read_bytes(cache, length) * kernel_traffic_factor(axes.kernel, axes.gathered)
    written = sum(size * layers for _, size, layers in cache)
    scores = score_traffic_bytes(summary, axes.kernel, length, degree)
    states = 2 * summary.state_bytes_per_sequence
    logits = 2 * model.V * 4
    flops = 2 * summary.active_parameters + attention_flops(summary, lambda window: min(length, reach(window, axes.kv) or length))
    remade_flops, remade_bytes = remade_work(summary, share, axes, length)
    peer_bytes, transfers = peer_work(summary, sequences, e, degree)
    per_layer = layer_ops(axes.kernel, sequences) + (attention_ops(axes.kernel, length) * (1 if axes.kernel == "flash" else sequences))
    if axes.kernel == "paged" and sequences > 1:
        per_layer += calibration.PAGED_SEVERAL_OPS.value
    return StepWork(
        read_bytes=sequences * (cached + written + scores + states + logits + remade_bytes),
        paged_bytes=sequences * cached if axes.kernel == "paged" and sequences > 1 else 0.0,
        flops=sequences * (flops + remade_flops) / degree,
        num_ops=per_layer * model.L + step_ops(axes.kernel),
        peer_bytes=peer_bytes,
        peer_transfers=transfers,
    )


def prefill_beside(
    summary: Summary, share: WeightShare, cache: tuple[tuple[int | None, int, int], ...], axes: Axes, prompt_tokens: int, chunk: int
) -> StepWork:
    """A prefill in chunks without reading its weights, as `decode_beside`."""
    model, e, degree = summary.model, ELEMENT_BYTES[axes.dense], axes.degree
    chunks = ceil(prompt_tokens / chunk)
    mean_keys = (prompt_tokens + chunk) / 2  # that a chunk sees, itself included
    cached = chunks * cache_read_bytes(cache, mean_keys) * kernel_traffic_factor(axes.kernel, axes.gathered)
    written = prompt_tokens * sum(size * layers for _, size, layers in cache)
    scores = score_traffic_bytes(summary, axes.kernel, causal_pairs(prompt_tokens, None), degree)
    body = summary.active_parameters - summary.head_parameters
    flops = 2 * (body * prompt_tokens + summary.head_parameters)
    attention = attention_flops(summary, lambda window: causal_pairs(prompt_tokens, reach(window, axes.kv)))
    paged = axes.kernel == "paged"
    remade = [remade_work(summary, share, axes, start) for start in range(0, prompt_tokens, chunk)] if axes.kv.retain.rebuilds or axes.kv.of_input else []
    peer_bytes, transfers = peer_work(summary, prompt_tokens, e, degree)
    around = step_ops(axes.kernel)
    ops = (layer_ops(axes.kernel, chunk) + attention_ops(axes.kernel, mean_keys)) * model.L + around
    return StepWork(
        read_bytes=cached + written + scores + 2 * model.V * 4 + sum(size for _, size in remade),
        flops=(flops + (0.0 if paged else attention) + sum(ops for ops, _ in remade)) / degree,
        paged_flops=attention / degree if paged else 0.0,
        num_ops=chunks * ops,
        peer_bytes=peer_bytes,
        peer_transfers=chunks * transfers,
    )


def sequences_in_step(plan: Plan, workload: Workload) -> int:
    """Sequences that decode together: those asked for, as far as the plan admits them and the cache holds them at their mean length."""
    held = plan.kv_tokens // max(1, plan.kv.retain.tokens(ceil(workload.mean_length))) if plan.kv.layout == "paged" else plan.max_sequences
    return max(1, min(workload.concurrency, plan.max_sequences, held))


def cache_share(summary: Summary, plan: Plan) -> tuple[tuple[int | None, int, int], ...]:
    """`cache_token_bytes` of a plan."""
    return cache_token_bytes(summary, plan.kv, plan.tensor_parallel)
