"""Plan → engine: the only place that turns choices into objects, in the order in which the budget wants them.

    runtime    the libraries' own memory, brought in by one tiny product and one tiny attention before anything is counted
    tokenizer
    weights    allocated at their final size, then filled through a bounded staging buffer, tensor by tensor
    rehearsal  the largest prefill step and the widest decode step the plan allows, on one block of cache, so that the workspace peaks here
    cache      what the plan says, or what the budget leaves after the rehearsal if that is less; touched at once

After that nothing large is allocated any more: the peak has been seen before the first request arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from tradespace.engine.engine import Engine
from tradespace.engine.runner import Runner
from tradespace.engine.sampler import Sampler
from tradespace.engine.scheduler import Scheduler
from tradespace.errors import BudgetError, UnsupportedError
from tradespace.kernels.attention.dispatch import resolve_kernels
from tradespace.kernels.view import Span
from tradespace.kv.cache import KVCache
from tradespace.loading.gguf import read_gguf
from tradespace.loading.resolve import ModelFiles
from tradespace.loading.safetensors import read_sharded
from tradespace.loading.tokenizer import Tokenizer
from tradespace.loading.weights import load_weights
from tradespace.model.transformer import Transformer
from tradespace.spec.device import DeviceSpec
from tradespace.spec.model import ModelSpec
from tradespace.spec.plan import Plan
from tradespace.spec.tensors import model_tensors
from tradespace.units import MiB, format_bytes

STAGING_BYTES = 16 * MiB
# what a sampled peak may miss, and what the allocator may keep between steps of unlike shapes
SAFETY_BYTES = 12 * MiB
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Built:
    """An engine that runs `plan` (as built: its cache may be smaller than asked), and what each part of it was measured to cost."""

    engine: Engine
    tokenizer: Tokenizer
    transformer: Transformer
    cache: KVCache
    spec: ModelSpec
    plan: Plan
    kernels: tuple[str, ...]
    measured_bytes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def build_engine(
    spec: ModelSpec,
    files: ModelFiles,
    plan: Plan,
    device: DeviceSpec,
    *,
    tokenizer: Tokenizer,
    now_bytes: Callable[[], int],
    peak_bytes: Callable[[str], int],
    on_load: Callable[[str, int], None] | None = None,
    scheduling: str = "continuous",
) -> Built:
    """Assembles the engine for `plan` inside plan.memory_bytes.

    now_bytes()       bytes that the process tree costs now
    peak_bytes(name)  ends a phase and returns its peak
    on_load(tensor, bytes)  progress of loading

    Raises UnsupportedError for a plan with parts that nothing implements, BudgetError (need, have, remedy) where the measured process leaves too little.
    """
    reasons = [*plan.cannot_run(), *([spec.plan_only] if spec.plan_only else [])]
    if reasons:
        raise UnsupportedError(f"this plan is priced but cannot run yet: {'; '.join(reasons)}. Run: tradespace plan {spec.name} --runnable")
    threads = plan.threads or device.cores or 1
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    measured: dict[str, int] = {}
    before = now_bytes()
    kernels, notes = _kernels(spec, plan)
    transformer = Transformer(spec, plan.weights, attention=kernels, linear=plan.linear, max_context=plan.max_context, device="cpu")
    source = read_gguf(files.weights[0]) if files.kind == "gguf" else read_sharded(files.folder)
    load_weights(transformer, source, spec, staging_bytes=STAGING_BYTES, progress=on_load)
    measured["weights"] = sum(weight_bytes(transformer).values())
    measured["loading"] = peak_bytes("loading") - before - measured["weights"]

    after_load = now_bytes()
    with _rehearsal_cache(spec, plan) as cache:
        rehearse(Runner(transformer, cache, plan), Sampler(plan), plan, spec)
    rehearsal_peak = max(peak_bytes("rehearsal"), after_load)
    measured["workspace"] = rehearsal_peak - after_load

    plan = fit_cache(spec, plan, left_bytes=plan.memory_bytes - rehearsal_peak - SAFETY_BYTES, notes=notes)
    cache = _cache(spec, plan, plan.num_blocks)
    measured["kv"] = cache.nbytes
    peak_bytes("build")
    runner = Runner(transformer, cache, plan)
    engine = Engine(runner, Scheduler.for_plan(plan, policy=scheduling), Sampler(plan), tokenizer)
    return Built(engine, tokenizer, transformer, cache, spec, plan, kernels, measured, notes)


def _kernels(spec: ModelSpec, plan: Plan) -> tuple[tuple[str, ...], list[str]]:
    """The attention kernel of each layer, and a note where a layer needs another one than the plan asks for."""
    kernels, reasons = resolve_kernels(spec, plan.attention, DTYPES[plan.weights.dense], "cpu")
    return kernels, list(reasons)


def weight_bytes(transformer: Transformer) -> dict[str, int]:
    """Bytes per role that the built module really holds."""
    roles = {tensor.name: tensor.role for tensor in model_tensors(transformer.spec)}
    found: dict[str, int] = {}
    for name, size in transformer.tensor_bytes().items():
        found[roles[name]] = found.get(roles[name], 0) + size
    return found


def _block_size(plan: Plan) -> int:
    return plan.kv.block_size if plan.kv.layout == "paged" else plan.max_context


def _cache(spec: ModelSpec, plan: Plan, num_blocks: int) -> KVCache:
    return KVCache(spec, plan.kv, num_blocks=num_blocks, block_size=_block_size(plan), dtype=DTYPES[plan.weights.dense], device="cpu")


@contextmanager
def _rehearsal_cache(spec: ModelSpec, plan: Plan) -> Iterator[KVCache]:
    """A cache for the rehearsal: two blocks that every table entry points at in turn, so that reading gathers as a scattered sequence does."""
    cache = _cache(spec, plan, 1 if plan.kv.layout == "contiguous" else min(2, plan.num_blocks))
    yield cache
    del cache


def rehearse(runner: Runner, sampler: Sampler, plan: Plan, spec: ModelSpec) -> None:
    """Runs the largest steps that the plan allows: a full prefill chunk at the end of the longest context, and a decode step of every sequence there."""
    size = _block_size(plan)
    count = -(-plan.max_context // size)
    # the last block first, so that the table is not one run of consecutive blocks and the gather is rehearsed, too
    last = runner.cache.num_blocks - 1
    table = tuple((last - index) % (last + 1) for index in range(count))
    chunk = min(plan.step_tokens, plan.max_context)
    runner.rehearse([Span(0, chunk, plan.max_context, table)], sampler)
    sequences = min(plan.max_sequences, plan.step_tokens)
    runner.rehearse([Span(row, 1, plan.max_context, table) for row in range(sequences)], sampler)


def fit_cache(spec: ModelSpec, plan: Plan, *, left_bytes: int, notes: list[str]) -> Plan:
    """`plan` with as much of its cache as `left_bytes` can hold: at least one sequence of max_context, else BudgetError."""
    from tradespace.spec.kv import token_bytes

    per_token = token_bytes(spec, plan.kv.store)
    size = _block_size(plan)
    need = -(-plan.max_context // size) * size * per_token
    if left_bytes < need:
        tokens = max(0, left_bytes) // (per_token * size) * size if plan.kv.layout == "paged" else 0
        remedy = f"--context {tokens}" if tokens else f"--memory {format_bytes(plan.memory_bytes + need - left_bytes).replace(' ', '')}"
        raise BudgetError(
            f"the cache for one sequence of {plan.max_context} tokens needs {format_bytes(need)}; {format_bytes(max(0, left_bytes))} are left of "
            f"{format_bytes(plan.memory_bytes)} once the process, the weights and the largest step have been measured. Fits with {remedy}",
            need_bytes=plan.memory_bytes + need - left_bytes,
            have_bytes=plan.memory_bytes,
        )
    wanted = plan.num_blocks * size
    tokens = min(wanted, left_bytes // (per_token * size) * size)
    if tokens == wanted:
        return plan
    notes.append(f"cache: {tokens:,} token slots instead of the planned {wanted:,}: the process measured larger than predicted")
    if plan.kv.layout == "contiguous":
        return replace(plan, max_sequences=tokens // size, kv_tokens=tokens)
    return replace(plan, kv_tokens=tokens)
