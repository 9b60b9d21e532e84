"""Does `bench serve` measure what a known client measures? guidellm (vllm-project/guidellm) on the same server, in turn, with the same prompts and arrivals.

guidellm runs from an environment of its own, as its dependencies are many; its executable is looked for on the PATH. Where the two disagree, the server's own
histograms (/metrics), read before and after each run, are the third witness.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tradespace.errors import EngineError, UnsupportedError
from tradespace.lab.common import command_line, markdown_table
from tradespace.lab.serving.asking import WORDS as WORD_LIST
from tradespace.lab.serving.asking import Ask
from tradespace.lab.serving.figures import summarize
from tradespace.lab.serving.load import closed_loop, open_loop, poisson
from tradespace.lab.serving.process import MODEL, Server
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Figure, Record, new_record

WORDS = ("--memory", "1GiB", "--max-num-seqs", "8", "--context", "1024", "--no-grammars", "--no-prefix-sharing")
PROMPT, OUTPUT, CONCURRENCY, RATE_PER_S, MOST_APART = 64, 32, 4, 3.0, 0.05
FIRST_S, LAST_S = 2.0, 5.0  # before a replay's first request, and behind its last
MODES = {"closed": f"{CONCURRENCY} at once", "poisson": f"Poisson, {RATE_PER_S:g} requests/s"}
METRICS = {
    "ttft": ("time to first token", "s"),
    "itl": ("inter-token latency", "s"),
    "e2e": ("end to end", "s"),
    "speed": ("output tokens/s", "tok/s"),
}
# what both are compared by: medians of a run's requests, and all tokens over the time from the first request's beginning to the last one's end
Measured = dict[str, float]


def draw_asks(mode: str, count: int, seed: int) -> list[Ask]:
    """One round's requests: the same for both clients."""
    draw = random.Random(seed)
    asks = [Ask(prompt=PROMPT, output=OUTPUT, body={"prompt": " ".join(draw.choices(WORD_LIST, k=PROMPT))}) for _ in range(count)]
    # guidellm's workers may not be there yet for what is due at once
    return asks if mode == "closed" else [replace(ask, at_s=(ask.at_s or 0.0) + FIRST_S) for ask in poisson(asks, RATE_PER_S, seed=seed)]


def by_us(server: Server, mode: str, asks: Sequence[Ask]) -> Measured:
    """As `tradespace bench serve` measures. Raises EngineError where a request fails."""
    target = server.target()
    run = asyncio.run(closed_loop(target, asks, concurrency=CONCURRENCY) if mode == "closed" else open_loop(target, asks))
    row = summarize(run)
    if row["completed"] != len(asks) or row["output_tokens"] != OUTPUT * len(asks):
        raise EngineError(f"{row['completed']} of {len(asks)} requests ended well, with {row['output_tokens']} tokens: {row['errors']}")
    return {
        "ttft": row["ttft_p50_s"], "itl": row["tpot_p50_s"], "e2e": row["e2e_p50_s"], "ttft_mean": row["ttft_mean_s"], "itl_mean": row["tpot_mean_s"],
        "speed": row["output_tokens"] / (max(answer.end_s for answer in run.answers) - min(answer.sent_s for answer in run.answers)),
    }  # fmt: skip


def find_guidellm() -> str:
    """Its executable. Raises UnsupportedError where there is none on the PATH."""
    if (found := shutil.which("guidellm")) is None:
        raise UnsupportedError(
            "this experiment compares with guidellm, which is not on the PATH. It needs an environment of its own: "
            "python -m venv DIR && DIR/bin/pip install guidellm, then PATH=$PATH:DIR/bin tradespace lab run serve-client"
        )
    return found


def by_guidellm(server: Server, mode: str, asks: Sequence[Ask]) -> Measured:
    """As guidellm states it of each request. Raises EngineError where it fails, or a request does."""
    with tempfile.TemporaryDirectory(prefix="tradespace-guidellm-") as folder:
        data, out = Path(folder) / "asks.jsonl", Path(folder) / "out.json"
        rows = [
            {"prompt": ask.body["prompt"], "output_tokens_count": ask.output} | ({} if ask.at_s is None else {"relative_timestamp": ask.at_s}) for ask in asks
        ]
        if mode != "closed":  # guidellm 0.8.1 may end a replay before the answer to its last request: that is one which does not count
            rows.append({**rows[-1], "relative_timestamp": rows[-1]["relative_timestamp"] + LAST_S})
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        backend = {
            "kind": "openai_http", "target": f"http://127.0.0.1:{server.port}", "model": MODEL, "request_format": "/v1/completions",
            "extras": {"body": {"temperature": 0}},
        }  # fmt: skip
        profile = f"kind=concurrent,streams={CONCURRENCY}" if mode == "closed" else "kind=replay,schedule_turn=timestamp"
        words = [find_guidellm(), "run", "--backend", json.dumps(backend), "--profile", profile, "--data", f"kind=json_file,path={data}"]
        words += ["--constraint", f"kind=max_requests,count={len(rows)}", "--output", f"kind=json,path={out}", "--disable-console"]
        # another environment's Python must not read this one's packages
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")} | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, cwd=folder)
        if done.returncode or not out.is_file():
            raise EngineError(f"guidellm failed: {' | '.join((done.stderr or done.stdout).strip().splitlines()[-4:])}")
        found = json.loads(out.read_text(encoding="utf-8"))["benchmarks"][0]
    good = sorted(found["requests"]["successful"], key=lambda one: one["request_start_time"])[: len(asks)]
    tokens = [one["output_tokens"] for one in good]
    if tokens != [OUTPUT] * len(asks):
        others = {kind: len(found["requests"][kind]) for kind in ("errored", "incomplete")}
        raise EngineError(f"guidellm: {len(good)} of {len(asks)} requests ended well, with {sum(tokens)} tokens; {others}")
    ttft, itl = ([one[name] / 1e3 for one in good] for name in ("time_to_first_token_ms", "inter_token_latency_ms"))
    return {
        "ttft": statistics.median(ttft), "itl": statistics.median(itl), "e2e": statistics.median(one["request_latency"] for one in good),
        "ttft_mean": statistics.mean(ttft), "itl_mean": statistics.mean(itl),
        "speed": sum(tokens) / (max(one["request_end_time"] for one in good) - min(one["request_start_time"] for one in good)),
    }  # fmt: skip


