"""`ts.quantize(model, output, …)`: a checkpoint in fewer bytes, layer by layer inside a stated memory, that other tools open."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from tradespace import api
from tradespace.errors import BudgetError, InputError, UnsupportedError
from tradespace.loading.gguf import read_gguf
from tradespace.loading.resolve import ModelFiles, resolve
from tradespace.loading.safetensors import read_sharded
from tradespace.loading.tokenizer import Tokenizer
from tradespace.loading.weights import Source
from tradespace.measure.memory import MemoryMeter, limit_heap_growth, process_bytes
from tradespace.quantize.allocate import CANDIDATES, allocate, budget_of_bits
from tradespace.quantize.budget import check_budget
from tradespace.quantize.calibrate import calibration_windows
from tradespace.quantize.hadamard import RotatedWeights
from tradespace.quantize.methods import Method, check_formats, find_method, named
from tradespace.quantize.pipeline import Outcome, Pipeline, Recipe, check_output
from tradespace.quantize.sensitivity import Sensitivity, SensitivityPass
from tradespace.quantize.source import StoredWeights, Weights
from tradespace.spec.formats import find_format
from tradespace.spec.model import ModelSpec, RoutedFFN
from tradespace.spec.tensors import num_parameters
from tradespace.spec.weights import WeightPlan, weight_bytes
from tradespace.units import MiB, format_bytes, parse_bytes

Target = Literal["compressed-tensors", "gguf"]
TARGETS: tuple[Target, ...] = get_args(Target)
# what a budget is spent on in a GGUF file: blocks of 32, which fit more widths than the K-quants' 256
GGUF_CANDIDATES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "bf16")
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What was written. `formats`: by default and exceptions. `expected_kl`: the sum of measured sensitivities, where formats were chosen for a budget.

    weight_bytes: of the weights as the engine holds them; stored_bytes: of the checkpoint's tensors, which say a little more (shapes, padding).
    errors: squared error of each linear's outputs over their square, on calibration text, where the method learned from one.
    """

    model: str
    folder: str
    method: str
    formats: str
    weight_bytes: int
    stored_bytes: int
    bits_per_weight: float
    bf16_bytes: int
    seconds: float
    memory_bytes: int
    peak_bytes: int
    resumed: bool
    expected_kl: float | None = None
    sensitivities: tuple[Sensitivity, ...] = ()
    errors: dict[str, float] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def quantize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str | None = None,
    group_size: int | None = None,
    method: str | None = None,
    bytes: str | int | None = None,
    bits: float | None = None,
    formats: Sequence[str] | None = None,
    embed: str | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    samples: int = 128,
    context: int = 2048,
    alpha: float | None = None,
    to: Target = "compressed-tensors",
    memory: str | int | None = None,
    seed: int = 0,
    revision: str | None = None,
    offline: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Quantized:
    """Quantizes `model` into the folder `output`, which appears whole or not at all; a run that was cut short goes on where it stopped.

    format, group_size  one format for all linears ("int4" with 64, or "int4-g64"); `embed` holds embedding and head, by default as dense as they are
    bytes, bits         a budget instead: all weights together, or per parameter; formats are chosen per matrix, out of `formats`, by measured sensitivity
    method              of `quantize.methods.METHODS`; default: gptq where there is a text to learn from (smoothquant for w8a8), else rtn-search; rtn for GGUF
    to                  "compressed-tensors", a folder that transformers and vLLM open; "gguf", a file that llama.cpp opens, from a folder or a file
    calibrate           a text file of `samples` windows of `context` tokens; alpha: SmoothQuant's, by default searched for
    memory              what the process may take at its peak; default: 80% of what is free

    Raises InputError and UnsupportedError for what cannot be done, before anything is written; BudgetError where `memory` or the budget of bytes is too small.
    """
    start_s, out = time.monotonic(), Path(output)
    check_output(out)
    budget = bytes is not None or bits is not None
    if budget == (format is not None) or (bytes is not None and bits is not None):
        raise InputError("say what is wanted by one of --format (all linears alike), --bytes or --bits (formats chosen per matrix)")
    if to not in TARGETS:
        raise InputError(f"--to {to}: write {' or '.join(TARGETS)}")
    chosen = _method(method, format, to, has_text=calibrate is not None, budget=budget)
    _refuse_idle(chosen, budget=budget, group_size=group_size, embed=embed, formats=formats, alpha=alpha)
    if calibrate is None and (chosen.needs_text or budget):
        what = "a budget is spent by measured sensitivities, and they need" if budget else f"--method {chosen.name} learns from"
        raise InputError(f"{what} text of the kind that the model is for. Give --calibrate FILE, or use --format with --method rtn-search, which needs none")
    files = resolve(str(model), revision=revision, offline=offline)
    spec = api.spec_of_files(files)
    if any(isinstance(layer.ffn, RoutedFFN) for layer in spec.layers):
        raise UnsupportedError(f"{spec.name} routes tokens to experts; no such model runs here yet, and none is quantized. Its dense relatives are")
    if spec.quantization and files.kind == "safetensors":
        raise UnsupportedError(f"{spec.name} is stored as {spec.quantization} already. Quantize the model's bf16 weights, or a GGUF file")
    if calibrate is not None and context > spec.max_context:
        raise InputError(f"--context {context}: {spec.name} takes at most {spec.max_context} tokens")
    memory_bytes = parse_bytes(api.DEFAULT_SHARE if memory is None else memory, free_bytes=api.this_machine().free_bytes)
    limit_heap_growth(4 * MiB)  # matrices of small models stay in the heap: a page fault for each of their temporaries would cost a third of the time
    with MemoryMeter() as meter:
        job = _Job(str(model), files, chosen, out, to, seed, on_progress)
        if calibrate is not None:
            job.windows = calibration_windows(Tokenizer.from_files(files), Path(calibrate), samples=samples, context=context, seed=seed)
        check_budget(job.weights.spec, chosen, memory_bytes, process_bytes=process_bytes(), samples=samples, context=context)
        if budget:
            limit = budget_of_bits(job.weights.spec, bits) if bits is not None else parse_bytes(bytes or 0)
            names = [find_format(name).name for name in formats] if formats else list(GGUF_CANDIDATES if to == "gguf" else CANDIDATES)
            with _told_of_a_full_disk(out):
                plan = job.allocate(names, limit)
        else:
            plan = uniform_plan(named(format or "", group_size), embed)
        check_disk(out, job.weights.spec, plan, to, tokens=samples * context * (1 + chosen.aims) if chosen.needs_text else 0)
        with _told_of_a_full_disk(out):
            outcome = job.run(plan, alpha)
    return _report(job, plan, outcome, memory_bytes, meter.peak_bytes, time.monotonic() - start_s)


