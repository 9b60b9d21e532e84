"""A language model made of arithmetic, as the test oracle of everything that moves blocks: the next token is a hash of the whole context.

It reads that context back from the slots that the step's block tables name, so one wrong block, slot, position or order changes the tokens. `expected` says
what must come out, computed from the prompt alone, with no cache and no scheduler.
"""

import random
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence

from tradespace.engine.request import FinishReason, Request, accept_tokens
from tradespace.engine.scheduler import Scheduler
from tradespace.engine.sharing import Sharing
from tradespace.engine.speculative import accept_drafts
from tradespace.engine.step import Step

V = 31
EOS = 0


def next_token(context: Sequence[int]) -> int:
    return zlib.crc32(array("q", context).tobytes()) % V


def expected(request: Request) -> list[int]:
    """The tokens that a request must generate."""
    tokens = list(request.prompt_ids)
    while True:
        tokens.append(next_token(tokens))
        if request.ends_with(tokens[-1], len(tokens) - request.num_prompt):
            return tokens[request.num_prompt :]


class HashMachine:
    """Slots that hold (position, token); what no running request holds and nobody can find is overwritten before every step."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.slots: list[tuple[int, int] | None] = [None] * (scheduler.allocator.num_blocks * scheduler.block_size)

    def execute(self, step: Step) -> dict[str, list[int]]:
        """The sampled tokens of each request that samples."""
        P, allocator = self.scheduler.block_size, self.scheduler.allocator
        copied = [(target, self.slots[source * P : (source + 1) * P]) for source, target in step.copies]
        assert len(dict(copied)) == len(copied), "a block is the target of two copies"
        for target, content in copied:
            self.slots[target * P : (target + 1) * P] = content
        live = {block for request in self.scheduler.running for block in request.blocks}
        for block in range(allocator.num_blocks):
            if block not in live and allocator.name_of(block) is None:
                self.slots[block * P : (block + 1) * P] = [(-1, -1)] * P
        sampled = {}
        for item in step.sequences:
            blocks = item.request.blocks
            for position, token in enumerate(item.tokens(), start=item.start):
                slot = blocks[position // P] * P + position % P
                # a token may be computed again over itself, whoever reads it
                alone = allocator.references[blocks[position // P]] == 1
                assert alone or self.slots[slot] == (position, token), f"{item.request.id} writes into a block that others read"
                self.slots[slot] = (position, token)
            rows = []
            for position in range(item.start + item.num_tokens - item.num_logits, item.start + item.num_tokens):
                found = [self.slots[blocks[p // P] * P + p % P] for p in range(position + 1)]
                assert all(entry is not None and entry[0] == p for p, entry in enumerate(found)), f"{item.request.id} reads what it never wrote"
                rows.append(next_token([entry[1] for entry in found if entry is not None]))
            if rows:
                sampled[item.request.id] = rows
        return sampled


class ScriptedDrafter:
    """Knows the answers, and falsifies each drafted token with a given probability."""

    def __init__(self, wrong: float, seed: int = 0, length: int = 8):
        self.wrong, self.length, self.random = wrong, length, random.Random(seed)
        self.answers: dict[str, list[int]] = {}

    def propose(self, request: Request) -> list[int]:
        if request.id not in self.answers:
            self.answers[request.id] = expected(request)
        ahead = self.answers[request.id][request.num_outputs : request.num_outputs + self.length]
        return [(token + 1) % V if self.random.random() < self.wrong else token for token in ahead]


def run_step(scheduler: Scheduler, machine: HashMachine, drafter: ScriptedDrafter | None = None) -> Step:
    """One step of the scheduler on the machine, with all that must always hold checked."""
    first = scheduler.running[0] if scheduler.running else None
    everyone = [*scheduler.running, *scheduler.waiting]
    step = scheduler.schedule(drafter.propose if drafter else None)
    check_invariants(scheduler, step)
    scheduled = [item.request for item in step.sequences]
    if first is not None:
        assert first in scheduled and first not in step.preempted, "the first in order did not advance"
    if everyone and len({request.priority for request in everyone}) == 1:
        oldest = min(everyone, key=lambda request: request.order)
        # a fork stands before later arrivals that run already, and waits for them at most
        assert oldest in scheduled or (oldest.sample and scheduled), "the oldest did not advance"
    accepted: dict[str, list[int]] = {}
    finished: dict[str, FinishReason] = {}
    sampled = machine.execute(step)
    for item in step.sequences:
        if item.samples:
            tokens, reason = accept_tokens(item.request, accept_drafts(sampled[item.request.id], item.draft_tokens))
            accepted[item.request.id] = tokens
            if reason:
                finished[item.request.id] = reason
    scheduler.commit(step, accepted, finished)
    check_blocks(scheduler)
    return step


def check_invariants(scheduler: Scheduler, step: Step) -> None:
    assert len({item.request.id for item in step.sequences}) == len(step.sequences)
    assert step.num_tokens <= scheduler.step_tokens
    assert len(scheduler.running) <= scheduler.max_sequences
    assert all(item.request.state == "running" for item in step.sequences)
    assert all(item.num_tokens > len(item.draft_tokens) for item in step.sequences)
    assert all(item.start == item.request.num_computed for item in step.sequences)
    assert all(item.start + item.num_tokens <= item.request.max_cached for item in step.sequences)
    assert all(request.state == "waiting" and not request.blocks and request.num_computed == 0 for request in scheduler.waiting)
    assert step.slots.held <= step.slots.allocated == scheduler.allocator.num_used * scheduler.block_size
    check_blocks(scheduler)


def check_blocks(scheduler: Scheduler) -> None:
    owned = [block for request in scheduler.running for block in request.blocks] + scheduler._parked
    owners, allocator = Counter(owned), scheduler.allocator
    assert len(owners) == allocator.num_used, "a block leaked"
    assert all(allocator.references[block] == count for block, count in owners.items()), "a block has owners that are not counted"
    assert isinstance(scheduler.sharing, Sharing) or len(owned) == len(owners), "a block has two owners"
    assert allocator.num_free + allocator.num_used == allocator.num_blocks
    for request in scheduler.running:
        assert len(request.blocks) == len(set(request.blocks)) and len(request.blocks) * scheduler.block_size >= request.num_computed
    allocator.check()
