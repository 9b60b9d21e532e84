"""What pages waste, and what they cost. Waste: the engine's own scheduler and allocator driven over request lengths, without a model. Cost: decode speed
of a real model, paged against contiguous, interleaved. arXiv:2309.06180 claims under 4% waste, against 60–80% for contiguous reservations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tradespace.engine.request import Request, SamplingParams
from tradespace.engine.scheduler import Scheduler
from tradespace.lab.common import Length, command_line, markdown_table, trace_lengths, uniform_lengths
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Figure, Record, new_record
from tradespace.spec.kv import expected_waste

BLOCK = 16


def simulate(lengths: Sequence[Length], *, block_size: int, num_blocks: int, max_context: int, max_sequences: int, step_tokens: int = 512) -> Scheduler:
    """Runs the scheduler over requests of these lengths, as the engine would, with a token of no meaning for each that is sampled."""
    scheduler = Scheduler(num_blocks=num_blocks, block_size=block_size, max_sequences=max_sequences, max_context=max_context, step_tokens=step_tokens)
    for number, length in enumerate(lengths):
        scheduler.add(Request(id=str(number), prompt_ids=(0,) * length.prompt, params=SamplingParams(max_tokens=length.output, ignore_eos=True)))
    while scheduler.has_work:
        step = scheduler.schedule()
        accepted = {item.request.id: [0] for item in step.sequences if item.samples}
        ended = {item.request.id: "length" for item in step.sequences if item.samples and item.request.num_outputs + 1 >= item.request.params.max_tokens}
        scheduler.commit(step, accepted, ended)  # pyright: ignore[reportArgumentType]
    return scheduler


def mean_held(lengths: Sequence[Length]) -> float:
    """Tokens that a sequence holds, averaged over its decode steps and weighted by how many it has: what the formula calls the mean length."""
    held = sum((2 * length.prompt + length.output - 1) * length.output / 2 for length in lengths)
    return held / sum(length.output for length in lengths)


def waste_rows(quick: bool) -> list[dict[str, object]]:
    """Time-averaged share of allocated slots that hold nothing: both sets of lengths, both layouts."""
    count = 300 if quick else 2000
    found: list[dict[str, object]] = []
    for name, lengths in (("conversation trace", trace_lengths(count)), ("uniform 16–256", uniform_lengths(count, 16, 256))):
        longest = max(length.prompt + length.output for length in lengths)
        sequences = 32
        slots = sequences * longest
        paged = simulate(lengths, block_size=BLOCK, num_blocks=-(-slots // BLOCK), max_context=longest, max_sequences=sequences)
        contiguous = simulate(lengths, block_size=longest, num_blocks=sequences, max_context=longest, max_sequences=sequences)
        found.append(
            {
                "lengths": name,
                "requests": count,
                "mean_length": mean_held(lengths),
                "block_size": BLOCK,
                "paged_waste": paged.counters.slot_waste,
                "formula": expected_waste(mean_held(lengths), BLOCK),
                "contiguous_waste": contiguous.counters.slot_waste,
                "contiguous_region": longest,
            }
        )
    return found


def decode_speeds(quick: bool, say: Callable[[str], None]) -> dict[str, Figure]:
    """Decode tokens per second of SmolLM2, one sequence and sixteen, in both layouts, interleaved; and the paired ratio."""
    import tradespace as ts

    rounds, output = (3, 24) if quick else (7, 48)
    figures: dict[str, Figure] = {}
    for sequences in (1, 16):
        with ts.open("smollm2-135m", memory="4GiB", concurrency=sequences, context=1024, weights="bf16") as first:
            base = first.plan
        both = {layout: replace(base.kv, layout=layout, prefix_sharing=False) for layout in ("paged", "contiguous")}
        plans = {layout: replace(base, kv=kv, kv_tokens=sequences * 1024) for layout, kv in both.items()}
        opened = {layout: ts.open("smollm2-135m", plan=plan) for layout, plan in plans.items()}
        speeds: dict[str, list[float]] = {layout: [] for layout in opened}
        for turn in range(rounds + 1):
            for layout, llm in opened.items():
                prompts = [[(7 * row + turn + column) % 1000 + 100 for column in range(512)] for row in range(sequences)]
                llm.generate(prompts, ts.SamplingParams(max_tokens=output, temperature=0, ignore_eos=True))
                if turn:  # the first round warms up
                    speeds[layout].append(llm.speeds.decode_tokens_per_s or 0.0)
        for llm in opened.values():
            llm.close()
        for layout, values in speeds.items():
            figures[f"decode {layout} {sequences}"] = Figure.of(values, "tok/s")
        figures[f"paged over contiguous {sequences}"] = Figure.of([a / b for a, b in zip(speeds["paged"], speeds["contiguous"], strict=True)], "ratio")
        say(f"{sequences} sequences: paged runs at {figures[f'paged over contiguous {sequences}'].median:.2f} of the contiguous speed")
    return figures


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    rows = waste_rows(quick)
    figures = decode_speeds(quick, say)
    repeats = len(next(iter(figures.values())).values)
    notes = "waste: time-averaged over steps, weighted by slots; formula: (P-1)/2 over mean length + (P-1)/2; speed: context 512, SmolLM2-135M, bf16"
    return new_record("paging", command=command_line(), device=this_machine(), repeats=repeats, figures=figures, rows=rows, notes=notes)


def markdown(record: Record) -> str:
    header = ("lengths", "mean length", f"paged, blocks of {BLOCK}", "formula", "contiguous")
    rows = [
        (str(r["lengths"]), f"{r['mean_length']:.0f}", f"{r['paged_waste']:.2%}", f"{r['formula']:.2%}", f"{r['contiguous_waste']:.1%}") for r in record.rows
    ]
    ratios = [(name, figure) for name, figure in record.figures.items() if name.startswith("paged over")]
    costs = "; ".join(f"{name.rsplit(' ', 1)[1]} sequence(s) {f.median:.2f} [{f.min:.2f}–{f.max:.2f}]" for name, f in ratios)
    return f"{markdown_table(header, rows)}\n\nDecode speed, paged over contiguous (median [range] of paired ratios, context 512): {costs}."
