"""What each plan of a space costs: bytes, seconds, quality, and whether it fits and runs.

Three choices are computed, not enumerated, because the budget decides them: how many sequences and token slots the cache holds (what the workload needs; less
where less is left, but at least one sequence of the full context), and how many layers are streamed (the fewest with which the rest fits). What a plan
costs is a sum of terms that each depend on few axes; a term is computed once per combination of its own axes, so that tens of thousands of plans take about a
second in plain Python. The sums are those of `cost.memory.ledger`, line for line; a test holds the two together.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import ceil

from tradespace.cost import calibration, memory, workspace
from tradespace.cost.quality import EXACT, activation_quality, combine, kv_quality, pattern_quality, retention_quality, weight_quality
from tradespace.cost.summary import (
    Product,
    Summary,
    WeightShare,
    cache_token_bytes,
    dequantize_elements,
    product_shapes,
    summarize,
    weight_share,
    widest_columns,
)
from tradespace.cost.time import Rates, StepTime, decode_tokens_per_s, prefill_tokens_per_s, rates_for, request_seconds, step_time
from tradespace.cost.traffic import Axes, decode_work, prefill_work
from tradespace.planner.candidate import Candidate, Question
from tradespace.planner.space import Space
from tradespace.spec import native
from tradespace.spec.estimate import Estimate
from tradespace.spec.formats import ELEMENT_BYTES
from tradespace.spec.kv import PLAIN, KVPlan, refusal
from tradespace.spec.plan import Placement, Plan
from tradespace.spec.weights import WeightPlan


@dataclass(frozen=True)
class Room:
    """How much the cache gets: sequences, token slots, and whether that fits."""

    max_sequences: int
    kv_tokens: int
    bytes_each: float
    fits: bool


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Of the largest step: what stands beside the cache (matrices widened, products compiled), the worst moment of a layer, and that of the head."""

    beside: float
    layers: float
    head: float


OfSequences = Callable[[int], StepBytes]


