"""How fast prefill and decode are on this machine, against what the roofline predicts, over formats, batch sizes and contexts."""

from __future__ import annotations

from collections.abc import Callable

from tradespace.lab.common import command_line, markdown_table
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Figure, Record, new_record

MODEL = "smollm2-135m"
# attention (which brings its products along), format, sequences at once, prompt tokens
CASES = (
    ("native", "stored", 1, 128),
    ("native", "stored", 1, 512),
    ("native", "stored", 16, 128),
    ("native", "int8", 1, 128),
    ("native", "bf16", 1, 128),
    ("native", "bf16", 1, 512),
    ("native", "bf16", 16, 128),
    ("native", "fp32", 1, 128),
    ("sdpa", "bf16", 1, 128),
    ("sdpa", "bf16", 1, 512),
    ("sdpa", "bf16", 16, 128),
    ("sdpa", "int8", 1, 128),
)
OUTPUT = 48


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    import tradespace as ts

    rounds = 2 if quick else 3
    figures: dict[str, Figure] = {}
    rows = []
    for kernel, weights, sequences, prompt in CASES:
        with ts.open(MODEL, memory="4GiB", weights=weights, attention=kernel, concurrency=sequences, context=1024) as llm:
            speeds: dict[str, list[float]] = {"prefill": [], "decode": []}
            for turn in range(rounds + 1):
                prompts = [[(31 * row + 7 * column + turn) % 4000 + 20 for column in range(prompt)] for row in range(sequences)]
                llm.generate(prompts, ts.SamplingParams(max_tokens=OUTPUT, temperature=0, ignore_eos=True))
                report = llm.report()
                if turn:
                    for phase, values in speeds.items():
                        measured = report.line(phase).measured
                        assert measured is not None, f"{phase} ran and was timed"
                        values.append(measured)
            report = llm.report()
            name = f"{kernel}, {weights}, {sequences} × {prompt}"
            row: dict[str, object] = {
                "kernel": kernel,
                "plan": llm.plan.describe(),
                "weights": weights,
                "sequences": sequences,
                "prompt": prompt,
                "output": OUTPUT,
            }
            for phase, values in speeds.items():
                figures[f"{name}: {phase}"] = Figure.of(values, "tok/s")
                row[f"predicted_{phase}"] = report.line(phase).predicted.value
                row[f"source_{phase}"] = report.line(phase).predicted.source
            rows.append(row)
            say(f"{name}: prefill {figures[f'{name}: prefill'].median:.0f}, decode {figures[f'{name}: decode'].median:.0f} tok/s")
    return new_record("speed", command=command_line(), device=this_machine(), repeats=rounds, figures=figures, rows=rows, notes=f"{MODEL}, greedy")


def markdown(record: Record) -> str:
    header = ("kernels", "weights", "sequences × prompt", "prefill tok/s", "predicted", "decode tok/s", "predicted")
    rows = []
    for r in record.rows:
        name = f"{r['kernel']}, {r['weights']}, {r['sequences']} × {r['prompt']}"
        cells = [{"sdpa": "torch"}.get(r["kernel"], r["kernel"]), str(r["weights"]), f"{r['sequences']} × {r['prompt']}"]
        for phase in ("prefill", "decode"):
            figure = record.figures[f"{name}: {phase}"]
            cells += [f"{figure.median:,.0f} [{figure.min:,.0f}–{figure.max:,.0f}]", f"{r[f'predicted_{phase}']:,.0f}"]
        rows.append(tuple(cells))
    return markdown_table(header, rows, left=3)
