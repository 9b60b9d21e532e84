"""What HTTP costs: tokens a second of one batch through the server, whole and streamed, against the engine's own, in turn on the same plan."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable

from tradespace.errors import EngineError
from tradespace.lab.common import command_line, markdown_table
from tradespace.lab.serving.asking import Ask, Target
from tradespace.lab.serving.load import closed_loop
from tradespace.lab.serving.process import MODEL, Server
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Figure, Record, new_record

BATCH, PROMPT, CONTEXT, IDLE = 16, 64, 1024, 200
WORDS = ("--memory", "1200MiB", "--max-num-seqs", str(BATCH), "--context", str(CONTEXT), "--no-grammars")
ENGINE_MEMORY = "2500MiB"  # of which the server, a child of this process, counts for its 1200
BARS = {"whole": 0.95, "streamed": 0.85}


def through_http(target: Target, tokens: int, seed: int) -> tuple[float, float]:
    """Tokens a second of one batch, and the client's own share of a core meanwhile."""
    run = asyncio.run(closed_loop(target, [Ask(prompt=PROMPT, output=tokens)] * BATCH, concurrency=BATCH, seed=seed))
    made = [answer.output_tokens for answer in run.answers]
    if made != [tokens] * BATCH:
        raise EngineError(f"answers of {made} tokens, {tokens} wanted each: {[answer.error for answer in run.answers if answer.error]}")
    return sum(made) / run.wall_s, run.client_cpu_s / run.wall_s


async def idle_streams(target: Target, count: int) -> list[asyncio.StreamWriter]:
    """Connections that have streamed an answer, and stay open."""
    body = target.body_of(Ask(prompt=4, output=1), random.Random(0))
    head = f"POST {target.path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    found = []
    for _ in range(count):
        reader, writer = await asyncio.open_connection(target.address.host, target.address.port)
        writer.write(head + body)
        await reader.readuntil(b"data: [DONE]")
        await reader.readuntil(b"0\r\n\r\n")
        found.append(writer)
    return found


def with_idle(target: Target, idle: Target, tokens: int, seed: int) -> tuple[float, float]:
    """As `through_http`, beside IDLE idle streaming connections."""

    async def both() -> tuple[float, float]:
        writers = await idle_streams(idle, IDLE)
        run = await closed_loop(target, [Ask(prompt=PROMPT, output=tokens)] * BATCH, concurrency=BATCH, seed=seed)
        closed = sum(writer.transport.is_closing() for writer in writers)
        for writer in writers:
            writer.transport.abort()
        if closed:
            raise EngineError(f"{closed} of {IDLE} idle connections were closed while they were to be idle")
        return sum(answer.output_tokens for answer in run.answers) / run.wall_s, run.client_cpu_s / run.wall_s

    return asyncio.run(both())


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """The engine in this process and the server in its own, one after the other in rotated order."""
    import tradespace as ts

    rounds, tokens = (2, 32) if quick else (9, 192)
    params = ts.SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    speeds: dict[str, list[float]] = {name: [] for name in ("engine", "whole", "streamed", "idle")}
    client: dict[str, list[float]] = {name: [] for name in speeds}
    with Server(*WORDS) as server, ts.open(MODEL, memory=ENGINE_MEMORY, concurrency=BATCH, context=CONTEXT, goal="throughput") as llm:
        plan = server.get("/ready")[1]["plan"]
        if llm.plan.describe() != plan:
            raise EngineError(f"the engine runs {llm.plan.describe()} and the server {plan}: they must be the same to be compared")
        draw = random.Random(0)

        def engine(seed: int) -> tuple[float, float]:
            prompts = [[draw.randrange(100, 4000) for _ in range(PROMPT)] for _ in range(BATCH)]
            start = time.perf_counter()
            done = llm.generate(prompts, params)
            return sum(len(one.output_ids) for one in done) / (time.perf_counter() - start), 0.0

        whole, streamed = server.target(stream=False), server.target()
        ways: dict[str, Callable[[int], tuple[float, float]]] = {
            "engine": engine,
            "whole": lambda seed: through_http(whole, tokens, seed),
            "streamed": lambda seed: through_http(streamed, tokens, seed),
            "idle": lambda seed: with_idle(whole, streamed, tokens, seed),
        }
        for turn in range(rounds + 1):
            names = [*ways][turn % 4 :] + [*ways][: turn % 4]
            for name in names:
                speed, cpu = ways[name](turn)
                if turn:  # the first round warms up
                    speeds[name].append(speed)
                    client[name].append(cpu)
    figures = {name: Figure.of(values, "tok/s") for name, values in speeds.items()}
    ratios = {name: [a / b for a, b in zip(speeds[name], speeds["engine"], strict=True)] for name in ("whole", "streamed")}
    figures |= {f"{name} over engine": Figure.of(values, "ratio") for name, values in ratios.items()}
    figures["idle over whole"] = Figure.of([a / b for a, b in zip(speeds["idle"], speeds["whole"], strict=True)], "ratio")
    figures |= {f"client, {name}": Figure.of(client[name], "cores") for name in ("whole", "streamed")}
    for name, bar in BARS.items():
        say(f"{name}: {statistics.median(ratios[name]):.3f} of the engine's own (bar {bar}); the client took {statistics.median(client[name]):.1%} of a core")
    say(f"{IDLE} idle streaming connections: {figures['idle over whole'].median:.3f} of the tokens a second without")
    row = {"batch": BATCH, "prompt": PROMPT, "tokens": tokens, "plan": plan, "idle": IDLE, "bars": BARS}
    notes = f"{MODEL}, greedy; random prompts; client and server on the same machine"
    return new_record("serve-throughput", command=command_line(), device=this_machine(), repeats=rounds, figures=figures, rows=[row], notes=notes)


def markdown(record: Record) -> str:
    row, figures = record.rows[0], record.figures
    table = [("the engine alone", f"{figures['engine'].median:,.0f}", "", "", "")]
    for name, words in (("whole", "through HTTP, whole answers"), ("streamed", "through HTTP, streamed")):
        ratio, bar = figures[f"{name} over engine"], row["bars"][name]
        verdict = f"{bar:.0%} ({'kept' if ratio.median >= bar else 'MISSED'})"
        table.append((words, f"{figures[name].median:,.0f}", _spread(ratio), verdict, f"{figures[f'client, {name}'].median:.0%}"))
    table.append(
        (f"whole, beside {row['idle']} idle streaming connections", f"{figures['idle'].median:,.0f}", f"{_spread(figures['idle over whole'])} of whole", "", "")
    )
    head = (f"batch of {row['batch']}, {row['tokens']} tokens each", "tokens/s", "of the engine's own", "bar", "client, of a core")
    return markdown_table(head, table) + f"\n\nMedians of paired rounds; the client runs on the same cores. Plan: {row['plan']}."


def _spread(figure: Figure) -> str:
    return f"{figure.median:.1%} [{figure.min:.1%} – {figure.max:.1%}]"
