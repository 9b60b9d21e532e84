"""The overlapped engine gives the tokens of the plain one, whatever arrives, ends, forks and is aborted while steps are under way. No device here: the runner
computes what a device would, from the tokens that it has itself where the host has not got them yet.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tradespace.engine.engine import Engine
from tradespace.engine.overlapped import UNKNOWN, OverlappedEngine
from tradespace.engine.request import Request, SamplingParams
from tradespace.engine.sampler import Sampler
from tradespace.engine.scheduler import Scheduler
from tradespace.engine.step import Step

V = 23


def following(tokens: list[int]) -> int:
    """The next token of a sequence: all of it matters."""
    return (sum((index + 3) * token for index, token in enumerate(tokens, 1)) * 7 + len(tokens)) % V


@dataclass
class Flight:
    step: Step
    rows: dict[str, int]
    found: list[int]

    def tokens(self) -> list[int | None]:
        return list(self.found)


@dataclass
class Device:
    """A cache of tokens by slots, and what they foretell."""

    block_size: int = 4
    slots: dict[int, int] = field(default_factory=dict)
    vocab_size: int = V

    def _slot(self, request: Request, position: int) -> int:
        return request.blocks[position // self.block_size] * self.block_size + position % self.block_size

    def _take(self, step: Step, last: Flight | None) -> list[int]:
        copied = {
            target * self.block_size + offset: self.slots.get(source * self.block_size + offset)
            for source, target in step.copies
            for offset in range(self.block_size)
        }
        self.slots |= {slot: token for slot, token in copied.items() if token is not None}
        found = []
        for item in step.sequences:
            for position, token in enumerate(item.tokens(), item.start):
                if token == UNKNOWN:
                    assert last is not None, "a token that nobody knows"
                    token = last.found[last.rows[item.request.id]]
                self.slots[self._slot(item.request, position)] = token
            if item.samples:
                found.append(following([self.slots[self._slot(item.request, position)] for position in range(item.start + item.num_tokens)]))
        return found

    def launch(self, step: Step, last: Flight | None = None) -> Flight:
        found = self._take(step, last)
        sampling = [item.request.id for item in step.sequences if item.samples]
        return Flight(step, {id: row for row, id in enumerate(sampling)}, found)

    def execute(self, step: Step) -> torch.Tensor:
        logits = torch.zeros(step.num_logits, V)
        for row, token in enumerate(self._take(step, None)):
            logits[row, token] = 1.0
        return logits

    @staticmethod
    def needs_logits(request: Request) -> bool:
        return request.params.logprobs is not None


def engines(**sizes):
    values = {"num_blocks": 12, "block_size": 4, "max_sequences": 4, "max_context": 40, "step_tokens": 16} | sizes
    return [kind(Device(), Scheduler(**values), Sampler()) for kind in (Engine, OverlappedEngine)]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), blocks=st.integers(8, 16), sharing=st.booleans(), careful=st.booleans())
def test_tokens_are_those_of_the_plain_engine(seed, blocks, sharing, careful):
    draw = random.Random(seed)
    prompts = [[draw.randrange(V) for _ in range(draw.randint(1, 14))] for _ in range(draw.randint(1, 9))]
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=draw.randint(1, 12),
            stop_token_ids=(draw.randrange(V),) if draw.random() < 0.5 else (),
            logprobs=1 if careful and draw.random() < 0.3 else None,
        )
        for _ in prompts
    ]
    plain, overlapped = engines(num_blocks=blocks, prefix_sharing=sharing)
    expected = plain.generate(prompts, params)
    found = overlapped.generate(prompts, params)
    assert [(c.output_ids, c.finish_reason) for c in found] == [(c.output_ids, c.finish_reason) for c in expected]
    overlapped.step()
    assert not overlapped.has_work and overlapped.scheduler.allocator.num_used == 0
    overlapped.scheduler.allocator.check()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_arrivals_and_aborts_at_any_moment(seed):
    draw = random.Random(seed)
    engine = engines(num_blocks=10)[1]
    alive: list[Request] = []
    ended: list[Request] = []
    for _ in range(60):
        if draw.random() < 0.3:
            prompt = [draw.randrange(V) for _ in range(draw.randint(1, 10))]
            alive.append(engine.add(prompt, SamplingParams(temperature=0.0, max_tokens=draw.randint(1, 10), ignore_eos=True)))
        if alive and draw.random() < 0.1:
            engine.abort(alive[draw.randrange(len(alive))])
        engine.step()
        allocator = engine.scheduler.allocator
        assert allocator.num_free + allocator.num_used == allocator.num_blocks
        ended += [request for request in alive if request.finished]
        alive = [request for request in alive if not request.finished]
    while engine.has_work:
        engine.step()
    for request in ended + alive:
        assert UNKNOWN not in request.token_ids
        tokens = list(request.prompt_ids)
        for token in request.output_ids:
            assert token == following(tokens)
            tokens.append(token)
        assert request.finish_reason == "abort" or request.num_outputs == request.params.max_tokens
    assert engine.scheduler.allocator.num_used == 0


def test_samples_of_one_prompt():
    plain, overlapped = engines(num_blocks=12, prefix_sharing=True)
    params = SamplingParams(temperature=0.0, max_tokens=5, n=3, ignore_eos=True)
    expected, found = (engine.generate([[1, 2, 3, 4, 5]], params)[0] for engine in (plain, overlapped))
    assert [s.output_ids for s in found.samples] == [s.output_ids for s in expected.samples]


def test_a_failing_launch_ends_its_requests_alone():
    engine = engines(max_sequences=1)[1]
    first, second = (engine.add([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)) for _ in range(2))
    engine.step()
    launch, engine.runner.launch = engine.runner.launch, None
    engine.step()
    engine.runner.launch = launch
    while engine.has_work:
        engine.step()
    assert first.finish_reason == "error" and first.error is not None
    assert second.finish_reason == "length" and second.num_outputs == 3


def test_an_interrupt_ends_everything():
    engine = engines()[1]
    request = engine.add([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True))
    engine.step()

    def interrupted(*_):
        raise KeyboardInterrupt

    engine.runner.launch = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert request.finish_reason == "abort" and UNKNOWN not in request.token_ids and not engine.has_work


def test_beams_are_those_of_the_plain_engine():
    """They are queued past `add`, with log-probabilities that only the host has, beside a request whose steps overlap."""
    from tradespace.engine.beam import BeamParams, beam_search

    plain, overlapped = engines(num_blocks=24, prefix_sharing=True)
    params = BeamParams(num_beams=3, max_tokens=6, ignore_eos=True)
    expected = beam_search(plain, [1, 2, 3, 4, 5], params)
    other = overlapped.add([4, 4, 2], SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True))
    overlapped.step()
    overlapped.step()
    assert [beam.output_ids for beam in beam_search(overlapped, [1, 2, 3, 4, 5], params)] == [beam.output_ids for beam in expected]
    while overlapped.has_work:
        overlapped.step()
    assert UNKNOWN not in other.token_ids and other.num_outputs == 9
