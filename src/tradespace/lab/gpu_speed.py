"""The GPU engine on an H100: decode, the request mixes that vLLM was measured with, prefill, start-up, memory under a flood, and a 70B model on 40 GB.

Random weights of the Llama-3-8B shape (speed does not depend on them), token-id prompts, greedy, a seed for the lengths. Every mix runs once untimed (the
longest does not: those before have warmed all that it uses), then `REPEATS` times. vLLM's figures are those of the issue, measured on another day on such a
card: here for orientation, not of this run.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tradespace.cost.memory import ledger
from tradespace.cost.time import decode_time, prefill_time
from tradespace.engine.request import SamplingParams
from tradespace.errors import TradespaceError, UnsupportedError
from tradespace.lab import gpu_peers
from tradespace.lab.common import command_line, commits_of, markdown_table
from tradespace.lab.experiments import GPU_PREDICTIONS
from tradespace.lab.gpu_peers import Peer, Request
from tradespace.measure.record import Figure, Record, new_record
from tradespace.spec.cuda import WHOLE_PROMPT_TOKENS
from tradespace.spec.device import DeviceSpec
from tradespace.spec.kv import KVPlan
from tradespace.spec.model import ModelSpec
from tradespace.spec.plan import Plan
from tradespace.spec.weights import WeightPlan
from tradespace.spec.workload import Workload
from tradespace.spec.zoo import find_model
from tradespace.units import GiB

REPEATS = 3
BLOCK = 32
FORMATS = (("bf16", "bf16"), ("int8", "bf16"), ("fp8", "bf16"), ("int4-g128", "bf16"))
ENGINES = {"mixes": ("bf16", "bf16", None), "fp8-mixes": ("fp8-a8", "fp8", "fp8")}  # of the mixes: weights, cache, vLLM's name of the weights
MIXES = ((256, 64, 512, 128), (1024, 64, 1024, 256), (512, 128, 128, 128))  # requests, shortest and longest prompt, output
DECODE_STEP = 8192  # tokens: all prompts of a decode are read in one step, else what reading them takes in pieces swings with how the pieces fall
LONG_MIX = 1024  # requests of a mix that is not run untimed
WARM_UP: Request = ([[10] * 64] * 4, 8)
SHORT, LONG = 8, 136  # tokens generated, between which decode is timed
GPT_FAST = ("bf16", "int8", "int4-g128")  # what gpt-fast has, too
PEER_CONTEXT = 8192
LONG_ROUNDS, PEER_LONG_ROUNDS = 3, 1  # of a long mix, which takes half a minute each time: by us and by a peer
BUDGETS = (8, 16, 24, 40, 70)  # GiB
CELLS = ((1, 128), (1, 2048), (1, 32_256), (16, 128), (16, 2048), (64, 1024), (256, 128), (256, 512))
# of the comparison with what the planner predicts, (sequences, prompt)
PREDICTED_TOKENS, PREDICTED_STEP = 48, 8192


def plan_for(spec: ModelSpec, weights: str, store: str, *, sequences: int, context: int, step: int, memory_bytes: int) -> Plan:
    """A CUDA plan whose cache holds all sequences at full length, or what the budget leaves. The embedding stays in bf16: only rows of it are read."""
    held = WeightPlan(default=weights, exceptions={} if weights == "bf16" else {"embed": "bf16"}, layout="cuda")
    return Plan(
        model=spec.name,
        weights=held,
        kv=KVPlan(store=store, block_size=BLOCK),
        attention="paged",
        linear="cuda",
        max_sequences=sequences,
        max_context=context,
        step_tokens=step,
        kv_tokens=sequences * -(-context // BLOCK) * BLOCK,
        device="h100-80gb",
        memory_bytes=memory_bytes,
    )


@dataclass(frozen=True)
class Job:
    """Work that is the same for every engine. Each of `rounds` is one request, or two that differ in how many tokens they are answered with: then what the
    second takes beyond the first counts. The first `untimed` rounds warm up.
    """

    what: str
    unit: str
    rounds: list[list[Request]]
    untimed: int = 1
    counts_prompts: bool = False  # tokens read count, not those generated

    def requests(self) -> list[Request]:
        return [request for each in self.rounds for request in each]

    def speeds(self, taken: Sequence[Sequence[float]]) -> list[float]:
        """Tokens a second of each timed round, from (seconds, tokens generated) of each request."""
        found, rest = [], iter(taken)
        for requests in self.rounds:
            pairs = [next(rest) for _ in requests]
            tokens = sum(map(len, requests[0][0])) if self.counts_prompts else pairs[-1][1] - (pairs[0][1] if len(pairs) > 1 else 0)
            found.append(tokens / (pairs[-1][0] - (pairs[0][0] if len(pairs) > 1 else 0.0)))
        return found[self.untimed :]


def peer_fields(peer: Peer, values: Sequence[float]) -> dict[str, Any]:
    """What a row says of a peer."""
    if peer.absent:
        return {"peer_absent": peer.absent}
    return {"peer": peer.name, "peer_settings": peer.settings, "peer_value": statistics.median(values), "peer_values": list(values)}


class Bench:
    """One built engine, timed."""

    def __init__(self, spec: ModelSpec, plan: Plan):
        from tradespace.build_cuda import build_on_device

        started = time.perf_counter()
        self.built = build_on_device(spec, None, plan, tokenizer=None)
        self.start_up_s = time.perf_counter() - started
        self.draw = random.Random(0)
        self.run(*WARM_UP)

    def prompts(self, count: int, shortest: int, longest: int) -> list[list[int]]:
        V = self.built.spec.V
        return [[self.draw.randrange(10, V - 10) for _ in range(self.draw.randint(shortest, longest))] for _ in range(count)]

    def run(self, prompts: Sequence[Sequence[int]], output: int) -> tuple[float, int]:
        """(seconds, tokens generated)."""
        import torch

        torch.cuda.synchronize()
        started = time.perf_counter()
        done = self.built.engine.generate(list(prompts), SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True))
        return time.perf_counter() - started, sum(len(completion.output_ids) for completion in done)

    def decode(self, sequences: int, prompt: int) -> list[float]:
        """tok/s between the 8th and the 136th token."""
        return self.speeds(self.decode_job(sequences, prompt))

    def decode_job(self, sequences: int, prompt: int) -> Job:
        def asked() -> list[list[int]]:
            return self.prompts(sequences, prompt, prompt)

        name = f"decode, {sequences} at once, context {prompt}"
        return Job(name, "tok/s", [[(asked(), SHORT), (asked(), LONG)] for _ in range(REPEATS + 1)])

    def mix_job(self, requests: int, shortest: int, longest: int, output: int) -> Job:
        prompts, long = self.prompts(requests, shortest, longest), requests >= LONG_MIX
        rounds: list[list[Request]] = [[(prompts, output)] for _ in range(LONG_ROUNDS if long else REPEATS + 1)]
        return Job(f"{requests} requests, prompts {shortest}-{longest}, {output} out", "out tok/s", rounds, untimed=0 if long else 1)

    def prefill_job(self, sequences: int, prompt: int) -> Job:
        rounds: list[list[Request]] = [[(self.prompts(sequences, prompt, prompt), 1)] for _ in range(REPEATS + 1)]
        return Job(f"prefill, {sequences} prompts of {prompt:,}", "tok/s", rounds, counts_prompts=True)

    def speeds(self, job: Job) -> list[float]:
        return job.speeds([self.run(*request) for request in job.requests()])

    def close(self) -> None:
        import torch

        del self.built
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)


def _row(part: str, what: str, weights: str, values: Sequence[float], unit: str, **more: Any) -> dict[str, Any]:
    spread = (max(values) - min(values)) / statistics.median(values) if len(values) > 1 else 0.0
    return {"part": part, "what": what, "weights": weights, "value": statistics.median(values), "spread": spread, "unit": unit, "values": list(values), **more}


def predicted_decode(spec: ModelSpec, plan: Plan, device: DeviceSpec, sequences: int, prompt: int, output: int) -> float:
    """The planner's tok/s of so many sequences together."""
    work = Workload(context_tokens=plan.max_context, concurrency=sequences, prompt_tokens=prompt, output_tokens=output, goal="throughput")
    return sequences / decode_time(spec, plan, device, work).seconds.require()


