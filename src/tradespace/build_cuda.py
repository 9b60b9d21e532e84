"""Plan → engine on a CUDA device, in the order in which the budget wants it.

    context    the driver's own, the libraries', and what Triton's kernels take once they are loaded
    weights    allocated at their final size, packed, then filled tensor by tensor (or drawn at random)
    buffers    of the largest step, and what a step reads and leaves
    rehearsal  the largest mixed step on a few blocks of cache: whatever a library takes on first use is taken here
    cache      what the plan says, or what the budget leaves if that is less
    graphs     a decode step for each number of sequences, a mixed one for some numbers of tokens

The allocator is then held to the budget: a step that wanted more would fail instead of going over it. Nothing does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tradespace.build import check_runs, fit_cache, load_files
from tradespace.cost import calibration
from tradespace.engine.device_runner import DeviceRunner
from tradespace.engine.overlapped import OverlappedEngine
from tradespace.engine.request import Request, SamplingParams
from tradespace.engine.sampler import Sampler
from tradespace.engine.scheduler import Scheduler
from tradespace.engine.step import ScheduledSequence, SlotUse, Step
from tradespace.errors import BudgetError, UnsupportedError
from tradespace.kernels.attention.dispatch import Choice
from tradespace.kernels.cuda_module import why_not
from tradespace.kernels.sample.device import OnDevice
from tradespace.kv.cache import KVCache
from tradespace.loading.random_weights import fill_random
from tradespace.loading.resolve import ModelFiles
from tradespace.loading.tokenizer import Tokenizer
from tradespace.measure.device_memory import DeviceMeter
from tradespace.model.cuda_step import DeviceStep
from tradespace.model.transformer import Transformer
from tradespace.spec import cuda
from tradespace.spec.model import ModelSpec
from tradespace.spec.plan import Plan
from tradespace.units import format_bytes


@dataclass
class BuiltOnDevice:
    """As `build.Built`, on a device. `measured_bytes` are the driver's figures between the parts of the build, `seconds` what each part took."""

    engine: OverlappedEngine
    tokenizer: Tokenizer | None
    transformer: Transformer
    cache: KVCache
    spec: ModelSpec
    plan: Plan
    kernels: tuple[Choice, ...]
    meter: DeviceMeter
    measured_bytes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def build_on_device(
    spec: ModelSpec,
    files: ModelFiles | None,
    plan: Plan,
    *,
    tokenizer: Tokenizer | None,
    index: int = 0,
    on_load: Callable[[int, int], None] | None = None,
    on_step: Callable[[Step, float], None] | None = None,
    on_capture: Callable[[int, int], None] | None = None,
    meter: DeviceMeter | None = None,
) -> BuiltOnDevice:
    """The engine for `plan` (a CUDA plan) inside plan.memory_bytes of device `index`. files None: random weights.

    Raises UnsupportedError for a plan with parts that nothing implements, BudgetError (need, have, remedy) where the measured process leaves too little.
    """
    check_runs(plan, spec)
    if reason := cuda.refusal(spec, plan.kv):
        raise UnsupportedError(f"{spec.name}: {reason}")
    meter = meter or DeviceMeter.start(index)
    device = torch.device("cuda", index)
    measured: dict[str, int] = {}
    seconds: dict[str, float] = {}
    clock = time.perf_counter

    def phase(name: str, since: tuple[float, int]) -> tuple[float, int]:
        torch.cuda.synchronize(device)
        now = clock(), meter.used_bytes()
        seconds[name], measured[name] = now[0] - since[0], now[1] - since[1]
        return now

    torch.cuda.set_device(device)
    at = clock(), 0
    torch.ones(1, device=device)
    at = phase("context", at)
    choices = tuple(Choice("paged") for _ in spec.layers)
    transformer = Transformer(spec, plan.weights, attention=choices, linear="cuda", max_context=plan.max_context, device=device)
    notes: list[str] = []
    if files is None:
        fill_random(transformer, progress=on_load)
    else:
        notes += load_files(transformer, files, spec, on_load, int(calibration.DEVICE_STAGING_BYTES.value))
    torch.cuda.empty_cache()
    at = phase("weights", at)
    step = DeviceStep(
        transformer,
        step_tokens=plan.step_tokens,
        logit_rows=plan.logit_rows,
        max_sequences=min(plan.max_sequences, plan.step_tokens),
        max_context=plan.max_context,
    )
    num_tokens = spec.V if tokenizer is None else min(tokenizer.vocab_size, spec.V)
    small = _cache(spec, plan, 4, device)
    step.bind(small)
    runner = DeviceRunner(step, small, plan, num_tokens=num_tokens)
    at = phase("buffers", at)
    rehearse(runner, plan)
    at = phase("rehearsal", at)
    if reason := why_not(device):
        notes.append(f"decode of one sequence runs in Triton's kernels, which are slower: {reason}")
    step.planes, runner.cache = (), small
    held = small.nbytes
    del small
    captured = cuda.captured_steps(spec, runner.max_sequences, plan.max_context, plan.step_tokens)
    reserve = int(calibration.GRAPH_BYTES.value) * captured + int(calibration.DEVICE_SLACK_BYTES.value)
    plan = fit_cache(spec, plan, left_bytes=plan.memory_bytes - at[1] + held - reserve, notes=notes)
    cache = _cache(spec, plan, plan.num_blocks, device)
    step.bind(cache)
    runner.cache = cache
    at = phase("kv cache", at)
    runner.capture(on_capture)
    at = phase("graphs", at)
    if at[1] > plan.memory_bytes:
        raise BudgetError(
            f"built, the engine takes {format_bytes(at[1])} on the device; the budget is {format_bytes(plan.memory_bytes)}. "
            f"Give --memory {format_bytes(at[1] * 1.02).replace(' ', '')}",
            need_bytes=at[1],
            have_bytes=plan.memory_bytes,
        )
    _hold(plan.memory_bytes - at[1], device)
    sampler = Sampler(num_tokens=num_tokens, kernel=OnDevice(runner.sampling))
    engine = OverlappedEngine(runner, Scheduler.from_plan(plan), sampler, tokenizer, on_step=on_step)
    return BuiltOnDevice(engine, tokenizer, transformer, cache, spec, plan, choices, meter, measured, seconds, notes)


