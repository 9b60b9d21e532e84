"""The engine's own process: takes what has arrived, does a step, says what it brought; sleeps while there is nothing to do.

One message after each step, whatever the number of requests. Outputs nobody streams cost nothing until they end. Grammars are compiled in a thread of their own
(`constraints.py`): no step waits for one. Ends when the front's end of the socket closes.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import tradespace as ts
from tradespace.engine.request import Request
from tradespace.errors import BudgetError, InputError, TradespaceError
from tradespace.llm import LLM
from tradespace.measure.memory import process_bytes
from tradespace.server.constraints import Compiler
from tradespace.server.log import protect_log
from tradespace.server.messages import Abort, Failed, Limits, Load, Piece, Progress, Ready, Refused, Snapshot, Submit, Watch


class Loop:
    """The engine between two ends of a socket. `constraints` compiles grammars; its finished work is taken before each step."""

    def __init__(self, llm: LLM, connection: Connection, model: str):
        self.llm, self.engine, self.connection, self.model = llm, llm.engine, connection, model
        self.compiler = Compiler(llm.tokenizer, vocab_size=self.engine.runner.vocab_size)
        self._open: dict[str, tuple[int, int, bool]] = {}  # a request's own id → the front's, its sample, whether it streams
        self._members: dict[int, Request] = {}
        self._sent: dict[str, tuple[int, int, int]] = {}  # pieces, tokens and logprobs that the front has had
        self._first: list[int] = []

    def run(self) -> None:
        """Until the front has gone."""
        scheduler = self.engine.scheduler
        limits = Limits(
            max_context=scheduler.max_context, max_sequences=scheduler.max_sequences, num_blocks=scheduler.allocator.num_blocks,
            block_size=scheduler.block_size, vocab_size=self.engine.runner.vocab_size, retain=scheduler.retain,
        )  # fmt: skip
        own = {name: getattr(self.llm.sampling(), name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
        self.connection.send(Ready(limits, self.llm.plan.describe(), self.model, own, self.engine.eos_ids))
        try:
            while True:
                busy = self.engine.has_work
                while self.connection.poll(0 if busy else (0.005 if self.compiler.busy else None)):
                    self._take(self.connection.recv())
                    busy = True
                for submit, constraint in self.compiler.finished():
                    self._add(submit, constraint)
                if self.engine.has_work:
                    self._step()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return

    def _take(self, message: object) -> None:
        match message:
            case Submit(grammar=None):
                self._add(message, None)
            case Submit():
                self.compiler.begin(message)
            case Abort(id):
                self.compiler.forget(id)
                request = self._members.get(id)
                if request is not None:
                    self.engine.abort(request)
                    self._forget(request)
            case Watch():
                self.connection.send(self._snapshot())
            case _:
                raise AssertionError(f"a message of type {type(message).__name__}")

    def _add(self, submit: Submit, constraint: Any) -> None:
        if isinstance(constraint, Exception):
            self.connection.send(Refused(submit.id, str(constraint)))
            return
        try:
            request = self.engine.add(submit.prompt_ids, submit.sampling(), priority=submit.priority, constraint=constraint)
        except InputError as error:
            self.connection.send(Refused(submit.id, str(error)))
            return
        self._members[submit.id] = request
        for member in (request, *request.siblings):
            self._open[member.id] = (submit.id, member.sample, submit.stream)
            self._sent[member.id] = (0, 0, 0)

    def _forget(self, request: Request) -> None:
        for member in (request, *request.siblings):
            known = self._open.pop(member.id, None)
            self._sent.pop(member.id, None)
            if known is not None:
                self._members.pop(known[0], None)

    def _step(self) -> None:
        try:
            changed = self.engine.step()
        except TradespaceError as error:  # every request has ended
            changed = [member for request in self._members.values() for member in (request, *request.siblings)]
            print(f"engine: {error}", file=sys.stderr)
        pieces: list[Piece] = []
        first: list[int] = []
        for request in changed:
            known = self._open.get(request.id)
            if known is None:
                continue
            id, sample, streams = known
            if request.num_outputs == 1 and sample == 0:
                first.append(id)
            if streams or request.finished:
                pieces.append(self._piece(request, id, sample))
            if request.finished:
                del self._open[request.id], self._sent[request.id]
                root = self._members.get(id)  # None: several outputs ended in this step, and one of them has been here
                if root is not None and all(member.finished for member in (root, *root.siblings)):
                    del self._members[id]
        self.connection.send(Progress(tuple(pieces), self._load(), tuple(first)))

    def _piece(self, request: Request, id: int, sample: int) -> Piece:
        pieces, tokens, logprobs = self._sent[request.id]
        outputs = request.token_ids[request.num_prompt + tokens :]
        piece = Piece(
            id,
            sample,
            "".join(request.pieces[pieces:]),
            tuple(outputs),
            tuple(request.logprobs[logprobs:]),
            request.finish_reason,
            None if request.error is None else str(request.error),
            request.num_cached,
            tuple(request.prompt_logprobs) if tokens == 0 and request.prompt_logprobs else (),
        )
        self._sent[request.id] = (len(request.pieces), tokens + len(outputs), len(request.logprobs))
        return piece

    def _load(self) -> Load:
        scheduler, counters = self.engine.scheduler, self.engine.counters
        return Load(
            len(scheduler.running), len(scheduler.waiting), scheduler.allocator.num_used, scheduler.allocator.num_blocks, counters.preemptions,
            counters.prefix_cache_queries, counters.prefix_cache_hits, counters.tokens,
        )  # fmt: skip

    def _snapshot(self) -> Snapshot:
        allocator, report = self.engine.scheduler.allocator, self.llm.report()
        lines = tuple((line.name, line.predicted.value, line.measured) for line in report.lines if line.unit == "bytes")
        peak = report.line("peak of the process").measured or 0
        owners = [0] * allocator.num_blocks
        for block in range(allocator.num_blocks):
            if allocator.references[block] == 0 and allocator.name_of(block) is not None:
                owners[block] = -1
        for request in self.engine.scheduler.running:
            for block in request.blocks:
                owners[block] = self._open.get(request.id, (0,))[0] or 1
        return Snapshot(lines, process_bytes(), round(peak), self.llm.plan.memory_bytes, tuple(owners), tuple(allocator.references), self._load())


def serve(connection: Connection, model: str, options: Mapping[str, Any]) -> None:
    """Build the engine and run it until the front goes."""
    try:
        with ts.open(model, say=lambda line: print(line, file=sys.stderr, flush=True), **options) as llm:
            Loop(llm, connection, model).run()
    except TradespaceError as error:
        need = (error.need_bytes, error.have_bytes) if isinstance(error, BudgetError) else (None, None)
        connection.send(Failed(str(error), type(error).__name__, *need))
        sys.exit(error.exit_code)


def main() -> None:
    """`python -m tradespace.server.worker FD`: the first message is (model, options)."""
    # a terminal's Ctrl-C and a supervisor's SIGTERM reach the whole group; the front decides when this process ends, by closing the socket
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    protect_log()
    connection = Connection(int(sys.argv[1]))
    model, options = connection.recv()
    serve(connection, model, options)


if __name__ == "__main__":
    main()
