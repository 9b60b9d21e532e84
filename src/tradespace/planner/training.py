"""How to train within a budget: method, formats, optimizer, micro-batch and checkpointing, by search; checkpointing by dynamic programming over the layers.

Peak of the backward pass: for each segment, what it and those before it keep, and what is there while it runs. So a state of the program is (layers done, bytes
kept), with the least seconds of recomputation; a segment may be added where its own moment fits. States that another one beats in both are dropped.

Quality is not traded in silence: the first rung of LADDER that fits wins, and within it the most tokens a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from tradespace.cost.memory import compute_pool
from tradespace.cost.training import Terms, TrainLedger, terms, train_ledger, with_segments
from tradespace.cost.training_time import again_seconds, step_seconds
from tradespace.errors import BudgetError, InputError, UnsupportedError
from tradespace.spec import cuda
from tradespace.spec.device import DeviceSpec
from tradespace.spec.estimate import Estimate
from tradespace.spec.formats import find_format
from tradespace.spec.model import ModelSpec
from tradespace.spec.parallel import shard_spec, split_refusal
from tradespace.spec.training import BY_LAYER, KINDS, METHODS, OPTIMIZERS, Segment, TrainPlan, best_k, every, qlora_weights, refusal, selective_refusal
from tradespace.spec.weights import TRAINING_LAYOUT, WeightPlan
from tradespace.units import format_bytes

# (method, base format, optimizer, format of embedding and head; "": as the base): what is learned with, from all parameters in fp32 states down to adapters
# over codes, embedding and head in 8 bits, too
LADDER = (
    ("full", "fp32", "adamw", ""),
    ("full", "bf16", "adamw", ""),
    ("full", "bf16", "adamw8bit", ""),
    ("full", "bf16", "adafactor", ""),
    ("lora", "fp32", "adamw", ""),
    ("lora", "bf16", "adamw", ""),
    ("qlora", "nf4", "adamw", "bf16"),
    ("qlora", "nf4", "adamw", "int8"),
    ("qlora", "nf4", "paged-adamw", "int8"),
    ("qlora", "nf4", "adamw8bit", "int8"),
)
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


def plan_checkpointing(spec: ModelSpec, plan: TrainPlan, device: DeviceSpec, room_bytes: int) -> tuple[Segment, ...] | None:
    """The segments of least recomputation whose peak stays within `room_bytes`; None where nothing does."""
    found = terms(spec, plan)
    L = spec.L
    offload = _can_page(device)
    longest = max(1, ceil(2 * best_k(L, found.kept[0]["full"], found.kept[0]["none"])))
    seconds = [{kind: again_seconds(spec, plan, device, index, kind) for kind in KINDS} for index in range(L)]
    room = room_bytes - found.after_loss
    # by layers done: (kept, seconds, segments) with kept ascending and seconds descending
    states: list[list[tuple[int, float, tuple[Segment, ...]]]] = [[] for _ in range(L + 1)]
    states[0].append((0, 0.0, ()))
    for index in range(L):
        states[index] = _undominated(states[index])
        for kept, spent, segments in states[index]:
            for segment in _choices(spec, index, L, longest, offload):
                held, peak = _moment(found, segment, index, kept)
                if peak <= room and held + found.loss <= room_bytes:
                    cost = sum(seconds[i][segment.kind] for i in range(index, index + segment.layers))
                    states[index + segment.layers].append((held, spent + cost, (*segments, segment)))
    last = _undominated(states[L])
    return min(last, key=lambda state: (state[1], state[0]))[2] if last else None


def _choices(spec: ModelSpec, index: int, L: int, longest: int, offload: bool) -> list[Segment]:
    found = [Segment("none", 1)]
    if selective_refusal(spec.layers[index]) is None:
        found += [Segment("norms", 1), Segment("selective", 1)]
    found += [Segment("full", k) for k in range(1, min(longest, L - index) + 1)]
    return [*found, Segment("offload", 1)] if offload else found


def _moment(found: Terms, segment: Segment, index: int, kept: int) -> tuple[int, int]:
    """(kept with this segment, its own moment's bytes)."""
    if segment.kind in BY_LAYER:
        held = kept + found.kept[index][segment.kind]
        return held, held + found.transient[index][segment.kind]
    which = range(index, index + segment.layers)
    here = found.kept[index][segment.kind]
    held = kept + (0 if segment.kind == "offload" else here)
    again = sum(found.kept[i]["none"] for i in which) - (0 if segment.kind == "offload" else here)
    return held, held + again + found.transient[which[-1]]["none"]


def _undominated(states: list[tuple[int, float, tuple[Segment, ...]]]) -> list[tuple[int, float, tuple[Segment, ...]]]:
    best, found = float("inf"), []
    for state in sorted(states, key=lambda state: (state[0], state[1])):
        if state[1] < best - 1e-15:
            best = state[1]
            found.append(state)
    return found


@dataclass(frozen=True)
class TrainCandidate:
    """A plan with its ledger and its speed, or the least it would need."""

    plan: TrainPlan
    ledger: TrainLedger
    seconds: Estimate
    fits: bool

    @property
    def tokens_per_s(self) -> float:
        """Of all ranks together."""
        return self.plan.data_parallel * self.plan.tokens * self.plan.accumulation / self.seconds.require()

    def to_dict(self) -> dict[str, object]:
        speed = self.tokens_per_s if self.seconds.known else None
        return {"plan": self.plan.to_dict(), "ledger": self.ledger.to_dict(), "tokens_per_s": speed, "fits": self.fits}


@dataclass(frozen=True)
class Question:
    """What is asked of the planner. None: the planner chooses. batch: sequences of a step; micro-batches and accumulation divide it."""

    spec: ModelSpec
    device: DeviceSpec
    memory_bytes: int
    context: int
    batch: int = 8
    method: str | None = None
    only_method: bool = False  # the command has no other
    weights: str | None = None
    optimizer: str | None = None
    checkpointing: tuple[Segment, ...] | None = None
    rank: int = 16
    alpha: float = 32.0
    fused: bool | None = None
    attention: str = "sdpa"
    data_bytes: int = 0
    here_bytes: int | None = None  # what this process was measured at, tokenizer and data in it
    spare_bytes: int = 0  # what is taken beside the plan: a teacher, for instance
    spare_token_bytes: int = 0  # and of each token of a micro-batch: its teacher's last stream
    logit_bytes: int | None = None  # while the loss is computed; None: those of plain cross entropy
    data_parallel: int = 1  # ranks; memory_bytes is each one's, batch all of theirs
    tensor_parallel: int = 1

    def spare(self, plan: TrainPlan) -> int:
        """Bytes beside the plan."""
        return self.spare_bytes + plan.tokens * self.spare_token_bytes


def rungs(question: Question) -> list[tuple[str, str, str, str]]:
    """The rungs of the ladder that were not excluded, a pinned format or optimizer in its place."""
    found = []
    for method, fmt, optimizer, tables in LADDER:
        if question.method not in (None, method):
            continue
        if fmt == "fp32" and question.weights is None and question.device.kind == "cuda":
            continue
        if OPTIMIZERS[optimizer].pages and question.optimizer is None and not _can_page(question.device):
            continue
        fmt, optimizer = question.weights or fmt, question.optimizer or optimizer
        if (method == "qlora") == (fmt in ("fp32", "bf16")) or not _over_ranks(question, method, optimizer):
            continue
        if (method, fmt, optimizer, tables) not in found:
            found.append((method, fmt, optimizer, tables))
    return found


def _can_page(device: DeviceSpec) -> bool:
    """Whether the host's memory is another than the device's, behind a link of known speed."""
    return compute_pool(device) == "device" and device.host_link_bytes_per_s is not None


def _over_ranks(question: Question, method: str, optimizer: str) -> bool:
    """Whether the question's ranks can learn so; what was asked for by name is refused later, with its reason."""
    ranks = question.data_parallel * question.tensor_parallel
    adapters = question.tensor_parallel > 1 and method != "full" and question.method is None
    factored = ranks > 1 and optimizer == "adafactor" and question.optimizer is None
    return not adapters and not factored


def candidates(question: Question) -> list[TrainCandidate]:
    """Every rung at every micro-batch, the fitting ones first; within a rung the fastest first. Raises InputError for a name that means nothing."""
    for what, name, known in (("method", question.method, METHODS), ("optimizer", question.optimizer, tuple(OPTIMIZERS))):
        if name is not None and name not in known:
            raise InputError(f"--{what} {name}: known are {', '.join(known)}")
    if question.optimizer is not None and (pages := OPTIMIZERS[question.optimizer].pages) and not _can_page(question.device):
        raise InputError(f"--optimizer {question.optimizer} moves states between a device and the host; on {question.device.name} both are one. Use {pages}")
    if question.weights is not None:
        find_format(question.weights)
    if (reason := refusal(question.spec)) is not None:
        raise UnsupportedError(f"{question.spec.name} cannot be trained yet: {reason}")
    if (reason := split_refusal(question.spec, question.tensor_parallel)) is not None:
        raise UnsupportedError(f"{question.spec.name}: {reason}")
    batch, left = divmod(question.batch, question.data_parallel)
    if left or not batch:
        raise InputError(f"--batch {question.batch} cannot be shared by {question.data_parallel} data ranks. Give a multiple of {question.data_parallel}")
    found: list[tuple[int, TrainCandidate]] = []
    for number, (method, fmt, optimizer, tables) in enumerate(rungs(question)):
        weights = (
            qlora_weights(fmt, tables, TRAINING_LAYOUT if question.device.kind == "cuda" and cuda.runs(fmt) else "stored")
            if method == "qlora"
            else WeightPlan(default=fmt)
        )
        for micro in MICRO_BATCHES:
            if micro > batch or batch % micro:
                continue
            accumulation = batch // micro
            can_fuse = accumulation == 1 and method == "full" and question.data_parallel == 1
            fused = can_fuse if question.fused is None else question.fused
            if fused and accumulation > 1:
                continue
            plan = TrainPlan(
                model=question.spec.name, method=method, weights=weights, rank=question.rank, alpha=question.alpha, optimizer=optimizer, context=question.context,  # noqa: E501
                micro_batch=micro, accumulation=accumulation, fused=fused, attention=question.attention, device=question.device.name,
                memory_bytes=question.memory_bytes, loss_tokens=_loss_tokens(question.spec, question.context * micro, question.device),
                logit_bytes=_logit_bytes(question), fused_kernels=question.device.kind == "cuda", data_parallel=question.data_parallel,
                tensor_parallel=question.tensor_parallel,
            )  # fmt: skip
            found.append((number, _candidate(question, plan)))
    found.sort(key=lambda each: (not each[1].fits, each[0], each[1].seconds.value or 0.0))
    return [candidate for _, candidate in found]


def _logit_bytes(question: Question) -> int:
    """On a device plain cross entropy turns 16-bit logits into their gradient where they lie."""
    if question.logit_bytes is not None:
        return question.logit_bytes
    spec = question.spec
    return 2 if question.device.kind == "cuda" and spec.logit_softcap is None and spec.logit_scale == 1.0 else 8


def _loss_tokens(spec: ModelSpec, tokens: int, device: DeviceSpec) -> int:
    """As many as make 64 MiB of fp32 logits, at least 64; on a device 256 MiB of 16-bit ones, at least 512, for the product's sake."""
    if device.kind == "cuda":
        return min(tokens, max(512, 2**28 // (2 * spec.V)))
    return max(64, min(tokens, 2**26 // (4 * spec.V)))


def _candidate(question: Question, plan: TrainPlan) -> TrainCandidate:
    spec, device = shard_spec(question.spec, question.tensor_parallel), question.device
    bare = train_ledger(spec, with_segments(plan, every(1, spec.L, "none")), device, data_bytes=question.data_bytes, here_bytes=question.here_bytes)
    fixed = sum(line.bytes.require() for line in bare.lines if line.name not in ("activations", "step"))
    room = int(question.memory_bytes - question.spare(plan) - fixed)
    segments = question.checkpointing
    if segments is None:
        segments = plan_checkpointing(spec, plan, device, room)
    shown = with_segments(plan, segments or every(1, spec.L))
    ledger = train_ledger(spec, shown, device, data_bytes=question.data_bytes, here_bytes=question.here_bytes)
    return TrainCandidate(
        shown, ledger, step_seconds(spec, shown, device), segments is not None and ledger.total_bytes + question.spare(plan) <= question.memory_bytes
    )


def best_plan(question: Question) -> TrainCandidate:
    """The plan to run. Raises BudgetError with what would fit, UnsupportedError for models that are not trained."""
    found = candidates(question)
    if found and found[0].fits:
        return found[0]
    raise no_fit(question, found)


def _over_more(question: Question) -> list[str]:
    """The fewest data ranks, as devices of this kind, over which it would fit."""
    for ranks in (2, 4, 8):
        if question.batch % ranks == 0 and candidates(replace(question, data_parallel=ranks, fused=None))[0].fits:
            return [f"--data-parallel {ranks} on as many devices"]
    return []


def no_fit(question: Question, found: Sequence[TrainCandidate]) -> Exception:
    """The error for a budget that holds nothing: the nearest plan, or the longest sequence that would fit."""
    if not found:
        asked = " ".join(f"--{name} {value}" for name, value in (("method", question.method), ("weights", question.weights)) if value is not None)
        return UnsupportedError(f"{asked} exclude each other: qlora takes a base in nf4, int8, int4 …; full and lora one in bf16 or fp32")
    least = min(found, key=lambda each: each.ledger.total_bytes)
    need = least.ledger.total_bytes + question.spare(least.plan)
    remedies = []
    context = question.context
    while context > 64:
        context //= 2
        shorter = candidates(replace(question, context=context))
        if shorter[0].fits:
            remedies.append(f"--context {context}")
            break
    pinned = [name for name in ("checkpointing", "weights", "optimizer") if getattr(question, name) is not None]
    free = replace(question, **dict.fromkeys(pinned))
    if pinned and candidates(free)[0].fits:
        remedies.append("without " + " ".join(f"--{name}" for name in pinned))
    elif question.method is not None and not question.only_method:
        freer = candidates(replace(free, method=None))
        if freer[0].fits:
            remedies.append(f"--method {freer[0].plan.method}")
    if question.data_parallel == question.tensor_parallel == 1 and not remedies and compute_pool(question.device) == "device":
        remedies += _over_more(question)
    remedies.append(f"--memory {format_bytes(need * 1.01).replace(' ', '')}")
    message = (
        f"training {question.spec.name} needs {format_bytes(need)} at the least ({least.plan.describe()}); "
        f"{format_bytes(question.memory_bytes)} are stated. Fits with {' or '.join(remedies)}"
    )
    return BudgetError(message, need_bytes=round(need), have_bytes=question.memory_bytes)
