"""Plan → engine: the only place that turns choices into objects, in the order in which the budget wants them.

    runtime    the libraries' own memory, brought in by one tiny product and one tiny attention before anything is counted
    tokenizer
    weights    allocated at their final size, then filled through a bounded staging buffer, tensor by tensor
    rehearsal  the largest prefill step and the widest decode step the plan allows, on one block of cache, so that the workspace peaks here
    cache      what the plan says, or what the budget leaves after the rehearsal if that is less; touched at once

After that nothing large is allocated any more: the peak has been seen before the first request arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from tradespace.adapt.lora import LoraWeight, adapter_names
from tradespace.adapt.peft_files import load_adapter
from tradespace.cost import calibration
from tradespace.engine.engine import Engine
from tradespace.engine.request import Request, SamplingParams
from tradespace.engine.runner import Runner
from tradespace.engine.sampler import Sampler, SampleRow
from tradespace.engine.scheduler import Policy, Scheduler
from tradespace.engine.step import Step
from tradespace.errors import BudgetError, UnsupportedError
from tradespace.formats import DTYPES, Weight
from tradespace.kernels.attention.dispatch import Choice, resolve_kernels
from tradespace.kernels.sample.native import NativeSampling
from tradespace.kernels.view import Span, StepBatch, positions_of
from tradespace.kv.cache import KVCache
from tradespace.loading.gguf import read_gguf
from tradespace.loading.quantized import load_quantized
from tradespace.loading.resolve import ModelFiles
from tradespace.loading.safetensors import read_sharded
from tradespace.loading.tokenizer import Tokenizer
from tradespace.loading.weights import load_weights
from tradespace.model.rebuild import Rebuilding
from tradespace.model.recorded import Recorded
from tradespace.model.transformer import Transformer
from tradespace.quantize.rtn import fill_rtn
from tradespace.spec.buckets import buckets_up_to
from tradespace.spec.device import DeviceSpec
from tradespace.spec.kv import model_refusal, pointless, state_bytes, token_bytes
from tradespace.spec.kv_stores import STORES
from tradespace.spec.model import ModelSpec
from tradespace.spec.plan import Plan
from tradespace.spec.tensors import model_tensors
from tradespace.units import format_bytes

STAGING_BYTES = int(calibration.STAGING_BYTES.value)
RESERVE_BYTES = int(calibration.RESERVE_BYTES.value)
SHORT_STEP = 16  # tokens, at most, of a native step that is rehearsed


@dataclass
class Built:
    """An engine that runs `plan` (as built: its cache may be smaller than asked), and what each part of it was measured to cost."""

    engine: Engine
    tokenizer: Tokenizer
    transformer: Transformer
    cache: KVCache
    spec: ModelSpec
    plan: Plan
    kernels: tuple[Choice, ...]
    measured_bytes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    torch_threads: int = 1  # as they were before: for whoever closes the engine


def build_engine(
    spec: ModelSpec,
    files: ModelFiles,
    plan: Plan,
    device: DeviceSpec,
    *,
    tokenizer: Tokenizer,
    now_bytes: Callable[[], int],
    peak_bytes: Callable[[str], int],
    on_load: Callable[[int, int], None] | None = None,
    on_step: Callable[[Step, float], None] | None = None,
    scheduling: Policy = "continuous",
    adapters: Mapping[str, Path] | None = None,
) -> Built:
    """Assembles the engine for `plan` inside plan.memory_bytes.

    now_bytes()       bytes that the process tree costs now, once what is free has been given back
    peak_bytes(name)  ends a phase and returns its peak
    on_load(done, of) progress of loading, in stored bytes
    on_step           called after each step with it and its seconds
    adapters          folders of LoRA adapters in PEFT's format by name, held in fp32 beside the weights and chosen by each request

    Raises UnsupportedError for a plan with parts that nothing implements, BudgetError (need, have, remedy) where the measured process leaves too little.
    """
    check_runs(plan, spec)
    threads = plan.threads or device.cores or 1
    threads_before = torch.get_num_threads()
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    measured: dict[str, int] = {}
    peak_bytes("start")
    kernels = resolve_kernels(spec, plan.attention, DTYPES[plan.weights.dense], "cpu", weights=plan.kv.retain.evicts)
    transformer = Transformer(
        spec, plan.weights, attention=kernels, linear=plan.linear, activations=plan.activations, max_context=plan.max_context, device="cpu"
    )
    notes = list(load_files(transformer, files, spec, on_load))
    if adapters:
        check_adapters(plan)
        before = now_bytes()
        for name, folder in adapters.items():
            load_adapter(transformer, folder, name=name)
        measured["adapters"] = max(0, now_bytes() - before)
    after_load = now_bytes()
    measured["weights"] = sum(weight_bytes(transformer).values())
    measured["staging"] = max(0, peak_bytes("loading") - after_load)

    if plan.linear == "native":
        # a parallel operator of torch leaves a thread that spins for milliseconds, on a core that the next native step needs
        torch.set_num_threads(1)
    sampler = make_sampler(plan, num_tokens=min(tokenizer.vocab_size, spec.V), threads=threads)
    model = step_model(transformer, plan, threads)
    with _rehearsal_cache(spec, plan) as cache:
        if isinstance(model, Recorded):
            model.record(cache)
        else:
            compile_products(transformer, plan)
        measured["engine tensors"] = transformer.rope_nbytes + rehearse(model, cache, sampler, plan)
        rehearsal_peak = max(peak_bytes("rehearsal") - cache.nbytes, after_load)
        if isinstance(model, Recorded):
            model.forget()
    del cache
    now_bytes()
    measured["workspace"] = rehearsal_peak - after_load

    notes += [f"layer {index}: {choice.kernel} instead of {plan.attention}: {choice.reason}" for index, choice in enumerate(kernels) if choice.reason]
    plan = fit_cache(spec, plan, left_bytes=plan.memory_bytes - rehearsal_peak - RESERVE_BYTES, notes=notes)
    cache = _cache(spec, plan, plan.num_blocks)
    measured["kv cache"] = cache.nbytes
    if isinstance(model, Recorded):
        model.record(cache)
    peak_bytes("build")
    engine = Engine(
        Runner(model, cache, plan, adapters=adapter_names(transformer)), Scheduler.from_plan(plan, policy=scheduling), sampler, tokenizer, on_step=on_step
    )
    return Built(engine, tokenizer, transformer, cache, spec, plan, kernels, measured, notes, threads_before)


def make_sampler(plan: Plan, *, num_tokens: int, threads: int) -> Sampler:
    """Tokens of a native plan are chosen by the native kernel on the step's own threads, those of any other plan by torch."""
    if plan.linear == "native":
        return Sampler(num_tokens=num_tokens, kernel=NativeSampling(vocab_size=num_tokens, max_rows=plan.logit_rows, threads=threads))
    return Sampler(num_tokens=num_tokens)


