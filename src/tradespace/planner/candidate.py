"""One evaluated plan, and the order in which plans are preferred.

The rule for "best", in this order:
1. comfort: plans with all layers resident and at least MIN_BITS bits a weight; then plans that stream layers, as every token waits for a link; then fewer bits;
2. quality: a loss of at most QUALITY_LIMIT nats per token counts as none; beyond it the smaller loss wins; unknown comes after every known loss, and among
   unknowns the format with more bits, first of the weights, then of the cache;
3. a quantized checkpoint's own formats, before any that it would have to be quantized to once more, and a cache of floats before one that rounds to codes:
   who wants that for more or longer sequences says so (--kv-store), or gets it where nothing else fits;
4. speed: seconds to serve the workload once (`cost.time.request_seconds`), prompts included, so that sequences which have to wait count;
5. shared prefixes: at equal speed a layout in which requests can share them, the smaller its blocks the more;
6. bytes, and between plans equal in all that the smaller loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tradespace.cost import calibration
from tradespace.cost.memory import Ledger, ledger
from tradespace.cost.time import StepTime, decode_tokens_per_s, prefill_tokens_per_s
from tradespace.spec.device import DeviceSpec
from tradespace.spec.estimate import Estimate
from tradespace.spec.formats import FORMATS
from tradespace.spec.kv import KVPlan
from tradespace.spec.model import ModelSpec
from tradespace.spec.plan import Placement, Plan
from tradespace.spec.weights import WeightPlan
from tradespace.spec.workload import Workload

QUALITY_LIMIT = 0.05  # nats per token
MIN_BITS = 4  # fewer bits a weight lose so much everywhere that figures were published that they come last


def quality_key(quality: Estimate, weights: WeightPlan, kv: KVPlan) -> tuple[float, float, float]:
    """Smaller is better: within the limit, then by loss, then unknown, of fewer bits last."""
    if quality.value is None:
        return (2.0, -FORMATS[weights.default].bits, -kv.min_bits)
    return (0.0, 0.0, 0.0) if quality.value <= QUALITY_LIMIT else (1.0, quality.value, 0.0)


def least_comfort(weights: WeightPlan) -> int:
    """The comfort of a plan with these weights and all layers resident."""
    return 2 if FORMATS[weights.default].bits < MIN_BITS else 0


def rounded(kv: KVPlan, requantized: bool) -> float:
    """How many of weights and cache are not as the checkpoint and the activations have them."""
    return float(requantized) + (kv.min_bits < 16)


def best_preference(quality: Estimate, weights: WeightPlan, kv: KVPlan, requantized: bool) -> tuple[float, ...]:
    """What no plan with these weights and this cache comes before in `Candidate.preference`."""
    return (least_comfort(weights), *quality_key(quality, weights, kv), rounded(kv, requantized))


@dataclass(frozen=True)
class Question:
    """What was asked; every candidate points at it."""

    model: ModelSpec
    device: DeviceSpec
    workload: Workload
    memory_bytes: int  # of the pool that the model computes in, on each device
    host_memory_bytes: int | None
    linear: str
    activations: str = "auto"
    staging_bytes: int | None = None
    tokenizer_bytes: int | None = None

    @property
    def usable_bytes(self) -> int:
        """The budget less what the engine leaves free."""
        return self.memory_bytes - (int(calibration.RESERVE_BYTES.value) if self.device.kind == "cpu" else 0)


@dataclass(frozen=True)
class Candidate:
    """A point of the space with its price. `bytes_each`: peak of the compute pool on each device; `fits` means memory and number of devices.

    `runs` lists what in the plan has no implementation yet; empty: it runs.
    """

    question: Question
    weights: WeightPlan
    kv: KVPlan
    attention: str
    step_tokens: int
    placement: Placement
    tensor_parallel: int
    max_sequences: int
    kv_tokens: int
    bytes_each: int
    host_bytes: int
    fits_memory: bool
    decode: StepTime
    prefill: StepTime
    sequences: int  # that decode together
    request_s: float
    quality: Estimate
    runs: tuple[str, ...]
    requantized: bool = False  # the checkpoint is quantized, and this plan holds its weights in other formats

    @property
    def decode_tokens_per_s(self) -> Estimate:
        """As the workload's goal counts them: see `cost.time.decode_tokens_per_s`."""
        return decode_tokens_per_s(self.decode, self.sequences, self.question.workload)

    @property
    def prefill_tokens_per_s(self) -> Estimate:
        """Prompt tokens per second of one prefill."""
        return prefill_tokens_per_s(self.prefill, self.question.workload)

    @property
    def fits(self) -> bool:
        return self.fits_memory and self.tensor_parallel <= self.question.device.count

    @property
    def need_bytes(self) -> int:
        """The least budget under which it fits: what it takes on each device, and what the engine leaves free."""
        return self.bytes_each + self.question.memory_bytes - self.question.usable_bytes

    @property
    def total_bytes(self) -> int:
        """Over all devices that it needs."""
        return self.bytes_each * self.tensor_parallel

    @property
    def serves_all(self) -> bool:
        """The cache holds the whole workload: every sequence at its full context."""
        workload = self.question.workload
        kept = self.kv.retain.tokens(workload.context_tokens)
        return self.max_sequences >= workload.concurrency and self.kv_tokens >= workload.concurrency * kept

    @property
    def quality_key(self) -> tuple[float, float, float]:
        """Smaller is better: what the rule above says about quality."""
        return quality_key(self.quality, self.weights, self.kv)

    @property
    def comfort(self) -> int:
        """0: all layers resident in at least MIN_BITS bits; 1: layers streamed; 2: fewer bits."""
        return max(least_comfort(self.weights), 1 if self.placement.streamed_layers else 0)

    @property
    def preference(self) -> tuple[float, ...]:
        """Smaller is better: comfort, quality, own formats and a cache of floats, speed, shared prefixes, bytes, and at last the smaller loss."""
        loss = float("inf") if self.quality.value is None else self.quality.value
        grain = float(self.kv.block_size) if self.kv.prefix_sharing else float("inf")
        return (self.comfort, *self.quality_key, rounded(self.kv, self.requantized), self.request_s, grain, float(self.total_bytes), loss)

    @property
    def objectives(self) -> tuple[float, ...]:
        """Bytes, decode speed and loss, all to be small. Unknown loss is infinite; among unknowns fewer bits are worse, of weights and cache apart."""
        speed = self.decode_tokens_per_s.value or 0.0
        loss = self.quality.value
        if loss is not None:
            return (float(self.total_bytes), -speed, loss, 0.0, 0.0)
        return (float(self.total_bytes), -speed, float("inf"), 64 - FORMATS[self.weights.default].bits, 64 - self.kv.min_bits)

    @cached_property
    def plan(self) -> Plan:
        question = self.question
        return Plan(
            model=question.model.name,
            weights=self.weights,
            kv=self.kv,
            attention=self.attention,
            pattern=question.model.imposed,
            linear={"native": "native", "paged": "cuda"}.get(self.attention, question.linear),
            activations=question.activations if self.attention == "native" else "auto",
            max_sequences=self.max_sequences,
            max_context=question.workload.context_tokens,
            step_tokens=self.step_tokens,
            kv_tokens=self.kv_tokens,
            placement=self.placement,
            tensor_parallel=self.tensor_parallel,
            device=question.device.name,
            memory_bytes=question.memory_bytes,
        )

    @cached_property
    def ledger(self) -> Ledger:
        question = self.question
        return ledger(question.model, self.plan, question.device, staging_bytes=question.staging_bytes, tokenizer_bytes=question.tokenizer_bytes)

    def to_dict(self) -> dict[str, object]:
        return {
            "plan": self.plan.to_dict(),
            "describe": self.plan.describe(),
            "bytes_each": self.bytes_each,
            "need_bytes": self.need_bytes,
            "total_bytes": self.total_bytes,
            "host_bytes": self.host_bytes,
            "decode": self.decode.to_dict(),
            "prefill": self.prefill.to_dict(),
            "decode_tokens_per_s": self.decode_tokens_per_s.value,
            "prefill_tokens_per_s": self.prefill_tokens_per_s.value,
            "quality_nats": self.quality.value,
            "quality_source": self.quality.source,
            "fits": self.fits,
            "cannot_run": list(self.runs),
        }
