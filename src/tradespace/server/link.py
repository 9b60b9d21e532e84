"""The front's end of the engine's process: starts it, hands it requests, brings each its news, and survives its end.

Everything here runs on the event loop but for one thread that sends, so that a full socket never holds up HTTP. When the engine's process ends by itself, every
request ends with an error, and the process is started again, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from tradespace.errors import EngineError, InputError, TradespaceError
from tradespace.measure.memory import return_freed_memory
from tradespace.server.admission import Admission
from tradespace.server.messages import Abort, Failed, Grammar, Limits, Load, Piece, Progress, Ready, Refused, Snapshot, Submit, Watch

SOCKET_BYTES = 4 << 20
IDLE_S = 1.0  # after so long without a request, freed memory goes back to the system
News = Piece | Exception


class Unavailable(TradespaceError):
    """The engine is not there: it starts, has failed, or the server is about to stop."""


class DeadlineExceeded(TradespaceError):
    """The request's own time is over."""


@dataclass(eq=False)
class Job:
    """One request on the front's side. `news`, which several may share, brings its pieces and, at most once and last, an exception."""

    id: int
    prompt_ids: tuple[int, ...]
    params: Mapping[str, Any]
    news: asyncio.Queue[News]
    key: str = ""
    priority: int = 0
    stream: bool = False
    grammar: Grammar | None = None
    arrived_s: float = field(default_factory=time.perf_counter)
    first_s: float | None = None
    last_s: float | None = None
    sent: bool = False
    outputs: int = 1
    num_left: int = 1
    ended: bool = False


