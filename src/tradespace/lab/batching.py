"""What continuous batching gains over fixed batches of the same memory: 64 requests with a trace's lengths, same engine, same kernels, same cache bytes.

continuous  requests join and leave at every step (Orca, OSDI 2022); pages are taken as tokens need them
fixed       batches of as many requests as the cache has regions of the longest context; every row is computed until the longest output of its batch ends.
            Prompts are not padded, which is kinder than a generate loop is
padded      the same with prompts as long as the batch's longest, as a plain generate loop pads them; its tokens are other tokens
context     as fixed, with regions of the context that is planned where nobody says how long requests are: what an engine without pages reserves when it
            does not know the workload beforehand ("Orca (Max)" of arXiv:2309.06180)
reserved    the best that fixed batches can be, with all lengths known beforehand: a member takes its own prompt + output, and costs nothing once it has ended

What can be gained is bounded: where a step's time is that of its rows (a compute-bound CPU), the ratio is that of the rows computed, which the record states
as `rows`; it grows beyond that only as far as larger batches read the weights less often.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tradespace.lab.common import Length, command_line, markdown_table, trace_lengths
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Figure, Record, new_record
from tradespace.units import format_bytes

if TYPE_CHECKING:
    from tradespace.llm import LLM

MODEL = "smollm2-135m"
REQUESTS, MAX_PROMPT, MAX_OUTPUT = 64, 512, 256
POLICIES = ("continuous", "fixed", "padded", "context", "reserved")
PLANNED_CONTEXT = 2048  # tokens, of `open` and `run` without --context
# (weights, regions of the longest context that the cache holds): how the file holds them, and as most models are published
CASES = (("stored", 16), ("bf16", 4))


def token_ids(row: int, count: int) -> list[int]:
    """A prompt of `count` tokens that no other row has."""
    return [(31 * row + 7 * column) % 4000 + 20 for column in range(count)]


def serve(llm: LLM, lengths: list[Length], policy: str, regions: int) -> tuple[list[tuple[int, ...]], int]:
    """(the output tokens of all requests as far as they were asked for, rows that were computed)."""
    import tradespace as ts

    if policy in ("continuous", "reserved"):
        params = [ts.SamplingParams(max_tokens=length.output, temperature=0, ignore_eos=True) for length in lengths]
        done = llm.generate([token_ids(row, length.prompt) for row, length in enumerate(lengths)], params)
        return [completion.output_ids for completion in done], sum(length.prompt + length.output for length in lengths)
    found: list[tuple[int, ...]] = []
    rows = 0
    for start in range(0, len(lengths), regions):
        batch = lengths[start : start + regions]
        longest, output = max(length.prompt for length in batch), max(length.output for length in batch)
        params = ts.SamplingParams(max_tokens=output, temperature=0, ignore_eos=True)
        prompts = [token_ids(start + row, longest if policy == "padded" else length.prompt) for row, length in enumerate(batch)]
        done = llm.generate(prompts, [params] * len(batch))
        found += [completion.output_ids[: length.output] for completion, length in zip(done, batch, strict=True)]
        rows += sum(len(prompt) + output for prompt in prompts)
    return found, rows


def _case(weights: str, regions: int, lengths: list[Length], rounds: int, say: Callable[[str], None]) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Speeds of all policies, in turn, over one cache; and the row of the record."""
    import tradespace as ts

    context = MAX_PROMPT + MAX_OUTPUT
    with ts.open(MODEL, memory="4GiB", concurrency=regions, context=context, weights=weights) as first:
        base = replace(first.plan, kv=replace(first.plan.kv, layout="paged", block_size=16, prefix_sharing=False), kv_tokens=regions * context)
    tokens = sum(length.output for length in lengths)
    speeds: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    row: dict[str, Any] = {"weights": weights, "regions": regions, "requests": len(lengths), "output_tokens": tokens, "steps": {}, "rows": {}}
    answers: dict[str, list[tuple[int, ...]]] = {}
    for _ in range(rounds):
        for policy in POLICIES:
            most = {"fixed": regions, "padded": regions, "context": max(1, regions * context // PLANNED_CONTEXT)}.get(policy, len(lengths))
            with ts.open(MODEL, plan=replace(base, max_sequences=most), scheduling="continuous" if policy == "continuous" else "fixed") as llm:
                serve(llm, lengths[:2], "continuous", regions)  # warms up
                before = llm.engine.counters.steps
                start = time.perf_counter()
                answers[policy], row["rows"][policy] = serve(llm, lengths, policy, most)
                speeds[policy].append(tokens / (time.perf_counter() - start))
                row["steps"][policy] = llm.engine.counters.steps - before
                row["cache_bytes"] = llm.report().line("kv cache").measured
                row["plan"] = llm.plan.describe()
            say(f"{weights}, {regions} regions, {policy}: {speeds[policy][-1]:.0f} tok/s in {row['steps'][policy]} steps")
    row["requests_with_equal_tokens"] = sum(len(set(same)) == 1 for same in zip(*(answers[policy] for policy in POLICIES if policy != "padded"), strict=True))
    return speeds, row


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """All cases, all policies in turn over the same requests."""
    rounds = 1  # of five policies over the same requests; their order within a round is fixed
    lengths = trace_lengths(24 if quick else REQUESTS, max_prompt=MAX_PROMPT, max_output=MAX_OUTPUT)
    figures: dict[str, Figure] = {}
    rows = []
    for weights, regions in CASES[:1] if quick else CASES:
        speeds, row = _case(weights, regions, lengths, rounds, say)
        rows.append(row)
        name = f"{weights}, {regions} regions"
        figures |= {f"{name}: {policy}": Figure.of(values, "tok/s") for policy, values in speeds.items()}
        for other in POLICIES[1:]:
            ratios = [a / b for a, b in zip(speeds["continuous"], speeds[other], strict=True)]
            figures[f"{name}: continuous over {other}"] = Figure.of(ratios, "ratio")
    notes = f"prompts and outputs of the conversation trace clipped to {MAX_PROMPT} and {MAX_OUTPUT}; {MODEL}"
    return new_record("batching", command=command_line(), device=this_machine(), repeats=rounds, figures=figures, rows=rows, notes=notes)


def markdown(record: Record) -> str:
    header = ("weights", "cache", "policy", "tok/s", "steps", "rows computed", "continuous is faster by", "by rows alone")
    table = []
    for row in record.rows:
        name = f"{row['weights']}, {row['regions']} regions"
        for policy in row["steps"]:
            ratio = record.figures.get(f"{name}: continuous over {policy}")
            cells = (f"{record.figures[f'{name}: {policy}'].median:.0f}", f"{row['steps'][policy]:,}", f"{row['rows'][policy]:,}")
            more = (f"{ratio.median:.2f}×", f"{row['rows'][policy] / row['rows']['continuous']:.2f}×") if ratio else ("", "")
            table.append((row["weights"], format_bytes(row["cache_bytes"]), policy, *cells, *more))
    same = "; ".join(f"{row['requests_with_equal_tokens']} of {row['requests']}" for row in record.rows)
    return (
        f"{markdown_table(header, table)}\n\n{record.rows[0]['requests']} requests, {record.rows[0]['output_tokens']:,} output tokens; requests with the same "
        f'tokens under all policies that read the same prompts: {same}. "Fixed" computes every row until its batch\'s longest output ends; "padded" pads '
        f'prompts, too, as a plain generate loop does; "context" reserves {PLANNED_CONTEXT:,} tokens for each member, as an engine without pages does that '
        'knows no lengths; "reserved" knows all lengths beforehand and stops computing a member that has ended.'
    )
