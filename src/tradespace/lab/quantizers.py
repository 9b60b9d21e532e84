"""What quantizers make of the same bits: every method and format of issue on both models, KL and perplexity on WikiText-2 test, and whether the bars hold.

Two scopes: "linears" leaves embedding and head as the file has them, so that only what the quantizers choose differs; "all" holds every matrix in the formats
of its plan, as `tradespace quantize --bytes` does. Runs on an accelerator where torch has one (minutes), else on the CPU, where it reads less (an hour or two).
Rows are kept in the cache folder until the record is there, so that a run that was stopped goes on.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tradespace.home import cache_folder
from tradespace.lab.common import command_line, data_file
from tradespace.lab.quality import stored_as
from tradespace.lab.quantizers_model import WINDOWS, HeldHidden, HeldSensitivities, HeldWeights, Reader, embedded, quantize_whole
from tradespace.lab.quantizers_table import markdown
from tradespace.loading.tokenizer import Tokenizer
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Record, commit_of, new_record, write_atomically
from tradespace.quality.divergence import windows as windows_of
from tradespace.quality.text import begins_with_bos
from tradespace.quantize.allocate import allocate, first_last
from tradespace.quantize.calibrate import calibration_windows
from tradespace.quantize.methods import find_method
from tradespace.quantize.smoothing import choose_alpha
from tradespace.quantize.stream import LayerRunner
from tradespace.spec.device import DeviceSpec
from tradespace.spec.formats import FORMATS, find_format
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import QUANTIZABLE_ROLES, TensorSpec, layer_tensors, model_tensors
from tradespace.spec.weights import WeightPlan, weight_bytes

Scope = Literal["linears", "all"]
Say = Callable[[str], None]
CALIBRATION = ("wikitext2", "train.txt")
SEED = 0
CASES_TOGETHER = 5
ALPHA_PIECES = 1  # of WINDOWS windows each, that SmoothQuant's α is chosen on
KEPT = ("num_tokens", "mean_kl", "kl_error", "p99_kl", "top1_agreement", "perplexity", "reference_perplexity", "log_ratio", "log_ratio_error")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is read: `windows` of WikiText-2 test and `samples` of the calibration text, `context` tokens each; both whole multiples of WINDOWS."""

    windows: int = 32
    samples: int = 128
    context: int = 512


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: a format by a method. `rule`: how formats were chosen where that is not one for all ("allocate", "first-last"), at the bytes of `like`."""

    format: str
    method: str
    scope: Scope = "linears"
    rule: str = "uniform"
    like: str = ""


MODELS = {"smollm2-135m": 64, "gemma3-270m": 128}  # and the group that divides their widths
ROTATE = ("smollm2-135m",)
ON_CPU = Size(windows=WINDOWS, samples=2 * WINDOWS)
QUICK = Size(windows=WINDOWS, samples=WINDOWS, context=64)
RULES = ("uniform", "first-last")


def cases(group: int, *, rotates: bool = False) -> list[Case]:
    """All that are measured on a model whose groups have so many weights, and which `quantize/hadamard.py` can turn or not."""
    found = [Case(format="bf16", method="rtn", scope="all"), Case(format="int8", method="rtn", scope="all")]
    for bits in (4, 3):
        found += [Case(format=f"int{bits}-g{group}", method=method) for method in ("rtn", "rtn-search", "gptq", "awq", "awq-gptq")]
    found += [Case(format=fmt, method="gptq") for fmt in ("int2-g64", "int2-g64-zp", "e8")]
    found += [Case(format=fmt, method="gptaq") for fmt in ("int2-g64", "e8")]
    smooth = ("smoothquant", "smooth-search", *(("hadamard-smooth",) if rotates else ()))
    found += [Case(format="w8a8", method=method) for method in ("rtn", *smooth)]
    for bits in (4, 3):
        fmt = f"int{bits}-g{group}"
        found += [Case(format=fmt, method="rtn", scope="all")]
        for rule in RULES:
            found += [Case(format=fmt, method="gptq", scope="all", rule=rule), Case(format=fmt, method="gptq", scope="all", rule="allocate", like=rule)]
    return found


def quick_cases(group: int) -> list[Case]:
    """A few, to see that it works."""
    return [
        Case(format=f"int3-g{group}", method="rtn"),
        Case(format=f"int3-g{group}", method="gptq"),
        Case(format="w8a8", method="smoothquant"),
        Case(format=f"int3-g{group}", method="rtn", scope="all"),
    ]


def run(*, quick: bool, say: Say, only: Sequence[str] = tuple(MODELS)) -> Record:
    """Every case on these models. Where an accelerator computes, a few cases to a process: what limits one of them is the launching of small kernels."""
    device, size = this_machine(), QUICK if quick else Size() if torch.cuda.is_available() else ON_CPU
    chosen = [(model, quick_cases(group) if quick else cases(group, rotates=model in ROTATE)) for model, group in MODELS.items() if model in only]
    jobs = [(model, MODELS[model], size, tuple(wanted)) for model, wanted in (chosen[:1] if quick else chosen)]
    if torch.cuda.is_available():
        jobs = [(model, group, size, some) for model, group, size, wanted in jobs for some in split(wanted)]
        with multiprocessing.get_context("spawn").Pool(len(jobs)) as pool:
            found = pool.starmap(measure_model, jobs)
    else:
        found = [measure_model(*job) for job in jobs]
    rows = [{"part": job[0]} | row for job, rows in zip(jobs, found, strict=True) for row in rows]
    shutil.rmtree(rows_folder(size))
    for row in rows:
        say(f"{row['model']} {row['format']} {row['method']} {row['scope']} {row['rule']}: KL {row['mean_kl']:.4g} ± {row['kl_error']:.1g}")
    calibrated = f"calibrated on {size.samples} windows of {size.context} tokens of {'/'.join(CALIBRATION)}"
    notes = f"WikiText-2 test, {size.windows} windows of {size.context} tokens; {calibrated}; KL to the file's own weights, dequantized; "
    notes += "weights as they decode, products in fp32"
    return new_record("quantizers", command=command_line(), device=computing(device), repeats=1, rows=rows, notes=notes)


def split(wanted: Sequence[Case]) -> list[tuple[Case, ...]]:
    """Cases in short runs; those that share sensitivities stay together."""
    together = tuple(case for case in wanted if case.rule == "allocate")
    others = [case for case in wanted if case.rule != "allocate"]
    return [*(tuple(others[start : start + CASES_TOGETHER]) for start in range(0, len(others), CASES_TOGETHER)), *([together] if together else [])]


def computing(host: DeviceSpec) -> DeviceSpec:
    """The host, named with the accelerator that did the work."""
    if not torch.cuda.is_available():
        return host
    return replace(host, name=f"{torch.cuda.get_device_name()} (host: {host.name})")


def measure_model(model: str, group: int, size: Size, wanted: Sequence[Case]) -> list[dict[str, Any]]:
    """Rows of one model."""
    paths = [rows_folder(size) / f"{model}-{'-'.join(asdict(case).values())}.json" for case in wanted]
    todo = [(case, path) for case, path in zip(wanted, paths, strict=True) if not path.is_file()]
    # the fused attention of an accelerator takes no masks that are views into one vector
    kernels = [SDPBackend.MATH] if torch.cuda.is_available() else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    if todo:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.no_grad(), sdpa_kernel(kernels), Bench(model, size) as bench:
            for case, path in todo:
                write_atomically(path, json.dumps(bench.measure(case), allow_nan=False) + "\n")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def rows_folder(size: Size) -> Path:
    """Where the rows of this commit wait for the record."""
    return cache_folder() / f"quantizers-{commit_of(Path(__file__).parent)[0][:10]}-{size.windows}-{size.samples}-{size.context}"


@dataclass(frozen=True)
class Basis:
    """A model's weights in one basis, what it predicts, and the embedded calibration text."""

    weights: HeldWeights
    reader: Reader
    calibration: HeldHidden
    runner: LayerRunner

    @classmethod
    def of(cls, weights: HeldWeights, tested: Sequence[Sequence[int]], samples: Sequence[Sequence[int]]) -> Basis:
        runner = LayerRunner(weights.spec, len(samples[0]), windows=WINDOWS)
        return cls(weights, Reader(weights, tested), embedded(weights, samples, together=WINDOWS), runner)


