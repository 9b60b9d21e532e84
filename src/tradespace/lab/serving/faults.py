"""Faults: clients that die, dawdle, lie and attack, signals under load, a full disk. Beside each a probe asks for four tokens, again and again."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tradespace.lab.common import command_line, markdown_table
from tradespace.lab.serving import fault_kinds as kinds
from tradespace.lab.serving.asking import Answer, Ask, send
from tradespace.lab.serving.figures import percentile
from tradespace.lab.serving.load import Run, open_loop
from tradespace.lab.serving.process import MODEL, Server, blocks_kept
from tradespace.measure.machine import this_machine
from tradespace.measure.memory import MemoryMeter, child_pids
from tradespace.measure.record import Figure, Record, new_record
from tradespace.units import format_bytes, parse_bytes

MEMORY = "1GiB"
WORDS = ("--memory", MEMORY, "--max-num-seqs", "8", "--context", "1024", "--grace", "60")
PROBE_EVERY_S = 0.25
Row = dict[str, Any]


async def beside(server: Server, work: Awaitable[kinds.Found]) -> tuple[kinds.Found, list[Answer]]:
    """`work`, with the probe beside it. The probe is a client of its own: its turn comes whatever the others have queued."""
    done = asyncio.Event()
    probes: list[Answer] = []

    async def probe() -> None:
        draw, target = random.Random(9), server.target(timeout_s=kinds.WAIT_S, body={"user": "probe"})
        while not done.is_set():
            probes.append(await send(target, Ask(prompt=4, output=4), draw))
            await asyncio.sleep(PROBE_EVERY_S)

    probing = asyncio.create_task(probe())
    try:
        found = await work
    finally:
        done.set()
        await probing
    return found, probes


def row_of(name: str, found: kinds.Found, probes: list[Answer], seconds: float) -> Row:
    times = [probe.e2e_s for probe in probes]
    unanswered = dict(Counter(probe.error for probe in probes if probe.error is not None))
    row: Row = {"fault": name, "endings": found, "lost": sum(count for how, count in found.items() if how.startswith("LOST")), "seconds": seconds}
    return row | {"probes": len(probes), "unanswered": unanswered, "probe_p50_s": percentile(times, 50), "probe_max_s": max(times, default=None)}


def client_faults(server: Server, quick: bool, say: Callable[[str], None]) -> list[Row]:
    """Those of clients, one after the other on one server, which must be idle again after each with all blocks free."""
    target = server.target(timeout_s=kinds.WAIT_S, body={"user": "faulty"})
    faults: dict[str, Callable[[], Awaitable[kinds.Found]]] = {
        "clients killed mid-stream": lambda: kinds.killed(target, 50 if quick else 500),
        "slow readers": lambda: kinds.slow(target, 12, 5 if quick else 30),
        "half-open connections": lambda: kinds.half_open(server.address, 90 if quick else 300, 90),
        "malformed JSON and UTF-8, deep nesting": lambda: kinds.malformed(server.address),
        "bodies of 100 MB": lambda: kinds.big_bodies(server.address, 6 if quick else 24),
        "catastrophic regexes, grammars, schemas": lambda: kinds.hostile(target),
    }
    rows = []
    for name, fault in faults.items():
        start_s = time.perf_counter()
        found, probes = asyncio.run(beside(server, fault()))
        row: Row = row_of(name, found, probes, time.perf_counter() - start_s) | {"blocks": blocks_kept(server.until_idle())}
        rows.append(row)
        say(f"{name}: {found}; probe answered {row['probes'] - sum(row['unanswered'].values())} of {row['probes']}, at most {row['probe_max_s'] or 0:.1f} s")
    return rows


def under_load(server: Server, count: int, act: Callable[[], None]) -> Run:
    """`count` streams at once; `act` when about a quarter of the time that they take has gone."""
    draw = random.Random(4)
    asks = [Ask(prompt=draw.randint(8, 64), output=64, at_s=0.0) for _ in range(count)]

    async def both() -> Run:
        loading = asyncio.create_task(open_loop(server.target(timeout_s=kinds.WAIT_S), asks))
        await asyncio.sleep(2.0)
        act()
        return await loading

    return asyncio.run(both())


def endings(run: Run, clear: tuple[str, ...]) -> kinds.Found:
    """How requests ended; errors that do not begin as one of `clear` are lost."""
    return dict(Counter("tokens" if a.error is None else a.error if a.error.startswith(clear) else f"LOST: {a.error}" for a in run.answers))


def signals(quick: bool, say: Callable[[str], None]) -> list[Row]:
    """SIGTERM to the server, SIGKILL to its engine and to itself, each under load."""
    count, rows = 16 if quick else 64, []
    with Server(*WORDS) as server:
        run = under_load(server, count, lambda: server.process.send_signal(signal.SIGTERM))
        start_s = time.perf_counter()
        code = server.process.wait(timeout=120)
        found = endings(run, ("503", "error event: unavailable", "connection refused"))
        rows.append(row_of("SIGTERM under load", found, [], run.wall_s) | {"exit_code": code, "exit_s": time.perf_counter() - start_s})
        say(f"SIGTERM: {found}, exit code {code}")
    with Server(*WORDS) as server:
        engine = child_pids(server.pid)[0]
        run = under_load(server, count, lambda: os.kill(engine, signal.SIGKILL))
        found = endings(run, ("500", "503", "error event: engine_error", "error event: unavailable"))
        start_s = time.perf_counter()
        server.until_ready()
        again = asyncio.run(send(server.target(), Ask(prompt=4, output=4), random.Random(5)))
        row = row_of("SIGKILL of the engine under load", found, [again], run.wall_s) | {"ready_again_s": time.perf_counter() - start_s}
        rows.append(row | {"blocks": blocks_kept(server.until_idle())})
        say(f"SIGKILL of the engine: {found}, answers again after {row['ready_again_s']:.1f} s")
        left = child_pids(server.pid)
        run = under_load(server, count, lambda: server.process.kill())
        found = endings(run, ("connection lost", "connection refused", "the connection was closed"))
        end_s = time.perf_counter() + 30
        while any(_lives(pid) for pid in left) and time.perf_counter() < end_s:
            time.sleep(0.1)
        rows.append(row_of("SIGKILL of the server under load", found, [], run.wall_s) | {"orphans": sum(map(_lives, left))})
        say(f"SIGKILL of the server: {found}, {rows[-1]['orphans']} processes left behind")
    return rows


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def full_disk(say: Callable[[str], None]) -> Row:
    """Its log goes to a device that is always full, and it is given reason to write: it answers, and restarts its engine."""
    with Server(*WORDS, log=Path("/dev/full")) as server:
        engine = child_pids(server.pid)[0]
        run = under_load(server, 8, lambda: os.kill(engine, signal.SIGKILL))
        found = endings(run, ("500", "503", "error event: engine_error", "error event: unavailable"))
        server.until_ready()
        again = asyncio.run(send(server.target(), Ask(prompt=4, output=4), random.Random(6)))
    row = row_of("full disk for the log, engine killed", found, [again], run.wall_s)
    say(f"full disk: {found}, answered afterwards: {again.error is None}")
    return row


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    with Server(*WORDS) as server:
        server.until_idle()
        asyncio.run(send(server.target(), Ask(prompt=64, output=8), random.Random(7)))
        with MemoryMeter(root_pid=server.pid) as meter:
            rows = client_faults(server, quick, say)
    rows += [*signals(quick, say), full_disk(say)]
    state = {"fault": "state", "budget_bytes": parse_bytes(MEMORY), "peak_bytes": meter.peak_bytes, "method": meter.method}
    say(f"peak {format_bytes(meter.peak_bytes)} of {MEMORY}")
    figures = {"peak": Figure.of([meter.peak_bytes], "bytes")}
    notes = f"{MODEL}; the probe is a client of its own that asks for four tokens every {PROBE_EVERY_S:g} s"
    return new_record("serve-faults", command=command_line(), device=this_machine(), repeats=1, figures=figures, rows=[*rows, state], notes=notes)


def markdown(record: Record) -> str:
    *faults, state = record.rows
    table = []
    for row in faults:
        ends = ", ".join(f"{count} {how}" for how, count in row["endings"].items())
        good = row["probes"] - sum(row["unanswered"].values())
        probe = f"{good} of {row['probes']}, {row['probe_p50_s']:.2f} / {row['probe_max_s']:.2f} s" if row["probes"] else "–"
        blocks = row.get("blocks")
        free = "–" if blocks is None else "all" if blocks["used"] == blocks["references"] == 0 and blocks["free"] == blocks["total"] else f"{blocks['free']:,}"
        table.append((row["fault"], ends, f"{row['lost']}", probe, free))
    head = ("fault", "how it ended", "lost", "probe answered, median / longest", "blocks free after")
    kept = state["peak_bytes"] <= state["budget_bytes"]
    return (
        f"{markdown_table(head, table, left=2)}\n\nPeak of the server's processes during the clients' faults: {format_bytes(state['peak_bytes'])} of "
        f"{format_bytes(state['budget_bytes'])} ({'never above' if kept else 'ABOVE IT'})."
    )
