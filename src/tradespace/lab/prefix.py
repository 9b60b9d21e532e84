"""What shared prefixes gain: 64 requests that begin with the same 1,500 tokens. And what looking for them costs where nothing is shared.

Gain: time to first token of requests that come one after the other, with and without sharing; blocks in use when all come at once, against those that they
would need for themselves; and whether tokens stay the same. Cost: throughput over prompts that have nothing in common, with and without, in turn; and the
seconds of the scheduler alone, which shows what the first measurement's spread hides.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tradespace.engine.request import Request, SamplingParams
from tradespace.engine.scheduler import Scheduler
from tradespace.engine.sharing import Unshared
from tradespace.lab.common import command_line, markdown_table, trace_lengths
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Figure, Record, new_record
from tradespace.spec.kv import num_blocks as blocks_for

if TYPE_CHECKING:
    from tradespace.llm import LLM

MODEL = "smollm2-135m"
REQUESTS, PREFIX, OWN, OUTPUT = 64, 1500, 20, 8
CONTEXT = 1536
EVERY = 1  # every so manyth request is answered without sharing, too: each such answer computes the whole prompt
SOONER, MOST_COST = 10.0, 0.01  # what must be shown


def prompts(count: int, prefix: int, own: int) -> list[list[int]]:
    """`count` prompts of token ids with `prefix` tokens in common and `own` that are not."""
    draw = random.Random(prefix)
    common = [draw.randrange(20, 4000) for _ in range(prefix)]
    return [common + [draw.randrange(20, 4000) for _ in range(own)] for _ in range(count)]


def one_by_one(llm: LLM, several: Sequence[Sequence[int]], params: SamplingParams) -> tuple[list[float], list[tuple[int, ...]]]:
    """(seconds to the first token, output tokens) of requests each of which comes when the last has ended."""
    done = [llm.generate([prompt], params)[0] for prompt in several]
    return [completion.ttft_s or 0.0 for completion in done], [completion.output_ids for completion in done]


def all_at_once(llm: LLM, several: Sequence[Sequence[int]], params: SamplingParams) -> dict[str, Any]:
    """Most blocks in use at any step, most requests that ran, and the tokens of everyone."""
    engine = llm.engine
    requests = [engine.add(prompt, params) for prompt in several]
    used = running = computed = 0
    before = engine.counters.tokens
    while engine.has_work:
        engine.step()
        if len(engine.scheduler.running) >= running:
            running, used = len(engine.scheduler.running), max(used, engine.scheduler.allocator.num_used)
    computed = engine.counters.tokens - before
    return {"running": running, "blocks": used, "computed": computed, "outputs": [tuple(request.output_ids) for request in requests]}


def gain(quick: bool, say: Callable[[str], None]) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Times to first token, blocks and tokens."""
    import tradespace as ts

    count = 12 if quick else REQUESTS
    several = prompts(count, PREFIX, OWN)
    params = ts.SamplingParams(max_tokens=OUTPUT, temperature=0, ignore_eos=True)
    # 64 prompts of this length do not fit the cache unshared; shared they do
    with ts.open(MODEL, memory="2GiB", concurrency=8, context=CONTEXT, prefix_sharing=True) as llm:
        plan = replace(llm.plan, max_sequences=count, kv=llm.plan.kv)
        block = plan.kv.block_size
    with ts.open(MODEL, plan=plan) as llm:
        llm.generate([[7] * 40], params)  # warms up
        shared_s, shared = one_by_one(llm, several, params)
        say(f"shared: first request {shared_s[0]:.2f} s to its first token, the later ones {sorted(shared_s[1:])[count // 2] * 1000:.0f} ms")
        llm.engine.forget_prefixes()
        together = all_at_once(llm, several, params)
        say(f"all at once: {together['running']} run in {together['blocks']} blocks")
    with ts.open(MODEL, plan=replace(plan, kv=replace(plan.kv, prefix_sharing=False))) as llm:
        llm.generate([[7] * 40], params)
        alone_s, alone = one_by_one(llm, several[::EVERY], params)
    own = blocks_for(PREFIX + OWN + OUTPUT - 1, block) - PREFIX // block
    row = {
        "plan": plan.describe(),
        "requests": count,
        "prefix": PREFIX,
        "own": OWN,
        "output": OUTPUT,
        "block_size": block,
        "running": together["running"],
        "blocks": together["blocks"],
        "blocks_of_prefix": PREFIX // block,
        "blocks_of_their_own": own,
        "blocks_unshared": count * blocks_for(PREFIX + OWN + OUTPUT - 1, block),
        "tokens_computed": together["computed"],
        "tokens_unshared": count * (PREFIX + OWN + OUTPUT - 1),
        "compared": len(alone),
        "equal_one_by_one": sum(a == b for a, b in zip(alone, shared[::EVERY], strict=True)),
        "equal_at_once": sum(a == b for a, b in zip(shared, together["outputs"], strict=True)),
    }
    figures = {
        "first token, first request": Figure.of(shared_s[:1], "s"),
        "first token, later requests": Figure.of(shared_s[1:], "s"),
        "first token, without sharing": Figure.of(alone_s, "s"),
    }
    figures["sooner"] = Figure.of([figures["first token, without sharing"].median / later_s for later_s in shared_s[1:]], "ratio")
    return figures, row


