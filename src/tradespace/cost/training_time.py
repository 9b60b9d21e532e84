"""The seconds of a training step by the roofline: products, attention, what is computed again, the optimizer's traffic, and what ranks send each other."""

from __future__ import annotations

from math import prod

from tradespace.cost.training import element_bytes, layer_kept, parts_of, whole_bytes
from tradespace.spec.device import DeviceSpec
from tradespace.spec.estimate import Estimate
from tradespace.spec.formats import FORMATS
from tradespace.spec.model import LayerSpec, ModelSpec
from tradespace.spec.tensors import model_tensors
from tradespace.spec.training import OPTIMIZERS, Kind, TrainPlan, trained

CALLS_PER_LAYER = 90  # operations that Python starts, forward and backward
EFFICIENCY = 0.7  # of the machine's product rate, over a whole step: assumed until the speed is measured


def layer_forward_flops(layer: LayerSpec, D: int, plan: TrainPlan) -> tuple[float, float]:
    """(of products, of attention) for all tokens of a micro-batch; attention of whole causal sequences."""
    attn, ffn = parts_of(layer)
    matrices = D * (attn.N * attn.H + attn.K * (attn.H + attn.Hv)) + attn.N * attn.Hv * D + D * ffn.F * ((2 if ffn.gated else 1) + 1)
    return 2.0 * matrices * plan.tokens, 2.0 * plan.tokens * plan.context * attn.N * attn.H


def _after_norms_flops(layer: LayerSpec, D: int, plan: TrainPlan) -> float:
    """Of the two products that take a norm's result."""
    attn, ffn = parts_of(layer)
    return 2.0 * plan.tokens * D * (attn.N * attn.H + attn.K * (attn.H + attn.Hv) + ffn.F * (2 if ffn.gated else 1))


def again_seconds(spec: ModelSpec, plan: TrainPlan, device: DeviceSpec, index: int, kind: Kind) -> float:
    """What checkpointing a layer in this way costs in time."""
    if kind == "none":
        return 0.0
    layer = spec.layers[index]
    products, attention = layer_forward_flops(layer, spec.D, plan)
    rate = device.flops_per_s(plan.weights.dense).require() * EFFICIENCY
    touched = layer_kept(layer, spec.D, plan.tokens, element_bytes(plan)) / device.read_bytes_per_s.require()
    if kind == "norms":
        passes = 2 * (2 * plan.tokens * spec.D * element_bytes(plan)) / device.read_bytes_per_s.require()  # two norms, read and written
        return passes + (_after_norms_flops(layer, spec.D, plan) / rate if plan.method != "full" else 0.0)
    if kind == "selective":
        # the last product of a section is not run again, but beside an adapter it is
        return attention / rate + touched + (products / rate if plan.method != "full" else 0.0)
    seconds = (products + attention) / rate + touched
    if kind == "offload" and device.host_link_bytes_per_s is not None:
        seconds += 2 * plan.tokens * spec.D * element_bytes(plan) / device.host_link_bytes_per_s.require()
    return seconds


def sum_seconds(spec: ModelSpec, plan: TrainPlan, device: DeviceSpec) -> float:
    """What ranks send each other for a micro-batch: the stream four times a layer over tensor ranks; weights twice and gradients once over data ranks.
    0 where the link is not known."""
    link = device.peer_link_bytes_per_s
    if link is None or not link.known or plan.ranks == 1:
        return 0.0
    t, d = plan.tensor_parallel, plan.data_parallel
    streams = 4 * spec.L * plan.tokens * spec.D * element_bytes(plan) * 2 * (t - 1) / t
    passes = 3 if plan.method == "full" else 2
    weights = passes * sum(whole_bytes(spec, plan, index) for index in range(-1, spec.L)) * (d - 1) / d
    return (streams + weights) / link.require()


def step_seconds(spec: ModelSpec, plan: TrainPlan, device: DeviceSpec) -> Estimate:
    """Seconds of one step: forward, backward (twice; once where weights do not learn), what is computed again, and the optimizer's traffic."""
    rate = device.flops_per_s(plan.weights.dense)
    if not rate.known:
        return rate
    products = attention = again = 0.0
    for layer in spec.layers:
        here = layer_forward_flops(layer, spec.D, plan)
        products, attention = products + here[0], attention + here[1]
    head = 2.0 * plan.tokens * spec.V * spec.D
    passes = 3 if plan.method == "full" else 2
    index = 0
    for segment in plan.checkpointing:
        again += sum(again_seconds(spec, plan, device, i, segment.kind) for i in range(index, index + segment.layers))
        index += segment.layers
    compute = (passes * products + 3.5 * attention + (passes if plan.method == "full" else 2) * head) / (rate.require() * EFFICIENCY)
    traffic = 4.0 * sum(layer_kept(layer, spec.D, plan.tokens, element_bytes(plan)) for layer in spec.layers)
    if plan.method == "qlora":  # decoded for the forward pass and for the backward pass
        elements = sum(prod(tensor.shape) for tensor in model_tensors(spec) if FORMATS[plan.weights.format_of(tensor).name].bits < 16)
        traffic += 2 * elements * 2.5
    states = sum(OPTIMIZERS[plan.optimizer].state_bytes(shape, dtype) for _, shape, dtype in trained(spec, plan))
    bandwidth = device.read_bytes_per_s.require()
    paged = 0.0
    if OPTIMIZERS[plan.optimizer].pages and device.host_link_bytes_per_s is not None:
        paged = 2 * states / device.host_link_bytes_per_s.require()  # there and back
    calls = device.op_overhead_s.require() * CALLS_PER_LAYER * spec.L if device.op_overhead_s.known else 0.0
    again += sum_seconds(spec, plan, device)
    again += calls * (1 + 0.5 * sum(segment.kind != "none" for segment in plan.checkpointing) / max(1, len(plan.checkpointing)))
    return Estimate(plan.accumulation * (compute + again + traffic / bandwidth) + 2.5 * states / bandwidth + paged, "roofline")
