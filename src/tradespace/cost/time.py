"""Seconds of a step: a roofline with calibrated efficiencies, and which term it is that binds.

    seconds = max(bytes / (bandwidth · efficiency), operations / (rate · efficiency), streamed bytes / link) + overhead + all-reduces

Bytes and operations overlap, and so does streaming as far as it hides behind them. In the CUDA step's kernels they overlap in part: where both take about as
long, as with some hundred rows, the root of their squares' sum is what was measured; paged attention stands between the products, so its share adds. What
Python needs to start operations does not hide in eager execution, nor do the all-reduces of tensor parallelism, which stand between dependent products.
(Williams, Waterman, Patterson 2009, CACM 52(4), for the roofline.)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot
from operator import itemgetter

from tradespace.cost import calibration
from tradespace.cost.summary import summarize, weight_share
from tradespace.cost.traffic import Axes, StepWork, cache_share, decode_work, prefill_work, sequences_in_step
from tradespace.spec import cuda, native
from tradespace.spec.device import DeviceSpec
from tradespace.spec.estimate import Estimate
from tradespace.spec.formats import FORMATS
from tradespace.spec.model import ModelSpec
from tradespace.spec.plan import Plan
from tradespace.spec.weights import WeightPlan
from tradespace.spec.workload import Workload

BOUNDS = ("bandwidth", "compute", "overhead", "link", "disk", "peer")


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step, the largest term ("bound"), and every term in seconds."""

    seconds: Estimate
    bound: str
    terms: tuple[tuple[str, float], ...]
    arithmetic_intensity: float = 0.0

    def to_dict(self) -> dict[str, object]:
        return {
            "seconds": self.seconds.value,
            "source": self.seconds.source,
            "bound": self.bound,
            "terms": dict(self.terms),
            "arithmetic_intensity": self.arithmetic_intensity,
        }


@dataclass(frozen=True)
class Rates:
    """What a device offers to one format in one phase, efficiencies applied; an unknown rate is None and says why in `missing`."""

    device: DeviceSpec
    bandwidth_efficiency: float
    read_bytes_per_s: float | None
    flops_per_s: float | None
    op_s: float | None
    link_bytes_per_s: dict[str, float | None]
    peer_bytes_per_s: float | None
    source: str
    missing: dict[str, str]
    paged_flops_per_s: float | None = None
    in_part: bool = False  # whether bytes and operations overlap in part alone


def _matmul_rate(device: DeviceSpec, dtype: str) -> tuple[Estimate, str]:
    """The rate for `dtype`; a chip without such an instruction converts and multiplies in fp32."""
    rate = device.flops_per_s(dtype)
    if rate.known or dtype == "fp32":
        return rate, ""
    return device.flops_per_s("fp32"), f"; no {dtype} instruction, computed in fp32"


def _native_rate(device: DeviceSpec, dtype: str) -> tuple[Estimate, str]:
    """As `_matmul_rate`, for our own kernels: what they reach where that was measured, else a share of what the chip is said to, or of its fp32 rate where it
    has no instruction for `dtype`."""
    if dtype in device.native_flops_per_s:
        return device.native_flops_per_s[dtype], ""
    if dtype != "fp32" and calibration.native_kind(device.instruction_sets) == "native-avx2":
        return device.flops_per_s("fp32"), f"; {dtype} as a share of the fp32 rate"
    rate, note = _matmul_rate(device, dtype)
    fp32 = device.flops_per_s("fp32")
    if rate.value is not None and fp32.value is not None and rate.value < fp32.value:  # a library that lacks such products for this chip
        return fp32, f"; {dtype} at the fp32 rate, as it was measured below that"
    share = calibration.NATIVE_OF_MATMUL[dtype].value
    return rate.map(lambda value: value * share), f"{note}; our products at {share:.2f} of the chip's {dtype} rate"


def native_kind(device: DeviceSpec) -> str:
    """What the native kernels are calibrated as: shares of their own rates where those were measured, or where there are products of bytes."""
    return "native" if device.native_flops_per_s else calibration.native_kind(device.instruction_sets)


def step_phase(phase: str, weights: WeightPlan, rows: float) -> str:
    """The phase whose rates a step of so many rows has, a decode step or the chunk of a prefill: for codes on a CUDA device the kernel that takes that many."""
    if weights.layout != "cuda" or cuda.FORMATS[weights.default].plain:
        return phase
    return "several" if rows <= cuda.FEW_ROWS else "coded" if rows <= cuda.CODED_ROWS else "prefill"


def rates_for(device: DeviceSpec, weights: WeightPlan, phase: str, activations: str = "auto") -> Rates:
    """The device's rates for products with `weights`' default format in "decode", "prefill", or what else `step_phase` names."""
    is_native, name = weights.layout == "native", weights.default
    kind = {"native": native_kind(device), "cuda": "cuda step"}.get(weights.layout, device.kind)
    efficiency = calibration.find_calibration(kind, name, phase)
    bandwidth = calibration.find_calibration(kind, name, "decode")  # how well a format streams
    compute = calibration.find_calibration(kind, name, "few rows" if phase == "decode" else phase)
    rate, note = _native_rate(device, native.activation_form(name, activations)) if is_native else _matmul_rate(device, FORMATS[name].compute)
    attention, _ = _matmul_rate(device, "bf16")
    host, peer, disk = device.host_link_bytes_per_s, device.peer_link_bytes_per_s, device.disk_bytes_per_s
    figures = {
        "bandwidth": device.read_bytes_per_s,
        "compute": rate,
        "overhead": device.op_overhead_s,
        "link": host or Estimate.unknown(f"{device.name} has no link to host memory"),
        "disk": disk,
        "peer": peer or Estimate.unknown(f"{device.name} has no link to its peers"),
        "attention": attention,
    }
    return Rates(
        device=device,
        bandwidth_efficiency=bandwidth.efficiency,
        read_bytes_per_s=device.read_bytes_per_s.map(lambda value: value * bandwidth.efficiency).value,
        flops_per_s=rate.map(lambda value: value * compute.efficiency).value,
        op_s=device.op_overhead_s.value,
        link_bytes_per_s={"host": figures["link"].value, "disk": disk.value},
        peer_bytes_per_s=figures["peer"].value,
        source=efficiency.label + note,
        missing={name: figure.source for name, figure in figures.items() if not figure.known},
        paged_flops_per_s=attention.map(lambda value: value * calibration.PAGED_PREFILL_SHARE.value).value,
        in_part=kind == "cuda step",
    )