def cost(quick: bool, say: Callable[[str], None]) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Throughput over prompts that share nothing, with and without sharing in turn: over that of the other, median of paired ratios."""
    import tradespace as ts

    rounds, count, prompt, output = (4, 4, 128, 16) if quick else (12, 8, 64, 16)
    speeds: dict[bool, list[float]] = {True: [], False: []}
    params = ts.SamplingParams(max_tokens=output, temperature=0, ignore_eos=True)
    draw = random.Random(1)
    with ts.open(MODEL, memory="2GiB", concurrency=count, context=256, prefix_sharing=True) as llm:
        scheduler = llm.engine.scheduler
        # one engine, switched between rounds while it has no work: two engines would differ by where their memory happens to lie, and by more than this
        ways = {True: scheduler.sharing, False: Unshared(scheduler.block_size)}
        for turn in range(rounds + 1):
            for on in (True, False) if turn % 2 else (False, True):
                several = [[draw.randrange(20, 4000) for _ in range(prompt)] for _ in range(count)]
                scheduler.sharing = ways[on]
                start = time.perf_counter()
                llm.generate(several, params)
                if turn:  # the first round warms up
                    speeds[on].append(count * (prompt + output) / (time.perf_counter() - start))
        hits = llm.engine.counters.prefix_cache_hits
        assert hits == 0, f"prompts that share nothing had {hits} hits"
    figures = {f"throughput, sharing {'on' if on else 'off'}": Figure.of(values, "tok/s") for on, values in speeds.items()}
    figures["throughput, on over off"] = Figure.of([a / b for a, b in zip(speeds[True], speeds[False], strict=True)], "ratio")
    say(f"nothing shared: {figures['throughput, on over off'].median:.3f} of the throughput without looking")
    return figures, {"requests": count, "prompt": prompt, "output": output}


def scheduler_seconds(*, sharing: bool, lengths: Sequence, seed: int) -> float:
    """Seconds per token of the scheduler alone, over requests of these lengths that share nothing."""
    draw = random.Random(seed)
    scheduler = Scheduler(num_blocks=2048, block_size=16, max_sequences=32, max_context=1024, step_tokens=512, prefix_sharing=sharing)
    for number, length in enumerate(lengths):
        ids = tuple(draw.randrange(4000) for _ in range(length.prompt))
        scheduler.add(Request(id=str(number), prompt_ids=ids, params=SamplingParams(max_tokens=length.output, ignore_eos=True, temperature=0)))
    start = time.perf_counter()
    while scheduler.has_work:
        step = scheduler.schedule()
        sampling = [item.request for item in step.sequences if item.samples]
        ended = {request.id: "length" for request in sampling if request.num_outputs + 1 >= request.params.max_tokens}
        scheduler.commit(step, {request.id: [draw.randrange(4000)] for request in sampling}, ended)  # pyright: ignore[reportArgumentType]
    return (time.perf_counter() - start) / scheduler.counters.tokens


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    lengths = trace_lengths(60 if quick else 200, max_prompt=512, max_output=256)
    more_s = []
    for turn in range(3 if quick else 5):
        without_s = scheduler_seconds(sharing=False, lengths=lengths, seed=turn)
        more_s.append(scheduler_seconds(sharing=True, lengths=lengths, seed=turn) - without_s)
    figures, row = gain(quick, say)
    costs, circumstances = cost(quick, say)
    figures |= costs
    figures["scheduler, more per token"] = Figure.of(more_s, "s")
    per_token_s = 1 / figures["throughput, sharing off"].median
    row |= {f"cost_{name}": value for name, value in circumstances.items()}
    row |= {"scheduler_share": figures["scheduler, more per token"].median / per_token_s, "sooner_wanted": SOONER, "cost_allowed": MOST_COST}
    say(f"scheduler: {figures['scheduler, more per token'].median * 1e6:.2f} µs more per token, {row['scheduler_share']:.2%} of a token's time")
    notes = f"{MODEL}, greedy; prompts of random token ids"
    return new_record("prefix", command=command_line(), device=this_machine(), repeats=row["compared"], figures=figures, rows=[row], notes=notes)


def markdown(record: Record) -> str:
    row, figures = record.rows[0], record.figures
    first, later, alone = (figures[f"first token, {who}"] for who in ("first request", "later requests", "without sharing"))
    ratio, share = figures["throughput, on over off"], row["scheduler_share"]
    verdict = "kept" if figures["sooner"].median >= row["sooner_wanted"] else "missed"
    header = ("", "without sharing", "with sharing", "")
    table = [
        ("first token of a later request", _ms(alone), _ms(later), f"{figures['sooner'].median:.1f}× sooner ({row['sooner_wanted']:.0f}× wanted: {verdict})"),
        ("first token of the first request", _ms(alone), f"{first.median * 1000:,.0f} ms", ""),
        (f"blocks for all {row['requests']} at once", f"{row['blocks_unshared']:,}", f"{row['blocks']:,}", f"{row['blocks_of_prefix']} of them the prefix's"),
        (f"tokens computed for all {row['requests']}", f"{row['tokens_unshared']:,}", f"{row['tokens_computed']:,}", ""),
    ]
    return (
        f"{markdown_table(header, table)}\n\n{row['requests']} requests that begin with the same {row['prefix']:,} tokens, {row['own']} of their own and "
        f"{row['output']} of output each, blocks of {row['block_size']}. Requests with the same tokens with and without sharing: {row['equal_one_by_one']} of "
        f"{row['compared']} that were answered both ways; coming one by one and all at once: {row['equal_at_once']} of {row['requests']}. Where nothing is "
        f"shared, throughput with sharing on is {ratio.median:.3f} [{ratio.min:.3f}–{ratio.max:.3f}] of that with sharing off; the scheduler alone takes "
        f"{figures['scheduler, more per token'].median * 1e6:.2f} µs more per token, {share:.2%} of a token's time "
        f"({row['cost_allowed']:.0%} allowed: {'kept' if share <= row['cost_allowed'] else 'missed'})."
    )


def _ms(figure: Figure) -> str:
    return f"{figure.median * 1000:,.0f} ms [{figure.min * 1000:,.0f}–{figure.max * 1000:,.0f}]"