def predicted_prefill(spec: ModelSpec, plan: Plan, device: DeviceSpec, prompt: int) -> float:
    """The planner's tok/s of reading one prompt."""
    work = Workload(context_tokens=plan.max_context, prompt_tokens=prompt, output_tokens=1)
    return prompt / prefill_time(spec, plan, device, work).seconds.require()


def _beside(predicted: float, measured: float) -> dict[str, float]:
    return {"predicted": predicted, "off": predicted / measured - 1}


def _decodes(spec: ModelSpec, device: DeviceSpec, say: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = []
    for weights, store in FORMATS:
        bench = Bench(spec, plan_for(spec, weights, store, sequences=32, context=1024, step=DECODE_STEP, memory_bytes=40 * GiB))
        for sequences in (1, 32):
            job = bench.decode_job(sequences, 128)
            row = _row("decode", job.what, weights, bench.speeds(job), job.unit)
            rows.append(row | _beside(predicted_decode(spec, bench.built.plan, device, sequences, 128, LONG), row["value"]))
        rows.append(_row("decode", "start-up, random weights, kernels compiled on the way", weights, [bench.start_up_s], "s"))
        bench.close()
        bench = Bench(spec, plan_for(spec, weights, store, sequences=32, context=1024, step=DECODE_STEP, memory_bytes=40 * GiB))
        rows.append(_row("decode", "start-up, random weights, kernels compiled before", weights, [bench.start_up_s], "s"))
        bench.close()
        if weights in GPT_FAST:
            peer = gpu_peers.gpt_fast("llama-3-8b", weights, prompt=128 + SHORT, tokens=LONG - SHORT, rounds=REPEATS)
            rows[-4] |= peer_fields(peer, peer.answer or [])
            say(f"{peer.name}, {weights}: {peer.absent or ', '.join(f'{speed:.1f}' for speed in peer.answer)} tok/s")
        say(f"{weights}: " + ", ".join(f"{row['value']:.4g} {row['unit']}" for row in rows[-4:]))
    return rows


def _mixes(spec: ModelSpec, device: DeviceSpec, say: Callable[[str], None], part: str) -> list[dict[str, Any]]:
    """Decode, requests in mixes and prefill of one engine, and then of vLLM."""
    weights, store, quantization = ENGINES[part]
    bench = Bench(spec, plan_for(spec, weights, store, sequences=256, context=4352, step=16384, memory_bytes=75 * GiB))
    jobs = [bench.decode_job(1, 128), bench.decode_job(32, 128), *(bench.mix_job(*mix) for mix in MIXES), bench.prefill_job(8, 4096)]
    found = [_row(part, job.what, weights, bench.speeds(job), job.unit) for job in jobs]
    found[-1] |= _beside(predicted_prefill(spec, bench.built.plan, device, 4096), found[-1]["value"])
    bench.close()
    say(f"{weights}, cache {store}: " + ", ".join(f"{row['value']:,.0f}" for row in found))
    short = [replace(job, rounds=job.rounds[:PEER_LONG_ROUNDS]) if job.untimed == 0 else job for job in jobs]
    requests = [request for job in short for request in job.requests()]
    peer = gpu_peers.vllm(spec, quantization, [WARM_UP, *requests], max_sequences=256, max_context=PEER_CONTEXT)
    taken = iter((peer.answer or [])[1:])
    for row, job in zip(found, short, strict=True):
        row |= peer_fields(peer, job.speeds([next(taken) for _ in job.requests()]) if peer.answer else [])
    started = [_row(part, f"start-up of {peer.name}", weights, [peer.start_up_s], "s")] if peer.answer else []
    say(f"{peer.name}: " + (peer.absent or ", ".join(f"{row['peer_value']:,.0f}" for row in found)))
    return [*found, *started]


def _memory(spec: ModelSpec, device: DeviceSpec, requests: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Predicted against what the driver counts, under a flood."""
    rows = []
    for budget in BUDGETS:
        weights = "int4-g128" if budget == 8 else "int8" if budget == 16 else "bf16"
        plan = plan_for(spec, weights, "bf16", sequences=256, context=2048, step=2048, memory_bytes=budget * GiB)
        bench = Bench(spec, plan)
        plan = bench.built.plan
        seconds, tokens = bench.run(bench.prompts(requests, 16, 256), 16)
        used = bench.built.meter.used_bytes()
        predicted = ledger(spec, plan, device).total_bytes("device").require()
        parts = dict(bench.built.measured_bytes)
        row = _row("memory", f"{budget} GiB, {requests} requests at once", weights, [used / GiB], "GiB", predicted=predicted / GiB, budget=budget)
        rows.append(
            row | {"off": predicted / used - 1, "kept": used <= budget * GiB, "method": bench.built.meter.described, "parts": parts, "tok_s": tokens / seconds}
        )
        bench.close()
        say(f"{budget} GiB: {used / GiB:.2f} used, {predicted / GiB:.2f} predicted")
    return rows


def _predictions(spec: ModelSpec, device: DeviceSpec, say: Callable[[str], None], part: str) -> list[dict[str, Any]]:
    """The planner's speeds beside the measured, of one format of weights: decode of each cell of one sequence ("alone") or of several ("predictions"), and
    prefill where one prompt is read alone. Prompts that a library may read, which plans each shape when it comes again, are read once untimed."""
    rows = []
    kind, weights = part.split("-", 1)
    bench = Bench(spec, plan_for(spec, weights, "bf16", sequences=256, context=32_768, step=PREDICTED_STEP, memory_bytes=72 * GiB))
    plan = bench.built.plan
    for sequences, prompt in CELLS:
        if (sequences == 1) != (kind == "alone"):
            continue
        untimed = 1 if prompt >= WHOLE_PROMPT_TOKENS else 0
        pairs = [[bench.run(bench.prompts(sequences, prompt, prompt), tokens)[0] for tokens in (1, 1 + PREDICTED_TOKENS)] for _ in range(untimed + REPEATS)]
        first, all_tokens = zip(*pairs[untimed:], strict=True)
        decoded = sequences * PREDICTED_TOKENS / (statistics.median(all_tokens) - statistics.median(first))
        what = f"{sequences} at once, prompts of {prompt:,}"
        expected = predicted_decode(spec, plan, device, sequences, prompt, 1 + PREDICTED_TOKENS)
        rows.append(_row(part, f"decode, {what}", weights, [decoded], "tok/s") | _beside(expected, decoded))
        said = f"{weights}, {what}: {decoded:,.0f} tok/s ({rows[-1]['off']:+.0%})"
        if sequences == 1:
            row = _row(part, f"prefill, {what}", weights, [prompt / seconds for seconds in first], "tok/s")
            rows.append(row | _beside(predicted_prefill(spec, plan, device, prompt), row["value"]))
            said += f", prefill {row['value']:,.0f} ({rows[-1]['off']:+.0%})"
        say(said)
    bench.close()
    return rows


def _starts(spec: ModelSpec, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """`tradespace run` of a checkpoint of safetensors, from typing it to the first byte."""
    from tradespace.lab.gpu_start import start_rows

    return [
        _row("start-up", f"tradespace run, {row['nbytes'] / GiB:.1f} GiB of safetensors, kernels {row['what']}", "bf16", row["seconds"], "s")
        for row in start_rows(spec, "40GiB", say)
    ]


def _large(device: DeviceSpec, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Llama-2-70B's shape in int4 on 40 GB."""
    spec = find_model("llama-2-70b")
    bench = Bench(spec, plan_for(spec, "int4-g128", "int8", sequences=4, context=1024, step=512, memory_bytes=40 * 10**9))
    row = _row("70B", "llama-2-70b, decode of one sequence, context 128", "int4-g128", bench.decode(1, 128), "tok/s")
    rows = [row | _beside(predicted_decode(spec, bench.built.plan, device, 1, 128, 136), row["value"])]
    used = bench.built.meter.used_bytes()
    rows.append(_row("70B", "llama-2-70b, device bytes under 40 GB", "int4-g128", [used / 1e9], "GB", kept=used <= 40 * 10**9))
    bench.close()
    say(f"70B: {rows[0]['value']:.1f} tok/s in {rows[1]['value']:.1f} GB")
    return rows


def run(*, quick: bool, say: Callable[[str], None], only: Sequence[str]) -> Record:
    """Measures these parts; one that fails is a row that says why."""
    import torch

    from tradespace.llm_cuda import device_spec

    if not torch.cuda.is_available():
        raise UnsupportedError("gpu-speed measures a CUDA device, and torch sees none. `tradespace lab run cpu-speed` measures this CPU")
    device, spec = device_spec(0), replace(find_model("llama-3-8b"), max_context=40960)
    work: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "decode": lambda: _decodes(spec, device, say),
        "mixes": lambda: _mixes(spec, device, say, "mixes"),
        "fp8-mixes": lambda: _mixes(spec, device, say, "fp8-mixes"),
        "memory": lambda: _memory(spec, device, 200 if quick else 2000, say),
        "start-up": lambda: _starts(find_model("llama-3-8b"), say),
        "70B": lambda: _large(device, say),
    }
    work |= {part: partial(_predictions, spec, device, say, part) for part in GPU_PREDICTIONS}
    rows: list[dict[str, Any]] = []
    for part in only:
        try:
            rows += work[part]()
        except (TradespaceError, torch.OutOfMemoryError) as error:
            rows.append({"part": part, "what": "failed", "weights": "", "value": 0.0, "spread": 0.0, "unit": "", "error": str(error)})
            say(f"{part}: {error}")
        gc.collect()
        torch.cuda.empty_cache()
    figures = {f"{row['part']}:{row['what']} {row['weights']}": Figure.of(row["values"], row["unit"]) for row in rows if "error" not in row}
    return new_record("gpu-speed", command=command_line(), device=device, repeats=REPEATS, figures=figures, rows=rows)


def _written(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def markdown(record: Record) -> str:
    """One line a measurement, with a peer's figure where there is one; then which peers were absent, and why."""
    rows = []
    for row in record.rows:
        said = []
        if "peer" in row:
            said.append(f"{row['value'] / row['peer_value']:.2f} × {_written(row['peer_value'])} of {row['peer']}")
        if "predicted" in row:
            said.append(f"{_written(row['predicted'])} predicted ({row['off']:+.1%})")
        if "budget" in row:
            said.append(f"budget {'kept' if row['kept'] else 'EXCEEDED'}")
        rows.append((row["what"], row["weights"], f"{_written(row['value'])} {row['unit']}", f"{row['spread']:.1%}", row.get("error") or ", ".join(said)))
    table = markdown_table(("what", "weights", "measured", "spread", "beside"), rows)
    absent = dict.fromkeys(f"Beside {row['part']} in {row['weights']}: {row['peer_absent']}." for row in record.rows if "peer_absent" in row)
    return "\n\n".join(filter(None, (table, "\n".join(absent), commits_of(record.rows))))
