"""`ts.evaluate(model, text=…, against=…, tasks=…)`: what a model predicts of a text, how far that lies from a reference, and how it answers tasks.

What is evaluated is what `ts.open` builds in the same budget: its weights in their format, its cache, its kernels, in the engine's own steps. A reference is
read side by side where both fit the budget; else it goes first, alone, and its predictions wait on the disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tradespace import api
from tradespace.comparing import Budget, Compared, OnProgress, Pairing, ReferenceDtype, divergence_of, forward_of, peak_of, plan_subject, teller
from tradespace.errors import InputError
from tradespace.llm import LLM
from tradespace.loading.resolve import resolve
from tradespace.loading.tokenizer import Tokenizer
from tradespace.quality.divergence import Divergence, standard_error
from tradespace.quality.forward import rows_within
from tradespace.quality.perplexity import Perplexity, summarize, token_nats
from tradespace.quality.tasks import Example, TaskResult, find_task, read_examples, run_task
from tradespace.quality.text import Text, encode_text
from tradespace.spec.attention_pattern import Prefix, parse_pattern

SELF = "self"
DEFAULT_CONTEXT = 2048


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was found. `plan` and `weight_bytes`: what ran. `reference`: what it was compared with and how that was read. Peak and budget are of the process."""

    model: str
    plan: str
    weights: str
    weight_bytes: int
    perplexity: Perplexity | None
    divergence: Divergence | None
    reference: str | None
    tasks: tuple[TaskResult, ...]
    memory_bytes: int
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def evaluate(
    model: str | os.PathLike[str],
    *,
    text: str | Path | None = None,
    against: str | os.PathLike[str] | None = None,
    reference_dtype: ReferenceDtype = "fp32",
    context: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    tasks: Sequence[str] = (),
    task_data: Path | None = None,
    limit: int | None = None,
    weights: str | None = None,
    kv_store: str | None = None,
    pattern: str | None = None,
    memory: str | int | None = None,
    offline: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Perplexity of `text` (a Path is a file, a str the text itself), divergence from a reference, and tasks, inside one budget.

    against          another model, or "self": the same file's own weights, dequantized; held in reference_dtype, cache included
    context, stride  tokens of a window and from one window to the next; default min(2,048, the model's), and no overlap
    tokens           only the first so many tokens of the text
    tasks            names of `quality.tasks.TASKS`, read from task_data/<name>.jsonl; limit: only the first so many examples of each
    weights          evaluates the model in this format, quantized as it is loaded, and its cache exact; default: as `ts.open` would run it in this memory
    kv_store         evaluates the cache in this store
    pattern          evaluates the model with this attention pattern imposed on it; a reference keeps its own

    Raises InputError for a text or task that is missing, empty, too short or not what it should be, and for a reference with another vocabulary; BudgetError
    where the model, or the reference alone, does not fit.
    """
    if text is None and not tasks:
        raise InputError("nothing to evaluate on. Give a text (--text FILE), tasks (--tasks arc_easy,piqa), or both")
    if against is not None and text is None:
        raise InputError("--against compares predictions of a text. Give one with --text FILE")
    if pattern is not None and isinstance(parse_pattern(pattern), Prefix):
        raise InputError("--attention-pattern prefix shows tokens their own future: what they predict of it says nothing. Evaluate a causal pattern")
    examples = _examples(tasks, task_data, limit)
    device = api.find_machine(None)
    budget = Budget.of(memory, device)
    name, files = str(model), resolve(str(model), offline=offline)
    window = min(DEFAULT_CONTEXT, api.spec_of_files(files).max_context) if context is None else context
    read = None if text is None else encode_text(Tokenizer.from_files(files), text, context=window, stride=stride, tokens=tokens)
    subject = plan_subject(name, device, budget, window, files=files, weights=weights, kv_store=kv_store, pattern=pattern)
    compared, perplexity, divergence = None, None, None
    with ExitStack() as stack:
        if against is not None and read is not None:
            other = name if str(against) == SELF else str(against)
            other_files = files if other == name else resolve(other, offline=offline)
            pair = Pairing.of(other, other_files, reference_dtype, subject, device, budget, read)
            say(f"reference: {pair.describe()}")
            compared = pair.prepare(stack, on_progress, offline=offline)
        engine = stack.enter_context(subject.open(budget.engine_bytes, offline=offline, say=say))
        if read is not None:
            perplexity, divergence = _read_text(engine, read, budget, compared, on_progress)
        results = tuple(_run_task(engine, task, found, budget, on_progress) for task, found in examples.items())
        return Evaluation(
            model=name,
            plan=engine.plan.describe(),
            weights=engine.plan.weights.describe(),
            weight_bytes=sum(engine.weight_bytes().values()),
            perplexity=perplexity,
            divergence=divergence,
            reference=None if compared is None else compared.description,
            tasks=results,
            memory_bytes=budget.memory_bytes,
            peak_bytes=max(peak_of(engine), 0 if compared is None else compared.peak_bytes),
        )


def _examples(tasks: Sequence[str], folder: Path | None, limit: int | None) -> Mapping[str, list[Example]]:
    """All examples of all tasks, read before anything is loaded."""
    asked = [find_task(name) for name in dict.fromkeys(tasks)]
    if asked and folder is None:
        raise InputError("--tasks reads examples from files. Say with --task-data in which folder they lie")
    return {task.name: read_examples(task, folder, limit=limit) for task in asked if folder is not None}


def _run_task(engine: LLM, name: str, examples: Sequence[Example], budget: Budget, on_progress: OnProgress) -> TaskResult:
    forward = forward_of(engine, rows=rows_within(budget.work_bytes, engine.spec.V))
    tell = teller(on_progress, name, len(examples))
    return run_task(find_task(name), examples, forward, engine.tokenizer, max_context=engine.plan.max_context, on_example=tell)


def _read_text(engine: LLM, text: Text, budget: Budget, compared: Compared | None, on_progress: OnProgress) -> tuple[Perplexity, Divergence | None]:
    """The text through the model, and through the reference or what is stored of it."""
    windows, protocol = text.windows, text.windows.describe()
    tell = teller(on_progress, "text", windows.num_scored)
    if compared is None:
        forward = forward_of(engine, rows=rows_within(budget.work_bytes, engine.spec.V))
        nats = token_nats(forward.logprobs, windows, on_token=tell)
        mean, error = float(nats.mean()), standard_error(nats)
        return summarize(num_tokens=len(nats), mean_nats=mean, mean_error=error, num_bytes=text.scored_bytes, protocol=protocol), None
    return divergence_of(engine, compared, text, tell)


__all__ = ["Evaluation", "evaluate"]