def histogram_sums(server: Server) -> dict[str, tuple[float, float]]:
    """(sum, count) of the server's own histograms."""
    _, text = server.get("/metrics")
    found = {}
    for name, metric in (("ttft", "time_to_first_token_seconds"), ("itl", "inter_token_latency_seconds")):
        values = [re.search(rf"^vllm:{metric}_{part}{{[^}}]*}} (\S+)$", text, re.MULTILINE) for part in ("sum", "count")]
        found[name] = tuple(float(value.group(1)) if value is not None else 0.0 for value in values)
    return found


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """Both clients in each mode, the one that begins changing from round to round."""
    find_guidellm()
    rounds, count = (1, 8) if quick else (7, 48)
    values: dict[str, list[float]] = {}
    clients: dict[str, Callable[[Server, str, Sequence[Ask]], Measured]] = {"ours": by_us, "guidellm": by_guidellm}
    with Server(*WORDS) as server:
        plan = server.get("/ready")[1]["plan"]
        by_us(server, "closed", draw_asks("closed", 2 * CONCURRENCY, 10**6))
        for turn in range(rounds):
            for mode in MODES:
                asks = draw_asks(mode, count, turn)
                for client in [*clients][:: 1 if turn % 2 == 0 else -1]:
                    before = histogram_sums(server)
                    found = clients[client](server, mode, asks)
                    after = histogram_sums(server)
                    for name, (total, number) in after.items():
                        found[f"{name}_server"] = (total - before[name][0]) / (number - before[name][1])
                    for name, value in found.items():
                        values.setdefault(f"{mode}: {name}, {client}", []).append(value)
    figures = {name: Figure.of(of, METRICS.get(name.split(": ")[1].split(",")[0].split("_")[0], ("", "s"))[1]) for name, of in values.items()}
    for mode, words in MODES.items():
        for metric, (title, _) in METRICS.items():
            pairs = zip(values[f"{mode}: {metric}, ours"], values[f"{mode}: {metric}, guidellm"], strict=True)
            ratio = Figure.of([ours / theirs for ours, theirs in pairs], "ratio")
            figures[f"{mode}: {metric}, ours over guidellm"] = ratio
            say(f"{words}, {title}: {ratio.median:.3f} of guidellm's")
    done = subprocess.run([find_guidellm(), "--version"], capture_output=True, text=True, check=False)
    version = done.stdout.strip().split()[-1] if done.stdout.strip() else "of unknown version"
    row = {"plan": plan, "requests": count, "prompt_words": PROMPT, "tokens": OUTPUT, "guidellm": version, "allowed": MOST_APART}
    notes = f"{MODEL}, greedy, streamed completions; guidellm {version}; both clients with the same prompts and, where the loop is open, the same arrivals"
    return new_record("serve-client", command=command_line(), device=this_machine(), repeats=rounds, figures=figures, rows=[row], notes=notes)


def markdown(record: Record) -> str:
    row, figures, table = record.rows[0], record.figures, []
    for mode, words in MODES.items():
        for metric, (title, unit) in METRICS.items():
            ratio = figures[f"{mode}: {metric}, ours over guidellm"]
            cells = [figures[f"{mode}: {metric}, {client}"].median for client in ("ours", "guidellm")]
            shown = [f"{cell:,.0f}" if unit == "tok/s" else f"{cell * 1e3:,.1f} ms" for cell in cells]
            apart = ratio.median - 1
            verdict = f"{row['allowed']:.0%} ({'kept' if abs(apart) <= row['allowed'] else 'MISSED'})"
            table.append((f"{words}: {title}", *shown, f"{apart:+.1%} [{ratio.min - 1:+.1%} – {ratio.max - 1:+.1%}]", verdict))
    head = ("median of each run's requests", "bench serve", f"guidellm {row['guidellm']}", "apart", "bar")
    means = [
        f"{words}: first token {_ms(figures, mode, 'ttft', 'ours')}, inter-token {_ms(figures, mode, 'itl', 'ours')} under ours; "
        f"{_ms(figures, mode, 'ttft', 'guidellm')} and {_ms(figures, mode, 'itl', 'guidellm')} under guidellm"
        for mode, words in MODES.items()
    ]
    return (
        f"{markdown_table(head, table)}\n\nMedians of {record.repeats} rounds in turn; {row['requests']} requests of {row['prompt_words']} words and "
        f"{row['tokens']} tokens in each. Means, stated by the client / by the server's own histograms: {'. '.join(means)}. Plan: {row['plan']}."
    )


def _ms(figures: Any, mode: str, metric: str, client: str) -> str:
    return " / ".join(f"{figures[f'{mode}: {metric}_{of}, {client}'].median * 1e3:,.1f}" for of in ("mean", "server")) + " ms"
