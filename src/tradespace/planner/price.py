"""What each plan of a space costs: bytes, seconds, quality, and whether it fits and runs.

Three choices are computed, not enumerated, because the budget decides them: how many sequences and token slots the cache holds (what the workload needs; less
where less is left, but at least one sequence of the full context), and how many layers are streamed (the fewest with which the rest fits). What a plan
costs is a sum of terms that each depend on few axes; a term is computed once per combination of its own axes, so that tens of thousands of plans take about a
second in plain Python. The sums are those of `cost.memory.ledger`, line for line; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from math import ceil

from tradespace.cost import calibration, memory, workspace
from tradespace.cost.quality import EXACT, activation_quality, combine, kv_quality, pattern_quality, retention_quality, weight_quality
from tradespace.cost.summary import (
    Summary,
    WeightShare,
    cache_token_bytes,
    dequantize_elements,
    product_shapes,
    summarize,
    weight_share,
    widest_columns,
)
from tradespace.cost.time import Rates, StepTime, rates_for, request_seconds, step_phase, step_time
from tradespace.cost.traffic import Axes, StepWork, decode_beside, prefill_beside, weight_read_bytes, with_weights
from tradespace.planner.candidate import Candidate, Question
from tradespace.planner.parts import Cache, Part, Placements, Room, StepBytes
from tradespace.planner.space import Space
from tradespace.spec import cuda, native
from tradespace.spec.estimate import Estimate
from tradespace.spec.formats import ELEMENT_BYTES, FORMATS
from tradespace.spec.kv import PLAIN, KVPlan, refusal
from tradespace.spec.plan import Placement, Plan
from tradespace.spec.weights import WeightPlan

OfSequences = Callable[[int], StepBytes]
RESIDENT = Placement()


class Pricer:
    """Terms of the cost, each remembered under the axes that it depends on."""

    def __init__(self, question: Question, space: Space):
        self.question, self.space = question, space
        self.summary: Summary = summarize(question.model)
        self.pool = memory.compute_pool(question.device)
        self._fixed: dict[tuple, float] = {}
        self._stepped: dict[tuple, StepBytes] = {}
        self._moments: dict[tuple, float] = {}
        self._beside: dict[tuple, StepWork] = {}
        self._read: dict[tuple[int, float], float] = {}
        self._steps: dict[tuple, StepTime] = {}
        self._qualities: dict[tuple, Estimate] = {}
        self._reasons: dict[tuple, tuple[str, ...]] = {}
        self._rates: dict[tuple[str, str, str], Rates] = {}
        self._placements: dict[tuple[int, str], Placement] = {}
        self._bodies: dict[tuple, int] = {}
        self._held: dict[KVPlan, int] = {}
        self._caches: dict[tuple[str, str, int], Cache] = {}
        self._token_bytes: dict[tuple[int, int], tuple[tuple[int | None, int, int], ...]] = {}
        self._sequence_bytes: dict[tuple[int, int], tuple[int, int]] = {}
        self.mean_tokens, self.concurrency, self.usable_bytes = ceil(question.workload.mean_length), question.workload.concurrency, question.usable_bytes
        self.runtime_bytes = memory.runtime_estimate(question.device).require()
        self.tokenizer_bytes = memory.tokenizer_estimate(question.model.V, question.tokenizer_bytes).require()
        self.staging_bytes = calibration.staging(question.device.kind).value if question.staging_bytes is None else question.staging_bytes
        self.loading_bytes = self.staging_bytes if self.pool == "host" else 0
        self.resident_host_bytes = memory.peak_bytes(calibration.HOST_PROCESS_BYTES.value + self.tokenizer_bytes, self.staging_bytes, 0, 0, 0)

    def part(self, weights: WeightPlan, degree: int, number: int) -> Part:
        """What depends on the weights alone."""
        share = weight_share(self.summary, weights, degree)
        layers = tuple(sorted((key, name) for key, name in weights.exceptions.items() if key.rsplit(":", 1)[-1] not in ("embed", "lm_head")))
        body = self._bodies.setdefault((weights.default, layers, weights.layout, degree), len(self._bodies))
        widened = dequantize_elements(self.summary, weights, degree)
        products = product_shapes(self.summary, weights, degree)
        requantized = bool(self.space.own) and weights not in self.space.own
        waiting = tuple(name for name in weights.names if FORMATS[name].runs_since is None)
        return Part(weights, degree, share, Placements(share), widened, products, number, body, weights.dense, requantized, waiting)

    def cache(self, store: str, layout: str, block: int) -> Cache:
        """The cache of these choices."""
        key = (store, layout, block)
        if key not in self._caches:
            kv, context = self.space.kv_plan(store, layout, block), self.question.workload.context_tokens
            kept, slots = kv.retain.tokens(context), kv.block_slots(context)
            self._caches[key] = Cache(
                kv,
                kv.held,
                number=self._held.setdefault(kv.held, len(self._held)),
                index=len(self._caches),
                copied=frozenset(dense for dense in ELEMENT_BYTES if kv.copies(dense)),
                paged=kv.layout == "paged",
                kept=kept,
                kept_on_average=max(1, kv.retain.tokens(self.mean_tokens)),
                block=slots,
                sequence_slots=ceil(kept / slots) * slots,
                refused=refusal(kv) is not None,
            )
        return self._caches[key]

    def sequence_bytes(self, part: Part, cache: Cache) -> tuple[int, int]:
        """Of a token's slot, and of what a sequence has beside its slots."""
        key = (cache.number, part.degree)
        if key not in self._sequence_bytes:
            slot = memory.kv_slot_bytes(self.summary, cache.held, part.degree)
            self._sequence_bytes[key] = (slot, memory.state_bytes(self.summary, cache.held, self.question.workload.context_tokens, part.degree))
        return self._sequence_bytes[key]

    # ------------------------------------------------------------------------------------------------------------ bytes

    def step_bytes(self, part: Part, cache: Cache, kernel: str, step_tokens: int, sequences: int) -> StepBytes:
        """Of the largest step with so many sequences."""
        gathered = part.dense in cache.copied
        # what a CUDA step reads has a table of each sequence's blocks
        block = cache.block if kernel == "paged" else 0
        key = (part.number, cache.number, kernel, step_tokens, gathered, sequences, block)
        found = self._stepped.get(key)
        if found is None:
            found = self._stepped[key] = self._step_bytes(part, cache, kernel, step_tokens, gathered, sequences)
        return found

    def _step_bytes(self, part: Part, cache: Cache, kernel: str, step_tokens: int, gathered: bool, sequences: int) -> StepBytes:
        """Attention's worst moment by kernel, cache and the layers' formats; the rest by the weights and the size of the step alone."""
        weights, summary, device = part.weights, self.summary, self.question.device
        linear = {"native": "native", "paged": "cuda"}.get(kernel, self.question.linear)
        dense, rebuilds = weights.dense, cache.kv.retain.rebuilds
        shape = workspace.StepShape(
            T=step_tokens,
            S=self.question.workload.context_tokens,
            e=ELEMENT_BYTES[dense],
            kernel=kernel,
            gathered=gathered,
            rows=sequences,
            degree=part.degree,
            linear=linear,
            activations=self.question.activations,
            threads=device.cores or 1,
            kv=PLAIN if cache.kv.is_plain else cache.held,
        )

        def beside() -> float:
            found = workspace.dequantize_bytes(part.widened, dense)
            found += workspace.reference_tile_bytes(widest_columns(summary), dense) if linear == "reference" else 0
            found += workspace.native_buffers_bytes(summary, weights, shape) if weights.layout == "native" else 0
            if weights.layout == "cuda":
                found += workspace.cuda_buffers_bytes(summary, weights, shape, cache.block)
                found += calibration.GRAPH_BYTES.value * cuda.captured_steps(summary.model, min(shape.rows, shape.T), shape.S, shape.T)
            return found + workspace.product_kernels_bytes(*part.products, shape, kind=device.kind, dense=dense)

        def once(name: str, key: tuple, compute: Callable[[], float]) -> float:
            if (name, *key) not in self._moments:
                self._moments[name, *key] = compute()
            return self._moments[name, *key]

        layers = 0.0
        if weights.layout == "stored":
            mixing = once(
                "mixing", (part.body, cache.number, kernel, step_tokens, gathered, sequences), lambda: workspace.mixing_bytes(summary, weights, shape)
            )
            feeding = once("feeding", (part.body, step_tokens, linear, rebuilds), lambda: workspace.feeding_bytes(summary, weights, shape))
            layers = max(mixing, feeding) + workspace.rope_rows_bytes(summary.rope_dims, workspace.passing(shape))
        elif weights.layout == "cuda":
            layers = cuda.whole_prompts_bytes(summary.model, shape.T)
        head = once("head", (part.number, step_tokens, linear, sequences), lambda: workspace.head_bytes(summary, weights, shape))
        return StepBytes(once("beside", (part.number, step_tokens, linear, sequences, cache.block if kernel == "paged" else 0), beside), layers, head)

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

    def room(self, part: Part, cache: Cache, step_tokens: int, resident_bytes: float, step_bytes: OfSequences) -> Room:
        """The cache under what the budget leaves. With nothing left, the smallest there is, which does not fit."""
        budget, block, loading = self.usable_bytes, cache.block, self.loading_bytes
        sequence_slots = cache.sequence_slots or block
        slot_bytes, state = self.sequence_bytes(part, cache)

        def total(sequences: int, slots: int) -> float:
            always = self.always_bytes(sequences, step_tokens, block) + resident_bytes
            step = step_bytes(sequences)
            return memory.peak_bytes(always, loading, step.beside + slots * slot_bytes + sequences * state, step.layers, step.head)

        wanted = self.concurrency
        if (size := total(wanted, wanted * sequence_slots)) <= budget:
            return Room(wanted, wanted * sequence_slots, size, True)
        left = budget - total(wanted, 0)
        slots = int(left // (slot_bytes * block)) * block if slot_bytes and left > 0 else 0
        # where the loading peak is the higher one, slots up to there are free; to count them as paid for errs on the safe side
        if cache.paged and slots >= sequence_slots:
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
        if not placement.streamed_layers:
            return self.resident_host_bytes
        streamed = share.streamed_bytes[placement.streamed_layers] * degree if placement.stream_from == "host" else 0
        return memory.peak_bytes(calibration.HOST_PROCESS_BYTES.value + self.tokenizer_bytes + streamed, self.staging_bytes, 0, 0, 0)

    # ------------------------------------------------------------------------------------------------------------ seconds, quality, what runs

    def rates(self, weights: WeightPlan, phase: str) -> Rates:
        key = (weights.default, weights.layout, phase)
        if key not in self._rates:
            self._rates[key] = rates_for(self.question.device, weights, phase, self.question.activations)
        return self._rates[key]

    def token_bytes(self, part: Part, cache: Cache) -> tuple[tuple[int | None, int, int], ...]:
        """`cache_token_bytes` on one device."""
        key = (cache.number, part.degree)
        if key not in self._token_bytes:
            self._token_bytes[key] = cache_token_bytes(self.summary, cache.held, part.degree)
        return self._token_bytes[key]

    def read_bytes(self, part: Part, tokens: float) -> float:
        """Of the weights, by a step of so many tokens."""
        if (part.number, tokens) not in self._read:
            self._read[part.number, tokens] = weight_read_bytes(self.summary, part.share, tokens)
        return self._read[part.number, tokens]

    def step(self, phase: str, part: Part, cache: Cache, kernel: str, placement: Placement, tokens: int) -> StepTime:
        """A decode step of `tokens` sequences, or a prefill in chunks of `tokens`."""
        weights, workload = part.weights, self.question.workload
        gathered, streamed = part.dense in cache.copied, placement.streamed_layers
        key = (phase, part.number, cache.number, kernel, gathered, streamed, placement.stream_from if streamed else "", tokens)
        found = self._steps.get(key)
        if found is not None:
            return found
        axes = Axes(kernel, gathered, weights.dense, part.degree, streamed, placement.stream_from, cache.held)
        again = part.number if cache.kv.retain.rebuilds else -1  # only to rebuild older tokens are weights read again
        alike = (phase, kernel, gathered, weights.dense, part.degree, cache.number, tokens, again)
        beside = self._beside.get(alike)
        if beside is None:
            held = self.token_bytes(part, cache)
            if phase == "decode":
                beside = decode_beside(self.summary, part.share, held, axes, tokens, workload.mean_length)
            else:
                beside = prefill_beside(self.summary, part.share, held, axes, workload.prompt_tokens, tokens)
            self._beside[alike] = beside
        steps = 1 if phase == "decode" else ceil(workload.prompt_tokens / tokens)
        work = with_weights(beside, self.read_bytes(part, tokens), part.share, axes, steps=steps)
        rows = tokens if phase == "decode" else min(tokens, workload.prompt_tokens)
        found = self._steps[key] = step_time(work, self.rates(weights, step_phase(phase, weights, rows)))
        return found

    def quality(self, part: Part, cache: Cache) -> Estimate:
        weights, kv = part.weights, cache.kv
        key = (part.number, cache.number)
        if key not in self._qualities:
            model = self.question.model
            held = EXACT if weights in self.space.own else weight_quality(model, weights.default)
            parts = [held, activation_quality(model, weights, self.question.activations), kv_quality(model, kv, weights.dense), retention_quality(model, kv)]
            self._qualities[key] = combine([*parts, pattern_quality(model)])
        return self._qualities[key]

    def reasons(self, part: Part, cache: Cache, kernel: str, placement: Placement) -> tuple[str, ...]:
        """What cannot run yet; most reasons depend on the plan alone (of its weights on the formats that wait), the rest on the model and the device."""
        weights, kv, degree = part.weights, cache.kv, part.degree
        key = (part.waiting, degree, cache.index, kernel, placement.stream_from if placement.streamed_layers else "")
        if key not in self._reasons:
            question = self.question
            slots = kv.block_size if kv.layout == "paged" else 1
            linear = {"native": "native", "paged": "cuda"}.get(kernel, "torch")
            probe = Plan(model="", weights=weights, kv=kv, attention=kernel, linear=linear, placement=placement, tensor_parallel=degree, kv_tokens=slots)
            found = list(probe.cannot_run())
            if kernel in self.space.refused:
                found.append(self.space.refused[kernel])
            if question.model.plan_only:
                found.append(question.model.plan_only)
            if question.device.kind != "cpu" and kernel != "paged":
                found.append(f"device kind {question.device.kind}")
            self._reasons[key] = tuple(found)
        return self._reasons[key]

    # ------------------------------------------------------------------------------------------------------------ candidates

    def pairs(self) -> Iterator[tuple[Part, Cache]]:
        """Weights and caches that go together."""
        numbers = count()
        for weights in self.space.weights:
            for degree in self.space.degrees:
                part = self.part(weights, degree, next(numbers))
                for store in self.space.stores_for(weights):
                    for layout, block in self.space.layouts:
                        cache = self.cache(store, layout, block)
                        if not cache.refused:
                            yield part, cache

    def plans_of(self, part: Part, cache: Cache) -> Iterator[Candidate]:
        """Every plan of the space with these weights and this cache, priced."""
        for kernel in self.kernels_for(part.weights, cache.kv):
            for step_tokens in self.step_sizes(kernel):
                yield from self._placed(part, cache, kernel, step_tokens)

    def candidates(self) -> Iterator[Candidate]:
        """Every plan of the space, priced."""
        for part, cache in self.pairs():
            yield from self.plans_of(part, cache)

    def step_sizes(self, kernel: str) -> tuple[int, ...]:
        """Budgets of tokens per step. The native step goes through its tokens in blocks: larger steps than a few hundred cost buffers and gain nothing."""
        sizes = self.space.step_tokens
        return sizes if kernel != "native" else tuple(size for size in sizes if size <= native.STEP_TOKENS) or sizes[:1]

    def kernels_for(self, weights: WeightPlan, kv: KVPlan) -> tuple[str, ...]:
        """The kernels that go with a layout of weights and a cache: native ones with packed weights and tiles of keys, the others with the rest."""
        if weights.layout == "stored":
            return tuple(kernel for kernel in self.space.kernels if kernel not in ("native", "paged"))
        if weights.layout == "cuda":
            return ("paged",) if "paged" in self.space.kernels and cuda.cache_refusal(kv) is None else ()
        untiled = kv.layout == "contiguous" and self.question.workload.context_tokens % native.LANES
        return ("native",) if "native" in self.space.kernels and not untiled and native.refusal(self.question.model, kv) is None else ()

    def _placed(self, part: Part, cache: Cache, kernel: str, step_tokens: int) -> Iterator[Candidate]:
        """The plan with all layers resident, and where that is not enough for the workload, with as few streamed as will do."""
        step_bytes = partial(self.step_bytes, part, cache, kernel, step_tokens)
        if not self.space.must_stream:
            room = self.room(part, cache, step_tokens, part.share.total_bytes, step_bytes)
            yield self._candidate(part, cache, kernel, step_tokens, RESIDENT, room)
            if room.fits and room.max_sequences >= self.concurrency and room.kv_tokens >= self.concurrency * cache.kept:
                return
        if not self.space.sources:
            return
        layers = part.placed.fewest(self.usable_bytes - self.full_bytes(part, cache, step_tokens, step_bytes))
        room = self.room(part, cache, step_tokens, part.placed.resident[layers], step_bytes)
        for source in self.space.sources:
            yield self._candidate(part, cache, kernel, step_tokens, self.placement(layers, source), room)

    def placement(self, layers: int, source: str) -> Placement:
        """So many layers from there; one object for all plans that say so."""
        if (layers, source) not in self._placements:
            self._placements[layers, source] = Placement(streamed_layers=layers, stream_from=source)
        return self._placements[layers, source]

    def full_bytes(self, part: Part, cache: Cache, step_tokens: int, step_bytes: OfSequences) -> float:
        """The compute pool without weights, the cache holding the whole workload."""
        slot_bytes, state = self.sequence_bytes(part, cache)
        step = step_bytes(self.concurrency)
        running = step.beside + self.concurrency * (cache.sequence_slots * slot_bytes + state)
        return memory.peak_bytes(self.always_bytes(self.concurrency, step_tokens, cache.block), self.loading_bytes, running, step.layers, step.head)

    def _candidate(self, part: Part, cache: Cache, kernel: str, step_tokens: int, placement: Placement, room: Room) -> Candidate:
        question, workload, kv = self.question, self.question.workload, cache.kv
        held = room.kv_tokens // cache.kept_on_average if cache.paged else room.max_sequences
        sequences = max(1, min(self.concurrency, room.max_sequences, held))
        decode = self.step("decode", part, cache, kernel, placement, sequences)
        prefill = self.step("prefill", part, cache, kernel, placement, min(step_tokens, workload.prompt_tokens))
        known = decode.seconds.known and prefill.seconds.known
        host = self.host_bytes(part.share, placement, part.degree, room.bytes_each)
        fits_host = self.pool == "host" or question.host_memory_bytes is None or host <= question.host_memory_bytes
        return Candidate(
            question,
            part.weights,
            kv,
            kernel,
            step_tokens,
            placement,
            part.degree,
            room.max_sequences,
            room.kv_tokens,
            round(room.bytes_each),
            round(host),
            room.fits and fits_host,
            decode,
            prefill,
            sequences,
            request_seconds(decode.seconds.require(), prefill.seconds.require(), sequences, workload) if known else float("inf"),
            self.quality(part, cache),
            self.reasons(part, cache, kernel, placement),
            part.requantized,
        )