class Bench:
    """One model, its texts, and what several cases need: the reference's states, the embedded calibration text, sensitivities."""

    def __init__(self, model: str, size: Size):
        self.weights, self.size = HeldWeights(model), size
        self.spec = self.weights.spec
        tokenizer = Tokenizer.from_files(self.weights.files)
        bos_id = tokenizer.bos_id if begins_with_bos(tokenizer) else None
        text = data_file("wikitext2", "wiki.test.raw").read_text(encoding="utf-8")
        tested = windows_of(tokenizer.encode(text, add_special_tokens=False), size.context, bos_id=bos_id, count=size.windows)
        self.samples = calibration_windows(tokenizer, data_file(*CALIBRATION), samples=size.samples, context=size.context, seed=SEED)
        self.tested = tested
        self.plain = Basis.of(self.weights, tested, self.samples)
        self.known: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._folder = TemporaryDirectory(prefix="quantizers-")

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *raised: object) -> None:
        self._folder.cleanup()

    def measure(self, case: Case) -> dict[str, Any]:
        """The row of a case."""
        method, plan = find_method(case.method), self.plan(case)
        basis, alpha = self.turned if method.rotate else self.plain, None
        if method.fold == "smooth":
            pieces = basis.calibration.copied()
            pieces.pieces = pieces.pieces[:ALPHA_PIECES]
            alpha = choose_alpha(basis.runner, basis.weights, plan, pieces)
        model = quantize_whole(basis.weights, plan, method, basis.runner, basis.calibration, alpha=alpha)
        found = basis.reader.divergence(model)
        counted = list(counted_tensors(self.spec, case.scope))
        nbytes, elements = sum(plan.nbytes(tensor) for tensor in counted), sum(tensor.num_elements for tensor in counted)
        row = {"model": self.spec.name, "stored": stored_as(self.weights.files)} | asdict(case)
        row |= {"plan": plan.describe() if len(plan.exceptions) < 4 else "mixed", "bytes": nbytes, "bits_per_weight": 8 * nbytes / elements}
        return row | {name: getattr(found, name) for name in KEPT} | ({} if alpha is None else {"alpha": alpha})

    @cached_property
    def turned(self) -> Basis:
        """The model turned by a random Hadamard matrix: the same predictions."""
        return Basis.of(self.weights.turned(SEED), self.tested, self.samples)

    def plan(self, case: Case) -> WeightPlan:
        """Formats of all matrices. What is out of scope is held in fp32, and not rounded."""
        outside = {"embed": "fp32", "lm_head": "fp32"}
        if case.scope == "linears":
            return WeightPlan(default=case.format, exceptions=outside)
        if case.rule == "uniform":
            return WeightPlan(default=case.format)
        if case.rule == "first-last":
            return first_last(self.spec, [case.format], 2**62)
        budget_bytes = weight_bytes(self.spec, self.plan(replace(case, rule=case.like)))
        formats = candidates(find_format(case.format).group or 0)
        plan, _ = allocate(self.spec, self.sensitivities(case.method, formats), formats, budget_bytes)
        return plan

    def sensitivities(self, method: str, formats: Sequence[str]) -> Any:
        """Of every matrix in every format, measured once."""
        key = (method, tuple(formats))
        if key not in self.known:
            found = HeldSensitivities(self.weights, find_method(method), formats, self.samples, Path(self._folder.name) / str(len(self.known)))
            self.known[key] = found.run({"method": method})
        return self.known[key]


def candidates(group: int) -> list[str]:
    """What `tradespace quantize --bytes` spends a budget on, in groups of this size."""
    return [f"int2-g{group}-zp", f"int3-g{group}", f"int4-g{group}", "int8", "bf16"]


def counted_tensors(spec: ModelSpec, scope: Scope) -> Iterator[TensorSpec]:
    """The matrices whose bytes a row states."""
    tensors = model_tensors(spec) if scope == "all" else [tensor for index in range(spec.L) for tensor in layer_tensors(spec, index)]
    for tensor in tensors:
        if scope == "all" or (tensor.role in QUANTIZABLE_ROLES and tensor.name.endswith(".weight")):
            yield tensor


__all__ = ["FORMATS", "Bench", "Case", "Size", "cases", "markdown", "measure_model", "run"]
