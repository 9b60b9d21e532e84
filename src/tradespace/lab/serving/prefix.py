"""What the prefix cache gains over HTTP, on arrivals and lengths of the Azure trace and on conversations, and what it costs where nothing is shared.

The trace tells lengths and times, not texts. Here half of each prompt (at most 256 tokens) is one of eight preambles, as applications have them; the rest is
the request's own. In the conversations every turn sends all that was said before.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil

from tradespace.errors import EngineError
from tradespace.lab.common import command_line, data_file, markdown_table
from tradespace.lab.serving.asking import WORDS as WORD_LIST
from tradespace.lab.serving.asking import Answer, Ask, send
from tradespace.lab.serving.figures import median_interval, percentile
from tradespace.lab.serving.load import closed_loop, open_loop, read_trace
from tradespace.lab.serving.process import MODEL, Server
from tradespace.measure.machine import this_machine
from tradespace.measure.memory import child_pids
from tradespace.measure.record import Figure, Record, new_record

WORDS = ("--memory", "1GiB", "--max-num-seqs", "8", "--context", "1024", "--no-grammars")
PREAMBLES, MOST_SHARED, MOST_COST = 8, 256, 0.01
RATE_PER_S = 1.5


def azure(count: int) -> list[Ask]:
    """The trace's first requests, at RATE_PER_S on average, with preambles."""
    asks = read_trace(data_file("traces", "AzureLLMInferenceTrace_conv.csv"), count=count, max_prompt=768, max_output=48)
    span_s, draw = asks[-1].at_s or 1.0, random.Random(11)
    preambles = [[draw.randrange(100, 4000) for _ in range(MOST_SHARED)] for _ in range(PREAMBLES)]
    found = []
    for ask in asks:
        shared = preambles[draw.randrange(PREAMBLES)][: min(MOST_SHARED, ask.prompt // 2)]
        prompt = shared + [draw.randrange(100, 4000) for _ in range(ask.prompt - len(shared))]
        found.append(replace(ask, at_s=(ask.at_s or 0.0) * count / RATE_PER_S / span_s, body={"prompt": prompt}))
    return found


async def converse(server: Server, conversations: int, turns: int) -> list[Answer]:
    """Several conversations at once, each turn with all that was said before it. Answers after the first turn."""
    target = server.target(endpoint="chat")

    async def one(number: int) -> list[Answer]:
        draw, messages, found = random.Random(number), list[dict[str, str]](), list[Answer]()
        for _ in range(turns):
            messages.append({"role": "user", "content": " ".join(draw.choices(WORD_LIST, k=60))})
            answer = await send(target, Ask(prompt=1, output=24, body={"messages": messages, "user": str(number)}), draw)
            messages.append({"role": "assistant", "content": answer.text})
            found.append(answer)
        return found[1:]

    return [answer for several in await asyncio.gather(*(one(number) for number in range(conversations))) for answer in several]


def row_of(workload: str, sharing: bool, answers: list[Answer]) -> dict[str, Any]:
    wrong = [answer.error for answer in answers if answer.error is not None]
    if wrong:
        raise EngineError(f"{workload}: {len(wrong)} of {len(answers)} requests failed, the first with: {wrong[0]}")
    times = [answer.ttft_s for answer in answers if answer.ttft_s is not None]
    prompt, cached = sum(answer.prompt_tokens for answer in answers), sum(answer.cached_tokens for answer in answers)
    row = {"workload": workload, "sharing": sharing, "requests": len(answers), "prompt_tokens": prompt, "cached_tokens": cached, "hit_share": cached / prompt}
    return row | {"ttft_s": times, "ttft_p50_s": percentile(times, 50), "ttft_p90_s": percentile(times, 90)}


def cpu_seconds(server: Server) -> float:
    """Of a core, by both of the server's processes: what a busy machine does not lengthen, as it does a wall clock."""
    times = [psutil.Process(pid).cpu_times() for pid in (server.pid, *child_pids(server.pid))]
    return sum(one.user + one.system for one in times)


def cost(on: Server, off: Server, rounds: int, seed: int) -> tuple[list[float], list[float]]:
    """Of short rounds of prompts that share nothing, in turn: tokens a second with the cache over those without, and CPU seconds without over those with it."""
    speeds, spent = list[float](), list[float]()
    for turn in range(rounds + 1):
        speed, cpu = dict[bool, float](), dict[bool, float]()
        for sharing in (True, False) if turn % 2 else (False, True):
            server = on if sharing else off
            before = cpu_seconds(server)
            run = asyncio.run(closed_loop(server.target(stream=False), [Ask(prompt=192, output=32)] * 8, concurrency=8, seed=seed + turn))
            row = row_of("nothing shared", sharing, list(run.answers))
            if row["cached_tokens"]:
                raise EngineError(f"prompts that share nothing had {row['cached_tokens']} tokens found")
            cpu[sharing] = cpu_seconds(server) - before
            speed[sharing] = sum(answer.prompt_tokens + answer.output_tokens for answer in run.answers) / run.wall_s
        if turn:  # the first round warms up
            speeds.append(speed[True] / speed[False])
            spent.append(cpu[False] / cpu[True])
    return speeds, spent


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """Servers with the cache and without: each workload on the first pair, the cost on every pair (where a process's memory happens to lie is a difference)."""
    count, conversations, turns, pairs, rounds = (12, 2, 3, 1, 4) if quick else (60, 8, 6, 4, 16)
    rows: list[dict[str, Any]] = []
    speeds, spent, plans = list[float](), list[float](), dict[str, str]()
    for pair in range(pairs):
        with Server(*WORDS, "--prefix-sharing") as on, Server(*WORDS, "--no-prefix-sharing") as off:
            plans = {name: server.get("/ready")[1]["plan"] for name, server in (("on", on), ("off", off))}
            if pair == 0:
                rows = workloads(on, off, count, conversations, turns, say)
            time.sleep(1)
            found = cost(on, off, rounds, 1000 * pair)
        speeds, spent = speeds + found[0], spent + found[1]
    figures = {"nothing shared, on over off": Figure.of(speeds, "ratio"), "nothing shared, CPU off over on": Figure.of(spent, "ratio")}
    say(f"nothing shared: {statistics.median(speeds):.3f} of the tokens a second without the cache; {statistics.median(spent):.3f} by CPU seconds")
    for row in rows:
        figures[f"{row['workload']}, cache {'on' if row['sharing'] else 'off'}: first token"] = Figure.of(row.pop("ttft_s"), "s")
    rows.append({"workload": "nothing shared", "pairs": pairs, "plans": plans})
    notes = (
        f"{MODEL} over HTTP, streamed; Azure-like: {RATE_PER_S} requests/s on average, half of each prompt (at most {MOST_SHARED} tokens) is one of {PREAMBLES}"
    )
    return new_record("serve-prefix", command=command_line(), device=this_machine(), repeats=len(speeds), figures=figures, rows=rows, notes=notes)


def workloads(on: Server, off: Server, count: int, conversations: int, turns: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Hits and times to first token where something is shared."""
    rows, asks = list[dict[str, Any]](), azure(count)
    for sharing, server in ((True, on), (False, off)):
        asyncio.run(closed_loop(server.target(), [Ask(prompt=64, output=8)] * 4, concurrency=2, seed=99))
        rows.append(row_of("Azure-like", sharing, list(asyncio.run(open_loop(server.target(), asks)).answers)))
        rows.append(row_of("conversations", sharing, asyncio.run(converse(server, conversations, turns))))
        for row in rows[-2:]:
            say(f"{row['workload']}, cache {'on' if sharing else 'off'}: {row['hit_share']:.0%} hits, first token after {row['ttft_p50_s'] * 1000:.0f} ms")
    return rows


def verdict(low: float, high: float) -> str:
    """Of a cost that lies between: by the bound, where it is all on one side of it."""
    return "kept" if high <= MOST_COST else "MISSED" if low > MOST_COST else "undecided: the interval holds the bound"


def markdown(record: Record) -> str:
    table, rows = [], [row for row in record.rows if "sharing" in row]
    for name in dict.fromkeys(row["workload"] for row in rows):
        on, off = (next(row for row in rows if row["workload"] == name and row["sharing"] is sharing) for sharing in (True, False))
        times = [f"{row['ttft_p50_s'] * 1000:,.0f} / {row['ttft_p90_s'] * 1000:,.0f} ms" for row in (on, off)]
        table.append((name, f"{on['requests']}", f"{on['hit_share']:.0%}", *times, f"{off['ttft_p50_s'] / on['ttft_p50_s']:.2f}×"))
    head = ("workload", "requests", "prompt tokens found", "first token with, p50 / p90", "without", "sooner (p50)")
    said = []
    for what, name in (("tokens/s", "nothing shared, on over off"), ("CPU seconds", "nothing shared, CPU off over on")):
        if (figure := record.figures.get(name)) is not None:  # records before 27 November 2026 have no CPU seconds
            low, high = (1 - ratio for ratio in reversed(median_interval(figure.values)))
            said.append(f"{1 - figure.median:+.1%} of {what} [{low:+.1%} – {high:+.1%}] ({verdict(low, high)})")
    plans = next((f" Plans: {row['plans']['on']}; without the cache {row['plans']['off']}." for row in record.rows if "plans" in row), "")
    return (
        f"{markdown_table(head, table)}\n\nWhere nothing is shared the cache costs {' and '.join(said)}; {MOST_COST:.0%} is allowed. Medians of "
        f"{record.repeats} paired rounds, with their 95% intervals.{plans}"
    )
