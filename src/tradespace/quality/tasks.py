"""Multiple-choice and last-word tasks, asked exactly as lm-eval asks them (EleutherAI/lm-evaluation-harness 0.4, zero-shot, its default templates).

A request is a context and a continuation. Both are encoded together and the context's own tokens are cut off the front, so that tokens form as they would
in running text. What is scored is the continuation's log-probability. Multiple choice: the likeliest continuation wins (acc); divided by its characters
(acc_norm). Last word: whether every token of it is the model's first choice (acc), and the perplexity of whole words.

The examples come in llm-foundry's form, a JSON object a line: {"query", "choices", "gold"}, {"context_options", "continuation", "gold"} or {"context",
"continuation"}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch

from tradespace.errors import CorruptFileError, InputError
from tradespace.loading.tokenizer import Tokenizer
from tradespace.quality.divergence import standard_error
from tradespace.quality.forward import Forward, Passage

EXAMPLES_AT_ONCE = 32  # encoded and scored together


@dataclass(frozen=True, slots=True)
class Example:
    """One question: (context, continuation) of each choice, how long each counts for acc_norm (characters), and which is right. Last word: one choice."""

    requests: tuple[tuple[str, str], ...]
    lengths: tuple[int, ...]
    gold: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """How a line of the task's file becomes an example. `metrics` as lm-eval names them."""

    name: str
    fields: Mapping[str, type]
    example: Callable[[Mapping[str, Any]], Example]
    metrics: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Metric:
    """A task's figure with its standard error: of accuracies as lm-eval has it; of a perplexity by the delta method (lm-eval resamples)."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class TaskResult:
    """`num_examples` asked; `truncated` of them lost the start of their context because the model's is shorter."""

    task: str
    num_examples: int
    truncated: int
    metrics: dict[str, Metric]


def _question(suffix: str) -> Callable[[Mapping[str, Any]], Example]:
    def example(row: Mapping[str, Any]) -> Example:
        context = row["query"] + suffix
        return Example(tuple((context, f" {choice}") for choice in row["choices"]), tuple(len(choice) for choice in row["choices"]), row["gold"])

    return example


def _schema(row: Mapping[str, Any]) -> Example:
    """The choice is in the context, what follows is the same."""
    requests = tuple((context, f" {row['continuation']}") for context in row["context_options"])
    return Example(requests, (len(row["continuation"]),) * len(requests), row["gold"])


def _last_word(row: Mapping[str, Any]) -> Example:
    return Example(((row["context"], f" {row['continuation']}"),), (len(row["continuation"]),), 0)


_CHOICES = {"query": str, "choices": list, "gold": int}
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(name="arc_easy", fields=_CHOICES, example=_question("\nAnswer:"), metrics=("acc", "acc_norm")),
        Task(name="piqa", fields=_CHOICES, example=_question("Answer:"), metrics=("acc", "acc_norm")),  # its queries end with the line's end
        Task(name="winogrande", fields={"context_options": list, "continuation": str, "gold": int}, example=_schema, metrics=("acc",)),
        Task(name="lambada_openai", fields={"context": str, "continuation": str}, example=_last_word, metrics=("acc", "perplexity")),
    )
}


def find_task(name: str) -> Task:
    """The task of this name, or InputError with the list."""
    if name not in TASKS:
        raise InputError(f"unknown task '{name}'. Known: {', '.join(TASKS)}")
    return TASKS[name]


