"""What continuous batching gains over fixed batches of the same memory: 64 requests with a trace's lengths, same engine, same kernels, same cache bytes.

continuous  requests join and leave at every step (Orca, OSDI 2022); pages are taken as tokens need them
fixed       a batch is filled while nothing runs, each member reserving its own prompt + output; it runs until the last has ended, but members that have ended
            cost no compute (`engine/scheduler.py`, policy "fixed"): the best that fixed batches can be when lengths are known beforehand
padded      as a plain generate loop does it: each member has a region of the longest context, prompts are padded to the longest of the batch, and every row is
            computed until the longest output of the batch ends
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from tradespace.lab.common import Length, command_line, markdown_table, trace_lengths
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Figure, Record, new_record
from tradespace.units import format_bytes

if TYPE_CHECKING:
    from tradespace.llm import LLM

MODEL = "smollm2-135m"
REQUESTS, MAX_PROMPT, MAX_OUTPUT = 64, 512, 256
CACHE_REQUESTS = 16  # longest requests that the cache holds at once: the memory of every policy
POLICIES = ("continuous", "fixed", "padded")


def token_ids(row: int, count: int) -> list[int]:
    """A prompt of `count` tokens that no other row has."""
    return [(31 * row + 7 * column) % 4000 + 20 for column in range(count)]


def serve(llm: LLM, lengths: list[Length], *, padded: bool) -> list[tuple[int, ...]]:
    """The output tokens of all requests, as far as they were asked for."""
    import tradespace as ts

    if not padded:
        params = [ts.SamplingParams(max_tokens=length.output, temperature=0, ignore_eos=True) for length in lengths]
        return [done.output_ids for done in llm.generate([token_ids(row, length.prompt) for row, length in enumerate(lengths)], params)]
    found: list[tuple[int, ...]] = []
    for start in range(0, len(lengths), CACHE_REQUESTS):
        batch = lengths[start : start + CACHE_REQUESTS]
        prompt, output = max(length.prompt for length in batch), max(length.output for length in batch)
        params = ts.SamplingParams(max_tokens=output, temperature=0, ignore_eos=True)
        done = llm.generate([token_ids(start + row, prompt) for row in range(len(batch))], params)
        found += [completion.output_ids[: length.output] for completion, length in zip(done, batch, strict=True)]
    return found


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """All policies in turn over the same requests."""
    import tradespace as ts

    rounds = 1
    lengths = trace_lengths(24 if quick else REQUESTS, max_prompt=MAX_PROMPT, max_output=MAX_OUTPUT)
    context = MAX_PROMPT + MAX_OUTPUT
    with ts.open(MODEL, memory="4GiB", concurrency=CACHE_REQUESTS, context=context, weights="bf16") as first:
        base = replace(first.plan, kv=replace(first.plan.kv, layout="paged"), kv_tokens=CACHE_REQUESTS * context)
    tokens = sum(length.output for length in lengths)
    speeds: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    steps: dict[str, int] = {}
    answers: dict[str, list[tuple[int, ...]]] = {}
    cache_bytes: dict[str, float] = {}
    for _ in range(rounds):
        for policy in POLICIES:
            most = CACHE_REQUESTS if policy == "padded" else REQUESTS
            with ts.open(MODEL, plan=replace(base, max_sequences=most), scheduling="continuous" if policy == "continuous" else "fixed") as llm:
                serve(llm, lengths[:2], padded=False)  # warms up
                before = llm.engine.counters.steps
                start = time.perf_counter()
                answers[policy] = serve(llm, lengths, padded=policy == "padded")
                speeds[policy].append(tokens / (time.perf_counter() - start))
                steps[policy] = llm.engine.counters.steps - before
                cache_bytes[policy] = llm.report().line("kv cache").measured or 0
            say(f"{policy}: {speeds[policy][-1]:.0f} tok/s in {steps[policy]} steps")
    figures = {policy: Figure.of(values, "tok/s") for policy, values in speeds.items()}
    for other in POLICIES[1:]:
        figures[f"continuous over {other}"] = Figure.of([a / b for a, b in zip(speeds["continuous"], speeds[other], strict=True)], "ratio")
    equal = sum(a == b for a, b in zip(answers["continuous"], answers["fixed"], strict=True))
    rows = [
        {
            "requests": len(lengths),
            "output_tokens": tokens,
            "cache_bytes": max(cache_bytes.values()),
            "steps": steps,
            "requests_with_equal_tokens": equal,
        }
    ]
    notes = f"prompts and outputs of the conversation trace clipped to {MAX_PROMPT} and {MAX_OUTPUT}; {MODEL}, bf16"
    return new_record("batching", command=command_line(), device=this_machine(), repeats=rounds, figures=figures, rows=rows, notes=notes)


def markdown(record: Record) -> str:
    row = record.rows[0]
    header = ("policy", "tok/s", "steps", "continuous is faster by")
    rows = []
    for policy in POLICIES:
        ratio = record.figures.get(f"continuous over {policy}")
        rows.append((policy, f"{record.figures[policy].median:.0f}", f"{row['steps'][policy]:,}", f"{ratio.median:.2f}×" if ratio else ""))
    same = f"{row['requests_with_equal_tokens']} of {row['requests']} requests gave the same tokens continuously and in fixed batches"
    return (
        f"{markdown_table(header, rows)}\n\n{row['requests']} requests, {row['output_tokens']:,} output tokens, the same cache of "
        f"{format_bytes(row['cache_bytes'])} for all; {same}. Fixed batches here reserve exactly what each request will need and stop computing a member "
        "that has ended; padded ones are what a plain generate loop does."
    )
