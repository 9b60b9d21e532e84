"""The engine of a device that computes while the host schedules: step n + 1 is on its way before the tokens of step n are known here.

The scheduler goes on as if each sequence had got its token: a stand-in (`device_runner.UNKNOWN`) takes its place, and the device fills in the number itself.
Once the numbers are here they are put in place, spelt and held against stops; a sequence that turns out to have ended has then computed one token too many,
which is dropped, and its blocks are free: whoever gets them writes later, as the device goes step by step. Same tokens as `Engine`.

Requests whose next token depends on what only the host has (penalties, biases, constraints, log-probabilities) have their steps computed one after the other,
and everyone else's with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

from tradespace.engine.engine import Engine
from tradespace.engine.request import Request
from tradespace.engine.sampler import Sampled, Sampler
from tradespace.engine.scheduler import Scheduler
from tradespace.engine.step import Step
from tradespace.engine.text import TextCodec
from tradespace.errors import EngineError

if TYPE_CHECKING:
    from tradespace.engine.device_runner import DeviceRunner, InFlight

UNKNOWN = -1  # `device_runner.UNKNOWN`, without Triton


class OverlappedEngine(Engine):
    """As `Engine`, over a runner that launches steps and hands over their tokens later. Nothing is drafted."""

    runner: DeviceRunner

    def __init__(
        self,
        runner: DeviceRunner,
        scheduler: Scheduler,
        sampler: Sampler,
        tokenizer: TextCodec | None = None,
        *,
        eos_ids: Iterable[int] = (),
        on_step: Callable[[Step, float], None] | None = None,
    ):
        super().__init__(runner, scheduler, sampler, tokenizer, eos_ids=eos_ids, on_step=on_step)
        self._flying: InFlight | None = None
        self._landed_s = 0.0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._flying is not None

    def fork(self, request: Request) -> Request:
        """As `Engine.fork`: from all that is known once the step under way is through."""
        self._settle()
        return super().fork(request)

    def abort(self, request: Request) -> None:
        """As `Engine.abort`, once the step under way is through."""
        if not all(member.finished for member in (request, *request.siblings)):
            self._settle()
        super().abort(request)

    def step(self) -> list[Request]:
        """As `Engine.step`; the requests that it returns got tokens of the step before."""
        # asked of the scheduler and not kept: beams and forks are queued there, past `add`; only the first of those who wait can be in the next step
        running = self.scheduler.running
        next_in = islice(self.scheduler.waiting, max(0, self.scheduler.max_sequences - len(running)))
        if any(map(self.runner.needs_logits, chain(running, next_in))):
            changed = self._guarded(self._land)
            return self._joined(changed, super().step())
        return self._guarded(self._advance)

    @staticmethod
    def _joined(before: Sequence[Request], after: Sequence[Request]) -> list[Request]:
        return list({request.id: request for request in (*before, *after)}.values())

    def _guarded(self, work: Callable[[], list[Request]]) -> list[Request]:
        """A failure of the engine, or an interrupt, ends all requests."""
        try:
            return work()
        except Exception as error:
            self._end_all("error", error)
            raise EngineError(f"a step could not be completed, all requests have ended: {type(error).__name__}: {error}") from error
        except BaseException:
            self._end_all("abort")
            raise

    def _advance(self) -> list[Request]:
        now_s = self.clock()
        if self._flying is None:
            self._landed_s = now_s
        step = self.scheduler.schedule()
        flight = None
        failed: list[Request] = []
        if step.sequences:
            for item in step.sequences:
                if item.request.timings.scheduled_s is None:
                    item.request.timings.scheduled_s = now_s
            try:
                flight = self.runner.launch(step, self._flying)
            except Exception as error:
                changed = self._land()
                failed = self._fail(step, error)
                return self._joined(changed, failed)
        changed = self._land()
        if flight is not None:
            stand_ins = {item.request.id: [UNKNOWN] for item in step.sequences if item.samples}
            self.scheduler.commit(step, stand_ins, {})
            self._flying = flight
        return changed

    def _settle(self) -> None:
        """Waits for the step under way."""
        if self._flying is not None:
            self._guarded(self._land)

    def _land(self) -> list[Request]:
        """Takes the tokens of the step under way, if there is one: what `Engine` does right after computing it."""
        flight, self._flying = self._flying, None
        if flight is None:
            return []
        tokens = flight.tokens()
        now_s = self.clock()
        changed: list[Request] = []
        for item in flight.step.sequences:
            request, row = item.request, flight.rows.get(item.request.id)
            if row is None:  # its prompt was not through; `item.samples` would count the stand-in
                continue
            if request.finished:
                if request.token_ids[-1] == UNKNOWN:
                    request.token_ids.pop()
                continue
            request.token_ids.pop()  # the stand-in
            changed.append(request)
            accepted, reason = self._accept(item, [Sampled(tokens[row])])
            if reason == "error":
                continue
            request.token_ids.extend(accepted)
            if request.timings.first_token_s is None:
                request.timings.first_token_s = now_s
            if reason is not None:
                self.scheduler.finish(request, reason)
                self._close(request)
        if self.on_step is not None:
            self.on_step(flight.step, now_s - self._landed_s)
        self._landed_s = now_s
        return changed

    def _end_all(self, reason, error: Exception | None = None) -> None:
        self._flying = None
        for request in self.scheduler.running + self.scheduler.waiting:
            if request.token_ids[-1] == UNKNOWN:
                request.token_ids.pop()
        super()._end_all(reason, error)
