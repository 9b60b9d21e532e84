"""Why the rest of the space lost: for every family of options that the best plan does not use, its strongest member and what that member lacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tradespace.planner.candidate import MIN_BITS, QUALITY_LIMIT, Candidate, Question
from tradespace.planner.space import Space
from tradespace.spec.kv import STORES
from tradespace.units import format_bytes, format_seconds


@dataclass(frozen=True, slots=True)
class Rejection:
    """A family ("weights int8"), why it lost, and where bytes decided what it needs and what there is."""

    family: str
    reason: str
    need: int | None = None
    have: int | None = None

    def to_dict(self) -> dict[str, object]:
        return {"family": self.family, "reason": self.reason, "need_bytes": self.need, "have_bytes": self.have}


def _placement(candidate: Candidate) -> str:
    return candidate.placement.stream_from if candidate.placement.streamed_layers else "resident"


AXES: dict[str, Callable[[Candidate], str]] = {
    "weights": lambda c: c.weights.default,
    "head": lambda c: "kept dense" if c.weights.exceptions else "as the rest",
    "KV": lambda c: c.kv.describe_store(),
    "layout": lambda c: f"paged({c.kv.block_size})" if c.kv.layout == "paged" else "contiguous",
    "attention": lambda c: c.attention,
    "layers": lambda c: _placement(c) if _placement(c) == "resident" else f"streamed from {_placement(c)}",
    "devices": lambda c: str(c.tensor_parallel),
    "step tokens": lambda c: str(c.step_tokens),
}


def rejections(
    candidates: Sequence[Candidate], ranked: Sequence[Candidate], best: Candidate | None, space: Space, question: Question, *, runnable_only: bool
) -> list[Rejection]:
    """One entry per value of each axis that `best` does not take (of every value where nothing is best). `ranked`: those that may be chosen, best first."""
    found = []
    for axis, value_of in AXES.items():
        strongest: dict[str, Candidate] = {}
        for candidate in ranked:
            strongest.setdefault(value_of(candidate), candidate)
        for value in dict.fromkeys(map(value_of, candidates)):
            if best is not None and value == value_of(best):
                continue
            if best is not None and value in strongest:
                able = strongest[value]
                found.append(Rejection(f"{axis} {value}", _compared(able, best), able.need_bytes, question.memory_bytes))
            else:
                members = [candidate for candidate in candidates if value_of(candidate) == value]
                found.append(_unable(f"{axis} {value}", members, question, runnable_only))
    unused = {kernel: reason for kernel, reason in space.refused.items() if kernel not in space.kernels}
    found += [Rejection(f"KV {store}", reason) for store, reason in space.refused_stores.items() if space.stores is None and STORES[store].offered]
    found += [Rejection(f"attention {kernel}", f"cannot compute {question.model.name}: {reason}") for kernel, reason in unused.items()]
    return found


def _unable(family: str, members: Sequence[Candidate], question: Question, runnable_only: bool) -> Rejection:
    """Why none of a family may be chosen: it does not run, needs more devices, or more memory."""
    able = [c for c in members if not (runnable_only and c.runs)]
    if not able:
        return Rejection(family, "cannot run yet: " + "; ".join(min((c.runs for c in members), key=len)))
    at_hand = [c for c in able if c.tensor_parallel <= question.device.count]
    if not at_hand:
        strongest = min(able, key=lambda c: (not c.fits_memory, *c.preference))
        need = f"{strongest.tensor_parallel} devices needed, {question.device.count} there"
        return Rejection(family, need if strongest.fits_memory else f"{need}, and even so {_too_large(strongest, question)}", strongest.need_bytes)
    assert not any(c.fits_memory for c in at_hand), "what fits and runs on the devices at hand may be chosen"
    smallest = min(at_hand, key=lambda c: c.bytes_each)
    return Rejection(family, _too_large(smallest, question), smallest.need_bytes, question.memory_bytes)


def _too_large(candidate: Candidate, question: Question) -> str:
    if candidate.bytes_each > question.usable_bytes:
        return f"does not fit: needs {format_bytes(candidate.need_bytes)}, {format_bytes(question.memory_bytes)} there"
    assert question.host_memory_bytes is not None, "what fits the device and has no host limit fits"
    return f"does not fit the host: needs {format_bytes(candidate.host_bytes)}, {format_bytes(question.host_memory_bytes)} there"


def _loss(candidate: Candidate) -> str:
    return "unknown" if candidate.quality.value is None else f"{candidate.quality.value:.4f} nats"


def _compared(strongest: Candidate, best: Candidate) -> str:
    """What decided between a family's strongest member and the best plan, in the order of the rule."""
    if strongest.comfort != best.comfort:
        return (
            "layers streamed at every token, and plans fit that need not"
            if strongest.comfort == 1
            else f"fewer than {MIN_BITS} bits a weight, and plans fit with more"
        )
    if strongest.quality.value is None and best.quality.value is None and strongest.quality_key != best.quality_key:
        return "fewer bits, and no figure says what that loses"
    if strongest.quality_key != best.quality_key:
        limit = f" (limit {QUALITY_LIMIT})" if strongest.quality_key[0] == 1 else ""
        return f"loses more quality: {_loss(strongest)}{limit} against {_loss(best)}"
    if strongest.requantized != best.requantized:
        return f"would quantize once more what is stored as {best.weights.default}"
    if strongest.request_s > best.request_s:
        slow, fast = format_seconds(strongest.request_s), format_seconds(best.request_s)
        return f"slower: {slow} against {fast} for the workload" if slow != fast else f"no faster: {slow} for the workload either way"
    if best.kv.prefix_sharing and (not strongest.kv.prefix_sharing or strongest.kv.block_size > best.kv.block_size):
        return f"equal speed, and requests share {'less of their' if strongest.kv.prefix_sharing else 'no'} prefixes"
    if strongest.total_bytes > best.total_bytes:
        return f"equal speed, {format_bytes(strongest.total_bytes - best.total_bytes)} more"
    return f"equal speed and bytes, no smaller loss: {_loss(strongest)} against {_loss(best)}"