class Link:
    """The engine as the HTTP side sees it.

    options       arguments of `ts.open`
    on_end        called with each job that has ended, and why: "stop", "length", "abort", "error"
    on_progress   called with each step's news
    """

    def __init__(
        self,
        model: str,
        options: Mapping[str, Any],
        *,
        max_queue: int,
        on_end: Callable[[Job, str], None] = lambda job, reason: None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ):
        self.model, self.options, self.max_queue = model, options, max_queue
        self.on_end, self.on_progress = on_end, on_progress
        self.ready: Ready | None = None
        self.failure: str | None = None
        self.load = Load()
        self.restarts = 0
        self.admission: Admission[Job] = Admission(places=1, max_queue=max_queue)
        self._jobs: dict[int, Job] = {}
        self._count = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        self._watchers: list[asyncio.Future[Snapshot]] = []
        self._started: asyncio.Future[Ready] | None = None
        self._closing = False
        self._restart: asyncio.Task[None] | None = None
        self._idle: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------------------------------------------------ the process

    async def start(self) -> Ready:
        """Start the engine's process and wait until it is built. Raises what building it raised."""
        loop = asyncio.get_running_loop()
        self._started = loop.create_future()
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        command = [sys.executable, "-m", "tradespace.server.worker", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
        theirs.close()
        connection = Connection(ours.detach())
        self._connection, self._outbox = connection, SimpleQueue()
        threading.Thread(target=_send_all, args=(connection, self._outbox), name="to-engine", daemon=True).start()
        self._outbox.put((self.model, dict(self.options)))
        loop.add_reader(connection.fileno(), self._receive, connection)
        return await self._started

    async def close(self) -> None:
        """Ends the process; whoever still waits gets an error."""
        self._closing = True
        self.end_all(Unavailable("the server has stopped"))
        self._disconnect()
        if self._process is not None:
            process, self._process = self._process, None
            try:
                await asyncio.to_thread(process.wait, 5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def _disconnect(self) -> None:
        if self._connection is not None:
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._outbox.put(None)
            with contextlib.suppress(OSError):  # wakes the sender, too
                socket.socket(fileno=os.dup(self._connection.fileno())).shutdown(socket.SHUT_RDWR)
            self._connection.close()
            self._connection = None

    def _receive(self, connection: Connection) -> None:
        try:
            for _ in range(64):
                if connection is not self._connection or not connection.poll():
                    return
                self._take(connection.recv())
        except (EOFError, OSError):
            self._lost()

    def _lost(self) -> None:
        """The process has ended by itself: everyone gets an error, and it is started again, once."""
        self._disconnect()
        process, self.ready, self._process = self._process, None, None
        code = None
        if process is not None:
            try:
                code = process.wait(1)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
        why = f"the engine's process has ended (exit code {code})"
        if self._started is not None and not self._started.done():
            self._started.set_exception(EngineError(f"{why} before it was built"))
        self.end_all(EngineError(f"{why}; this request is lost. Send it again"))
        if self._closing:
            return
        if self.restarts == 0 and self.failure is None:
            self.restarts += 1
            print(f"tradespace serve: {why}; starting it again", file=sys.stderr, flush=True)
            self._restart = asyncio.get_running_loop().create_task(self._again())
        elif self.failure is None:
            self.failure = f"{why} for the second time"
            print(f"tradespace serve: {self.failure}; this server answers 503 from now on", file=sys.stderr, flush=True)

    async def _again(self) -> None:
        try:
            await self.start()
        except TradespaceError as error:
            self.failure = str(error)

    # ------------------------------------------------------------------------------------------------------------ requests

    @property
    def limits(self) -> Limits:
        """What the engine can take. Raises Unavailable while there is none."""
        if self.ready is None:
            raise Unavailable(self.failure or "the engine is starting")
        return self.ready.limits

    def submit(
        self,
        prompt_ids: tuple[int, ...],
        params: Mapping[str, Any],
        *,
        key: str,
        news: asyncio.Queue[News],
        priority: int = 0,
        stream: bool = False,
        grammar: Grammar | None = None,
    ) -> Job:
        """Queue a request. Raises Unavailable or QueueFull."""
        if self.ready is None or self._closing:
            raise Unavailable(self.failure or "the engine is starting")
        self._count += 1
        job = Job(self._count, prompt_ids, params, news, key, priority, stream, grammar, outputs=params.get("n", 1), num_left=params.get("n", 1))
        self.admission.add(job, key=key, priority=priority, outputs=job.outputs)
        self._jobs[job.id] = job
        self._admit()
        return job

    def abort(self, job: Job, error: Exception | None = None) -> None:
        """End a request at any time; nothing happens to one that has ended."""
        if not job.ended:
            if job.sent:
                self._outbox.put(Abort(job.id))
            self._end(job, "abort", error or EngineError("the request was aborted"))

    def end_all(self, error: Exception) -> None:
        for job in tuple(self._jobs.values()):
            if job.sent and self._connection is not None:
                self._outbox.put(Abort(job.id))
            self._end(job, "error", error, admit=False)
        for watcher in self._watchers:
            if not watcher.done():
                watcher.set_exception(Unavailable(str(error)))
        self._watchers.clear()

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    async def snapshot(self) -> Snapshot:
        """Ledger, memory and block map now. Several askers share one answer."""
        if self.ready is None:
            raise Unavailable(self.failure or "the engine is starting")
        future: asyncio.Future[Snapshot] = asyncio.get_running_loop().create_future()
        self._watchers.append(future)
        if len(self._watchers) == 1:
            self._outbox.put(Watch())
        return await future

    def _admit(self) -> None:
        for job in self.admission.take():
            job.sent = True
            self._outbox.put(Submit(job.id, job.prompt_ids, job.params, job.priority, job.stream, job.grammar))

    def _end(self, job: Job, reason: str, error: Exception | None = None, *, admit: bool = True) -> None:
        if job.ended:
            return
        job.ended = True
        self._jobs.pop(job.id, None)
        self.admission.done(job)
        if error is not None:
            job.news.put_nowait(error)
        self.on_end(job, reason)
        if admit:
            self._admit()
        if not self._jobs:
            if self._idle is not None:
                self._idle.cancel()
            self._idle = asyncio.get_running_loop().call_later(IDLE_S, self._rest)

    def _rest(self) -> None:
        """What a crowd of requests held goes back to the system once they have gone: the heap would keep it."""
        if not self._jobs:
            gc.collect()
            return_freed_memory()

    def _take(self, message: object) -> None:
        match message:
            case Progress():
                self.load = message.load
                self._spread(message)
                self.on_progress(message)
            case Refused(id, text):
                if (job := self._jobs.get(id)) is not None:
                    self._end(job, "error", InputError(text))
            case Snapshot():
                for watcher in self._watchers:
                    if not watcher.done():
                        watcher.set_result(message)
                self._watchers.clear()
            case Ready():
                self.ready = message
                places = message.limits.max_sequences
                # a few more than can run, so that a place that falls free is taken in the very next step
                self.admission = Admission(places=places + max(1, places // 4), max_queue=self.max_queue)
                if self._started is not None and not self._started.done():
                    self._started.set_result(message)
            case Failed():
                self.failure = message.message
                if self._started is not None and not self._started.done():
                    self._started.set_exception(_failure(message))
            case _:
                raise AssertionError(f"a message of type {type(message).__name__}")

    def _spread(self, progress: Progress) -> None:
        now_s = time.perf_counter()
        for id in progress.first:
            if (job := self._jobs.get(id)) is not None:
                job.first_s = now_s
        for piece in progress.pieces:
            job = self._jobs.get(piece.id)
            if job is None:
                continue
            job.news.put_nowait(piece)
            job.last_s = now_s
            if piece.finish_reason is not None:
                job.num_left -= 1
                if job.num_left == 0:
                    self._end(job, piece.finish_reason)


def _failure(failed: Failed) -> TradespaceError:
    from tradespace import errors

    kind = getattr(errors, failed.kind, TradespaceError)
    if kind is errors.BudgetError:
        return errors.BudgetError(failed.message, need_bytes=failed.need_bytes, have_bytes=failed.have_bytes)
    return kind(failed.message)


def _send_all(connection: Connection, outbox: SimpleQueue[Any]) -> None:
    try:
        while (message := outbox.get()) is not None:
            connection.send(message)
    except (OSError, ValueError):
        return  # the reader finds the connection lost, and says so
