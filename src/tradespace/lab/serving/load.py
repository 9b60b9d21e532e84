"""Load: closed loop (a fixed number of clients, each of which asks again when it has its answer) and open loop (arrivals that wait for nobody).

A closed loop slows down with the server and so hides its queue; an open loop shows it (Schroeder, Wierman, Harchol-Balter: Open Versus Closed, NSDI 2006).
"""

from __future__ import annotations

import asyncio
import csv
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from tradespace.errors import CorruptFileError, InputError
from tradespace.lab.serving.asking import Answer, Ask, Target, send

Tell = Callable[[int, int], None]  # requests done, of how many


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The answers, in the order in which they were sent; wall seconds; and what the client itself spent of a core's time on them."""

    answers: tuple[Answer, ...]
    start_s: float
    wall_s: float
    client_cpu_s: float


def poisson(asks: Iterable[Ask], rate: float, *, seed: int) -> list[Ask]:
    """The same requests at `rate` a second, exponentially spaced."""
    draw, at_s, found = random.Random(seed), 0.0, []
    for ask in asks:
        at_s += draw.expovariate(rate)
        found.append(replace(ask, at_s=at_s))
    return found


def read_trace(path: Path, *, count: int | None = None, speedup: float = 1.0, max_prompt: int | None = None, max_output: int | None = None) -> list[Ask]:
    """Requests of a trace in the Azure LLM inference form (TIMESTAMP, ContextTokens, GeneratedTokens), the first one at second 0.

    `speedup` divides the times between arrivals. Raises InputError where there is no such file, CorruptFileError naming the line that is not of this form.
    """
    found: list[Ask] = []
    first: datetime | None = None
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                try:
                    when = datetime.fromisoformat(row["TIMESTAMP"][:26])
                    prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
                except (KeyError, TypeError, ValueError) as error:
                    raise CorruptFileError(f"{path}, line {number}: needs TIMESTAMP, ContextTokens and GeneratedTokens ({error})") from error
                first = first or when
                if prompt < 1 or output < 1:
                    continue
                at_s = (when - first).total_seconds() / speedup
                found.append(Ask(prompt=min(prompt, max_prompt or prompt), output=min(output, max_output or output), at_s=at_s))
                if count is not None and len(found) == count:
                    break
    except OSError as error:
        raise InputError(f"--trace {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path} is not UTF-8") from error
    if not found:
        raise InputError(f"--trace {path} holds no request")
    return found


async def open_loop(target: Target, asks: Sequence[Ask], *, seed: int = 0, tell: Tell = lambda done, total: None) -> Run:
    """Every request at its time `at_s`, whatever has become of the others."""
    draw, done = random.Random(seed), 0

    async def one(ask: Ask) -> Answer:
        nonlocal done
        answer = await send(target, ask, draw)
        done += 1
        tell(done, len(asks))
        return answer

    start_s, cpu_s, tasks = time.perf_counter(), time.process_time(), list[asyncio.Task[Answer]]()
    for ask in asks:
        await asyncio.sleep(max(0.0, start_s + (ask.at_s or 0.0) - time.perf_counter()))
        tasks.append(asyncio.create_task(one(ask)))
    answers = await asyncio.gather(*tasks)
    return _run(answers, start_s, cpu_s)


async def closed_loop(target: Target, asks: Sequence[Ask], *, concurrency: int, seed: int = 0, tell: Tell = lambda done, total: None) -> Run:
    """`concurrency` clients take the requests one after the other."""
    draw, left, answers = random.Random(seed), iter(asks), list[Answer]()

    async def client() -> None:
        for ask in left:
            answers.append(await send(target, ask, draw))
            tell(len(answers), len(asks))

    start_s, cpu_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    return _run(sorted(answers, key=lambda answer: answer.sent_s), start_s, cpu_s)


def _run(answers: Sequence[Answer], start_s: float, cpu_s: float) -> Run:
    wall_s = max((answer.end_s for answer in answers), default=start_s) - start_s
    return Run(answers=tuple(answers), start_s=start_s, wall_s=wall_s, client_cpu_s=time.process_time() - cpu_s)
