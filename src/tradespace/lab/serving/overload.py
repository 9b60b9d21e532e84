"""Overload: 1,000 requests at once, then minutes of three times what the server can do. Memory, blocks, and how every single request ended."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from tradespace.lab.common import command_line, markdown_table
from tradespace.lab.serving.asking import Answer, Ask
from tradespace.lab.serving.figures import percentile, summarize
from tradespace.lab.serving.load import Run, closed_loop, open_loop, poisson
from tradespace.lab.serving.process import MODEL, Server, blocks_kept
from tradespace.measure.machine import this_machine
from tradespace.measure.memory import MemoryMeter
from tradespace.measure.record import Figure, Record, new_record
from tradespace.units import format_bytes, parse_bytes

MEMORY, BURST, TIMES, QUEUE = "1GiB", 1000, 3.0, 600
WORDS = ("--memory", MEMORY, "--max-num-seqs", "16", "--context", "1024", "--max-queue", str(QUEUE))
REFUSED = ("429 queue_full", "503 too_many_connections")  # the queue, or all connections that may be open
HUNG_S = 1800.0  # far beyond what a full queue takes: who has no end by then has none
MOST_DRIFT = 0.01


def draw_asks(count: int, *, seed: int) -> list[Ask]:
    """Mixed lengths: prompts of 8 to 128 tokens, answers of 4 to 48."""
    draw = random.Random(seed)
    return [Ask(prompt=draw.randint(8, 128), output=draw.randint(4, 48)) for _ in range(count)]


def ending(answer: Answer) -> str:
    """How a request ended: "tokens" (all that were asked for), the server's own error, or "LOST: …"."""
    if answer.error is None:
        return "tokens" if answer.output_tokens == answer.ask.output else f"LOST: {answer.output_tokens} of {answer.ask.output} tokens"
    return answer.error if answer.error in REFUSED else f"LOST: {answer.error}"


def row_of(name: str, run: Run) -> dict[str, Any]:
    """One phase's line of the record."""
    summary = summarize(run)
    keys = (
        "requests",
        "completed",
        "wall_s",
        "requests_per_s",
        "output_tokens_per_s",
        "ttft_p50_s",
        "ttft_p99_s",
        "e2e_p50_s",
        "e2e_p99_s",
        "client_cpu_share",
    )
    refused_s = [answer.e2e_s for answer in run.answers if answer.error in REFUSED]
    endings = dict(Counter(map(ending, run.answers)))
    lost = sum(count for how, count in endings.items() if how.startswith("LOST"))
    return {"phase": name, **{key: summary[key] for key in keys}, "endings": endings, "lost": lost, "refusal_p99_s": percentile(refused_s, 99)}


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """Everything on one server, watched from outside."""
    minutes = 0.5 if quick else 10.0
    rows: list[dict[str, Any]] = []
    with Server(*WORDS) as server:
        target = server.target(timeout_s=HUNG_S)
        asyncio.run(closed_loop(target, draw_asks(64, seed=1), concurrency=16))  # what is allocated on first use is allocated
        before = server.until_idle()
        time.sleep(1)
        with MemoryMeter(root_pid=server.pid) as meter:
            before_bytes = server.resident_bytes()
            calm = asyncio.run(closed_loop(target, draw_asks(60 if quick else 300, seed=2), concurrency=16))
            rows.append(row_of("capacity: 16 at once", calm) | {"peak_bytes": meter.mark("capacity")})
            rate = rows[0]["requests_per_s"]
            say(f"capacity: {rate:.1f} requests/s, {rows[0]['output_tokens_per_s']:,.0f} tokens/s")
            burst = asyncio.run(open_loop(target, [Ask(prompt=a.prompt, output=a.output, at_s=0.0) for a in draw_asks(BURST, seed=3)]))
            rows.append(row_of(f"{BURST:,} at once", burst) | {"peak_bytes": meter.mark("burst")})
            say(f"burst: {rows[1]['endings']} in {rows[1]['wall_s']:.0f} s")
            after_burst = server.until_idle()
            flood = poisson(draw_asks(round(TIMES * rate * 60 * minutes), seed=4), TIMES * rate, seed=5)
            flooded = asyncio.run(open_loop(target, flood))
            rows.append(row_of(f"{minutes:g} minutes at {TIMES:g}× capacity", flooded) | {"peak_bytes": meter.mark("flood"), "rate_per_s": TIMES * rate})
            say(f"flood: {rows[2]['endings']} in {rows[2]['wall_s']:.0f} s")
            after = server.until_idle()
            time.sleep(2)
            after_bytes = server.resident_bytes()
        state = {
            "phase": "state", "budget_bytes": parse_bytes(MEMORY), "peak_bytes": meter.peak_bytes, "method": meter.method,
            "resident_peaks_bytes": sum(meter.peak_rss_by_pid.values()), "before_bytes": before_bytes, "after_bytes": after_bytes,
            "stated_peak_bytes": after["memory"]["peak_bytes"], "preemptions": after["load"]["preemptions"], "blocks_before": blocks_kept(before),
            "blocks_after_burst": blocks_kept(after_burst), "blocks_after": blocks_kept(after),
        }  # fmt: skip
        rows.append(state)
    say(f"memory: peak {format_bytes(state['peak_bytes'])} of {MEMORY}; {format_bytes(before_bytes)} before, {format_bytes(after_bytes)} after")
    figures = {f"{row['phase']}: output": Figure.of([row["output_tokens_per_s"]], "tok/s") for row in rows[:3]}
    figures |= {"peak": Figure.of([meter.peak_bytes], "bytes"), "after over before": Figure.of([after_bytes / before_bytes], "ratio")}
    notes = (
        f"{MODEL}; streamed completions, prompts of 8-128 random tokens, answers of 4-48; memory: sampled {meter.method.upper()} of the server's process tree"
    )
    return new_record("serve-overload", command=command_line(), device=this_machine(), repeats=1, figures=figures, rows=rows, notes=notes)