def step_time(work: StepWork, rates: Rates) -> StepTime:
    """Seconds of `work` at `rates`; unknown where a rate that it needs is unknown."""
    read_bytes_per_s = rates.read_bytes_per_s
    if rates.device.bandwidth_curve:
        read_bytes_per_s = rates.device.bandwidth_at(work.read_bytes).map(lambda value: value * rates.bandwidth_efficiency).value
    link = "disk" if work.link == "disk" else "link"
    needed = (
        ("bandwidth", work.read_bytes - work.paged_bytes, read_bytes_per_s),
        ("compute", work.flops, rates.flops_per_s),
        (link, work.link_bytes, rates.link_bytes_per_s[work.link]),
        ("peer", work.peer_bytes, rates.peer_bytes_per_s),
        ("attention", work.paged_flops, rates.paged_flops_per_s),
    )
    taken: list[float] = []
    for name, amount, per_second in needed:
        if amount and per_second is None:
            return StepTime(Estimate.unknown(rates.missing.get(name, f"no {name} rate")), name, (), work.arithmetic_intensity)
        taken.append(amount / per_second if amount and per_second else 0.0)
    if rates.op_s is None:
        return StepTime(Estimate.unknown(rates.missing["overhead"]), "overhead", (), work.arithmetic_intensity)
    reading_s, products_s, link_s, peer_s, prompts_s = taken
    peer_s += work.peer_transfers * calibration.ALL_REDUCE_LATENCY_S.value
    overhead_s = work.num_ops * rates.op_s * calibration.OP_STARTS[rates.device.kind].value
    paged_s = 0.0
    if work.paged_bytes and read_bytes_per_s:  # of several sequences: read while nothing is multiplied by weights
        paged_s = work.paged_bytes / (read_bytes_per_s / rates.bandwidth_efficiency * calibration.PAGED_SHARE.value)
    together_s = hypot(reading_s, products_s) if rates.in_part else max(reading_s, products_s)
    seconds = max(together_s, link_s) + paged_s + prompts_s + overhead_s + peer_s
    terms = (("bandwidth", reading_s + paged_s), ("compute", products_s + prompts_s), (link, link_s), ("peer", peer_s), ("overhead", overhead_s))
    bound = max(terms, key=itemgetter(1))[0]
    return StepTime(Estimate(seconds, rates.source), bound, tuple([term for term in terms if term[1]]), work.arithmetic_intensity)


def decode_time(model: ModelSpec, plan: Plan, device: DeviceSpec, workload: Workload) -> StepTime:
    """One decode step: a token for each sequence that is in it, at the workload's mean length."""
    summary = summarize(model)
    share = weight_share(summary, plan.weights, plan.tensor_parallel)
    sequences = sequences_in_step(plan, workload)
    work = decode_work(summary, share, cache_share(summary, plan), Axes.of(plan), sequences, workload.mean_length)
    return step_time(work, rates_for(device, plan.weights, step_phase("decode", plan.weights, sequences), plan.activations))


def prefill_time(model: ModelSpec, plan: Plan, device: DeviceSpec, workload: Workload) -> StepTime:
    """All chunks of one prompt: the time to the first token without a queue."""
    summary = summarize(model)
    share = weight_share(summary, plan.weights, plan.tensor_parallel)
    work = prefill_work(summary, share, cache_share(summary, plan), Axes.of(plan), workload.prompt_tokens, plan.step_tokens)
    phase = step_phase("prefill", plan.weights, min(plan.step_tokens, workload.prompt_tokens))
    return step_time(work, rates_for(device, plan.weights, phase, plan.activations))


def decode_tokens_per_s(step: StepTime, sequences: int, workload: Workload) -> Estimate:
    """Tokens per second: of all sequences together for throughput; of one user for latency, who waits where not all sequences fit in a step at once."""
    tokens = sequences if workload.goal == "throughput" else min(1.0, sequences / workload.concurrency)
    return step.seconds.map(lambda seconds: tokens / seconds)


def prefill_tokens_per_s(step: StepTime, workload: Workload) -> Estimate:
    """Prompt tokens per second of one prefill."""
    return step.seconds.map(lambda seconds: workload.prompt_tokens / seconds)


def request_seconds(decode: float, prefill: float, sequences: int, workload: Workload) -> float:
    """Seconds to serve the whole workload once: every prompt read, every output written, `sequences` at a time."""
    rounds = workload.concurrency / sequences
    if workload.goal == "latency":
        return prefill + rounds * workload.output_tokens * decode
    return workload.concurrency * prefill + rounds * workload.output_tokens * decode
