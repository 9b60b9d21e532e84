"""`ts.open(model, memory=…)` → an `LLM` that generates, streams and chats inside the budget, and reports predicted against measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tradespace import api
from tradespace.adapt.peft_files import held_bytes
from tradespace.build import STAGING_BYTES, Built, build_engine, weight_bytes
from tradespace.choosing import check_plan, choose_plan, read_plan
from tradespace.cost.memory import Ledger, ledger, measurable_lines
from tradespace.cost.time import decode_time, prefill_time
from tradespace.defaults import Defaults
from tradespace.engine.beam import BeamOutput, BeamParams
from tradespace.engine.engine import Engine, Prompt, TextStream
from tradespace.engine.request import Completion, SamplingParams
from tradespace.engine.scheduler import Policy
from tradespace.errors import BudgetError, InputError, UnsupportedError
from tradespace.formats import DTYPES
from tradespace.kernels.native import is_compiled, unavailable
from tradespace.loading.gguf import held_headers
from tradespace.loading.resolve import resolve
from tradespace.loading.tokenizer import Tokenizer
from tradespace.measure.memory import MemoryMeter, limit_heap_growth, peak_rss_bytes, process_bytes, return_freed_memory
from tradespace.measure.report import Report, ReportLine
from tradespace.model.transformer import Transformer
from tradespace.progress import StepClock, loading_bar
from tradespace.spec.attention_imposed import impose
from tradespace.spec.device import DeviceSpec
from tradespace.spec.estimate import Estimate
from tradespace.spec.model import ModelSpec
from tradespace.spec.plan import Plan
from tradespace.spec.workload import Workload
from tradespace.units import format_bytes

Messages = Sequence[Mapping[str, str]]


class LLM:
    """A built engine with its tokenizer. Use it as a context manager: leaving it frees the weights and stops the memory meter."""

    def __init__(self, built: Built, device: DeviceSpec, predicted: Ledger, meter: MemoryMeter, measured_bytes: dict[str, int], defaults: Defaults):
        self._built: Built | None = built
        self._device = device
        self._predicted = predicted
        self._meter = meter
        self._measured_bytes = measured_bytes
        self._defaults = defaults
        self._lengths: list[tuple[int, int]] = []
        self._speeds = StepClock()
        built.engine.on_step = lambda step, seconds: self._speeds.take(step, seconds)

    def _open(self) -> Built:
        if self._built is None:
            raise InputError("this LLM is closed. Open it again with ts.open(...)")
        return self._built

    @property
    def plan(self) -> Plan:
        """The plan as it was built."""
        return self._open().plan

    @property
    def spec(self) -> ModelSpec:
        return self._open().spec

    @property
    def tokenizer(self) -> Tokenizer:
        return self._open().tokenizer

    @property
    def transformer(self) -> Transformer:
        """The model underneath, for evaluation."""
        return self._open().transformer

    @property
    def engine(self) -> Engine:
        """The engine underneath, for callers that schedule themselves (add, step)."""
        return self._open().engine

    @property
    def speeds(self) -> StepClock:
        """Tokens and seconds of the last generation's steps."""
        return self._speeds

    @property
    def phases(self) -> dict[str, int]:
        """Peak bytes of the process in each phase of the build."""
        return dict(self._meter.marks)

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the weights per role, as they lie in memory."""
        return weight_bytes(self.transformer)

    def sampling(self, **values: Any) -> SamplingParams:
        """SamplingParams with the model's own defaults where a value is None or absent."""
        given = {name: value for name, value in values.items() if value is not None}
        own = {name: value for name, value in vars(self._defaults).items() if name not in given}
        return SamplingParams(**{**own, **given})

    def render(self, text: str, *, system: str | None = None) -> list[int]:
        """Token ids of `text` as the user's message through the model's chat template; as plain text where the model has none."""
        messages = [{"role": "system", "content": system}] if system else []
        if self.tokenizer.chat_template is None:
            return self.tokenizer.encode(f"{system}\n\n{text}" if system else text)
        return self.render_chat([*messages, {"role": "user", "content": text}])

    def render_chat(self, messages: Messages) -> list[int]:
        """Token ids of a conversation through the model's chat template. Raises InputError where it has none or the template refuses the messages."""
        if self.tokenizer.chat_template is None:
            raise InputError(f"{self.spec.name} carries no chat template. Use generate(), or `tradespace run --raw` with a plain prompt")
        # the template writes the special tokens itself, <bos> included
        return self.tokenizer.encode(self.tokenizer.apply_chat_template([dict(message) for message in messages]), add_special_tokens=False)

    def generate(self, prompts: str | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None) -> list[Completion]:
        """Answers in the order of the prompts (texts or token ids), all in one continuous batch; for n > 1 `samples` of an answer are all n.

        Raises InputError for a prompt that is empty, not valid text, or longer than the plan's context allows; EngineError where the engine failed.
        """
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        self._speeds = StepClock()
        done = self.engine.generate(several, self.sampling() if params is None else params)
        self._lengths = [(len(sample.prompt_ids), len(sample.output_ids)) for completion in done for sample in completion.samples]
        return done

    def beam_search(self, prompt: Prompt, params: BeamParams | None = None) -> list[BeamOutput]:
        """The likeliest answers to one prompt by beam search, best first; beams share the cache of what they have in common.

        Raises InputError as `generate` does.
        """
        self._speeds = StepClock()
        found = self.engine.beam_search(prompt, params)
        self._lengths = [(len(self.engine.encode(prompt)), len(output.output_ids)) for output in found]
        return found

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Pieces of one answer as they are generated. Leaving the loop early aborts the request and frees its cache."""
        self._speeds = StepClock()
        stream = self.engine.stream(prompt, params or self.sampling())
        return self._pieces(stream)

    def _pieces(self, stream: TextStream) -> Iterator[str]:
        with stream:
            yield from stream
        self._lengths = [(stream.request.num_prompt, stream.request.num_outputs)]

    def chat(self, messages: Messages, params: SamplingParams | None = None) -> Completion:
        """The model's answer to a conversation, through its chat template; with params.n > 1 the others are its `siblings`."""
        return self.generate([self.render_chat(messages)], params)[0]

    def stream_chat(self, messages: Messages, params: SamplingParams | None = None) -> Iterator[str]:
        """The same, in pieces."""
        return self.stream(self.render_chat(messages), params)

    def report(self) -> Report:
        """Predicted against measured: each ledger line, the process's peak, and the speed of the last generation."""
        built, plan = self._open(), self.plan
        self._meter.mark("running")
        peak = self._meter.peak_bytes
        measured: dict[str, float] = {**self._measured_bytes, **built.measured_bytes}
        measured["heap"] = max(0, peak - sum(size for name, size in measured.items() if name != "staging"))  # staging is gone before the peak
        lines = [ReportLine(name, predicted, measured.get(name), "bytes", formula) for name, predicted, formula in measurable_lines(self._predicted)]
        assert all(line.measured is not None for line in lines), f"a ledger line nobody measured: {[line.name for line in lines if line.measured is None]}"
        pool = self._predicted.compute_pool
        how = f"sampled {self._meter.method} of the process tree"
        lines.append(ReportLine("peak of the process", self._predicted.total_bytes(pool), peak, "bytes", how))
        lines.append(
            ReportLine("peak resident size", Estimate.unknown("counts shared pages in full"), peak_rss_bytes(), "bytes", "the kernel's high-water mark")
        )
        lines += self._speed_lines()
        used = ", ".join(dict.fromkeys(choice.kernel or "none" for choice in built.kernels))
        facts = [
            ("budget", f"{format_bytes(plan.memory_bytes)} ({'kept' if peak <= plan.memory_bytes else 'EXCEEDED'})"),
            ("plan", f"{plan.describe()} · attention by {used} · {plan.kv_tokens:,} cache slots"),
        ]
        counters = built.engine.counters
        if plan.kv.prefix_sharing:
            facts += [(name, f"{getattr(counters, name):,} tokens") for name in ("prefix_cache_queries", "prefix_cache_hits")]
        facts += [("note", note) for note in built.notes]
        return Report(f"{self.spec.name}: predicted against measured", tuple(lines), tuple(facts))

    def _speed_lines(self) -> list[ReportLine]:
        if not self._lengths:
            return []
        # what the roofline says of the work that was really done, not of the work that was planned for
        prompt = max(1, round(sum(length[0] for length in self._lengths) / len(self._lengths)))
        output = max(1, round(sum(length[1] for length in self._lengths) / len(self._lengths)))
        together = min(len(self._lengths), self.plan.max_sequences)
        work = Workload(context_tokens=max(self.plan.max_context, prompt + output), concurrency=together, prompt_tokens=prompt, output_tokens=output)
        decode = decode_time(self.spec, self.plan, self._device, work).seconds.map(lambda step_s: together / step_s)
        prefill = prefill_time(self.spec, self.plan, self._device, work).seconds.map(lambda prompt_s: prompt / prompt_s)
        found = [ReportLine("prefill", prefill, self._speeds.prefill_tokens_per_s, "tok/s", f"{prompt} prompt tokens")]
        if output > 1:
            found.append(ReportLine("decode", decode, self._speeds.decode_tokens_per_s, "tok/s", f"{together} sequences at once"))
        return found

    def close(self) -> None:
        """Frees the engine. Requests still running are aborted."""
        if self._built is None:
            return
        self._built.engine.scheduler.reset("abort")
        torch.set_num_threads(self._built.torch_threads)
        self._built = None
        self._meter.__exit__(None, None, None)
        return_freed_memory()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def open(
    model: str | Path,
    *,
    memory: str | int | None = None,
    plan: Plan | str | Path | None = None,
    context: int | None = None,
    concurrency: int = 8,
    goal: str = "latency",
    weights: str | None = None,
    attention: str | None = None,
    pattern: str | None = None,
    activations: str | None = None,
    prefix_sharing: bool | None = None,
    kv_store: str | None = None,
    kv_retain: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    scheduling: Policy = "continuous",
    revision: str | None = None,
    offline: bool = False,
    progress: bool = False,
    device: str | None = None,
    random_weights: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> LLM:
    """Fetch `model` if need be, plan it for this machine within `memory`, build the best plan (or obey `plan`), and return it ready to generate.

    memory       budget of the whole process tree; default 80% of what is free now (a cgroup's limit counts)
    plan         a Plan, or the file that `tradespace plan --save` wrote
    context      most tokens of one sequence; default min(the model's, 2,048)
    concurrency  sequences that the cache is sized for; more wait in the queue
    pattern      an attention pattern imposed on the model ("sliding:1024"): lossy, and the plan says so
    weights, attention, activations  fix these choices of the planner; weights "stored" runs a GGUF file's blocks as they are, activations "fp32" asks the
                 native kernels for exact products
    prefix_sharing  prompts with equal first tokens share what the cache holds of them; default: where the plan allows it (paged, full retention, continuous)
    kv_store, kv_retain  fix how the cache holds keys and values ("int8", "k=int8,v=int4") and what it keeps ("sliding:1020,4", "h2o:1024", "recent:sqrt")
    adapters     LoRA adapters in PEFT's format, folders by name: nothing is merged, and each request names its own (`SamplingParams.adapter`)
    device       "cpu", "cuda", "cuda:1"; default: the first CUDA device that can be used, else the CPU
    random_weights  draw the weights of a model of the zoo (or of a config.json) instead of reading any: for speed and memory, on a CUDA device
    say          receives one line per decision (the default is silent); progress shows bars on a terminal

    Raises BudgetError (need, have, and the nearest plan that fits) where the budget cannot be met, InputError for a model or flag that makes no sense.
    """
    from tradespace.llm_cuda import find_place, open_on_device

    sharing = None if prefix_sharing is None else "on" if prefix_sharing else "off"
    fixed = {"weights": weights, "attention": attention, "activations": activations, "kv_store": kv_store, "kv_retain": kv_retain}
    folders = {name: Path(folder) for name, folder in (adapters or {}).items()}
    fixed |= {"prefix_sharing": sharing}
    place = find_place(device)
    if place is not None:
        if scheduling != "continuous":
            raise InputError("a CUDA device schedules continuously; fixed batches are for --device cpu")
        if folders:
            raise UnsupportedError("adapters are served on a CPU so far. Give --device cpu, or merge the adapter into the model")
        same = {"memory": memory, "plan": plan, "context": context, "concurrency": concurrency, "goal": goal, "fixed": fixed, "pattern": pattern}
        return open_on_device(place, str(model), **same, revision=revision, offline=offline, progress=progress, random_weights=random_weights, say=say)
    fixed |= {"linear": "torch" if folders and plan is None else None}
    if random_weights:
        raise InputError("random weights are drawn on a CUDA device; there is none, or --device cpu was given. Give a checkpoint")
    # the first run on a machine measures it and compiles the kernels, in processes of their own that end before the budget begins to count
    machine = api.find_machine(None)
    chosen = read_plan(plan) if plan is not None else None
    budget = _budget(memory, chosen, machine, say)
    machine = _with_kernels(machine, say)
    limit_heap_growth()
    meter = MemoryMeter().__enter__()
    try:
        return _open(
            meter, machine, str(model), budget, chosen, context, concurrency, goal, fixed, pattern, scheduling, revision, offline, progress, say, folders
        )
    except BaseException:
        meter.__exit__(*sys.exc_info())
        raise


def _budget(memory: str | int | None, chosen: Plan | None, device: DeviceSpec, say: Callable[[str], None]) -> int:
    """The bytes that were asked for, here or by the plan; at most what is free."""
    own = chosen is not None and chosen.memory_bytes > 0
    budget = chosen.memory_bytes if memory is None and chosen is not None and own else api.budget_bytes(memory, device)
    share = " (80% of what is free)" if memory is None and not own else ""
    say(f"budget: {format_bytes(budget)}{share} of {format_bytes(device.free_bytes)} free")
    if budget > device.free_bytes:  # what is not there cannot be kept to
        budget = device.free_bytes
        say(f"note: planned within the {format_bytes(budget)} that are free now")
    return budget


def _with_kernels(device: DeviceSpec, say: Callable[[str], None]) -> DeviceSpec:
    """The device with the native kernels ready, compiled if need be; or with the reason why it has none."""
    if device.no_native:
        return device
    if not is_compiled():
        say("compiling the CPU kernels for this machine, once (about twenty seconds)")
    reason = unavailable()
    if reason is None:
        return device
    say(f"note: {reason}; torch's kernels run instead")
    return replace(device, no_native=reason)


def _open(
    meter: MemoryMeter,
    device: DeviceSpec,
    model: str,
    budget: int,
    chosen: Plan | None,
    context: int | None,
    concurrency: int,
    goal: str,
    fixed: Mapping[str, str | None],
    pattern: str | None,
    scheduling: Policy,
    revision: str | None,
    offline: bool,
    progress: bool,
    say: Callable[[str], None],
    adapters: Mapping[str, Path],
) -> LLM:
    files = resolve(model, revision=revision, offline=offline, progress=progress)
    with held_headers() as headers:
        before = settled_bytes()
        spec, defaults = impose(api.spec_of_files(files), pattern or "" if chosen is None else chosen.pattern), Defaults.of(files)
        stored = api.stored_weights(files, spec) if chosen is None else None
        tokenizer = Tokenizer.from_files(files)
        headers.drop_vocabularies()
        tokenizer_bytes = max(0, settled_bytes() - before)
        if chosen is None:
            if scheduling == "fixed" and fixed["prefix_sharing"] is None:
                fixed = {**fixed, "prefix_sharing": "off"}  # a fixed batch reserves its blocks beforehand
            chosen = choose_plan(spec, device, budget - adapter_bytes(adapters), context, concurrency, goal, **fixed, stored=stored)
        else:
            check_plan(chosen, spec, {"context": context, "attention_pattern": pattern, **fixed})
        chosen = replace(chosen, memory_bytes=budget)
        predicted = ledger(spec, chosen, device, staging_bytes=STAGING_BYTES)
        need = round(predicted.total_bytes().require()) + adapter_bytes(adapters)
        if need > budget:
            raise BudgetError(
                f"this plan needs {format_bytes(need)}; the budget is {format_bytes(budget)}. Let the planner choose (leave --plan away), or give --memory "
                f"{format_bytes(need * 1.02).replace(' ', '')}",
                need_bytes=need,
                have_bytes=budget,
            )
        say(f"plan: {chosen.describe()} · {chosen.kv_tokens:,} cache slots · {format_bytes(need)} predicted")
        warm_runtime(DTYPES[chosen.weights.dense])
        measured = {"runtime": settled_bytes() - tokenizer_bytes, "tokenizer": tokenizer_bytes}
        with loading_bar(show=progress) as on_load:
            built = build_engine(
                spec, files, chosen, device, tokenizer=tokenizer, now_bytes=settled_bytes, peak_bytes=meter.mark, on_load=on_load, scheduling=scheduling,
                adapters=adapters,
            )  # fmt: skip
    for note in built.notes:
        say(f"note: {note}")
    return LLM(built, device, ledger(spec, built.plan, device, staging_bytes=STAGING_BYTES), meter, measured, defaults)


def adapter_bytes(adapters: Mapping[str, Path]) -> int:
    """Of these folders' matrices in fp32. Raises InputError for a folder that holds none."""
    return sum(held_bytes(folder) for folder in adapters.values())


def settled_bytes() -> int:
    """Bytes of this process once its allocator has given back what is free."""
    return_freed_memory()
    return process_bytes()


def warm_runtime(dtype) -> None:
    """One tiny product and one tiny attention: what the libraries set up on first use is then counted as theirs and not as the model's."""
    with torch.inference_mode():
        rows = torch.ones(64, 64, dtype=dtype)
        heads = rows.view(1, 1, 64, 64)
        torch.nn.functional.linear(rows, rows)
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        torch.nn.functional.silu(rows).float().softmax(-1).topk(4)


__all__ = ["LLM", "open"]