def markdown(record: Record) -> str:
    *phases, state = record.rows
    table = []
    for row in phases:
        refused = sum(count for how, count in row["endings"].items() if how in REFUSED)
        peak = format_bytes(row["peak_bytes"])
        first = "–" if row["ttft_p50_s"] is None else f"{row['ttft_p50_s']:.2f} / {row['ttft_p99_s']:.2f} s"
        table.append(
            (
                row["phase"],
                f"{row['requests']:,}",
                f"{row['completed']:,}",
                f"{refused:,}",
                f"{row['lost']:,}",
                f"{row['output_tokens_per_s']:,.0f}",
                first,
                peak,
            )
        )
    head = ("", "requests", "answered in full", "refused (429, 503)", "lost or hung", "tokens/s", "first token, p50 / p99", "peak memory")
    drift = state["after_bytes"] / state["before_bytes"] - 1
    blocks, kept = state["blocks_after"], state["peak_bytes"] <= state["budget_bytes"]
    whole = blocks["free"] + blocks["used"] == blocks["total"] and blocks["used"] == blocks["references"] == 0
    return (
        f"{markdown_table(head, table)}\n\nBudget {format_bytes(state['budget_bytes'])}, peak {format_bytes(state['peak_bytes'])} "
        f"({'never above' if kept else 'ABOVE IT'}; the sum of both processes' own resident peaks, which counts what both map twice, is "
        f"{format_bytes(state['resident_peaks_bytes'])}). Resident before {format_bytes(state['before_bytes'])}, after {format_bytes(state['after_bytes'])}: "
        f"{drift:+.2%} ({'within' if abs(drift) <= MOST_DRIFT else 'NOT within'} {MOST_DRIFT:.0%}). Cache blocks at the end: {blocks['free']:,} free + "
        f"{blocks['used']:,} used of {blocks['total']:,} ({'none leaked' if whole else 'LEAKED'})."
    )
