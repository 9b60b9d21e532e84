"""Who computes what in the next step: continuous batching (Orca, OSDI 2022), paged cache (arXiv:2309.06180), chunked prefill (arXiv:2308.16369). No torch.

A step is built in this order: decodes, one token each; chunks of prompts that run already; new requests; drafts to verify, from what is left. Blocks are
taken as tokens need them. When they run out, the last request in order (priority, arrival) is preempted: its blocks are freed, its tokens kept, and it waits
in its old place until they are computed again, which changes none of them.

Nobody starves. Requests are admitted strictly in order, so that no running one stands behind a waiting one (of equal priority); a victim is always the last,
so the first keeps its blocks and may take all others'; `add` refuses what does not fit the whole cache; and the first always gets a token of the step's
budget. So the first advances in every step and finishes, then the next is the first. Preemptions back and forth are rare because a request is admitted only
when the blocks of all its known tokens are free beside what running prompts still need, and one block more for each sequence that can still grow.

Where prefixes are shared (`sharing.py`), a request begins with the blocks that hold its first tokens already; who writes into a block of several owners gets
a copy first, which the step lists. A fork stands right behind its family, so it may wait for later arrivals that run already, but for nobody else.

policy "fixed" is what continuous batching is compared with: a batch is filled while nothing runs, in order, up to `max_sequences` and as long as every
member's prompt + max_tokens slots can be reserved at once; it runs until all its members have ended; their blocks stay reserved until then. Members that have
ended cost no compute, and prompts are chunked and share steps with decodes as above, so the comparison favours fixed batches where it can.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

from tradespace.engine.allocator import BlockAllocator
from tradespace.engine.request import FinishReason, Request
from tradespace.engine.sharing import Sharing, Unshared
from tradespace.engine.step import Counters, ScheduledSequence, SlotUse, Step
from tradespace.errors import InputError
from tradespace.spec.kv import FULL, Retain
from tradespace.spec.kv import num_blocks as blocks_for
from tradespace.spec.plan import Plan

Policy = Literal["continuous", "fixed"]
Propose = Callable[[Request], Sequence[int]]


class Scheduler:
    """Requests in, steps out. `schedule` hands out a step, `commit` takes its tokens; `finish` ends a request at any time.

    num_blocks, block_size   the cache: paged, or one block of `max_context` slots per sequence (contiguous)
    max_sequences            most requests that run at once
    step_tokens              most tokens of one step
    retain                   what stays of a sequence, and so how many slots it needs
    max_drafts               most drafted tokens of one sequence in a step
    prefix_sharing           equal prefixes share blocks; only with the policy "continuous"
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_sequences: int,
        max_context: int,
        step_tokens: int,
        max_drafts: int = 0,
        policy: Policy = "continuous",
        prefix_sharing: bool = False,
        retain: Retain = FULL,
    ):
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size), ("max_sequences", max_sequences), ("step_tokens", step_tokens)):
            if value < 1:
                raise InputError(f"scheduler: {name} is {value}; at least 1 is needed")
        if policy not in get_args(Policy):
            raise InputError(f"unknown scheduling policy '{policy}'. Known: {', '.join(get_args(Policy))}")
        if prefix_sharing and policy == "fixed":
            raise InputError("a fixed batch reserves its blocks beforehand and shares none. Plan without prefix_sharing, or schedule continuously")
        self.block_size = block_size
        self.retain = retain
        self.max_sequences = max_sequences
        self.max_context = max_context
        self.step_tokens = step_tokens
        self.max_drafts = max_drafts
        self.policy: Policy = policy
        self.allocator = BlockAllocator(num_blocks)
        self.counters = Counters()
        self.sharing = Sharing(self.allocator, block_size, self.counters) if prefix_sharing else Unshared(block_size)
        self.waiting: list[Request] = []  # both sorted by (priority, arrival)
        self.running: list[Request] = []
        self._live: dict[str, Request] = {}
        self._arrivals = 0
        self._parked: list[int] = []  # blocks of ended members of a fixed batch
        self._budget = 0
        self._scheduled: dict[str, ScheduledSequence] = {}
        self._preempted: list[Request] = []
        self._copies: dict[str, tuple[int, int]] = {}  # by the request that needs the copy

    @classmethod
    def from_plan(cls, plan: Plan, *, policy: Policy = "continuous") -> Scheduler:
        return cls(
            num_blocks=plan.num_blocks,
            block_size=plan.kv.block_slots(plan.max_context),
            max_sequences=plan.max_sequences,
            max_context=plan.max_context,
            step_tokens=plan.step_tokens,
            max_drafts=plan.speculation,
            policy=policy,
            prefix_sharing=plan.kv.prefix_sharing,
            retain=plan.kv.retain,
        )

    def _blocks_for(self, num_tokens: int) -> int:
        """Blocks of a sequence of so many tokens: of as many as are retained."""
        return blocks_for(self.retain.tokens(num_tokens), self.block_size)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request. Raises InputError where it could never run: prompt and output exceed the context or the whole cache."""
        prompt, output = request.num_prompt, request.params.max_tokens
        if prompt + output > self.max_context:
            raise InputError(
                f"the prompt's {prompt} tokens and max_tokens {output} need a context of {prompt + output}; there are {self.max_context}. "
                + self._shorter(self.max_context - prompt, f"plan a context of {prompt + output}")
            )
        capacity = self.allocator.num_blocks * self.block_size
        if self._blocks_for(request.max_cached) > self.allocator.num_blocks:
            raise InputError(
                f"the prompt's {prompt} tokens and max_tokens {output} need {request.max_cached} slots of the KV cache; it has {capacity}. "
                + self._shorter(capacity + 1 - prompt, "give more memory")
            )
        if request.id in self._live:
            raise InputError(f"a request with the id '{request.id}' is under way already; give each its own")
        self._live[request.id] = request
        if request.root is request:
            request.arrival = self._arrivals
            self._arrivals += 1
        insort(self.waiting, request, key=lambda queued: queued.order)

    def fork(self, request: Request) -> Request:
        """A request that goes on from the tokens that `request` has now, with noise of its own, and stands behind it in order.

        Where there is room for one more it begins at once, and shares its blocks; else it waits, and takes later what it finds. Raises InputError where the
        request has ended.
        """
        if request.finished:
            raise InputError(f"request {request.id} has ended and cannot be forked")
        forked = request.fork()
        self.add(forked)
        if request.state == "running" and self.waiting[0] is forked and len(self.running) < self.max_sequences and self._may_begin(forked):
            self._admit()
        return forked

    def replace_last(self, request: Request, token: int) -> None:
        """The last token of `request`, which has no key and value yet, becomes another: how a beam goes on otherwise than its request did."""
        assert request.num_outputs > 0 and request.num_computed < request.num_tokens, f"request {request.id} has computed its last token"
        request.token_ids[-1] = token
        del request.block_names[(request.num_tokens - 1) // self.block_size :]  # a name that the token before had a part in

    @staticmethod
    def _shorter(room: int, otherwise: str) -> str:
        return f"Fits with max_tokens {room}, or {otherwise}" if room >= 1 else f"Shorten the prompt by at least {1 - room} tokens, or {otherwise}"

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request, whatever it is doing, and give back its blocks. One that has ended already stays as it is."""
        if request.finished:
            return
        _remove(self.running if request.state == "running" else self.waiting, request)
        self._scheduled.pop(request.id, None)
        if self.policy == "fixed":
            self._parked += request.blocks
        else:
            self._release(request, keep=reason != "error")
        request.blocks = ()
        request.state, request.finish_reason = "finished", reason
        if not self.running:
            self.allocator.free(self._parked)
            self._parked = []
        del self._live[request.id]

    def abort(self, request: Request) -> None:
        self.finish(request, "abort")

    def reset(self, reason: FinishReason) -> list[Request]:
        """End all requests and start from an empty cache, whatever state an interrupted call has left. Returns those ended."""
        ended = [request for request in self._live.values() if not request.finished]
        for request in ended:
            request.blocks = ()
            request.state, request.finish_reason = "finished", reason
        self.waiting, self.running, self._parked, self._scheduled, self._copies, self._live = [], [], [], {}, {}, {}
        self.allocator.reset()
        return ended

    def schedule(self, propose: Propose | None = None) -> Step:
        """The next step; empty only when nothing is left to do. `propose` drafts tokens for a request that decodes."""
        self._budget, self._scheduled, self._preempted, self._copies = self.step_tokens, {}, [], {}
        self.sharing.begin_step()
        if self.policy == "fixed" and not self.running:
            self._fill_batch()
        # the first in order always gets on, also when its prompt is long and the others' decodes would fill the step
        kept = 1 if self.running and self.running[0].num_uncomputed > 1 else 0
        for request in tuple(self.running):
            if request.state == "running" and request.num_uncomputed == 1 and self._budget > kept:
                self._schedule(request)
        for request in tuple(self.running):
            if request.state == "running" and request.num_uncomputed > 1 and self._budget and not self._finds_more(request):
                self._schedule(request)
        if self.policy == "continuous":
            self._admit_what_fits()
        if propose is not None and self.max_drafts:
            self._draft(propose)
        return self._step()

    def commit(self, step: Step, accepted: Mapping[str, Sequence[int]], finished: Mapping[str, FinishReason]) -> None:
        """Take a step's result: per request that sampled its accepted tokens (at least one), and why it ended, if it did.

        Of drafts that were not accepted nothing stays: `num_computed` goes back to what the accepted tokens follow from, surplus blocks are returned.
        """
        for item in step.sequences:
            request = item.request
            if request.state != "running":  # ended while the step was computed
                continue
            if item.samples:
                tokens = accepted[request.id]
                assert 1 <= len(tokens) <= item.num_logits, f"{len(tokens)} tokens accepted of {item.num_logits} sampled"
                request.token_ids.extend(tokens)
                request.num_computed = request.num_tokens - 1  # the last one's key and value come with the next step
                self.counters.accepted_drafts += len(tokens) - 1
            else:
                request.num_computed += item.num_tokens
            self.sharing.publish(request)
            if request.id in finished:
                self.finish(request, finished[request.id])
            elif item.draft_tokens:
                self._return_surplus(request)
        self._scheduled = {}

    def _schedule(self, request: Request) -> None:
        """Put as many of a running request's tokens into the step as the budget allows, preempting others (or itself) where blocks are short."""
        count = min(request.num_uncomputed, self._budget)
        if self._make_room(request, request.num_computed + count):
            self._scheduled[request.id] = ScheduledSequence(request, request.num_computed, count)
            self._budget -= count
            if count > 1:
                self.sharing.will_fill(request, count)

    def _finds_more(self, request: Request) -> bool:
        """A prompt that runs gets the blocks that others have filled meanwhile. True: others fill its next one in this step, so that it does better to wait."""
        self.sharing.adopt(request)
        return self.sharing.awaits(request)

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Give `request` the blocks for `num_tokens` tokens. False: it was itself the last in order, and is preempted."""
        missing = self._blocks_for(num_tokens) - len(request.blocks)
        # a victim may be the other owner of a block that would have to be copied
        while missing + self.sharing.must_copy(request) > self.allocator.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        if copy := self.sharing.own(request):
            # all copies are made at once: what would be copied in two leaps, because its owner got the block in this very step, is copied from where it lies
            lies = {target: source for source, target in self._copies.values()}
            self._copies[request.id] = (lies.get(copy[0], copy[0]), copy[1])
        if missing > 0:
            request.blocks += self.allocator.allocate(missing, after=request.blocks[-1] if request.blocks else None)
        return True

    def _release(self, request: Request, *, keep: bool = True) -> None:
        """Give a request's blocks back. What they hold can still be found, unless it is not to be kept."""
        if not keep:
            self.allocator.forget(request.blocks)
        self.allocator.free(reversed(request.blocks))  # its first blocks are those that others most likely begin with: they are evicted last

    def _preempt(self, victim: Request) -> None:
        _remove(self.running, victim)
        item = self._scheduled.pop(victim.id, None)
        if item is not None:
            self._budget += item.num_tokens
            self._copies.pop(victim.id, None)
        self._release(victim)
        self.counters.preemptions += 1
        self.counters.recomputed_tokens += victim.num_computed
        victim.num_lost += victim.num_computed
        victim.blocks, victim.num_computed, victim.num_published, victim.state = (), 0, 0, "waiting"
        victim.num_preemptions += 1
        self._preempted.append(victim)
        insort(self.waiting, victim, key=lambda queued: queued.order)

    def _admit(self) -> Request:
        request = self.waiting.pop(0)
        request.state = "running"
        insort(self.running, request, key=lambda queued: queued.order)
        self.sharing.adopt(request)
        return request

    def _admit_what_fits(self) -> None:
        # where someone had to make room in this very step, nobody new comes in
        while self.waiting and not self._preempted and self._budget and len(self.running) < self.max_sequences and self._may_begin(self.waiting[0]):
            self._schedule(self._admit())

    def _may_begin(self, request: Request) -> bool:
        """The admission rule of continuous batching (see above). A request that would be alone always may: `add` saw to that."""
        if not self.running:
            return True
        if self.sharing.awaits(request):
            return False
        growing = sum(self._can_grow(other) for other in [*self.running, request])
        # where a cache forgets, nothing is shared
        fresh = self.sharing.fresh_blocks(request) if self.retain.kind == "full" else self._blocks_for(request.num_tokens)
        return fresh + growing <= self._spare_blocks()

    def _spare_blocks(self) -> int:
        """Free blocks that no running request's known tokens need."""
        owed = sum(max(0, self._blocks_for(request.num_tokens) - len(request.blocks)) for request in self.running)
        return self.allocator.num_free - owed

    def _can_grow(self, request: Request) -> bool:
        return self._blocks_for(request.max_cached) > self._blocks_for(request.num_tokens)

    def _fill_batch(self) -> None:
        """Start the next fixed batch: reserve prompt + max_tokens slots for each member."""
        while self.waiting and len(self.running) < self.max_sequences:
            need = self._blocks_for(self.waiting[0].max_cached + 1)
            need = min(need, self.allocator.num_blocks)  # the very last token's slot is reserved only where there is one
            if need > self.allocator.num_free:
                return
            request = self._admit()
            request.blocks = self.allocator.allocate(need)

    def _draft(self, propose: Propose) -> None:
        """Add drafts where budget and blocks are left over: they displace nobody."""
        for item in tuple(self._scheduled.values()):
            request = item.request
            room = min(self.max_drafts, self._budget, request.params.max_tokens - request.num_outputs - 1)
            if not item.samples or room < 1 or request.constraint is not None:  # a draft's row would need the state behind the draft
                continue
            known = item.start + item.num_tokens
            slots = (len(request.blocks) + max(0, self._spare_blocks())) * self.block_size
            drafts = tuple(propose(request))[: max(0, min(room, slots - known))]
            if drafts and self._make_room(request, known + len(drafts)):
                self._scheduled[request.id] = replace(item, num_tokens=item.num_tokens + len(drafts), draft_tokens=drafts)
                self._budget -= len(drafts)
                self.counters.draft_tokens += len(drafts)

    def _return_surplus(self, request: Request) -> None:
        kept = self._blocks_for(request.num_computed)
        if self.policy == "continuous" and kept < len(request.blocks):
            self.allocator.free(request.blocks[kept:])
            request.blocks = request.blocks[:kept]

    def _step(self) -> Step:
        scheduled = {id: item.num_tokens for id, item in self._scheduled.items()}
        held = sum(self.retain.tokens(request.num_computed + scheduled.get(request.id, 0)) for request in self.running)
        # a shared block's tokens were counted once for each owner; one that is not full is about to be copied
        held = max(0, held - self.allocator.num_surplus * self.block_size)
        slots = SlotUse(allocated=self.allocator.num_used * self.block_size, held=held)
        step = Step(tuple(self._scheduled.values()), tuple(self._preempted), slots, tuple(self._copies.values()))
        # one that has asked for all its tokens may hold its blocks until the last one is known (`overlapped.py`)
        ending = any(not request.num_uncomputed for request in self.running)
        assert step.sequences or ending or not self.has_work, f"{len(self.running)} running and {len(self.waiting)} waiting requests, but nothing to do"
        assert step.num_tokens <= self.step_tokens, f"a step of {step.num_tokens} tokens; at most {self.step_tokens} were planned"
        if step.sequences:
            self.counters.steps += 1
            self.counters.tokens += step.num_tokens
            self.counters.allocated_slots += slots.allocated
            self.counters.held_slots += slots.held
        return step


def _remove(queue: list[Request], request: Request) -> None:
    index = bisect_left(queue, request.order, key=lambda queued: queued.order)
    assert queue[index] is request, f"request {request.id} is not where its order says"
    del queue[index]
