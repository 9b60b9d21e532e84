"""What `tradespace bench serve` does: asks the server what it serves, warms up, loads it, and makes a record of what came back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from tradespace.errors import InputError, UnsupportedError
from tradespace.lab.common import command_line
from tradespace.lab.serving.asking import Ask, Target, send
from tradespace.lab.serving.figures import PERCENTILES, summarize
from tradespace.lab.serving.http import Address, BadAnswer, call
from tradespace.lab.serving.load import Run, Tell, closed_loop, open_loop, poisson, read_trace
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Figure, Record, new_record
from tradespace.units import format_seconds

NAMES = {
    "ttft": "time to first token (TTFT)",
    "tpot": "time per output token (TPOT)",
    "itl": "inter-token latency (ITL)",
    "e2e": "end to end",
}
KEPT = 20_000  # most values of a figure in the record; percentiles are of all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is to be sent. Exactly one of trace, rate (requests a second) and concurrency is given; `spread` draws lengths from half to one and a half."""

    trace: Path | None = None
    rate: float | None = None
    concurrency: int | None = None
    requests: int | None = None
    prompt: int = 128
    output: int = 64
    spread: bool = False
    max_prompt: int | None = None
    max_output: int | None = None
    speedup: float = 1.0
    warmup: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.trace, self.rate, self.concurrency)) != 1:
            raise InputError("say how requests arrive with one of --trace FILE, --rate R (Poisson) and --concurrency C (closed loop)")
        if self.trace is None and self.speedup != 1:
            raise InputError("--speedup is of a trace's arrivals. Give --trace, or another --rate")

    @property
    def describe(self) -> str:
        if self.trace is not None:
            return f"open loop, arrivals of {self.trace.name}" + (f", {self.speedup:g} times as fast" if self.speedup != 1 else "")
        return f"open loop, Poisson, {self.rate:g} requests a second" if self.rate is not None else f"closed loop, {self.concurrency} at once"

    def asks(self) -> list[Ask]:
        """The requests, with their times where the loop is open."""
        if self.trace is not None:
            return read_trace(self.trace, count=self.requests, speedup=self.speedup, max_prompt=self.max_prompt, max_output=self.max_output)
        count = self.requests or 64
        draw = random.Random(self.seed)

        def length(mean: int) -> int:
            return draw.randint(mean - mean // 2, mean + mean // 2) if self.spread else mean

        several = [Ask(prompt=length(self.prompt), output=length(self.output)) for _ in range(count)]
        return several if self.rate is None else poisson(several, self.rate, seed=self.seed)


def find_model(address: Address, *, api_key: str | None = None) -> str:
    """The first model that the server offers. Raises UnsupportedError where nobody answers as an OpenAI-compatible server does."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    where = f"{address.host}:{address.port}"
    try:
        status, found = asyncio.run(call(address, "GET", "/v1/models", headers=headers, timeout_s=30))
    except (OSError, BadAnswer, ValueError, TimeoutError) as error:
        raise UnsupportedError(f"no server answers at {where} ({type(error).__name__}). Start one: tradespace serve MODEL --memory 1GiB") from error
    if status == 401:
        raise InputError(f"{where} asks for a key. Give --api-key, or TRADESPACE_API_KEY")
    try:
        return found["data"][0]["id"]
    except (KeyError, TypeError, IndexError) as error:
        raise UnsupportedError(f"{where}/v1/models answers {status} and names no model. Give --model") from error


def run_load(target: Target, load: Load, *, tell: Tell = lambda done, total: None) -> Run:
    """Warm up, then load. Raises UnsupportedError where the server refuses the first request: the load would be nothing but that."""
    asks = load.asks()

    async def run() -> Run:
        for turn in range(load.warmup):
            first = await send(target, replace(asks[turn % len(asks)], at_s=None), random.Random(load.seed + 1 + turn))
            if first.error is not None:
                raise UnsupportedError(
                    f"the first request ({first.ask.prompt} tokens, {first.ask.output} wanted) ended with: {first.error}. Try --prompt, --tokens, "
                    "--max-prompt or --max-output for lengths that fit, --endpoint chat, or --any-length for a server that has no ignore_eos"
                )
        if load.concurrency is not None:
            return await closed_loop(target, asks, concurrency=load.concurrency, seed=load.seed, tell=tell)
        return await open_loop(target, asks, seed=load.seed, tell=tell)

    return asyncio.run(run())


def record_of(run: Run, row: dict[str, Any], *, notes: str) -> Record:
    """Every request's TTFT, TPOT and end-to-end time as figures (evenly thinned where there are very many), and the summary as the row."""
    good = [answer for answer in run.answers if answer.error is None]
    values = {
        "ttft": [answer.ttft_s for answer in good if answer.ttft_s is not None],
        "tpot": [answer.tpot_s for answer in good if answer.tpot_s is not None],
        "itl": [gap for answer in good for gap in answer.itl_s],
        "e2e": [answer.e2e_s for answer in good],
    }
    figures = {NAMES[name]: Figure.of(thinned(of, KEPT), "s") for name, of in values.items() if of}
    return new_record("bench-serve", command=command_line(), device=this_machine(), repeats=len(good), figures=figures, rows=[row], notes=notes)


def thinned(values: list[float], most: int) -> list[float]:
    """At most so many, evenly over the ordered values, both ends kept: their median and spread stay."""
    if len(values) <= most:
        return values
    ordered = sorted(values)
    return [ordered[round(index * (len(ordered) - 1) / (most - 1))] for index in range(most)]


def summary_table(row: dict[str, Any], load: str, say: Callable[[str], None]) -> Table:
    """Latencies down, percentiles across; what else there is to say, in lines."""
    say(f"{load}: {row['completed']} of {row['requests']} requests ended well in {format_seconds(row['wall_s'])}")
    for error, count in sorted(row["errors"].items(), key=lambda pair: -pair[1]):
        say(f"  {count} × {error}")
    say(f"{row['output_tokens_per_s']:,.1f} output tokens/s, {row['requests_per_s']:.2f} requests/s")
    if "goodput_per_s" in row:
        wanted = [f"{name} ≤ {format_seconds(row[key])}" for name, key in (("TTFT", "slo_ttft_s"), ("TPOT", "slo_tpot_s")) if row[key] is not None]
        say(f"goodput: {row['goodput_per_s']:.2f} requests/s within {' and '.join(wanted)} ({row['within_slo']} requests)")
    say(f"this client took {row['client_cpu_share']:.1%} of a core")
    table = Table("latency", "mean", *(f"p{percent}" for percent in PERCENTILES))
    for name, words in NAMES.items():
        cells = [row[f"{name}_mean_s"], *(row[f"{name}_p{percent}_s"] for percent in PERCENTILES)]
        table.add_row(words, *("–" if cell is None else format_seconds(cell) for cell in cells))
    return table


def bench_serve(load: Load, target: Target, *, slo_ttft_s: float | None, slo_tpot_s: float | None, tell: Tell) -> tuple[Run, dict[str, Any]]:
    """The run and its summary, with the circumstances in it."""
    if (slo_ttft_s is not None or slo_tpot_s is not None) and not target.stream:
        raise InputError("an SLO of TTFT or TPOT needs streamed answers. Leave --no-stream away")
    run = run_load(target, load, tell=tell)
    row = {"model": target.model, "endpoint": target.endpoint, "stream": target.stream, "load": load.describe, "seed": load.seed}
    row |= summarize(run, slo_ttft_s=slo_ttft_s, slo_tpot_s=slo_tpot_s)
    return run, row
