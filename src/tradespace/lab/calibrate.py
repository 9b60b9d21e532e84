"""What the cost model's "measured" constants are on this machine: bytes that libraries and the engine keep, shares of its rates that phases reach.

Each figure comes out of a process of its own. Bytes: growth of the proportional set size, once what is free has been given back. Shares: from a run's own
tok/s, less what its operations cost to start, against what the machine's measured rates would allow. `cost/calibration.py` states the values that the planner
uses; a test compares them with the record.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

from tradespace.cost import calibration
from tradespace.cost.time import native_kind
from tradespace.errors import EngineError
from tradespace.lab.common import command_line, markdown_table
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Figure, Record, new_record
from tradespace.units import MiB, format_bytes

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # SmolLM2-135M's, outputs × columns
MOST_ROWS = 2048
TOKENIZERS = ("smollm2-135m", "gemma3-270m")
# model, weights, attention, budget, context, sequences: cases of the leftover that no line explains
LEFTOVERS = (
    ("smollm2-135m", "bf16", "sdpa", "1GiB", 512, 1),
    ("smollm2-135m", "bf16", "sdpa", "1200MiB", 2048, 4),
    ("smollm2-135m", "int8", "sdpa", "800MiB", 512, 8),
    ("smollm2-135m", "int8", "native", "800MiB", 2048, 1),
    ("gemma3-270m", "bf16", "sdpa", "1500MiB", 1024, 2),
)
# weights, attention: whose shares of the rates are measured
SPEEDS = (("fp32", "sdpa"), ("bf16", "sdpa"), ("int8", "sdpa"), ("fp32", "native"), ("bf16", "native"), ("int8", "native"), ("q4_0", "native"))


def kind_of(attention: str) -> str:
    """What `cost/calibration.py` calls this machine under this attention kernel."""
    return native_kind(this_machine()) if attention == "native" else "cpu"


# ---------------------------------------------------------------------------------------------------------------- in a process of its own


def product_bytes(dtype_name: str) -> float:
    """Bytes kept per product of another shape or number of rows in bf16; of all of them in fp32."""
    import torch

    from tradespace.formats import DTYPES
    from tradespace.llm import settled_bytes
    from tradespace.measure.memory import limit_heap_growth
    from tradespace.spec.buckets import buckets_up_to

    limit_heap_growth()
    dtype = DTYPES[dtype_name]
    torch.set_num_threads(this_machine().cores or 1)
    with torch.inference_mode():
        torch.nn.functional.linear(torch.ones(64, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype))
        weights = [torch.ones(shape, dtype=dtype) for shape in SHAPES]
        before = settled_bytes()
        for weight_RC in weights:
            for rows in buckets_up_to(MOST_ROWS):
                torch.nn.functional.linear(torch.ones(rows, weight_RC.shape[1], dtype=dtype), weight_RC)
        grown = settled_bytes() - before
    return grown / (len(SHAPES) * len(buckets_up_to(MOST_ROWS))) if dtype_name == "bf16" else grown


def tokenizer_bytes(model: str) -> float:
    """Bytes per vocabulary entry."""
    import torch  # noqa: F401  (its pages are the runtime's, not the tokenizer's)

    from tradespace.llm import settled_bytes
    from tradespace.loading.resolve import resolve
    from tradespace.loading.tokenizer import Tokenizer

    files = resolve(model)
    before = settled_bytes()
    tokenizer = Tokenizer.from_files(files)
    return (settled_bytes() - before) / tokenizer.vocab_size


def sampler_bytes() -> float:
    """Bytes per logit that top-k and top-p sampling of penalized rows allocates at most, by torch's own record."""
    import torch

    from tradespace.engine.request import Request, SamplingParams
    from tradespace.engine.sampler import Sampler, SampleRow

    rows, V = 4, int(calibration.SAMPLER_LOGITS_AT_ONCE.value) // 4
    request = Request(id="r", prompt_ids=(0,), params=SamplingParams(temperature=1.0, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=0))
    logits_RV = torch.randn(rows, V)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.inference_mode(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        Sampler().sample(logits_RV, [SampleRow(request)] * rows)
    assert profile.profiler is not None and profile.profiler.kineto_results is not None, "it was profiled"
    events: list[Any] = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / (rows * V)


def leftover_bytes(model: str, weights: str, attention: str, memory: str, context: int, sequences: int) -> float:
    """The process's peak less what the ledger books for all that is not heap, with runtime and tokenizer as they were measured in this run."""
    import tradespace as ts

    with ts.open(model, memory=memory, weights=weights, attention=attention, context=context, concurrency=sequences) as llm:
        prompts = [[(31 * row + 7 * column) % 4000 + 20 for column in range(context * 3 // 4)] for row in range(sequences)]
        llm.generate(prompts, ts.SamplingParams(max_tokens=16, temperature=0, ignore_eos=True))
        report = llm.report()
    peak = report.line("peak of the process")
    known = ("runtime", "tokenizer")
    booked = peak.predicted.require() - sum(report.line(name).predicted.require() for name in (*known, "heap"))
    assert peak.measured is not None, "a run has a peak"
    return peak.measured - booked - sum(report.line(name).measured or 0.0 for name in known)


def shares(weights: str, attention: str) -> dict[str, float]:
    """Of the bandwidth in decode alone; of the matmul rate in decode of 16 sequences ("few rows") and in prefill of 512 tokens."""
    import tradespace as ts
    from tradespace.cost.time import decode_time, prefill_time
    from tradespace.spec.workload import Workload

    found: dict[str, float] = {}
    for phase, sequences in (("decode", 1), ("few rows", 16), ("prefill", 1)):
        with ts.open("smollm2-135m", memory="4GiB", weights=weights, attention=attention, concurrency=sequences, context=1024) as llm:
            prompt, output = (512, 2) if phase == "prefill" else (128, 48)
            measured_s = []
            for turn in range(4):
                prompts = [[(31 * row + 7 * column + turn) % 4000 + 20 for column in range(prompt)] for row in range(sequences)]
                llm.generate(prompts, ts.SamplingParams(max_tokens=output, temperature=0, ignore_eos=True))
                speed = llm.speeds.prefill_tokens_per_s if phase == "prefill" else llm.speeds.decode_tokens_per_s
                assert speed is not None, f"{phase} ran and was timed"
                if turn:  # the first round warms up
                    measured_s.append((prompt if phase == "prefill" else sequences) / speed)
            work = Workload(context_tokens=1024, concurrency=sequences, prompt_tokens=prompt, output_tokens=output)
            predict = prefill_time if phase == "prefill" else decode_time
            terms = dict(predict(llm.spec, llm.plan, this_machine(), work).terms)
            term = terms.get("bandwidth" if phase == "decode" else "compute", 0.0)
            kind = kind_of(attention)
            left_s = median(measured_s) - terms.get("overhead", 0.0)
            found[phase] = calibration.find_calibration(kind, weights, phase).efficiency * term / max(left_s, 1e-9)
    return found


# ---------------------------------------------------------------------------------------------------------------- the experiment


PARTS: dict[str, Callable[..., Any]] = {
    "product": product_bytes,
    "tokenizer": tokenizer_bytes,
    "sampler": sampler_bytes,
    "leftover": leftover_bytes,
    "shares": shares,
}


def measure(part: str, *arguments: object) -> Any:
    """One part, in a fresh process."""
    done = subprocess.run([sys.executable, "-m", "tradespace.lab.calibrate", part, json.dumps(arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"calibrating {part} {arguments} failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def byte_figures(say: Callable[[str], None], *, rounds: int) -> dict[str, Figure]:
    """What can be measured on a busy machine, too."""
    found = {
        "PRODUCT_KERNEL_BYTES": Figure.of([measure("product", "bf16") for _ in range(rounds)], "bytes"),
        "FP32_PRODUCT_BYTES": Figure.of([measure("product", "fp32") for _ in range(rounds)], "bytes"),
        "TOKENIZER_BYTES_PER_ENTRY": Figure.of([measure("tokenizer", model) for model in TOKENIZERS for _ in range(rounds)], "bytes"),
        "SAMPLER_BYTES_PER_LOGIT": Figure.of([measure("sampler")], "bytes"),
        "HEAP_BYTES": Figure.of([measure("leftover", *case) for case in LEFTOVERS], "bytes"),
    }
    for name, figure in found.items():
        say(f"{name}: {figure.median:,.0f} [{figure.min:,.0f} to {figure.max:,.0f}]")
    return found


def share_figures(say: Callable[[str], None], *, rounds: int) -> dict[str, Figure]:
    """What only a quiet machine can say."""
    found: dict[str, Figure] = {}
    for form, ours in (device := this_machine()).native_flops_per_s.items():
        found[f"NATIVE_OF_MATMUL {form}"] = Figure.of([ours.require() / device.flops_per_s(form).require()], "of the rate")
    for weights, attention in SPEEDS:
        kind = kind_of(attention)
        runs = [measure("shares", weights, attention) for _ in range(rounds)]
        for phase in runs[0]:
            figure = found[f"{kind} {weights} {phase}"] = Figure.of([run[phase] for run in runs], "of the rate")
            say(f"{kind} {weights} {phase}: {figure.median:.3f}")
    return found


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    rounds = 1 if quick else 2
    figures = byte_figures(say, rounds=rounds)
    if not quick:
        figures |= share_figures(say, rounds=1)  # each is a median of three turns already
    notes = (
        "shares of the machine's measured rates on SmolLM2-135M: of the bandwidth in decode, elsewhere of the matmul rate, or of the native kernels' own; "
        "NATIVE_OF_MATMUL: the latter of the former"
    )
    return new_record("calibration", command=command_line(), device=this_machine(), repeats=rounds, figures=figures, notes=notes)


def stated(name: str) -> float:
    """What `cost/calibration.py` states for a figure of the record."""
    if name.isupper():
        return float(getattr(calibration, name).value)
    if name.startswith("NATIVE_OF_MATMUL "):
        return calibration.NATIVE_OF_MATMUL[name.split()[1]].value
    kind, weights, phase = name.split(" ", 2)
    return calibration.find_calibration(kind, weights, phase).efficiency


def markdown(record: Record) -> str:
    rows = []
    for name, figure in record.figures.items():
        values = (figure.median, figure.min, figure.max, stated(name))
        large = figure.unit == "bytes" and figure.median >= MiB // 16
        cells = [format_bytes(value) if large else f"{value:.3g}" for value in values]
        rows.append((name, cells[0], f"{cells[1]} to {cells[2]}", cells[3]))
    return markdown_table(("constant", "measured", "spread", "in the cost model"), rows)


if __name__ == "__main__":
    print(json.dumps(PARTS[sys.argv[1]](*json.loads(sys.argv[2]))))