def _hold(left_bytes: int, device: torch.device) -> None:
    """From now on the allocator gets at most `left_bytes` beyond what it has."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved(device) + max(0, left_bytes)) / total), device)


def _cache(spec: ModelSpec, plan: Plan, num_blocks: int, device: torch.device) -> KVCache:
    return KVCache(
        spec,
        plan.kv,
        num_blocks=num_blocks,
        block_size=plan.kv.block_slots(plan.max_context),
        dtype=torch.bfloat16,
        device=device,
        max_sequences=plan.max_sequences,
        max_context=plan.max_context,
    )


def rehearsal_lengths(tokens: int, max_context: int, max_sequences: int) -> list[int]:
    """The fewest prompts that fill a step of so many tokens, each as long as it may be.

    >>> rehearsal_lengths(16384, 4352, 256), rehearsal_lengths(32, 4352, 256), rehearsal_lengths(100, 10, 3)
    ([4352, 4352, 4352, 3328], [32], [10, 10, 10])
    """
    count = min(-(-tokens // max_context), max_sequences)
    return [min(max_context, tokens - max_context * index) for index in range(count)]


@torch.inference_mode()
def rehearse(runner: DeviceRunner, plan: Plan) -> None:
    """The largest mixed step, one of equal prompts, one of few tokens, and draws of every kind, on the first blocks of the cache."""
    size, blocks = runner.block_size, runner.cache.num_blocks
    greedy, drawn = SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, top_k=50, top_p=0.95, min_p=0.01, seed=0)
    whole = rehearsal_lengths(plan.step_tokens, plan.max_context, runner.max_sequences)
    few = rehearsal_lengths(min(plan.step_tokens, 32), plan.max_context, runner.max_sequences)
    # prompts of equal length are read in one call of a library, which leaves its output beside the step's buffers: as many tokens as there can be
    equal = [min(plan.max_context, plan.step_tokens // len(whole))] * len(whole)
    for lengths, params in ((few, greedy), (whole, drawn), (whole, greedy), (equal, greedy)):
        runner.prompts.expect(lengths)
        items = []
        for count in lengths:
            request = Request(id=f"rehearsal {len(items)}", prompt_ids=(0,) * count, params=params)
            request.blocks = tuple(index % blocks for index in range(-(-count // size)))
            items.append(ScheduledSequence(request, 0, count))
        runner.launch(Step(tuple(items), (), SlotUse(0, 0))).tokens()
    for rows in (1, 16, 32, cuda.FEW_ROWS, cuda.CODED_PASS):  # each is a kernel of its own
        if rows <= min(runner.model.logit_rows, plan.step_tokens):
            runner.model.logits_of(torch.zeros(rows, dtype=torch.int64, device=runner.device))
