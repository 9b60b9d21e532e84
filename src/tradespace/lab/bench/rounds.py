"""One cell, measured: every engine in a process of its own, all alive at once and one at a time at work, in rounds whose order turns.

A machine's speed drifts, so engines are compared within a round: what is quoted is the median of the rounds' ratios, with their spread. Prompts are random and
new in every round, the same for all engines in it: what a cache of prefixes may remember helps nobody. What the machine can read and multiply is measured in
the same rounds. A peer that cannot take part is named with the reason, and is no error; that ours cannot, is.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tradespace.errors import TradespaceError
from tradespace.lab.bench.models import floats_folder
from tradespace.lab.bench.peers import OURS, PEERS, Peer
from tradespace.lab.bench.process import Worker
from tradespace.lab.bench.task import Task
from tradespace.lab.bench.work import Work, work_of

LIMITS = "tradespace.lab.bench.limits"
TRIALS, TRIALS_S = 2, 1.5  # of each variant at least so many, more while they take less time than this; the best one counts
FIRST_PROMPT = 16  # tokens of the first request, whose answer ends the start-up
Tell = Callable[[str, int, int], None]
Say = Callable[[str], None]


@dataclass
class Engine:
    """What one engine did. settings: the variant that was fastest of `tried` (name → tokens/s, empty where there is but one)."""

    name: str
    version: str
    settings: str
    tried: dict[str, float]
    dtype: str
    startup_s: float = 0.0
    peak_bytes: int = 0
    tokens_per_s: list[float] = field(default_factory=list)
    facts: dict[str, str | int] = field(default_factory=dict)


@dataclass
class Cell:
    """A task, its work, who took part (ours first) and who did not, and the machine's limits in the same rounds."""

    task: Task
    work: Work
    engines: list[Engine]
    absent: dict[str, str]
    read_bytes_per_s: list[float] = field(default_factory=list)
    flops_per_s: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ours(self) -> Engine:
        return self.engines[0]

    def engine(self, name: str) -> Engine | None:
        return next((engine for engine in self.engines if engine.name == name), None)

    def ratios(self, peer: Engine) -> list[float]:
        """Ours over the peer's, round by round."""
        return [mine / theirs for mine, theirs in zip(self.ours.tokens_per_s, peer.tokens_per_s, strict=True)]

    def limit_tokens_per_s(self) -> float:
        """What reading alone would allow at the bandwidth measured here."""
        return statistics.median(self.read_bytes_per_s) / self.work.bytes_per_token

    def share(self, engine: Engine) -> float | None:
        """Of the limit that counts: bytes read (decode, batch) or operations done (prefill), over what was measured in the same rounds.

        None where torch's products in the engine's type are slower than in fp32: those of a chip that has no instructions for them are no limit.
        """
        speed = statistics.median(engine.tokens_per_s)
        if self.task.kind == "prefill":
            rate = statistics.median(self.flops_per_s[engine.dtype])
            return None if rate < statistics.median(self.flops_per_s["fp32"]) else speed * self.work.flops_per_token / rate
        return speed / self.limit_tokens_per_s()


def measure_cell(task: Task, against: Sequence[str], *, rounds: int, tell: Tell, say: Say, seed: int = 0) -> Cell:
    """Measures `task` on our engine and on those of `against` that can. Raises what ours raises."""
    work = work_of(task)
    draw = random.Random(seed)
    steps = rounds + 2

    def prompts(length: int = task.prompt) -> list[list[int]]:
        low, high = work.vocabulary // 10, work.vocabulary * 9 // 10  # neither special tokens nor empty rows
        return [[draw.randrange(low, high) for _ in range(length)] for _ in range(task.sequences)]

    absent: dict[str, str] = {}
    with ExitStack() as stack:
        running: list[tuple[Engine, Worker]] = []
        for index, peer in enumerate([OURS, *(PEERS[name] for name in against)]):
            tell(f"{task.label}: {peer.name} starts", 0, steps)
            try:
                if reason := peer.absent(task):
                    raise TradespaceError(reason)
                own = replace(task, path=str(floats_folder(Path(task.path), say))) if peer.reads == "floats" else task
                running.append(stack.enter_context(_Started(peer, own, work, prompts)))
            except TradespaceError as error:
                if index == 0:
                    raise
                absent[peer.name] = str(error)
                say(f"{peer.name} takes no part: {error}")
        cell = Cell(task, work, [engine for engine, _ in running], absent)
        limits = stack.enter_context(Worker("limits", LIMITS))
        limits.open(task, {})
        dtypes = sorted({"fp32", *(engine.dtype for engine in cell.engines)}) if task.kind == "prefill" else []
        for turn in range(rounds + 1):  # the first one is thrown away
            tell(task.label, turn + 1, steps)
            reading = limits.ask("read", size_bytes=round(work.read_bytes))
            rates = {dtype: limits.ask("multiply", dtype=dtype) for dtype in dtypes}
            fresh, order = prompts(), turn % len(running)
            for engine, worker in running[order:] + running[:order]:
                speed = _speed(task, worker, fresh)
                if turn:
                    engine.tokens_per_s.append(speed)
            if turn:
                cell.read_bytes_per_s.append(reading)
                for dtype, rate in rates.items():
                    cell.flops_per_s.setdefault(dtype, []).append(rate)
        for engine, worker in running:
            engine.facts, engine.peak_bytes = worker.ask("facts"), worker.peak_bytes
    tell(task.label, steps, steps)
    return cell


class _Started(ExitStack):
    """An engine with its worker, in the variant of its settings that is fastest for the task, tried in processes that are gone by then."""

    def __init__(self, peer: Peer, task: Task, work: Work, prompts: Callable[..., list[list[int]]]):
        super().__init__()
        self.peer, self.task, self.work, self.prompts = peer, task, work, prompts

    def __enter__(self) -> tuple[Engine, Worker]:  # type: ignore[override]
        super().__enter__()
        variants = self.peer.variants(self.task)
        best, tried = _best_variant(self.peer, self.task, variants, self.prompts)
        worker = Worker(self.peer.name, self.peer.full_module)
        self.push(worker)
        worker.open(self.task, variants[best])
        first = [prompt[:FIRST_PROMPT] for prompt in self.prompts()]
        worker.ask("measure", prompts=first, tokens=0)
        engine = Engine(self.peer.name, self.peer.version, best, tried, self.peer.dtype or self.work.dtype, time.perf_counter() - worker.started_s)
        return engine, worker


def _best_variant(peer: Peer, task: Task, variants: dict[str, dict[str, Any]], prompts: Callable[..., list[list[int]]]) -> tuple[str, dict[str, float]]:
    """(name, tokens/s of each that ran). Raises the first variant's error where none runs."""
    if len(variants) == 1:
        return next(iter(variants)), {}
    tried: dict[str, float] = {}
    errors: list[TradespaceError] = []
    for name, settings in variants.items():
        try:
            with Worker(peer.name, peer.full_module) as worker:
                worker.open(task, settings)
                begun_s, speeds = time.perf_counter(), []
                while len(speeds) < TRIALS or time.perf_counter() - begun_s < TRIALS_S:
                    speeds.append(_speed(task, worker, prompts()))
                tried[name] = max(speeds)
        except TradespaceError as error:
            errors.append(error)
    if not tried:
        raise errors[0]
    return max(tried, key=lambda name: tried[name]), tried


def _speed(task: Task, worker: Worker, prompts: list[list[int]]) -> float:
    """Tokens/s of what the task times."""
    took = worker.ask("measure", prompts=prompts, tokens=task.tokens)
    return task.num_timed / took["prefill_s" if task.kind == "prefill" else "decode_s"]
