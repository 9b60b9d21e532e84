"""Does the process stay inside its budget, and is its peak what was predicted? Each case is a fresh process, because a peak never falls.

The measured figure is the sampled proportional set size of the process tree (see `measure/memory.py`); beside it stands the kernel's own high-water mark of
the resident size, which we do not sample and cannot miss, and which counts pages shared with other processes in full.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from tradespace.errors import EngineError
from tradespace.lab.common import command_line, markdown_table, trace_lengths
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Figure, Record, new_record
from tradespace.units import format_bytes, parse_bytes

MODEL = "smollm2-135m"
BUDGETS = ("600MiB", "800MiB", "1200MiB")
# requests at once, longest prompt and output: mixed lengths out of the conversation trace, clipped
WORKLOADS = ((1, 512, 128), (1, 1792, 256), (8, 512, 96), (64, 384, 48))


def case(model: str, memory: str, requests: int, max_prompt: int, max_output: int) -> dict[str, Any]:
    """Runs one case in this process and returns what was predicted and measured, in bytes."""
    import tradespace as ts

    lengths = trace_lengths(requests, max_prompt=max_prompt, max_output=max_output)
    with ts.open(model, memory=memory, concurrency=requests, context=max_prompt + max_output) as llm:
        prompts = [[(31 * row + 7 * column) % 4000 + 20 for column in range(length.prompt)] for row, length in enumerate(lengths)]
        params = [ts.SamplingParams(max_tokens=length.output, temperature=0, ignore_eos=True) for length in lengths]
        done = llm.generate(prompts, params)
        report = llm.report()
        peak = report.line("peak of the process")
        return {
            "model": model,
            "memory": memory,
            "requests": requests,
            "weights": llm.plan.weights.describe(),
            "kv_tokens": llm.plan.kv_tokens,
            "finished": sum(len(completion.output_ids) == length.output for completion, length in zip(done, lengths, strict=True)),
            "preemptions": sum(completion.num_preemptions for completion in done),
            "predicted_bytes": peak.predicted.value,
            "measured_bytes": peak.measured,
            "peak_rss_bytes": report.line("peak resident size").measured,
            "lines": report.to_dict()["lines"],
            "phases": dict(llm.phases),
        }


def run_case(model: str, memory: str, requests: int, max_prompt: int, max_output: int) -> dict[str, Any]:
    """The same in a fresh process."""
    arguments = json.dumps([model, memory, requests, max_prompt, max_output])
    done = subprocess.run([sys.executable, "-m", "tradespace.lab.memory", arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"the case {arguments} failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    repeats = 1
    rows, figures = [], {}
    for memory in BUDGETS:
        for workload in WORKLOADS:
            runs = [run_case(MODEL, memory, *workload) for _ in range(repeats)]
            budget = parse_bytes(memory)
            name = f"{memory}, {workload[0]} requests"
            figures[f"{name}: measured"] = Figure.of([run["measured_bytes"] for run in runs], "bytes")
            figures[f"{name}: predicted"] = Figure.of([run["predicted_bytes"] for run in runs], "bytes")
            row = {key: value for key, value in runs[0].items() if key not in ("lines", "phases")} | {"budget_bytes": budget}
            row |= {"longest": f"{workload[1]} + {workload[2]}"}
            for key in ("measured_bytes", "predicted_bytes", "peak_rss_bytes"):
                row[f"worst_{key}"] = max(run[key] for run in runs)
            row["worst_error"] = max((run["measured_bytes"] / run["predicted_bytes"] - 1 for run in runs), key=abs)
            row["lines"] = runs[0]["lines"]
            rows.append(row)
            say(f"{name}: {format_bytes(row['worst_measured_bytes'])} measured, {row['worst_error']:+.1%} off the prediction")
    notes = "measured: sampled PSS of the process tree, worst of the repeats; resident: the kernel's high-water mark"
    return new_record("memory", command=command_line(), device=this_machine(), repeats=repeats, figures=figures, rows=rows, notes=notes)


def markdown(record: Record) -> str:
    header = ("budget", "requests at once", "plan", "cache slots", "predicted peak", "measured peak", "difference", "peak resident", "kept")
    rows = []
    for r in record.rows:
        kept = max(r["worst_measured_bytes"], r["worst_peak_rss_bytes"]) <= r["budget_bytes"]
        sizes = [format_bytes(r[key]) for key in ("predicted_bytes", "worst_measured_bytes")]
        name = f"{r['requests']} (≤ {r['longest']} tokens)"
        plan = f"{r['weights']}"
        rows.append(
            (
                r["memory"],
                name,
                plan,
                f"{r['kv_tokens']:,}",
                *sizes,
                f"{r['worst_error']:+.1%}",
                format_bytes(r["worst_peak_rss_bytes"]),
                "yes" if kept else "NO",
            )
        )
    return markdown_table(header, rows, left=3)


if __name__ == "__main__":
    print(json.dumps(case(*json.loads(sys.argv[1]))))
