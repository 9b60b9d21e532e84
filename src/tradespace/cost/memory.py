"""The byte ledger: what a plan takes in every pool, line by line, before anything runs.

Pools are "host", "device" (each device alike) and "disk". The pool that the model computes in is "device" on a CUDA card and "host" otherwise.

Not everything is there at once. Every line belongs to a phase, and a pool's total is its peak over the moments at which it can come:

    total(pool) = always + max(loading, running + max(layers, head))

Weights, runtime, tokenizer and the engine's own tensors are there always; the loader's staging buffer only while loading; the KV cache from the moment it is
allocated ("running"), which is after the last weight is in place and the staging buffer is released; a layer's activations ("layers") and the logits ("head")
never together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tradespace.cost import calibration, workspace
from tradespace.cost.summary import (
    Summary,
    WeightShare,
    cache_state_bytes,
    cache_token_bytes,
    dequantize_elements,
    product_shapes,
    summarize,
    weight_share,
    widest_columns,
)
from tradespace.spec import cuda
from tradespace.spec.buckets import buckets_up_to
from tradespace.spec.device import DeviceSpec
from tradespace.spec.estimate import Estimate
from tradespace.spec.kv import KVPlan
from tradespace.spec.model import ModelSpec
from tradespace.spec.plan import Plan
from tradespace.units import format_bytes

Phase = Literal["always", "loading", "running", "layers", "head"]
PHASES: tuple[Phase, ...] = ("always", "loading", "running", "layers", "head")
EXACT = "exact"
MODELLED = "modelled: closed formula over live tensors"


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """One item: where it lies, how many bytes with their source, by which formula, and in which phase it is there."""

    name: str
    pool: str
    bytes: Estimate
    formula: str
    phase: Phase = "always"

    @property
    def transient(self) -> bool:
        """There only while the model is loaded."""
        return self.phase == "loading"

    def to_dict(self) -> dict[str, object]:
        return {"name": self.name, "pool": self.pool, "bytes": self.bytes.value, "source": self.bytes.source, "formula": self.formula, "phase": self.phase}


@dataclass(frozen=True)
class Ledger:
    """All lines of a plan; `compute_pool` is the one that the plan's budget is about."""

    lines: tuple[LedgerLine, ...]
    compute_pool: str

    @property
    def pools(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(line.pool for line in self.lines))

    def phase_bytes(self, pool: str, phase: Phase) -> float:
        """Sum of a phase's lines; ValueError with the reason where one of them is unknown."""
        return sum(line.bytes.require() for line in self.lines if line.pool == pool and line.phase == phase)

    def total_bytes(self, pool: str | None = None) -> Estimate:
        """The pool's peak (of the compute pool by default) in whole bytes, by the rule above; unknown where a line is."""
        pool = pool or self.compute_pool
        lines = [line for line in self.lines if line.pool == pool]
        unknown = next((line for line in lines if not line.bytes.known), None)
        if unknown is not None:
            return Estimate.unknown(f"{unknown.name}: {unknown.bytes.source}")
        total = peak_bytes(*(self.phase_bytes(pool, phase) for phase in PHASES))
        return Estimate(round(total), EXACT if all(line.bytes.source == EXACT for line in lines) else "ledger: sum of its lines")

    def line(self, name: str) -> LedgerLine:
        """The line of this name, or KeyError with the names there are."""
        for line in self.lines:
            if line.name == name:
                return line
        raise KeyError(f"no line '{name}' in this ledger; it has {', '.join(line.name for line in self.lines)}")

    def to_dict(self) -> dict[str, object]:
        return {
            "compute_pool": self.compute_pool,
            "total_bytes": {pool: self.total_bytes(pool).value for pool in self.pools},
            "lines": [line.to_dict() for line in self.lines],
        }


def peak_bytes(always: float, loading: float, running: float, layers: float, head: float) -> float:
    """The rule for a pool's total."""
    return always + max(loading, running + max(layers, head))


# ---------------------------------------------------------------------------------------------------------------- single terms


def compute_pool(device: DeviceSpec) -> str:
    """Where the model computes: host memory for a CPU and for chips whose GPU shares it, else the device's own."""
    return "device" if device.kind == "cuda" else "host"


def runtime_estimate(device: DeviceSpec) -> Estimate:
    """What the process costs before any model: as the device states it, else the calibration's constant for its kind, which says that it is assumed."""
    if device.runtime_bytes.known:
        return device.runtime_bytes
    constant = calibration.RUNTIME_BYTES[device.kind]
    return Estimate(constant.value, f"{constant.source} ({constant.date})")


