"""Four nouns make an engine: the scheduler says what to compute, the runner computes it, the sampler chooses, the tokenizer spells it out.

One thread. `step` does one step for everyone; `generate` and `stream` call it until their own requests are through, and others' requests advance with them. A
failing step ends the requests that were in it with EngineError; an interrupt (Ctrl-C) in a step ends all requests; either way every block is free again and
the engine goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor

from tradespace.engine.beam import BeamOutput, BeamParams, beam_search
from tradespace.engine.request import Completion, Constraint, FinishReason, Request, SamplingParams, accept_tokens
from tradespace.engine.sampler import Sampled, Sampler, SampleRow
from tradespace.engine.scheduler import Scheduler
from tradespace.engine.speculative import Drafter, accept_drafts
from tradespace.engine.step import Counters, ScheduledSequence, Step
from tradespace.engine.text import OutputText, TextCodec
from tradespace.errors import EngineError, InputError

Prompt = str | Sequence[int]


class StepRunner(Protocol):
    """What the engine needs of a runner."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def adapters(self) -> tuple[str, ...]: ...

    def execute(self, step: Step) -> Tensor: ...


class Engine:
    """Requests → tokens → text.

    tokenizer   None: prompts are token ids, there is no text, and no stop strings
    eos_ids     tokens that end an output, beside those that the tokenizer names
    drafter     drafts up to the scheduler's `max_drafts` tokens per step; changes the speed and never the output
    on_step     called after each step with it and its duration in seconds: for experiments
    """

    def __init__(
        self,
        runner: StepRunner,
        scheduler: Scheduler,
        sampler: Sampler,
        tokenizer: TextCodec | None = None,
        *,
        eos_ids: Iterable[int] = (),
        drafter: Drafter | None = None,
        on_step: Callable[[Step, float], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.runner = runner
        self.scheduler = scheduler
        self.sampler = sampler
        self.tokenizer = tokenizer
        self.eos_ids = frozenset(eos_ids) | (frozenset() if tokenizer is None else frozenset(tokenizer.eos_ids))
        self.drafter = drafter
        self.on_step = on_step
        self.clock = clock
        self._texts: dict[str, OutputText] = {}
        self._count = 0

    @property
    def counters(self) -> Counters:
        return self.scheduler.counters

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0, id: str | None = None, constraint: Constraint | None = None
    ) -> Request:
        """Queue a prompt (text, or token ids). Raises InputError where it is empty, not of this vocabulary, or can never fit context or cache.

        With params.n > 1 the other outputs are the request's `siblings`, queued right behind it. `constraint`: what the output must obey, in its first state.
        """
        params = params or SamplingParams()
        if params.adapter is not None and params.adapter not in self.runner.adapters:
            known = ", ".join(self.runner.adapters) or "none: open the model with adapters={'NAME': folder}"
            raise InputError(f"no adapter '{params.adapter}'. This engine has {known}")
        prompt_ids = self.encode(prompt)
        self._check_ids("logit_bias", params.logit_bias)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        if params.stop and self.tokenizer is None:
            raise InputError("stop strings need a tokenizer; without one give stop_token_ids")
        self._count += 1
        request = Request(id=id or f"r{self._count}", prompt_ids=prompt_ids, params=params, priority=priority, eos_ids=self.eos_ids, constraint=constraint)
        self.scheduler.add(request)
        self._open(request)
        try:
            for _ in range(1, params.n):
                request.siblings.append(self.fork(request))
        except BaseException:
            self.abort(request)
            raise
        return request

    def fork(self, request: Request) -> Request:
        """A second request that goes on from the tokens that `request` has now, with noise of its own; both share what they have in the cache.

        Beams are made of this and `abort`. Raises InputError where the request has ended.
        """
        forked = self.scheduler.fork(request)
        self._open(forked)
        return forked

    def _open(self, request: Request) -> None:
        """The clock and the text of a request that has just been queued; a fork's text is spelt anew."""
        request.timings.arrived_s = self.clock()
        if self.tokenizer is not None:
            decoder, params = self.tokenizer.stream_decoder(), request.params
            text = OutputText(decoder, stops=params.stop, stop_ids=request.stop_ids(), min_tokens=params.min_tokens)
            self._texts[request.id] = text
            for token in request.output_ids:
                self._emit(request, text.push(token))

    def abort(self, request: Request) -> None:
        """End a request at any time, with its siblings; what they have generated stays. One that has ended already stays as it is."""
        for member in (request, *request.siblings):
            if not member.finished:
                self.scheduler.abort(member)
                self._close(member)

    def forget_prefixes(self) -> None:
        """Nothing that is in the cache now will be found by those who come: for measurements that must not profit from what ran before."""
        self.scheduler.allocator.forget_all()

    def step(self) -> list[Request]:
        """One step for everyone. Returns the requests that got tokens or ended; failed ones carry `error`. Nothing to do: an empty list."""
        started_s = self.clock()
        try:
            step = self.scheduler.schedule(self.drafter.propose if self.drafter else None)
            if not step.sequences:
                return []
            for item in step.sequences:
                if item.request.timings.scheduled_s is None:
                    item.request.timings.scheduled_s = started_s
            try:
                sampled = self._compute(step)
            except Exception as error:
                return self._fail(step, error)
            changed = self._take(step, sampled)
        except Exception as error:
            self._end_all("error", error)
            raise EngineError(f"a step could not be completed, all requests have ended: {type(error).__name__}: {error}") from error
        except BaseException:
            self._end_all("abort")
            raise
        if self.on_step is not None:
            self.on_step(step, self.clock() - started_s)
        return changed

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None) -> list[Completion]:
        """Completions of all prompts, in their order; for n > 1 each holds its `siblings`. `params`: one for all, or one for each.

        Raises EngineError if one fails; the others are then aborted.
        """
        if isinstance(prompts, str):
            raise InputError("generate takes a list of prompts; for one, write [prompt]")
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise InputError(f"{len(prompts)} prompts with {len(each)} sampling parameters. Give one for all, or one for each")
        requests: list[Request] = []
        try:
            for prompt, wanted in zip(prompts, each, strict=True):
                requests.append(self.add(prompt, wanted))
            for request in requests:
                for member in (request, *request.siblings):
                    self._run_until_changed(member, lambda request: request.finished)
            return [Completion.of(request) for request in requests]
        except (KeyboardInterrupt, SystemExit):
            self._end_all("abort")  # it may have come between two lines of `add`
            raise
        finally:
            for request in requests:
                self.abort(request)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> TextStream:
        """Pieces of text as they become certain. The request is queued at once; dropping or closing the stream aborts it."""
        if self.tokenizer is None:
            raise InputError("a stream of text needs a tokenizer; use add and step for token ids")
        if params is not None and params.n > 1:
            raise InputError(f"a stream is one text, and n is {params.n}. Use generate, or open {params.n} streams")
        return TextStream(self, self.add(prompt, params))

    def _run_until_changed(self, request: Request, enough: Callable[[Request], bool]) -> None:
        while not enough(request):
            self.step()
            if request.error is not None:
                raise request.error

    def beam_search(self, prompt: Prompt, params: BeamParams | None = None) -> list[BeamOutput]:
        """The best outputs of a beam search, best first (`engine/beam.py`). Raises InputError as `add` does."""
        return beam_search(self, prompt, params or BeamParams())

    def _check_ids(self, what: str, ids: Iterable[int]) -> None:
        strange = next((token for token in ids if not 0 <= token < self.runner.vocab_size), None)
        if strange is not None:
            raise InputError(f"{what} holds token {strange}; the model's vocabulary has 0 … {self.runner.vocab_size - 1}. Was it encoded for another model?")

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt (text, or token ids already). Raises InputError where it is empty or not of this vocabulary."""
        if not isinstance(prompt, str):
            self._check_ids("the prompt", prompt)
            return tuple(prompt)
        if not prompt:
            raise InputError("the prompt is empty; write at least one character")
        if self.tokenizer is None:
            raise InputError("a prompt of text needs a tokenizer; without one give token ids")
        ids = tuple(self.tokenizer.encode(prompt))
        self._check_ids("the prompt", ids)
        return ids

    def _compute(self, step: Step) -> list[Sampled]:
        logits_RV = self.runner.execute(step)
        rows = [SampleRow(item.request, item.draft_tokens[:count]) for item in step.sequences if item.samples for count in range(len(item.draft_tokens) + 1)]
        return self.sampler.sample(logits_RV, rows)

    def _take(self, step: Step, sampled: list[Sampled]) -> list[Request]:
        """Accept what was sampled, spell it, end what has ended."""
        accepted: dict[str, list[int]] = {}
        finished: dict[str, FinishReason] = {}
        changed: list[Request] = []
        now_s = self.clock()
        row = 0
        for item in step.sequences:
            if not item.samples:
                continue
            mine, row = sampled[row : row + item.num_logits], row + item.num_logits
            changed.append(item.request)
            tokens, reason = self._accept(item, mine)
            if reason == "error":
                continue
            accepted[item.request.id] = tokens
            if reason is not None:
                finished[item.request.id] = reason
            if item.request.timings.first_token_s is None:
                item.request.timings.first_token_s = now_s
        self.scheduler.commit(step, accepted, finished)
        for request in changed:
            if request.finished:
                self._close(request)
        return changed

    def _accept(self, item: ScheduledSequence, sampled: list[Sampled]) -> tuple[list[int], FinishReason | None]:
        request = item.request
        known = [choice.token_id for choice in sampled]
        standing: list[int] = []
        for token in accept_drafts(known, item.draft_tokens):
            if token is None:
                request.error = EngineError(f"request {request.id}: the model's logits at position {request.num_tokens + len(standing)} hold no finite number")
                self.scheduler.finish(request, "error")
                return [], "error"
            standing.append(token)
        tokens, reason = accept_tokens(request, standing)
        if request.constraint is not None and reason != "stop" and not all(map(request.constraint.accept, tokens)):
            request.error = EngineError(f"request {request.id}: its constraint does not take the token {tokens[-1]} that it allowed")
            self.scheduler.finish(request, "error")
            return [], "error"
        text = self._texts.get(request.id)
        for index, token in enumerate(tokens):
            if text is None:
                break
            try:
                self._emit(request, text.push(token))
            except InputError as error:  # an id that the tokenizer has no text for
                request.error = EngineError(f"request {request.id}: token {token} was sampled but cannot be spelt: {error}")
                self.scheduler.finish(request, "error")
                return [], "error"
            if text.stopped:
                tokens, reason = tokens[: index + 1], "stop"
                break
        request.logprobs += [choice.logprobs for choice in sampled[: len(tokens)] if choice.logprobs is not None]
        return tokens, reason

    def _emit(self, request: Request, piece: str) -> None:
        if piece:
            request.pieces.append(piece)

    def _close(self, request: Request) -> None:
        """What an ended request still gets: the text that was held back, and the time."""
        text = self._texts.pop(request.id, None)
        if text is not None:
            self._emit(request, text.finish())
        request.timings.finished_s = self.clock()

    def _fail(self, step: Step, error: Exception) -> list[Request]:
        """End the requests of a step that raised. The others stay queued."""
        ended = [item.request for item in step.sequences]
        for request in ended:
            request.error = EngineError(f"request {request.id} failed in a step of {step.num_tokens} tokens: {type(error).__name__}: {error}")
            request.error.__cause__ = error
            self.scheduler.finish(request, "error")
            self._close(request)
        return ended

    def _end_all(self, reason: FinishReason, error: Exception | None = None) -> None:
        for request in self.scheduler.reset(reason):
            if error is not None:
                request.error = EngineError(f"request {request.id} was ended by a failure of the engine: {type(error).__name__}: {error}")
                request.error.__cause__ = error
            request.timings.finished_s = self.clock()
        self._texts.clear()


class TextStream:
    """An iterator over the text of one request, which `request` gives access to. Closing it before its end aborts the request."""

    def __init__(self, engine: Engine, request: Request):
        self._engine = engine
        self.request = request
        self._seen = 0

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        seen = self._seen
        self._engine._run_until_changed(self.request, lambda request: request.finished or len(request.pieces) > seen)
        if len(self.request.pieces) == seen:
            raise StopIteration
        self._seen += 1
        return self.request.pieces[seen]

    @property
    def completion(self) -> Completion:
        """The result, once the stream is through or closed."""
        if not self.request.finished:
            raise InputError("the stream has not ended: read it to its end, or close it")
        return Completion.of(self.request)

    def close(self) -> None:
        self._engine.abort(self.request)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