def check_disk(out: Path, spec: ModelSpec, plan: WeightPlan, to: Target, *, tokens: int) -> None:
    """Raises BudgetError (need, have, remedy) where the disk under `out` has no room for the weights, for a GGUF file's copy of them, and for the hidden states
    of `tokens` calibration tokens before and after a layer. What an earlier run left there counts as room."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    partial = out.with_name(out.name + ".partial")
    left_bytes = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) if partial.exists() else 0
    need_bytes = weight_bytes(spec, replace(plan, layout="stored")) * (2 if to == "gguf" else 1) + 2 * 4 * tokens * spec.D
    have_bytes = shutil.disk_usage(folder).free + left_bytes
    if need_bytes > have_bytes:
        need, have = format_bytes(need_bytes), format_bytes(have_bytes)
        remedy = "Give -o on another disk, or free some" + (", or calibrate on fewer --samples" if tokens else "")
        raise BudgetError(f"writing {out} needs {need} of disk; {have} are free under {folder}. {remedy}", need_bytes=need_bytes, have_bytes=have_bytes)


@contextmanager
def _told_of_a_full_disk(out: Path) -> Iterator[None]:
    """A disk that fills up on the way ends the run with what is to be done; what is whole so far is kept."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        kept = "What is finished waits beside it: with the same command the run goes on from there"
        raise InputError(f"the disk is full ({error.strerror}); {out} was not written. Free some space. {kept}") from error


def _refuse_idle(method: Method, *, budget: bool, group_size: int | None, embed: str | None, formats: Sequence[str] | None, alpha: float | None) -> None:
    """Raises InputError for what was given and would change nothing."""
    if budget and group_size is not None:
        raise InputError(f"--group-size {group_size} goes with --format. A budget is spent on formats that say their groups: --formats int3-g64,int4-g64,int8")
    if budget and embed is not None:
        raise InputError(f"--embed {embed} goes with --format. A budget is spent on embedding and head, too: leave it away, or use --format")
    if not budget and formats is not None:
        raise InputError("--formats is what a budget is spent on. Say the budget with --bytes or --bits, or one format with --format")
    if formats is not None and not formats:
        raise InputError("--formats names no format. Leave it away, or say for example --formats int3-g64,int4-g64,int8")
    if alpha is not None and method.fold != "smooth":
        raise InputError(f"--alpha {alpha:g} is the balance of --method smoothquant; {method.name} has none. Leave it away")