def tokenizer_estimate(V: int, tokenizer_bytes: int | None) -> Estimate:
    if tokenizer_bytes is not None:
        return Estimate(tokenizer_bytes, "given")
    constant = calibration.TOKENIZER_BYTES_PER_ENTRY
    return Estimate(V * constant.value, f"{constant.source} ({constant.date})")


def kv_slots(plan: Plan) -> int:
    """Token slots that the cache holds: what the plan says where paged, one region of max_context a sequence where contiguous."""
    return plan.kv_tokens if plan.kv.layout == "paged" else plan.max_sequences * plan.kv.block_slots(plan.max_context)


def kv_slot_bytes(summary: Summary, kv: KVPlan | str, degree: int) -> int:
    """Bytes of one token slot over all layers on one device."""
    return sum(token * layers for _, token, layers in cache_token_bytes(summary, kv, degree))


def state_bytes(summary: Summary, kv: KVPlan, max_context: int, degree: int = 1) -> int:
    """What every sequence has beside its slots: fixed-size states of recurrent mechanisms, the cache's tails and token ids."""
    return summary.state_bytes_per_sequence + cache_state_bytes(summary, kv, max_context, degree)


def stream_buffer_bytes(share: WeightShare, streamed_layers: int) -> float:
    """Room for streamed layers in the compute pool: the largest of them, as often as layers are in flight."""
    return min(calibration.STREAM_BUFFERS.value, streamed_layers) * max(share.layer_bytes[len(share.layers) - streamed_layers :], default=0)


# ---------------------------------------------------------------------------------------------------------------- the ledger


def ledger(model: ModelSpec, plan: Plan, device: DeviceSpec, *, staging_bytes: int | None = None, tokenizer_bytes: int | None = None) -> Ledger:
    """The ledger of `plan` on (each) `device`. `staging_bytes`: the loader's buffer; `tokenizer_bytes`: measured, where it is."""
    summary, pool = summarize(model), compute_pool(device)
    share = weight_share(summary, plan.weights, plan.tensor_parallel)
    lines = [LedgerLine("runtime", pool, runtime_estimate(device), "before any model")]
    if pool != "host":
        host = calibration.HOST_PROCESS_BYTES
        lines.append(LedgerLine("host process", "host", Estimate(host.value, f"{host.source} ({host.date})"), "before any model"))
    lines += _weight_lines(plan, share, pool)
    lines.append(_kv_line(summary, plan, pool))
    lines += _step_lines(summary, plan, pool, device)
    held = workspace.engine_bytes(
        max_context=plan.max_context,
        max_sequences=plan.max_sequences,
        step_tokens=plan.step_tokens,
        block_size=plan.kv.block_slots(plan.max_context),
        rope_dims=summary.rope_dims,
    )
    lines.append(LedgerLine("engine tensors", pool, Estimate(held, EXACT), "rotary and block tables, ids, slots"))
    if pool == "host":
        heap = calibration.HEAP_BYTES
        lines.append(LedgerLine("heap", pool, Estimate(heap.value, f"{heap.source} ({heap.date})"), "objects, headers, what the allocator keeps"))
    lines.append(LedgerLine("tokenizer", "host", tokenizer_estimate(model.V, tokenizer_bytes), f"V = {model.V} entries"))
    staging = calibration.staging(device.kind)
    staged = Estimate(staging.value, f"{staging.source} ({staging.date})") if staging_bytes is None else Estimate(staging_bytes, "given")
    lines.append(LedgerLine("staging", "host", staged, "one buffer, released when the weights are in place", "loading"))
    return Ledger(tuple(lines), pool)


def _weight_lines(plan: Plan, share: WeightShare, pool: str) -> list[LedgerLine]:
    streamed = plan.placement.streamed_layers
    resident = [share.outside, *share.layers[: len(share.layers) - streamed]]
    totals: dict[tuple[str, str], int] = {}
    for part in resident:
        for key, size in part.items():
            totals[key] = totals.get(key, 0) + size
    split = f", one of {plan.tensor_parallel} parts" if plan.tensor_parallel > 1 else ""
    mixed = {role for role, _ in totals if sum(role == other for other, _ in totals) > 1}
    lines = [
        LedgerLine(f"weights: {role} ({name})" if role in mixed else f"weights: {role}", pool, Estimate(size, EXACT), f"{name}, codes and scales{split}")
        for (role, name), size in totals.items()
    ]
    if streamed:
        formula = f"{calibration.STREAM_BUFFERS.value:.0f} × the largest of {streamed} streamed layers"
        lines.append(LedgerLine("stream buffer", pool, Estimate(stream_buffer_bytes(share, streamed), EXACT), formula))
        where = plan.placement.stream_from
        lines.append(
            LedgerLine("streamed weights", where, Estimate(share.streamed_bytes[streamed] * plan.tensor_parallel, EXACT), f"the last {streamed} layers")
        )
    return lines