def read_examples(task: Task, folder: Path, *, limit: int | None = None) -> list[Example]:
    """The first `limit` examples of folder/<task>.jsonl. Raises InputError where the file is missing or empty, CorruptFileError naming line and field."""
    path = folder / f"{task.name}.jsonl"
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit} asks nothing. Give at least 1")
    found: list[Example] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(islice(file, limit), 1):
                found.append(task.example(_checked(task, line, f"{path}, line {number}")))
    except OSError as error:
        raise InputError(f"cannot read the examples of {task.name}: {path}: {error.strerror}. Say with --task-data where {task.name}.jsonl lies") from error
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path} is not UTF-8: byte {error.object[error.start]:#04x}") from error
    if not found:
        raise InputError(f"{path} is empty: it should hold one example a line")
    return found


def _checked(task: Task, line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CorruptFileError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise CorruptFileError(f"{where}: an example is a JSON object, this is a {type(row).__name__}")
    for name, kind in task.fields.items():
        value = row.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CorruptFileError(f"{where}: field '{name}' must be a {kind.__name__}, is {value!r:.60}")
        if isinstance(value, str) and not value:
            raise CorruptFileError(f"{where}: field '{name}' is empty")
        if isinstance(value, list) and (len(value) < 2 or not all(isinstance(item, str) and item for item in value)):
            raise CorruptFileError(f"{where}: field '{name}' must hold at least two texts")
    choices = next((row[name] for name, kind in task.fields.items() if kind is list), None)
    if choices is not None and not 0 <= row["gold"] < len(choices):
        raise CorruptFileError(f"{where}: gold {row['gold']} names none of {len(choices)} choices")
    return row


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of each: spaces at the context's end belong to the continuation, whose tokens are what both as one text have beyond as many as the context's."""
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    whole, alone = tokenizer.encode(context + continuation), tokenizer.encode(context)
    return alone, whole[len(alone) :]


def passages_of(tokenizer: Tokenizer, example: Example, max_context: int) -> tuple[list[Passage], bool]:
    """The passages that score an example's choices, and whether one had to lose the start of its context to fit `max_context` tokens."""
    found: list[Passage] = []
    truncated = False
    before: Sequence[int] = ()
    for context, continuation in example.requests:
        head, tail = encode_pair(tokenizer, context, continuation)
        if not tail or not head:
            raise InputError(f"'{(context + continuation)[-60:]}' has no token of its own to score: the tokenizer joins it with its context")
        if len(tail) > max_context:
            raise InputError(f"an answer of {len(tail)} tokens does not fit a context of {max_context}. Ask for a larger --context")
        ids = [*head, *tail]
        if len(ids) > max_context + 1:  # the last token is predicted and never read
            ids, truncated = ids[-(max_context + 1) :], True
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, before, strict=False)))
        found.append(Passage(ids, len(ids) - len(tail), shared))
        before = ids
    return found, truncated


def run_task(
    task: Task,
    examples: Sequence[Example],
    forward: Forward,
    tokenizer: Tokenizer,
    *,
    max_context: int,
    on_example: Callable[[int], None] | None = None,
) -> TaskResult:
    """Asks all examples and returns the task's metrics. `on_example` is told how many are done."""
    outcomes: dict[str, list[float]] = {name: [] for name in task.metrics}
    truncated = 0
    for start in range(0, len(examples), EXAMPLES_AT_ONCE):
        batch = examples[start : start + EXAMPLES_AT_ONCE]
        prepared = [passages_of(tokenizer, example, max_context) for example in batch]
        truncated += sum(cut for _, cut in prepared)
        scores = forward.scores([passage for passages, _ in prepared for passage in passages])
        for done, example in enumerate(batch, start + 1):
            _take(outcomes, example, list(islice(scores, len(example.requests))))
            if on_example is not None:
                on_example(done)
    return TaskResult(task.name, len(examples), truncated, {name: _metric(name, values) for name, values in outcomes.items()})


def _take(outcomes: Mapping[str, list[float]], example: Example, scores: Sequence[tuple[float, bool]]) -> None:
    nats = [score[0] for score in scores]
    for name, values in outcomes.items():
        if name == "perplexity":
            values.append(nats[0])
        elif len(nats) == 1:
            values.append(float(scores[0][1]))
        else:
            weighed = nats if name == "acc" else [value / length for value, length in zip(nats, example.lengths, strict=True)]
            values.append(float(weighed.index(max(weighed)) == example.gold))


def _metric(name: str, values: Sequence[float]) -> Metric:
    found = torch.tensor(values, dtype=torch.float64)
    mean, error = float(found.mean()), standard_error(found)
    if name == "perplexity":
        return Metric(math.exp(-mean), math.exp(-mean) * error)
    return Metric(mean, error)


def describe(results: Sequence[TaskResult]) -> Iterator[tuple[str, str, str, str]]:
    """Rows of a table: task, examples, metric, value ± error."""
    for result in results:
        for name, metric in result.metrics.items():
            shown = f"{metric.value:.3f} ± {metric.error:.3f}" if name == "perplexity" else f"{metric.value:.2%} ± {metric.error:.2%}"
            yield result.task, f"{result.num_examples:,}", name, shown