def step_model(transformer: Transformer, plan: Plan, threads: int) -> Transformer | Recorded | Rebuilding:
    """What computes a step: the model itself, its native recording, or what rebuilds keys and values that the cache does not keep."""
    if plan.linear == "native":
        return Recorded(transformer, step_tokens=plan.step_tokens, logit_rows=plan.logit_rows, threads=threads)
    return Rebuilding(transformer) if plan.kv.retain.rebuilds else transformer


def load_files(
    transformer: Transformer, files: ModelFiles, spec: ModelSpec, on_load: Callable[[int, int], None] | None, staging_bytes: int = STAGING_BYTES
) -> tuple[str, ...]:
    """Fills the model from its files through a buffer of `staging_bytes`; notes on what is not held as it was stored."""
    if files.kind == "gguf":
        load_weights(transformer, read_gguf(files.weights[0]), spec, fill=fill_rtn, staging_bytes=staging_bytes, progress=on_load)
        return ()
    source = read_sharded(files.folder)
    if spec.quantization and files.config is not None:
        return load_quantized(transformer, source, spec, config=files.config, fill=fill_rtn, staging_bytes=staging_bytes, progress=on_load)
    load_weights(transformer, source, spec, fill=fill_rtn, staging_bytes=staging_bytes, progress=on_load)
    return ()


