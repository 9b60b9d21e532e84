"""One step as the scheduler hands it out: whose tokens, from where, which drafts, which blocks to copy first; and what it says about the cache. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from tradespace.engine.request import Request


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """One request's part of a step: `num_tokens` tokens from position `start` on, the drafts at the end included."""

    request: Request
    start: int
    num_tokens: int
    draft_tokens: tuple[int, ...] = ()

    @property
    def samples(self) -> bool:
        """Whether the step computes all tokens that are known, so that the next one can be sampled."""
        return self.start + self.num_tokens - len(self.draft_tokens) == self.request.num_tokens

    @property
    def num_logits(self) -> int:
        """Rows of logits that it needs: one, and one more per draft; none while its prompt is not through."""
        return 1 + len(self.draft_tokens) if self.samples else 0

    def tokens(self) -> list[int]:
        known = self.request.token_ids[self.start : self.start + self.num_tokens - len(self.draft_tokens)]
        return [*known, *self.draft_tokens]


@dataclass(frozen=True, slots=True)
class SlotUse:
    """Token slots of the cache at one step: in allocated blocks, and holding a token once the step is computed. A shared block counts once, as a full one."""

    allocated: int
    held: int

    @property
    def empty_share(self) -> float:
        """Share of the allocated slots that hold nothing."""
        return 1 - self.held / self.allocated if self.allocated else 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """What the runner computes at once, and who had to make room.

    copies   (source, target) blocks that the runner copies, as if all at once, before it computes: whoever writes into a shared block gets its own
    """

    sequences: tuple[ScheduledSequence, ...]
    preempted: tuple[Request, ...]
    slots: SlotUse
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.sequences)

    @property
    def num_logits(self) -> int:
        return sum(item.num_logits for item in self.sequences)


@dataclass(slots=True)
class Counters:
    """Sums since the scheduler was made. Slots are summed over steps: `slot_waste` is their time average, in steps.

    recomputed_tokens      computed again after a preemption
    prefix_cache_queries   tokens of requests when they began, or began again, where prefixes are shared
    prefix_cache_hits      those of them whose keys and values were found in blocks that others had computed
    """

    steps: int = 0
    tokens: int = 0
    draft_tokens: int = 0
    accepted_drafts: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    allocated_slots: int = 0
    held_slots: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    copied_blocks: int = 0

    @property
    def slot_waste(self) -> float:
        """Time-averaged share of allocated token slots that hold nothing, weighted by how many there are."""
        return 1 - self.held_slots / self.allocated_slots if self.allocated_slots else 0.0