class Pricer:
    """Terms of the cost, each remembered under the axes that it depends on."""

    def __init__(self, question: Question, space: Space):
        self.question, self.space = question, space
        self.summary: Summary = summarize(question.model)
        self.pool = memory.compute_pool(question.device)
        self._fixed: dict[tuple, float] = {}
        self._stepped: dict[tuple, StepBytes] = {}
        self._widened: dict[int, int] = {}
        self._products: dict[int, tuple[frozenset[Product], frozenset[Product]]] = {}
        self._shares: list[WeightShare] = []  # kept alive, so that their ids stay unique
        self._steps: dict[tuple, StepTime] = {}
        self._qualities: dict[tuple, Estimate] = {}
        self._reasons: dict[tuple, tuple[str, ...]] = {}
        self._rates: dict[tuple[str, str, str], Rates] = {}
        self.runtime_bytes = memory.runtime_estimate(question.device).require()
        self.tokenizer_bytes = memory.tokenizer_estimate(question.model.V, question.tokenizer_bytes).require()
        self.staging_bytes = calibration.STAGING_BYTES.value if question.staging_bytes is None else question.staging_bytes

    # ------------------------------------------------------------------------------------------------------------ bytes

    def step_bytes(self, weights: WeightPlan, share: WeightShare, kernel: str, step_tokens: int, kv: KVPlan, degree: int, sequences: int) -> StepBytes:
        """Of the largest step with so many sequences."""
        gathered = kv.copies(weights.dense)
        held = PLAIN if kv.is_plain else kv.held
        key = (id(share), kernel, step_tokens, gathered, held, sequences)
        if key not in self._stepped:
            linear, dense, device = ("native" if kernel == "native" else self.question.linear), weights.dense, self.question.device
            shape = workspace.StepShape(
                T=step_tokens,
                S=self.question.workload.context_tokens,
                e=ELEMENT_BYTES[dense],
                kernel=kernel,
                gathered=gathered,
                rows=sequences,
                degree=degree,
                linear=linear,
                activations=self.question.activations,
                threads=device.cores or 1,
                kv=held,
            )
            beside = workspace.dequantize_bytes(self.widened_elements(weights, share, degree), dense)
            beside += workspace.reference_tile_bytes(widest_columns(self.summary), dense) if linear == "reference" else 0
            beside += workspace.native_buffers_bytes(self.summary, weights, shape) if weights.layout == "native" else 0
            beside += workspace.product_kernels_bytes(*self.products(weights, share, degree), shape, kind=device.kind, dense=dense)
            layers = workspace.activation_bytes(self.summary, weights, shape)
            self._stepped[key] = StepBytes(beside, layers, workspace.head_bytes(self.summary, weights, shape))
        return self._stepped[key]

    def products(self, weights: WeightPlan, share: WeightShare, degree: int) -> tuple[frozenset[Product], frozenset[Product]]:
        """Shapes of the library's products of the layers and of the head."""
        if id(share) not in self._products:
            self._products[id(share)] = product_shapes(self.summary, weights, degree)
        return self._products[id(share)]

    def widened_elements(self, weights: WeightPlan, share: WeightShare, degree: int) -> int:
        """Elements of the workspace that the quantized matrices of a share are dequantized into."""
        if id(share) not in self._widened:
            self._widened[id(share)] = dequantize_elements(self.summary, weights, degree)
        return self._widened[id(share)]

    def always_bytes(self, max_sequences: int, step_tokens: int, block_size: int) -> float:
        """Of the compute pool, without weights."""
        key = ("always", max_sequences, step_tokens, block_size)
        if key not in self._fixed:
            held = workspace.engine_bytes(
                max_context=self.question.workload.context_tokens,
                max_sequences=max_sequences,
                step_tokens=step_tokens,
                block_size=block_size,
                rope_dims=self.summary.rope_dims,
            )
            on_host = self.tokenizer_bytes + calibration.HEAP_BYTES.value if self.pool == "host" else 0
            self._fixed[key] = self.runtime_bytes + held + on_host
        return self._fixed[key]

    def room(self, kv: KVPlan, slot_bytes: int, step_tokens: int, resident_bytes: float, step_bytes: OfSequences, degree: int = 1) -> Room:
        """The cache under what the budget leaves. With nothing left, the smallest cache there is, which does not fit."""
        workload, budget = self.question.workload, self.question.usable_bytes
        paged = kv.layout == "paged"
        block = kv.block_slots(workload.context_tokens)
        sequence_slots = ceil(kv.retain.tokens(workload.context_tokens) / block) * block or block
        loading = self.staging_bytes if self.pool == "host" else 0
        state = memory.state_bytes(self.summary, kv, workload.context_tokens, degree)

        def total(sequences: int, slots: int) -> float:
            always = self.always_bytes(sequences, step_tokens, block) + resident_bytes
            step = step_bytes(sequences)
            return memory.peak_bytes(always, loading, step.beside + slots * slot_bytes + sequences * state, step.layers, step.head)

        wanted = workload.concurrency
        if (size := total(wanted, wanted * sequence_slots)) <= budget:
            return Room(wanted, wanted * sequence_slots, size, True)
        left = budget - total(wanted, 0)
        slots = int(left // (slot_bytes * block)) * block if slot_bytes and left > 0 else 0
        # where the loading peak is the higher one, slots up to there are free; to count them as paid for errs on the safe side
        if paged and slots >= sequence_slots:
            return Room(wanted, slots, total(wanted, slots), True)
        low, high = 0, wanted - 1  # the most sequences that fit whole, by bisection: bytes grow with every one
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if total(middle, middle * sequence_slots) <= budget else (low, middle - 1)
        sequences = max(1, low)
        return Room(sequences, sequences * sequence_slots, total(sequences, sequences * sequence_slots), low >= 1)

    def host_bytes(self, share: WeightShare, placement: Placement, degree: int, bytes_each: float) -> float:
        """Peak of the host's pool."""
        if self.pool == "host":
            return bytes_each
        streamed = share.streamed_bytes[placement.streamed_layers] * degree if placement.stream_from == "host" else 0
        return memory.peak_bytes(calibration.HOST_PROCESS_BYTES.value + self.tokenizer_bytes + streamed, self.staging_bytes, 0, 0, 0)

    # ------------------------------------------------------------------------------------------------------------ seconds, quality, what runs

    def rates(self, weights: WeightPlan, phase: str) -> Rates:
        key = (weights.default, weights.layout, phase)
        if key not in self._rates:
            self._rates[key] = rates_for(self.question.device, weights, phase, self.question.activations)
        return self._rates[key]

    def decode(self, weights: WeightPlan, share: WeightShare, axes: Axes, sequences: int) -> StepTime:
        key = (id(share), axes, sequences)
        if key not in self._steps:
            cache = cache_token_bytes(self.summary, axes.kv, axes.degree)
            work = decode_work(self.summary, share, cache, axes, sequences, self.question.workload.mean_length)
            self._steps[key] = step_time(work, self.rates(weights, "decode"))
        return self._steps[key]

    def prefill(self, weights: WeightPlan, share: WeightShare, axes: Axes, step_tokens: int) -> StepTime:
        chunk = min(step_tokens, self.question.workload.prompt_tokens)
        key = (id(share), axes, -chunk)
        if key not in self._steps:
            cache = cache_token_bytes(self.summary, axes.kv, axes.degree)
            work = prefill_work(self.summary, share, cache, axes, self.question.workload.prompt_tokens, chunk)
            self._steps[key] = step_time(work, self.rates(weights, "prefill"))
        return self._steps[key]

    def quality(self, weights: WeightPlan, kv: KVPlan) -> Estimate:
        key = (weights, kv.store, kv.values, kv.retain)
        if key not in self._qualities:
            model = self.question.model
            held = EXACT if weights in self.space.own else weight_quality(model, weights.default)
            parts = [held, activation_quality(model, weights, self.question.activations), kv_quality(model, kv, weights.dense), retention_quality(model, kv)]
            self._qualities[key] = combine([*parts, pattern_quality(model)])
        return self._qualities[key]

    def reasons(self, weights: WeightPlan, kv: KVPlan, kernel: str, placement: Placement, degree: int) -> tuple[str, ...]:
        """What cannot run yet; most reasons depend on the plan alone, the rest on the model and the device."""
        key = (weights.names, kv, kernel, placement.stream_from if placement.streamed_layers else "", degree)
        if key not in self._reasons:
            question = self.question
            slots = kv.block_size if kv.layout == "paged" else 1
            linear = "native" if kernel == "native" else "torch"
            probe = Plan(model="", weights=weights, kv=kv, attention=kernel, linear=linear, placement=placement, tensor_parallel=degree, kv_tokens=slots)
            found = list(probe.cannot_run())
            if kernel in self.space.refused:
                found.append(self.space.refused[kernel])
            if question.model.plan_only:
                found.append(question.model.plan_only)
            if question.device.kind != "cpu":
                found.append(f"device kind {question.device.kind}")
            self._reasons[key] = tuple(found)
        return self._reasons[key]

    # ------------------------------------------------------------------------------------------------------------ candidates

    def candidates(self) -> Iterator[Candidate]:
        """Every plan of the space, priced."""
        for weights in self.space.weights:
            for degree in self.space.degrees:
                share = weight_share(self.summary, weights, degree)
                self._shares.append(share)
                placed = Placements(share)
                for store in self.space.stores_for(weights):
                    for layout, block in self.space.layouts:
                        kv = self.space.kv_plan(store, layout, block)
                        if refusal(kv) is not None:
                            continue
                        slot_bytes = memory.kv_slot_bytes(self.summary, kv, degree)
                        for kernel in self.kernels_for(weights, kv):
                            for step_tokens in self.step_sizes(kernel):
                                yield from self._placed(weights, share, placed, kv, slot_bytes, kernel, step_tokens, degree)

    def step_sizes(self, kernel: str) -> tuple[int, ...]:
        """Budgets of tokens per step. The native step goes through its tokens in blocks: larger steps than a few hundred cost buffers and gain nothing."""
        sizes = self.space.step_tokens
        return sizes if kernel != "native" else tuple(size for size in sizes if size <= native.STEP_TOKENS) or sizes[:1]

    def kernels_for(self, weights: WeightPlan, kv: KVPlan) -> tuple[str, ...]:
        """The kernels that go with a layout of weights and a cache: native ones with packed weights and tiles of keys, the others with the rest."""
        if weights.layout == "stored":
            return tuple(kernel for kernel in self.space.kernels if kernel != "native")
        untiled = kv.layout == "contiguous" and self.question.workload.context_tokens % native.LANES
        return ("native",) if "native" in self.space.kernels and not untiled and native.refusal(self.question.model, kv) is None else ()

    def _placed(
        self, weights: WeightPlan, share: WeightShare, placed: Placements, kv: KVPlan, slot_bytes: int, kernel: str, step_tokens: int, degree: int
    ) -> Iterator[Candidate]:
        """The plan with all layers resident, and where that is not enough for the workload, with as few streamed as will do."""
        step_bytes = partial(self.step_bytes, weights, share, kernel, step_tokens, kv, degree)
        room = self.room(kv, slot_bytes, step_tokens, share.total_bytes, step_bytes, degree)
        workload = self.question.workload
        kept = kv.retain.tokens(workload.context_tokens)
        is_enough = room.fits and room.max_sequences >= workload.concurrency and room.kv_tokens >= workload.concurrency * kept
        if not self.space.must_stream:
            yield self._candidate(weights, share, kv, kernel, step_tokens, degree, Placement(), room)
        if is_enough and not self.space.must_stream:
            return
        whole = self.full_bytes(kv, slot_bytes, step_tokens, step_bytes)
        for source in self.space.sources:
            layers = placed.fewest(self.question.usable_bytes - whole)
            streamed = self.room(kv, slot_bytes, step_tokens, placed.resident[layers], step_bytes, degree)
            yield self._candidate(weights, share, kv, kernel, step_tokens, degree, Placement(streamed_layers=layers, stream_from=source), streamed)

    def full_bytes(self, kv: KVPlan, slot_bytes: int, step_tokens: int, step_bytes: OfSequences) -> float:
        """The compute pool without weights, the cache holding the whole workload."""
        workload = self.question.workload
        block = kv.block_slots(workload.context_tokens)
        slots = workload.concurrency * ceil(kv.retain.tokens(workload.context_tokens) / block) * block
        step = step_bytes(workload.concurrency)
        running = step.beside + slots * slot_bytes + workload.concurrency * memory.state_bytes(self.summary, kv, workload.context_tokens)
        loading = self.staging_bytes if self.pool == "host" else 0
        return memory.peak_bytes(self.always_bytes(workload.concurrency, step_tokens, block), loading, running, step.layers, step.head)

    def _candidate(
        self, weights: WeightPlan, share: WeightShare, kv: KVPlan, kernel: str, step_tokens: int, degree: int, placement: Placement, room: Room
    ) -> Candidate:
        question, workload = self.question, self.question.workload
        axes = Axes(kernel, kv.copies(weights.dense), weights.dense, degree, placement.streamed_layers, placement.stream_from, kv.held)
        held = room.kv_tokens // max(1, kv.retain.tokens(ceil(workload.mean_length))) if kv.layout == "paged" else room.max_sequences
        sequences = max(1, min(workload.concurrency, room.max_sequences, held))
        decode = self.decode(weights, share, axes, sequences)
        prefill = self.prefill(weights, share, axes, step_tokens)
        known = decode.seconds.known and prefill.seconds.known
        host = self.host_bytes(share, placement, degree, room.bytes_each)
        fits_host = self.pool == "host" or question.host_memory_bytes is None or host <= question.host_memory_bytes
        return Candidate(
            question=question,
            weights=weights,
            kv=kv,
            attention=kernel,
            step_tokens=step_tokens,
            placement=placement,
            tensor_parallel=degree,
            max_sequences=room.max_sequences,
            kv_tokens=room.kv_tokens,
            bytes_each=round(room.bytes_each),
            host_bytes=round(host),
            fits_memory=room.fits and fits_host,
            decode=decode,
            prefill=prefill,
            decode_tokens_per_s=decode_tokens_per_s(decode, sequences, workload),
            prefill_tokens_per_s=prefill_tokens_per_s(prefill, workload),
            request_s=request_seconds(decode.seconds.require(), prefill.seconds.require(), sequences, workload) if known else float("inf"),
            quality=self.quality(weights, kv),
            runs=self.reasons(weights, kv, kernel, placement, degree),
            requantized=bool(self.space.own) and weights not in self.space.own,
        )


class Placements:
    """For one share of weights: resident bytes by the number of streamed layers, and the fewest layers for a given room."""

    def __init__(self, share: WeightShare):
        layers = len(share.layers)
        self.resident = [share.total_bytes - share.streamed_bytes[k] + memory.stream_buffer_bytes(share, k) for k in range(layers + 1)]
        self._least = list(self.resident)  # of up to k streamed layers: a larger layer's buffers may outweigh what it frees
        for k in range(1, layers + 1):
            self._least[k] = min(self._least[k - 1], self.resident[k])

    def fewest(self, room_bytes: float) -> int:
        """The least number of streamed layers (at least one) with which the weights fit `room_bytes`; all layers where none does."""
        k = bisect_left(self._least, True, lo=1, key=lambda size: size <= room_bytes)
        return min(k, len(self.resident) - 1)


def price(question: Question, space: Space) -> tuple[Candidate, ...]:
    """Every plan of `space`, priced for `question`."""
    return tuple(Pricer(question, space).candidates())