def check_runs(plan: Plan, spec: ModelSpec) -> None:
    """Raises UnsupportedError naming every part of the plan, or of the model, that nothing implements yet."""
    reasons = [*plan.cannot_run(), *([spec.plan_only] if spec.plan_only else [])]
    if not reasons and (found := model_refusal(spec, plan.kv) or pointless(spec, plan.kv)):
        raise UnsupportedError(found)
    if reasons:
        raise UnsupportedError(f"this plan is priced but cannot run yet: {'; '.join(reasons)}. Run: tradespace plan {spec.name} --runnable")


def check_adapters(plan: Plan) -> None:
    """Raises UnsupportedError for a plan whose steps pass adapters by."""
    if plan.linear == "native":
        raise UnsupportedError("the native step multiplies packed weights and takes no adapters. Plan with linear torch, or merge the adapter into the model")
    if plan.kv.retain.rebuilds or STORES[plan.kv.store].of_input:
        raise UnsupportedError(f"a cache of {plan.kv.describe()} computes keys and values again, without adapters. Plan another --kv-store and --kv-retain")


def weight_bytes(transformer: Transformer) -> dict[str, int]:
    """Bytes per role that the built module really holds."""
    found: dict[str, int] = {}
    for tensor in model_tensors(transformer.spec):
        stem, kind = tensor.name.rsplit(".", 1)
        module = transformer.get_submodule(stem)
        # a format's module counts its codes and scales itself; norms and biases are plain tensors
        held = module if kind == "weight" and isinstance(module, Weight | LoraWeight) else module.get_parameter(kind)
        found[tensor.role] = found.get(tensor.role, 0) + int(held.nbytes)  # pyright: ignore[reportArgumentType]
    return found


def _cache(spec: ModelSpec, plan: Plan, num_blocks: int) -> KVCache:
    order = "tiles" if plan.linear == "native" else "slots"
    return KVCache(
        spec,
        plan.kv,
        num_blocks=num_blocks,
        block_size=plan.kv.block_slots(plan.max_context),
        dtype=DTYPES[plan.weights.dense],
        device="cpu",
        order=order,
        max_sequences=plan.max_sequences,
        max_context=plan.max_context,
    )


@contextmanager
def _rehearsal_cache(spec: ModelSpec, plan: Plan) -> Iterator[KVCache]:
    """A cache for the rehearsal: a few blocks that every table entry points at in turn, so that reading gathers as a scattered sequence does."""
    yield _cache(spec, plan, 1 if plan.kv.layout == "contiguous" else min(2, plan.num_blocks))


@torch.inference_mode()
def compile_products(transformer: Transformer, plan: Plan) -> None:
    """One product of every shape and bucket of rows that a step can meet: what the library compiles for them is then there, and counted."""
    head = transformer.embed if transformer.spec.tied else transformer.lm_head
    weights = {}
    for module in transformer.layers.modules():
        if isinstance(module, Weight):
            weights[module.format_name, module.shape] = (module, plan.step_tokens)
    if isinstance(head, Weight):
        weights["head"] = (head, min(plan.max_sequences, plan.step_tokens))
    for module, most_rows in weights.values():
        if len(module.shape) == 2:
            for rows in buckets_up_to(most_rows):
                module.linear(torch.zeros(rows, module.shape[-1], dtype=transformer.dtype))


