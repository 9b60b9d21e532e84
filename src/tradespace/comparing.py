"""Two models in one budget: a reference and what is compared with it, open side by side where both fit, else one after the other with a file between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from tradespace import api, llm
from tradespace.build import STAGING_BYTES
from tradespace.cost.memory import ledger
from tradespace.engine.runner import Runner
from tradespace.errors import InputError
from tradespace.home import cache_folder
from tradespace.llm import LLM
from tradespace.loading.resolve import ModelFiles
from tradespace.loading.tokenizer import Tokenizer
from tradespace.model.recorded import Recorded
from tradespace.quality.divergence import Divergence, compare
from tradespace.quality.forward import Forward, rows_within
from tradespace.quality.perplexity import Perplexity, SlidingWindows, summarize
from tradespace.quality.stored import StoredLogprobs, check_disk, stored_bytes
from tradespace.quality.text import Text, first_difference
from tradespace.spec.attention_imposed import impose
from tradespace.spec.device import DeviceSpec
from tradespace.spec.formats import find_format
from tradespace.spec.model import ModelSpec
from tradespace.spec.plan import Plan
from tradespace.units import MiB, format_bytes

BLOCK_SIZE = 16  # tokens: choices of a question share whole blocks only
NATIVE_ROWS = 8
STORED = "stored"  # as a choice of weights: as the files hold them
OnProgress = Callable[[str, int, int], None]
ReferenceDtype = Literal["fp32", "bf16", "fp16"]


def teller(on_progress: OnProgress, what: str, total: int) -> Callable[[int], None]:
    return lambda done: on_progress(what, done, total)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to be opened: what it is, what it was planned as, and what the ledger says that takes."""

    name: str
    files: ModelFiles
    spec: ModelSpec
    plan: Plan
    need_bytes: int

    def open(self, engine_bytes: int, *, offline: bool = False, say: Callable[[str], None] = lambda line: None) -> LLM:
        return llm.open(self.name, plan=self.plan, memory=engine_bytes, offline=offline, say=say)


