"""Beam search: the `num_beams` likeliest outputs so far go on together, token by token, and the best that ended are returned.

A beam is a request. Where one goes on in two ways it is forked, so that both share the blocks of what they have in common (a block is copied when one of them
writes into it); where none of its continuations is among the best it is aborted. So B beams hold little more than one sequence until they part. Should the
engine lose one of them for a while (no room for all of them at once, a preemption), the search goes on with requests of one token each, which find their
prefixes in the cache again: slower, and the same result.

Scores are sums of log-probabilities over length**length_penalty (Wu et al., arXiv:1609.08144, without their other terms); which beams go on and when the search
ends is as in transformers' `generate(num_beams=…)`, so that the outputs are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Literal

from tradespace.engine.request import MAX_LOGPROBS, FinishReason, Request, SamplingParams
from tradespace.errors import InputError

if TYPE_CHECKING:
    from tradespace.engine.engine import Engine, Prompt

Top = Sequence[tuple[int, float]]  # (token, log-probability), best first


@dataclass(frozen=True, kw_only=True)
class BeamParams:
    """How beams are searched.

    num_beams       beams that go on at once
    max_tokens      most tokens of an output
    length_penalty  exponent of the length that a sum of log-probabilities is divided by: above 0 favours longer outputs
    early_stopping  True: the first `num_beams` outputs that ended are the result. False: stop when the best beam, at its length now, scores below the worst of
                    them. "never": when it cannot reach it at any length
    num_return      outputs to return, the best; None: all `num_beams`
    stop_token_ids  tokens that end an output, beside the model's own
    ignore_eos      the model's own end-of-sequence tokens do not end an output
    """

    num_beams: int = 4
    max_tokens: int = 256
    length_penalty: float = 1.0
    early_stopping: Literal[True, False, "never"] = False
    num_return: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        if not 1 <= self.num_beams < MAX_LOGPROBS:
            raise InputError(f"num_beams is {self.num_beams}; it must lie between 1 and {MAX_LOGPROBS - 1}")
        if self.max_tokens < 1:
            raise InputError(f"max_tokens is {self.max_tokens}; at least 1 is needed")
        if self.early_stopping not in (True, False, "never"):
            raise InputError(f"early_stopping is {self.early_stopping!r}; choose True, False or 'never'")
        if self.num_return is not None and not 1 <= self.num_return <= self.num_beams:
            raise InputError(f"num_return is {self.num_return}; of {self.num_beams} beams at least 1 and at most {self.num_beams} are returned")


@dataclass(frozen=True, kw_only=True)
class BeamOutput:
    """One output. `output_ids` ends with the stop token, if one ended it; `text` does not. logprob: the sum over its tokens; score: what it is ranked by."""

    output_ids: tuple[int, ...]
    text: str
    logprob: float
    score: float
    finish_reason: FinishReason


@dataclass
class _Beam:
    tokens: tuple[int, ...]
    logprob: float


@dataclass
class BeamSearch:
    """The search apart from the model: `take` the best tokens after each beam, and it says which beams go on, as (its place before, its new token)."""

    params: BeamParams
    stop_ids: frozenset[int]
    beams: list[_Beam] = field(default_factory=lambda: [_Beam((), 0.0)])
    ended: list[tuple[float, _Beam, FinishReason]] = field(default_factory=list)  # best first
    done: bool = False

    @property
    def width(self) -> int:
        """Tokens that `take` needs of each beam: those that may go on, and all that may end it."""
        return self.params.num_beams + len(self.stop_ids)

    def take(self, tops: Sequence[Top]) -> list[tuple[int, int]]:
        """One step on; `tops` of each beam in order. Empty: the search is through (`done`)."""
        B, length = self.params.num_beams, len(self.beams[0].tokens) + 1
        found = [(beam.logprob + logprob, place, token) for place, (beam, top) in enumerate(zip(self.beams, tops, strict=True)) for token, logprob in top]
        found.sort(key=lambda candidate: -candidate[0])
        last = length == self.params.max_tokens
        full = self.params.early_stopping is True and len(self.ended) == B
        for total, place, token in found[:B]:  # only what is among the best may end
            if (last or token in self.stop_ids) and not full:
                reason: FinishReason = "stop" if token in self.stop_ids else "length"
                self._end(_Beam((*self.beams[place].tokens, token), total), length, reason)
        going = [(place, token, total) for total, place, token in found if token not in self.stop_ids][:B]
        self.beams = [_Beam((*self.beams[place].tokens, token), total) for place, token, total in going]
        self.done = last or not going or self._settled(length)
        return [] if self.done else [(place, token) for place, token, _ in going]

    def _end(self, beam: _Beam, length: int, reason: FinishReason) -> None:
        self.ended.append((beam.logprob / length**self.params.length_penalty, beam, reason))
        self.ended.sort(key=lambda entry: -entry[0])
        del self.ended[self.params.num_beams :]

    def _settled(self, length: int) -> bool:
        """Whether no beam that still goes on can, or may, better what has ended."""
        if len(self.ended) < self.params.num_beams:
            return False
        if self.params.early_stopping is True:
            return True
        longest = self.params.early_stopping == "never" and self.params.length_penalty > 0
        reach = self.params.max_tokens if longest else length
        return self.beams[0].logprob / reach**self.params.length_penalty <= self.ended[-1][0]


def beam_search(engine: Engine, prompt: Prompt, params: BeamParams) -> list[BeamOutput]:
    """The best outputs of one prompt, best first; other requests of the engine advance with it.

    Raises InputError for a prompt that cannot be served, as `Engine.add` does, and where more tokens end an output than log-probabilities are given for.
    """
    stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else engine.eos_ids)
    search = BeamSearch(params, stop_ids)
    if search.width > MAX_LOGPROBS:
        raise InputError(
            f"{params.num_beams} beams with {len(stop_ids)} stop tokens need {search.width} log-probabilities; there are {MAX_LOGPROBS}. Fewer beams"
        )
    carriers = _Carriers(engine, engine.encode(prompt), params.max_tokens, min(search.width, engine.runner.vocab_size))
    try:
        going = search.take(carriers.first())
        while going:
            going = search.take(carriers.advance(going, [beam.tokens for beam in search.beams]))
    finally:
        carriers.close()
    best = search.ended[: params.num_return or params.num_beams]
    return [_output(engine, beam, score, reason, stop_ids) for score, beam, reason in best]


def _output(engine: Engine, beam: _Beam, score: float, reason: FinishReason, stop_ids: frozenset[int]) -> BeamOutput:
    spoken = beam.tokens[:-1] if reason == "stop" else beam.tokens
    text = "" if engine.tokenizer is None else _spelt(engine, spoken)
    return BeamOutput(output_ids=beam.tokens, text=text, logprob=beam.logprob, score=score, finish_reason=reason)


def _spelt(engine: Engine, tokens: Sequence[int]) -> str:
    assert engine.tokenizer is not None, "asked for where there is one"
    decoder = engine.tokenizer.stream_decoder()
    return "".join([*map(decoder.push, tokens), decoder.flush()])


class _Carriers:
    """The requests that beams are, one for each, in their order."""

    _numbers = count()

    def __init__(self, engine: Engine, prompt_ids: tuple[int, ...], max_tokens: int, width: int):
        self.engine, self.prompt_ids, self.width = engine, prompt_ids, width
        self.name = f"beam{next(self._numbers)}"
        self.apart = False  # once lost, a search goes on with requests of one token each
        self.fresh = count()
        self.requests = [self._request(prompt_ids, max_tokens)]

    def _request(self, prompt_ids: tuple[int, ...], max_tokens: int) -> Request:
        params = SamplingParams(max_tokens=max_tokens, temperature=0, logprobs=self.width, ignore_eos=True)
        request = Request(id=f"{self.name}-{next(self.fresh)}", prompt_ids=prompt_ids, params=params)
        self.engine.scheduler.add(request)
        return request

    def first(self) -> list[Top]:
        """After the prompt alone."""
        return self._tops(1)

    def advance(self, going: list[tuple[int, int]], outputs: list[tuple[int, ...]]) -> list[Top]:
        """The beams that go on, each with its new token, one step further; `outputs` are all their tokens."""
        length = len(outputs[0])
        if not self.apart and self._regroup(going):
            tops = self._tops(length + 1)
            if not self.apart:
                return tops
        self.apart = True
        self.close()
        self.requests = [self._request((*self.prompt_ids, *tokens), 1) for tokens in outputs]
        return self._tops(1)

    def _regroup(self, going: list[tuple[int, int]]) -> bool:
        """Fork and abort so that each beam has its request. False: one of them has been preempted, and cannot be forked without computing it anew."""
        heirs = {place for place, _ in going}
        for place, request in enumerate(self.requests):
            if place not in heirs:
                self.engine.scheduler.abort(request)
        if any(self.requests[place].state != "running" for place in heirs):
            return False
        taken: set[int] = set()
        requests: list[Request] = []
        for place, _ in going:  # all forks first: they begin with the tokens that are computed, which the last one is not among
            parent = self.requests[place]
            requests.append(self.engine.scheduler.fork(parent) if place in taken else parent)
            taken.add(place)
        self.requests = requests
        for request, (_, token) in zip(requests, going, strict=True):
            self.engine.scheduler.replace_last(request, token)
        return True

    def _tops(self, num_outputs: int) -> list[Top]:
        """The best tokens after each beam, once each has so many outputs. Where they part ways (`apart`) an empty list."""
        while True:
            ready = [request.num_outputs >= num_outputs for request in self.requests]
            if all(ready):
                break
            if any(ready) and not self.apart:
                self.apart = True
                return []
            self.engine.step()
            for request in self.requests:
                if request.error is not None:
                    raise request.error
        return [request.logprobs[-1].top for request in self.requests]

    def close(self) -> None:
        for request in self.requests:
            if not request.finished:
                self.engine.scheduler.abort(request)
