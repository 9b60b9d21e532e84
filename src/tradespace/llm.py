"""`ts.open(model, memory=…)` → an `LLM` that generates, streams and chats inside the budget, and reports predicted against measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tradespace import api
from tradespace.build import DTYPES, Built, build_engine, weight_bytes
from tradespace.cost.memory import Ledger, ledger
from tradespace.cost.time import decode_time, prefill_time
from tradespace.engine.request import Completion, SamplingParams
from tradespace.errors import BudgetError, InputError
from tradespace.loading.resolve import resolve
from tradespace.loading.tokenizer import Tokenizer
from tradespace.measure.memory import MemoryMeter, limit_heap_growth, process_bytes, return_freed_memory
from tradespace.measure.report import Report, ReportLine
from tradespace.planner.search import budget_error
from tradespace.spec.device import DeviceSpec
from tradespace.spec.estimate import Estimate
from tradespace.spec.model import ModelSpec
from tradespace.spec.plan import Plan, plan_from_dict
from tradespace.spec.workload import Workload
from tradespace.units import format_bytes

Messages = Sequence[Mapping[str, str]]
MAX_PLAN_BYTES = 1 << 20


@dataclass(frozen=True)
class Defaults:
    """What the model's own generation_config asks for; a caller's value always wins."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class LLM:
    """A built engine with its tokenizer. Use it as a context manager: leaving it frees the weights and stops the memory meter."""

    def __init__(self, built: Built, device: DeviceSpec, predicted: Ledger, meter: MemoryMeter, runtime_bytes: int, defaults: Defaults):
        self._built = built
        self._device = device
        self._predicted = predicted
        self._meter = meter
        self._runtime_bytes = runtime_bytes
        self._defaults = defaults
        self._last: list[Completion] = []
        self._closed = False

    @property
    def plan(self) -> Plan:
        """The plan as it was built."""
        return self._built.plan

    @property
    def spec(self) -> ModelSpec:
        return self._built.spec

    @property
    def tokenizer(self) -> Tokenizer:
        return self._built.tokenizer

    @property
    def engine(self):
        """The engine underneath, for callers that schedule themselves (add, step)."""
        self._check_open()
        return self._built.engine

    def sampling(self, **values: Any) -> SamplingParams:
        """SamplingParams with the model's own defaults where a value is None or absent."""
        given = {name: value for name, value in values.items() if value is not None}
        own = {name: value for name, value in vars(self._defaults).items() if name not in given}
        return SamplingParams(**{**own, **given})

    def render(self, text: str, *, system: str | None = None) -> str:
        """`text` as the user's message through the model's chat template; as it is where the model has none."""
        if not self.tokenizer.has_chat_template:
            return text
        messages = [{"role": "system", "content": system}] if system else []
        return self.tokenizer.apply_chat_template([*messages, {"role": "user", "content": text}])

    def generate(self, prompts: str | Sequence[str | Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None) -> list[Completion]:
        """Answers in the order of the prompts (texts or token ids), all in one continuous batch.

        Raises InputError for a prompt that is empty, not valid text, or longer than the plan's context allows; EngineError where the engine failed.
        """
        self._check_open()
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [self._encode(prompt) for prompt in several]
        settings = self.sampling() if params is None else params
        self._last = self._built.engine.generate(ids, settings)
        return list(self._last)

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[str]:
        """Pieces of one answer as they are generated. Leaving the loop early aborts the request and frees its cache."""
        self._check_open()
        return self._stream(self._encode(prompt), params or self.sampling())

    def _stream(self, ids: Sequence[int], params: SamplingParams) -> Iterator[str]:
        completion: Completion | None = None
        stream = self._built.engine.stream(ids, params)
        try:
            completion = yield from stream
        finally:
            stream.close()
            self._last = [completion] if completion is not None else []

    def chat(self, messages: Messages, params: SamplingParams | None = None) -> Completion:
        """The model's answer to a conversation, through its chat template."""
        return self.generate([self._chat_prompt(messages)], params)[0]

    def stream_chat(self, messages: Messages, params: SamplingParams | None = None) -> Iterator[str]:
        """The same, in pieces."""
        return self.stream(self._chat_prompt(messages), params)

    def _chat_prompt(self, messages: Messages) -> str:
        if not self.tokenizer.has_chat_template:
            raise InputError(f"{self.spec.name} carries no chat template. Use generate() or `tradespace run --raw` with a plain prompt")
        return self.tokenizer.apply_chat_template([dict(message) for message in messages])

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            # a rendered template writes its own <bos>; the tokenizer knows not to add a second one
            return self.tokenizer.encode_prompt(prompt)
        return [int(token) for token in prompt]

    def report(self) -> Report:
        """Predicted against measured: each ledger line, the process's peak, and the speed of the last generation."""
        built, plan = self._built, self._built.plan
        measured: dict[str, float] = {
            "runtime": self._runtime_bytes,
            "tokenizer": built.measured_bytes["tokenizer"],
            "kv cache": built.cache.nbytes,
            "workspace": built.measured_bytes["workspace"],
        }
        measured |= {f"weights: {role}": size for role, size in weight_bytes(built.transformer).items()}
        lines = [ReportLine(line.name, line.bytes, measured.get(line.name), "bytes", line.formula) for line in self._predicted.lines if not line.transient]
        peak = max(self._meter.peak_bytes, process_bytes())
        total = self._predicted.total_bytes("host")
        lines.append(ReportLine("peak of the process", total, peak, "bytes", f"sampled {self._meter.method} of the process tree"))
        lines += self._speed_lines()
        facts = [
            ("budget", f"{format_bytes(plan.memory_bytes)} ({'kept' if peak <= plan.memory_bytes else 'EXCEEDED'})"),
            ("plan", plan.describe()),
            ("attention kernels", ", ".join(dict.fromkeys(built.kernels))),
        ]
        facts += [("note", note) for note in built.notes]
        return Report(f"{self.spec.name}: predicted against measured", tuple(lines), tuple(facts))

    def _speed_lines(self) -> list[ReportLine]:
        done = [completion for completion in self._last if completion.num_output_tokens > 1]
        if not done:
            return []
        # what the roofline says of the work that was really done, not of the work that was planned for
        prompt = round(sum(c.num_prompt_tokens for c in done) / len(done))
        output = round(sum(c.num_output_tokens for c in done) / len(done))
        plan = self._built.plan
        together = min(len(done), plan.max_sequences)
        work = Workload(context_tokens=max(plan.max_context, prompt + output), concurrency=together, prompt_tokens=prompt, output_tokens=output)
        decode = decode_time(self.spec, plan, self._device, work).seconds.map(lambda step_s: together / step_s)
        prefill = prefill_time(self.spec, plan, self._device, work).seconds.map(lambda prompt_s: prompt / prompt_s)
        speeds = self._built.engine.last_speeds()
        return [
            ReportLine("prefill", prefill, speeds.prefill_tokens_per_s, "tok/s", f"{prompt} prompt tokens"),
            ReportLine("decode", decode, speeds.decode_tokens_per_s, "tok/s", f"{together} sequences at once"),
        ]

    def close(self) -> None:
        """Frees the engine. Requests still running are aborted."""
        if self._closed:
            return
        self._closed = True
        self._built.engine.abort_all()
        self._meter.__exit__(None, None, None)

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("this LLM is closed. Open it again with ts.open(...)")

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
    scheduling: str = "continuous",
    revision: str | None = None,
    offline: bool = False,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> LLM:
    """Fetch `model` if need be, plan it for this machine within `memory`, build the best plan (or obey `plan`), and return it ready to generate.

    memory       budget of the whole process tree; default 80% of what is free now (a cgroup's limit counts)
    plan         a Plan, or the file that `tradespace plan --save` wrote
    context      most tokens of one sequence; default min(the model's, 2,048)
    concurrency  sequences that the cache is sized for; more wait in the queue
    weights, attention  fix these choices of the planner
    say          receives one line per decision (the default is silent); progress shows bars on a terminal

    Raises BudgetError (need, have, and the nearest plan that fits) where the budget cannot be met, InputError for a model or flag that makes no sense.
    """
    limit_heap_growth()
    meter = MemoryMeter().__enter__()
    try:
        return _open(meter, str(model), memory, plan, context, concurrency, goal, weights, attention, scheduling, revision, offline, progress, say)
    except BaseException:
        meter.__exit__(*sys.exc_info())
        raise


def _open(meter, model, memory, plan, context, concurrency, goal, weights, attention, scheduling, revision, offline, progress, say) -> LLM:
    device = api.find_machine(None)
    chosen = read_plan(plan) if plan is not None else None
    budget = api.budget_bytes(memory, device) if memory is not None or chosen is None or not chosen.memory_bytes else chosen.memory_bytes
    share = " (80% of what is free)" if memory is None and chosen is None else ""
    say(f"budget: {format_bytes(budget)}{share} of {format_bytes(device.free_bytes)} free")
    files = resolve(model, revision=revision, offline=offline, progress=progress)
    spec = api.spec_of_files(files)
    if chosen is None:
        chosen = choose_plan(spec, device, budget, context, concurrency, goal, weights, attention)
    chosen = replace(chosen, memory_bytes=budget)
    predicted = ledger(spec, chosen, device)
    need = predicted.total_bytes("host").require()
    if need > budget:
        raise BudgetError(
            f"this plan needs {format_bytes(need)}; the budget is {format_bytes(budget)}. Let the planner choose (leave --plan away) or give --memory "
            f"{format_bytes(need * 1.02).replace(' ', '')}",
            need_bytes=int(need),
            have_bytes=budget,
        )
    say(f"plan: {chosen.describe()} · {chosen.kv_tokens:,} token slots · {format_bytes(need)} predicted")
    warm_runtime(DTYPES[chosen.weights.dense])
    return_freed_memory()
    runtime_bytes = process_bytes()
    tokenizer = Tokenizer.from_files(files)
    return_freed_memory()
    tokenizer_bytes = max(0, process_bytes() - runtime_bytes)
    with loading_bar(spec, chosen, show=progress) as on_load:
        built = build_engine(
            spec, files, chosen, device, tokenizer=tokenizer, now_bytes=process_bytes, peak_bytes=meter.mark, on_load=on_load, scheduling=scheduling
        )
    built.measured_bytes["tokenizer"] = tokenizer_bytes
    for note in built.notes:
        say(f"note: {note}")
    defaults = Defaults(**{name: value for name, value in (tokenizer.generation_defaults or {}).items() if name in Defaults.__dataclass_fields__})
    return LLM(built, device, ledger(spec, built.plan, device), meter, runtime_bytes, defaults)


def choose_plan(
    spec: ModelSpec, device: DeviceSpec, budget: int, context: int | None, concurrency: int, goal: str, weights: str | None, attention: str | None
) -> Plan:
    """The planner's best plan that runs; BudgetError with the nearest one where nothing fits."""
    pins = {axis: value for axis, value in (("weights", weights), ("attention", attention)) if value}
    frontier = api.plan(
        spec,
        memory=budget,
        device=device,
        context=min(2048, spec.max_context) if context is None else context,
        concurrency=concurrency,
        goal="throughput" if goal == "throughput" else "latency",
        runnable_only=True,
        pins=pins,
    )
    if frontier.best is None:
        raise budget_error(frontier)
    return frontier.best.plan


def read_plan(plan: Plan | str | Path) -> Plan:
    """A Plan as it is, or out of the YAML file that `tradespace plan --save` wrote. Raises InputError naming what is wrong."""
    if isinstance(plan, Plan):
        return plan
    path = Path(plan)
    try:
        if path.stat().st_size > MAX_PLAN_BYTES:
            raise InputError(f"{path} is {format_bytes(path.stat().st_size)}; a plan has at most {format_bytes(MAX_PLAN_BYTES)}. Is it another file?")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the plan {path}: {error.strerror}. Write one with: tradespace plan MODEL --save {path}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    return plan_from_dict(values)


def warm_runtime(dtype) -> None:
    """One tiny product and one tiny attention: what the libraries set up on first use is then counted as theirs and not as the model's."""
    import torch

    with torch.inference_mode():
        rows = torch.ones(64, 64, dtype=dtype)
        heads = rows.view(1, 1, 64, 64)
        torch.nn.functional.linear(rows, rows)
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        torch.nn.functional.silu(rows).float().softmax(-1).topk(4)


class loading_bar:
    """A progress bar of the bytes loaded, on standard error, where that is a terminal."""

    def __init__(self, spec: ModelSpec, plan: Plan, *, show: bool):
        self.show = show and sys.stderr.isatty()
        self.total = 0
        if self.show:
            from tradespace.spec.weights import weight_bytes as spec_bytes

            self.total = spec_bytes(spec, plan.weights)

    def __enter__(self) -> Callable[[str, int], None]:
        if not self.show:
            return lambda tensor, size: None
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("loading"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self.bar.__enter__()
        self.task = self.bar.add_task("loading", total=self.total)
        return lambda tensor, size: self.bar.advance(self.task, size)

    def __exit__(self, *details: object) -> None:
        if self.show:
            self.bar.__exit__(None, None, None)


__all__ = ["LLM", "Defaults", "Estimate", "choose_plan", "open", "read_plan"]
