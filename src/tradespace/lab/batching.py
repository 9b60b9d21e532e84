"""What continuous batching gains over fixed batches of the same memory: 64 requests with a trace's lengths, same engine, same kernels, same cache.

Fixed batches reserve prompt + output for each member and run until the longest of them ends (`engine/scheduler.py`, policy "fixed"); continuous batching lets
requests join and leave at every step (Orca, OSDI 2022).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from tradespace.lab.common import command_line, markdown_table, trace_lengths
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Figure, Record, new_record
from tradespace.units import format_bytes

MODEL = "smollm2-135m"
REQUESTS, MAX_PROMPT, MAX_OUTPUT = 64, 512, 256
POLICIES = ("continuous", "fixed")


def run(*, quick: bool, say: Callable[[str], None], cache_requests: int = 16) -> Record:
    """Both policies in turn over the same requests. `cache_requests`: longest requests that the cache holds at once, the memory of both."""
    import tradespace as ts

    rounds = 1 if quick else 2
    lengths = trace_lengths(16 if quick else REQUESTS, max_prompt=MAX_PROMPT, max_output=MAX_OUTPUT)
    prompts = [[(31 * row + 7 * column) % 4000 + 20 for column in range(length.prompt)] for row, length in enumerate(lengths)]
    params = [ts.SamplingParams(max_tokens=length.output, temperature=0, ignore_eos=True) for length in lengths]
    with ts.open(MODEL, memory="4GiB", concurrency=cache_requests, context=MAX_PROMPT + MAX_OUTPUT, weights="bf16") as first:
        plan = replace(first.plan, max_sequences=REQUESTS)
    tokens = sum(length.output for length in lengths)
    speeds: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    steps: dict[str, int] = {}
    answers: dict[str, list[tuple[int, ...]]] = {}
    opened = {policy: ts.open(MODEL, plan=plan, scheduling=policy) for policy in POLICIES}
    for llm in opened.values():  # warms up
        llm.generate(prompts[:4], ts.SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    for _ in range(rounds):
        for policy, llm in opened.items():
            before = llm.engine.counters.steps
            start = time.perf_counter()
            done = llm.generate(prompts, params)
            elapsed = time.perf_counter() - start
            steps[policy] = llm.engine.counters.steps - before
            answers[policy] = [completion.output_ids for completion in done]
            speeds[policy].append(tokens / elapsed)
            say(f"{policy}: {tokens / elapsed:.0f} tok/s in {steps[policy]} steps")
    cache_bytes = opened["continuous"].report().line("kv cache").measured
    for llm in opened.values():
        llm.close()
    figures = {policy: Figure.of(values, "tok/s") for policy, values in speeds.items()}
    figures["continuous over fixed"] = Figure.of([a / b for a, b in zip(*(speeds[policy] for policy in POLICIES), strict=True)], "ratio")
    equal = sum(a == b for a, b in zip(answers["continuous"], answers["fixed"], strict=True))
    same_tokens = sum(x == y for a, b in zip(answers["continuous"], answers["fixed"], strict=True) for x, y in zip(a, b, strict=True))
    rows = [
        {
            "requests": len(lengths),
            "output_tokens": tokens,
            "cache_bytes": cache_bytes,
            "steps_continuous": steps["continuous"],
            "steps_fixed": steps["fixed"],
            "requests_with_equal_tokens": equal,
            "equal_tokens": same_tokens,
        }
    ]
    notes = f"prompts and outputs of the conversation trace clipped to {MAX_PROMPT} and {MAX_OUTPUT}; {MODEL}, bf16"
    return new_record("batching", command=command_line(), device=this_machine(), repeats=rounds, figures=figures, rows=rows, notes=notes)


def markdown(record: Record) -> str:
    row = record.rows[0]
    header = ("policy", "tok/s (median [range])", "steps")
    rows = []
    for policy in POLICIES:
        figure = record.figures[policy]
        rows.append((policy, f"{figure.median:.0f} [{figure.min:.0f}–{figure.max:.0f}]", f"{row[f'steps_{policy}']:,}"))
    ratio = record.figures["continuous over fixed"]
    same = f"{row['requests_with_equal_tokens']} of {row['requests']} requests gave the same tokens under both"
    return (
        f"{markdown_table(header, rows)}\n\nContinuous over fixed: {ratio.median:.2f}× [{ratio.min:.2f}–{ratio.max:.2f}], {row['requests']} requests, "
        f"{row['output_tokens']:,} output tokens, a cache of {format_bytes(row['cache_bytes'])} for both; {same}."
    )