def _kv_line(summary: Summary, plan: Plan, pool: str) -> LedgerLine:
    slot, slots = kv_slot_bytes(summary, plan.kv, plan.tensor_parallel), kv_slots(plan)
    each = state_bytes(summary, plan.kv, plan.max_context, plan.tensor_parallel)
    total = slots * slot + plan.max_sequences * each
    if plan.kv.layout == "paged":
        formula = f"{plan.num_blocks} blocks × {plan.kv.block_size} tokens × {slot} B"
    else:
        formula = f"{plan.max_sequences} × {plan.kv.block_slots(plan.max_context)} tokens × {slot} B"
    if each:
        formula += f" + {plan.max_sequences} × {each} B a sequence"
    return LedgerLine("kv cache", pool, Estimate(total, EXACT), formula, "running")


def _step_lines(summary: Summary, plan: Plan, pool: str, device: DeviceSpec) -> list[LedgerLine]:
    shape, model, weights, dense = workspace.step_shape(plan, device.cores or 1), summary.model, plan.weights, plan.weights.dense
    lines: list[tuple[str, float, str, Phase]] = []
    widened = dequantize_elements(summary, weights, plan.tensor_parallel)
    if widened:
        size = workspace.dequantize_bytes(widened, dense)
        lines.append(("dequantized matrix", size, f"largest tile and a row of ones: {widened} × {size // widened} B", "running"))
    if weights.layout == "native":
        size = workspace.native_buffers_bytes(summary, weights, shape)
        lines.append(("step buffers", size, f"{shape.T} tokens of the native step, logits included", "running"))
    if weights.layout == "cuda":
        size = workspace.cuda_buffers_bytes(summary, weights, shape, plan.kv.block_slots(plan.max_context))
        lines.append(("step buffers", size, f"{shape.T} tokens of the CUDA step, {min(shape.rows, shape.T)} rows of logits, what steps read", "running"))
        steps = cuda.captured_steps(model, min(shape.rows, shape.T), plan.max_context, shape.T)
        lines.append(("graphs", calibration.GRAPH_BYTES.value * steps, f"{steps} captured steps: decodes by sequences, mixed ones by tokens", "running"))
    layers, head = product_shapes(summary, weights, plan.tensor_parallel)
    compiled = workspace.product_kernels_bytes(layers, head, shape, kind=device.kind, dense=dense)
    if compiled:
        formula = f"kept by the library: {len(layers | head)} shapes × up to {len(buckets_up_to(plan.step_tokens))} numbers of rows"
        lines.append(("product kernels", compiled, formula, "running"))
    if plan.linear == "reference":
        size = workspace.reference_tile_bytes(widest_columns(summary), dense)
        lines.append(("reference tile", size, "rows of a matrix widened to fp32", "running"))
    formula = f"worst moment of a layer: {shape.T} tokens, {plan.attention} over {shape.S} keys"
    lines.append(("workspace", workspace.activation_bytes(summary, weights, shape), formula, "layers"))
    sampled = "two more of each row sampled at once" if weights.layout == "native" else f"{calibration.SAMPLER_BYTES_PER_LOGIT.value:.0f} B each where sampled"
    formula = f"{min(shape.rows, shape.T)} rows × {model.V} logits; {sampled}"
    lines.append(("logits", workspace.head_bytes(summary, weights, shape), formula, "head"))
    return [LedgerLine(name, pool, Estimate(size, MODELLED), formula, phase) for name, size, formula, phase in lines]


def describe_total(found: Ledger) -> str:
    """One phrase per pool: "host 612 MiB"."""
    return ", ".join(f"{pool} {format_bytes(found.total_bytes(pool).require())}" for pool in found.pools)


def measurable_lines(predicted: Ledger) -> Iterator[tuple[str, Estimate, str]]:
    """The ledger's lines as a run can measure them: (name, bytes, formula). All weights are one line, and so is what a step holds at its worst moment."""
    pool = predicted.compute_pool
    weights = [line for line in predicted.lines if line.name.startswith("weights")]
    step = [line for line in predicted.lines if line.phase in ("layers", "head") or (line.phase == "running" and line.name != "kv cache")]
    for line in predicted.lines:
        if line in weights:
            if line is weights[0]:
                yield "weights", Estimate(sum(part.bytes.require() for part in weights), line.bytes.source), "codes, scales and norms of all tensors"
        elif line not in step:
            yield line.name, line.bytes, line.formula
    total = predicted.total_bytes(pool).require()
    at_worst = total - predicted.phase_bytes(pool, "always") - predicted.line("kv cache").bytes.require()
    yield "workspace", Estimate(at_worst, step[0].bytes.source), "worst moment of the largest step: " + ", ".join(line.name for line in step)