@dataclass(frozen=True)
class Budget:
    """The stated memory, less room for the rows of logits that a comparison holds: the engines get the rest."""

    memory_bytes: int
    work_bytes: int

    @classmethod
    def of(cls, memory: str | int | None, device: DeviceSpec) -> Budget:
        total = min(api.budget_bytes(memory, device), device.free_bytes)
        return cls(total, min(256 * MiB, max(32 * MiB, total // 16)))

    @property
    def engine_bytes(self) -> int:
        return max(1, self.memory_bytes - self.work_bytes)


def plan_subject(
    name: str,
    device: DeviceSpec,
    budget: Budget,
    context: int,
    *,
    files: ModelFiles,
    weights: str | None = None,
    kv_store: str | None = None,
    pattern: str | None = None,
    also: Mapping[str, str] | None = None,
) -> Subject:
    """The planner's best plan for one sequence of `context` tokens; a stated weight format comes with a cache in its activations' dtype, so that the format
    alone is measured, unless `kv_store` says otherwise. `also` fixes further axes. weights "stored": as the files hold them, tried where none is named.

    Raises BudgetError where nothing fits, InputError for a context that the model lacks.
    """
    spec = impose(api.spec_of_files(files), pattern or "")
    stored = api.stored_weights(files, spec) if weights in (None, STORED) else None
    if kv_store is None and weights is not None:
        kv_store = find_format(stored.default if stored is not None else weights).compute
    # paged: short passages share a step, and choices the blocks of what they have in common
    pins = {"layout": "paged"} | {axis: value for axis, value in (("weights", weights), ("kv_store", kv_store)) if value} | dict(also or {})
    frontier = api.plan(spec, memory=budget.engine_bytes, device=device, context=context, runnable_only=True, pins=pins, stored=stored)
    if frontier.best is None:
        raise api.no_plan(frontier)
    best = frontier.best.plan
    plan = replace(best, memory_bytes=budget.engine_bytes, kv=replace(best.kv, block_size=min(BLOCK_SIZE, best.kv.block_size)))
    # the native step has logits for as many rows as it has sequences: a few at a time read the head's weights once for all of them
    wider = replace(plan, max_sequences=max(plan.max_sequences, NATIVE_ROWS)) if plan.linear == "native" else plan
    for found in (wider, plan):
        need = round(ledger(spec, found, device, staging_bytes=STAGING_BYTES).total_bytes().require())
        if need <= budget.engine_bytes:
            break
    return Subject(name=name, files=files, spec=spec, plan=found, need_bytes=need)


def forward_of(engine: LLM, *, rows: int, vocabulary: int | None = None, step_tokens: int | None = None) -> Forward:
    """The model of an open engine, read through its own cache in its own steps (or smaller ones)."""
    runner, plan = engine.engine.runner, engine.plan
    assert isinstance(runner, Runner), "build_engine gives every engine a Runner"
    steps = min(plan.step_tokens, step_tokens or plan.step_tokens)
    if isinstance(runner.transformer, Recorded):
        rows = min(rows, runner.transformer.logit_rows)
    return Forward(runner.transformer, cache=runner.cache, block_size=runner.block_size, step_tokens=steps, rows=rows, vocabulary=vocabulary)


def peak_of(engine: LLM) -> int:
    """Peak bytes of the process so far, as the engine's meter has it."""
    return round(engine.report().line("peak of the process").measured or 0)


def store_reference(
    subject: Subject,
    engine_bytes: int,
    passages: SlidingWindows,
    path: Path,
    *,
    rows: int,
    vocabulary: int,
    on_token: Callable[[int], None],
    offline: bool = False,
) -> int:
    """Writes the reference's predictions of every scored token to `path`; returns the process's peak bytes. Raises BudgetError where the disk is too small."""
    check_disk(path.parent, passages.num_scored, vocabulary)
    done = 0
    with subject.open(engine_bytes, offline=offline) as engine, StoredLogprobs(path, vocabulary) as stored:
        forward = forward_of(engine, rows=rows, vocabulary=vocabulary)
        for passage in passages:
            for piece_RV in forward.logprobs(passage):
                stored.append(piece_RV)
                done += len(piece_RV)
                on_token(done)
        return peak_of(engine)


@dataclass
class Compared:
    """A reference that is ready to be read: an open model beside ours, or its predictions on the disk."""

    description: str
    vocabulary: int
    rows: int
    beside: LLM | None
    stored: StoredLogprobs | None
    peak_bytes: int = 0


@dataclass(frozen=True)
class Pairing:
    """How a reference and a model are read: together where the budget holds both, else one after the other."""

    reference: Subject
    dtype: str
    together: bool
    text: Text
    budget: Budget
    vocabulary: int

    @classmethod
    def of(cls, name: str, files: ModelFiles, dtype: str, subject: Subject, device: DeviceSpec, budget: Budget, text: Text) -> Pairing:
        """Raises InputError where the two models split the text into different tokens, BudgetError where the reference does not fit alone."""
        spec = api.spec_of_files(files)
        if files is not subject.files:
            tokenizer = Tokenizer.from_files(files)
            other = tokenizer.encode(text.text, add_special_tokens=False)[: len(text.ids)]
            where = first_difference(text.ids, other)
            if where is not None or max(text.ids) >= spec.V:
                raise InputError(
                    f"{subject.name} and {name} have different vocabularies ({subject.spec.V:,} and {spec.V:,} entries; the text splits differently from token "
                    f"{where or 0:,} on): their predictions cannot be compared token by token. Compare bits per byte, each evaluated by itself"
                )
        reference = plan_subject(name, device, budget, text.windows.context, files=files, weights=dtype, kv_store=dtype)
        shared = round(device.runtime_bytes.value or 0)
        need = reference.need_bytes + subject.need_bytes - shared
        # a second engine is also held to what the machine has left beside the first
        together = need <= budget.engine_bytes <= device.free_bytes - reference.need_bytes
        return cls(reference, dtype, together, text, budget, min(spec.V, subject.spec.V))

    def describe(self) -> str:
        how = "read beside the model" if self.together else f"read first, its predictions kept on disk in 16 bits an entry ({format_bytes(self._disk_bytes)})"
        return f"{self.reference.name} in {self.dtype}, {how}"

    @property
    def _disk_bytes(self) -> int:
        return stored_bytes(self.text.windows.num_scored, self.vocabulary)

    def prepare(self, stack: ExitStack, on_progress: OnProgress, *, offline: bool) -> Compared:
        """Opens the reference, or reads it through; `stack` closes and removes what it leaves."""
        rows = rows_within(self.budget.work_bytes, self.vocabulary)
        if self.together:
            beside = stack.enter_context(self.reference.open(self.budget.engine_bytes, offline=offline))
            return Compared(self.describe(), self.vocabulary, rows, beside, None)
        cache_folder().mkdir(parents=True, exist_ok=True)
        path = Path(stack.enter_context(TemporaryDirectory(prefix="reference-", dir=cache_folder()))) / "logprobs"
        tell = teller(on_progress, "reference", self.text.windows.num_scored)
        peak = store_reference(
            self.reference, self.budget.engine_bytes, self.text.windows, path, rows=rows, vocabulary=self.vocabulary, on_token=tell, offline=offline
        )
        return Compared(self.describe(), self.vocabulary, rows, None, stack.enter_context(StoredLogprobs(path, self.vocabulary, keep=True)), peak)


def divergence_of(engine: LLM, compared: Compared, text: Text, on_token: Callable[[int], None]) -> tuple[Perplexity, Divergence]:
    """Perplexity of the model and its divergence from a prepared reference, in one reading."""
    forward = forward_of(engine, rows=compared.rows, vocabulary=compared.vocabulary)
    if compared.beside is not None:
        beside = forward_of(compared.beside, rows=forward.rows, vocabulary=compared.vocabulary, step_tokens=forward.step_tokens)
        # both yield equal pieces: as many rows and tokens at a time as the one that takes fewer
        forward.rows, forward.step_tokens = beside.rows, beside.step_tokens
        reader = beside.logprobs
    else:
        assert compared.stored is not None, "a reference is open beside the model, or stored"
        reader = compared.stored.reader(forward.pieces)
    found = compare(reader, forward.logprobs, text.windows, on_token=on_token)
    own = summarize(
        num_tokens=found.num_tokens,
        mean_nats=math.log(found.perplexity),
        mean_error=found.perplexity_error / found.perplexity,
        num_bytes=text.scored_bytes,
        protocol=text.windows.describe(),
    )
    return own, found