def uniform_plan(fmt: str, embed: str | None) -> WeightPlan:
    """One format for the layers' linears; embedding and head in `embed`, by default dense."""
    outside = find_format(embed).name if embed is not None else WeightPlan(default=fmt).dense
    return WeightPlan(default=fmt, exceptions=dict.fromkeys(("embed", "lm_head"), outside) if outside != fmt else {})


def _method(name: str | None, fmt: str | None, to: Target, *, has_text: bool, budget: bool) -> Method:
    if name is not None:
        found = find_method(name)
    elif (fmt is None and to == "gguf") or (fmt is not None and find_format(fmt).block is not None and not fmt.startswith("e8")):
        found = find_method("rtn")  # GGUF's own blocks
    elif fmt == "w8a8":
        found = find_method("smoothquant" if has_text else "rtn")
    else:
        found = find_method("gptq" if has_text else "rtn-search")
    if budget and (found.rotate or found.fold is not None):
        raise InputError(f"--method {found.name} changes the matrices that sensitivities are measured of. With a budget use gptq, rtn or rtn-search")
    return found


class _Job:
    """One call's model and method, and what it has read so far."""

    def __init__(self, name: str, files: ModelFiles, method: Method, out: Path, to: Target, seed: int, on_progress: OnProgress):
        self.name, self.files, self.method, self.out, self.seed, self.on_progress = name, files, method, out, seed, on_progress
        self.to: Target = to
        self.source: Source = read_gguf(files.weights[0]) if files.kind == "gguf" else read_sharded(files.folder)
        stored = StoredWeights(self.source, api.spec_of_files(files))
        self.weights: Weights = RotatedWeights(stored, seed) if method.rotate else stored
        self.windows: list[list[int]] = []
        self.found: list[Sensitivity] = []
        self.expected_kl: float | None = None

    def allocate(self, names: Sequence[str], budget_bytes: int) -> WeightPlan:
        """The plan for a budget. Sensitivities wait beside the output until it is whole."""
        allocate(self.weights.spec, [], names, budget_bytes)  # a budget that cannot be met is told before hours are spent
        recipe = Recipe(weights=self.weights, plan=WeightPlan(), method=self.method, windows=self.windows, seed=self.seed, target=self.to)
        for name in names:
            check_formats(self.weights.spec, WeightPlan(default=name), self.method)
            replace(recipe, plan=WeightPlan(default=name)).naming(self.files, self.source)  # so is what the written form cannot say
        work = self.sensitivity_folder
        try:
            self.found = SensitivityPass(self.weights, self.method, names, self.windows, work, progress=self.on_progress).run(recipe.job(self.files))
        except InputError:  # weights that are not finite: no later run could go on
            shutil.rmtree(work)
            raise
        plan, self.expected_kl = allocate(self.weights.spec, self.found, names, budget_bytes)
        return plan

    @property
    def sensitivity_folder(self) -> Path:
        return self.out.with_name(self.out.name + ".sensitivity")

    def run(self, plan: WeightPlan, alpha: float | None) -> Outcome:
        windows = self.windows if self.method.needs_text else []
        recipe = Recipe(weights=self.weights, plan=plan, method=self.method, windows=windows, alpha=alpha, seed=self.seed, target=self.to)
        outcome = Pipeline(recipe, self.files, self.source, self.out, progress=self.on_progress).run()
        shutil.rmtree(self.sensitivity_folder, ignore_errors=True)
        return outcome


def _report(job: _Job, plan: WeightPlan, outcome: Outcome, memory_bytes: int, peak_bytes: int, seconds: float) -> Quantized:
    spec = job.weights.spec
    held_bytes = weight_bytes(spec, plan)
    return Quantized(
        model=job.name,
        folder=str(outcome.folder),
        method=job.method.name,
        formats=plan.describe(),
        weight_bytes=held_bytes,
        stored_bytes=outcome.nbytes,
        bits_per_weight=8 * held_bytes / num_parameters(spec),
        bf16_bytes=weight_bytes(replace(spec, tied=api.spec_of_files(job.files).tied), WeightPlan()),
        seconds=seconds,
        memory_bytes=memory_bytes,
        peak_bytes=peak_bytes,
        resumed=outcome.resumed,
        expected_kl=job.expected_kl,
        sensitivities=tuple(job.found),
        errors=outcome.errors,
        alphas=outcome.alphas,
    )