@torch.inference_mode()
def rehearse(model: Transformer | Recorded | Rebuilding, cache: KVCache, sampler: Sampler, plan: Plan) -> int:
    """Runs the largest steps that the plan allows: a full prefill chunk at the end of the longest context, and a decode step of every sequence there.

    Returns the bytes of the steps' own tensors (ids, positions, slots, block tables), each at its largest.
    """
    size = plan.kv.block_slots(plan.max_context)
    last = cache.num_blocks - 1
    # descending, so that the table is not one run of consecutive blocks and the gather is rehearsed, too
    table = tuple((last - index) % (last + 1) for index in range(-(-plan.kv.retain.tokens(plan.max_context) // size)))
    sequences = min(plan.max_sequences, plan.step_tokens)
    drawn = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=0)  # adjusted rows are copied
    request = Request(id="rehearsal", prompt_ids=(0,) * max(1, plan.max_context - 1), params=drawn)
    largest = [0] * 6
    starts = range(0, plan.step_tokens, plan.max_context)  # a step may be larger than a context: then several sequences fill it
    prefill = [
        Span(start, min(plan.max_context, plan.step_tokens - start), plan.max_context, table, row)
        for row, start in enumerate(starts)
        if row < plan.max_sequences
    ]
    if isinstance(model, Recorded):
        model.touch()  # its buffers are all that its steps need, so a short one rehearses as much as the longest
    for spans in (prefill, [Span(row, 1, plan.max_context, table, row) for row in range(sequences)]):
        batch = StepBatch.from_spans(spans, block_size=0 if plan.kv.places_tokens else size)
        tokens_T, positions_T = torch.zeros(batch.num_tokens, dtype=torch.int64), positions_of(spans)
        held = (tokens_T, positions_T, batch.query_starts_B1, batch.lengths_B, batch.block_tables_BM, batch.slots_T)
        largest = [max(size, tensor.nbytes) for size, tensor in zip(largest, held, strict=True)]
        if isinstance(model, Recorded) and batch.num_tokens > SHORT_STEP:
            short = Span(0, SHORT_STEP, plan.max_context, table)
            batch, tokens_T, positions_T = StepBatch.from_spans([short], block_size=size), tokens_T[:SHORT_STEP], positions_of([short])
        hidden_TD = model.forward(tokens_T, positions_T, batch, cache)
        rows = torch.arange(min(sequences, batch.num_tokens))
        sampler.sample(model.logits(hidden_TD, rows), [SampleRow(request, ())] * len(rows))
    return sum(largest)


def fit_cache(spec: ModelSpec, plan: Plan, *, left_bytes: int, notes: list[str]) -> Plan:
    """`plan` with as much of its cache as `left_bytes` can hold: at least one sequence of max_context, else BudgetError."""
    per_token, kept = token_bytes(spec, plan.kv), plan.kv.retain.tokens(plan.max_context)
    size = plan.kv.block_slots(plan.max_context)
    left_bytes -= plan.max_sequences * state_bytes(spec, plan.kv, plan.max_context)  # tails and token ids are no block's
    need = -(-kept // size) * size * per_token
    if left_bytes < need:
        tokens = max(0, left_bytes) // (per_token * size) * size if plan.kv.layout == "paged" and plan.kv.retain.kind == "full" else 0
        remedy = f"--context {tokens}" if tokens else f"--memory {format_bytes(plan.memory_bytes + need - left_bytes).replace(' ', '')}"
        raise BudgetError(
            f"the cache for one sequence of {plan.max_context} tokens needs {format_bytes(need)}; {format_bytes(max(0, left_bytes))} are left of "
            f"{format_bytes(plan.memory_bytes)} once the process, the weights and the largest step have been measured. Fits with {remedy}",
            need_bytes=plan.memory_bytes + need - left_bytes,
            have_bytes=plan.memory_bytes,
        )
    wanted = plan.num_blocks * size
    tokens = min(wanted, left_bytes // (per_token * size) * size) if per_token else wanted
    if tokens == wanted:
        return plan
    notes.append(f"cache: {tokens:,} token slots instead of the planned {wanted:,}: the process measured larger than predicted")
    if plan.kv.layout == "contiguous":
        return replace(plan, max_sequences=tokens // size, kv_tokens=tokens)
    return replace(plan, kv_tokens=tokens)
