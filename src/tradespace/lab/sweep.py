"""`tradespace eval --sweep`: bytes of the weights against KL divergence, over every format and method that runs; a PNG, an HTML page and a record.

The reference (the model's own weights, dequantized) is read once and its predictions lie on the disk until the sweep is through. Each point is kept as soon
as it is measured, so a sweep that was stopped goes on where it was: what a point depends on (files, text, windows, reference) is part of its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

from tradespace import api
from tradespace.comparing import STORED, Budget, Compared, OnProgress, divergence_of, plan_subject, store_reference, teller
from tradespace.errors import BudgetError, InputError, UnsupportedError
from tradespace.home import cache_folder
from tradespace.lab.common import command_line, data_file, markdown_table
from tradespace.lab.sweep_plot import draw_html, draw_png, require_plotters
from tradespace.loading.resolve import ModelFiles, resolve
from tradespace.loading.tokenizer import Tokenizer
from tradespace.measure.record import Record, commit_of, new_record, write_atomically, write_record
from tradespace.quality.forward import rows_within
from tradespace.quality.stored import StoredLogprobs, stored_bytes
from tradespace.quality.text import Text, encode_text
from tradespace.quantize.clip import can_clip
from tradespace.quantize.gptq import takes_feedback
from tradespace.quantize.methods import METHODS, Method, find_method
from tradespace.quantizing import quantize
from tradespace.spec import native
from tradespace.spec.device import DeviceSpec
from tradespace.spec.formats import FORMATS, WeightFormat, find_format
from tradespace.spec.tensors import num_parameters
from tradespace.units import format_bytes

RTN = "rtn"  # round to nearest, as every format is filled while it is loaded
REFERENCE = "reference"
SAMPLES = 128  # windows of the calibration text
# what `run` measures: about a bit apart, by the methods that differ there
SHOWN_FORMATS = ("bf16", "int8", "w8a8", "fp8", "nf4", "int4-g32", "int4-g64", "int3-g64", "int2-g64", "e8-4", "e8-3", "e8")
SHOWN_METHODS = ("rtn", "rtn-search", "gptq", "awq", "smoothquant")
SHOWN_MODEL, SHOWN_CONTEXT, SHOWN_TOKENS, SHOWN_SAMPLES = "smollm2-135m", 512, 4096, 16
# of a Divergence, what a point keeps
KEPT = ("num_tokens", "mean_kl", "kl_error", "median_kl", "p99_kl", "max_kl", "top1_agreement", "top1_error", "rms_dp", "perplexity", "reference_perplexity")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What all points have in common."""

    model: str
    files: ModelFiles
    text: Text
    dtype: str
    device: DeviceSpec
    budget: Budget
    folder: Path
    calibrate: Path | None = None
    samples: int = SAMPLES
    offline: bool = False

    @property
    def digest(self) -> str:
        """Of all that a point depends on, apart from format and method."""
        windows = self.text.windows
        stated = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.files.weights]
        facts = [
            stated,
            list(self.text.ids),
            windows.context,
            windows.stride,
            windows.bos_id,
            self.dtype,
            None if self.calibrate is None else (str(self.calibrate), self.samples),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]

    def point_path(self, fmt: str, method: str) -> Path:
        return self.folder / "points" / f"{self.digest}-{fmt}-{method}.json"


def run_sweep(
    model: str,
    *,
    text: Path,
    output: Path,
    formats: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    reference_dtype: str = "fp32",
    context: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    calibrate: Path | None = None,
    samples: int = SAMPLES,
    memory: str | int | None = None,
    offline: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Record:
    """Measures every (format, method) that is not on disk yet, then writes output/sweep.json, sweep.png and sweep.html and returns the record.

    What cannot be built (a group that does not divide a width, a budget too small) is said and left out, with its reason in the record's notes.
    Raises InputError for an unknown format or method, where matplotlib or plotly is missing, and where no point could be measured.
    """
    require_plotters()
    pairs = choose_pairs(formats, methods, reference_dtype, calibrate=calibrate)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file. Give a folder")
    device = api.find_machine(None)
    files = resolve(model, offline=offline)
    spec = api.spec_of_files(files)
    window = min(2048, spec.max_context) if context is None else context
    read = encode_text(Tokenizer.from_files(files), text, context=window, stride=stride, tokens=tokens)
    budget = Budget.of(memory, device)
    sweep = Sweep(
        model=model, files=files, text=read, dtype=reference_dtype, device=device, budget=budget, folder=output, calibrate=calibrate, samples=samples,
        offline=offline,
    )  # fmt: skip
    rows, left_out = measure_points(sweep, pairs, on_progress, say)
    record = _record(sweep, rows, left_out)
    write_record(output / "sweep.json", record)
    draw_png(record, output / "sweep.png")
    draw_html(record, output / "sweep.html")
    say(f"wrote sweep.json, sweep.png and sweep.html in {output}")
    return record


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """Experiment `sweep`: `tradespace eval --sweep` on SmolLM2, quantizers that learn from a text included. Points wait in a folder of the commit that measured
    them, with the page, so that a run that was stopped goes on."""
    formats, methods = (("int8", "int3-g64"), ("rtn", "gptq")) if quick else (SHOWN_FORMATS, SHOWN_METHODS)
    text, calibrate = data_file("wikitext2", "wiki.test.raw"), data_file("wikitext2", "train.txt")
    output = cache_folder() / f"sweep-{commit_of(Path(__file__).parent)[0][:10]}"
    return run_sweep(
        SHOWN_MODEL, text=text, output=output, formats=formats, methods=methods, context=SHOWN_CONTEXT,
        tokens=SHOWN_CONTEXT if quick else SHOWN_TOKENS, calibrate=calibrate, samples=4 if quick else SHOWN_SAMPLES, memory="4GiB", say=say,
    )  # fmt: skip


def markdown(record: Record) -> str:
    """The points by size, as the documentation shows them."""
    header = ("nothing smaller loses less", "format", "method", "weights", "bits", "mean KL, nats", "99%", "same top token", "perplexity")
    rows = [("yes" if row["pareto"] else "", *point_cells(row)) for row in record.rows]
    circumstances, *left_out = record.notes.split("; left out ")
    pairs: dict[str, list[str]] = {}
    for pair, _, reason in (each.partition(": ") for each in left_out):
        pairs.setdefault(reason, []).append(pair)
    said = "".join(f" Left out: {', '.join(names)} ({reason})." for reason, names in pairs.items())
    return "\n\n".join((markdown_table(header, rows, left=3), f"{circumstances}.{said}"))


def choose_pairs(formats: Sequence[str] | None, methods: Sequence[str] | None, dtype: str, *, calibrate: Path | None = None) -> list[tuple[str, str]]:
    """(format, method) of all points; by default of every format that runs and every method that has what it learns from; each pair only where the method has
    something to choose in the format (`chooses`).

    Raises InputError for names that are not known and for a method without its text, UnsupportedError for a format that nothing runs.
    """
    for name in methods or ():
        if find_method(name).needs_text and calibrate is None:
            raise InputError(f"method {name} learns from a text. Give one with --calibrate FILE, or other --methods")
    for name in formats or ():
        if find_format(name).runs_since is None:
            raise UnsupportedError(f"weight format {name} is priced but cannot run yet. Runs: {', '.join(n for n, f in FORMATS.items() if f.runs_since)}")
    # each format once, under its own name and not an alias
    chosen = [find_format(name).name for name in formats] if formats else [fmt.name for fmt in FORMATS.values() if fmt.runs_since and fmt.name != dtype]
    asked = list(dict.fromkeys(methods)) if methods else [name for name, method in METHODS.items() if calibrate is not None or not method.needs_text]
    pairs = [(name, method) for name in dict.fromkeys(chosen) for method in asked if chooses(METHODS[method], FORMATS[name])]
    if not pairs:
        raise InputError(f"no method of {', '.join(asked)} has anything to choose in {', '.join(chosen)}. Add rtn, which fills every format")
    return pairs


def chooses(method: Method, fmt: WeightFormat) -> bool:
    """Whether the method can fill the format with other codes than rounding to nearest does: else its point would be that one again, or none."""
    if method.name == RTN:
        return True
    if fmt.bits > 8:
        return False  # floats are only rounded
    if method.fold in ("smooth", "smooth-search"):
        return fmt.activations == 8
    if method.rounding == "gptq":
        return takes_feedback(fmt) and not fmt.activations
    searches = can_clip(fmt) or fmt.name.startswith("e8")
    return can_clip(fmt) if method.fold == "awq" else searches


def measure_points(
    sweep: Sweep, pairs: Sequence[tuple[str, str]], on_progress: OnProgress, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[tuple[str, str], str]]:
    """Rows of all pairs, measured or found on disk, and why the others were left out. Raises InputError where nothing is left."""
    (sweep.folder / "points").mkdir(parents=True, exist_ok=True)
    todo = [pair for pair in pairs if not sweep.point_path(*pair).is_file()]
    if len(todo) < len(pairs):
        say(f"{len(pairs) - len(todo)} of {len(pairs)} points are there already, in {sweep.folder / 'points'}")
    left_out: dict[tuple[str, str], str] = {}
    if todo:
        with reference_of(sweep, on_progress, say) as compared:
            for number, pair in enumerate(todo):
                on_progress("points", number, len(todo))
                reason = _measure(sweep, compared, *pair, on_progress)
                if reason is not None:
                    left_out[pair] = reason
                    say(f"left out {' by '.join(pair)}: {reason}")
            on_progress("points", len(todo), len(todo))
    rows = [json.loads(sweep.point_path(*pair).read_text(encoding="utf-8")) for pair in pairs if pair not in left_out]
    if not rows:
        raise InputError(f"no point could be measured: {'; '.join(f'{fmt} by {method}: {why}' for (fmt, method), why in left_out.items())}")
    return rows, left_out


@contextmanager
def reference_of(sweep: Sweep, on_progress: OnProgress, say: Callable[[str], None]) -> Iterator[Compared]:
    """The reference's predictions on the disk of the sweep's folder, made unless a sweep that was stopped left them whole; removed at the end."""
    vocabulary = api.spec_of_files(sweep.files).V
    windows = sweep.text.windows
    path = sweep.folder / f"{REFERENCE}-{sweep.digest}.logprobs"
    rows = rows_within(sweep.budget.work_bytes, vocabulary)
    if not (path.is_file() and path.stat().st_size == stored_bytes(windows.num_scored, vocabulary)):
        subject = plan_subject(sweep.model, sweep.device, sweep.budget, windows.context, files=sweep.files, weights=sweep.dtype, kv_store=sweep.dtype)
        say(f"{REFERENCE}: {sweep.model} in {sweep.dtype}; its predictions take {format_bytes(stored_bytes(windows.num_scored, vocabulary))} of disk")
        tell = teller(on_progress, REFERENCE, windows.num_scored)
        store_reference(subject, sweep.budget.engine_bytes, windows, path, rows=rows, vocabulary=vocabulary, on_token=tell, offline=sweep.offline)
    with StoredLogprobs(path, vocabulary, keep=True) as stored:
        yield Compared(f"{sweep.model} in {sweep.dtype}", vocabulary, rows, None, stored)
    path.unlink()


def _measure(sweep: Sweep, compared: Compared, fmt: str, method: str, on_progress: OnProgress) -> str | None:
    """Measures one point and keeps it; or says why it cannot be built."""
    try:
        with _built(sweep, fmt, method, on_progress) as (name, files, weights):
            context, also = sweep.text.windows.context, exact_products(fmt, sweep.device)
            exact = sweep.dtype if also else find_format(fmt).compute
            subject = plan_subject(name, sweep.device, sweep.budget, context, files=files, weights=weights, kv_store=exact, also=also)
            with subject.open(sweep.budget.engine_bytes, offline=sweep.offline) as engine:
                tell = teller(on_progress, f"{fmt}, {method}", sweep.text.windows.num_scored)
                perplexity, found = divergence_of(engine, compared, sweep.text, tell)
                size, plan = sum(engine.weight_bytes().values()), engine.plan.describe()
    except (BudgetError, InputError, UnsupportedError) as error:
        return str(error)
    row: dict[str, Any] = {"format": fmt, "method": method, "plan": plan, "bytes": size, "bits_per_weight": 8 * size / num_parameters(subject.spec)}
    row |= {name: getattr(found, name) for name in KEPT} | {"bits_per_byte": perplexity.bits_per_byte}
    write_atomically(sweep.point_path(fmt, method), json.dumps(row, allow_nan=False) + "\n")
    return None


def exact_products(fmt: str, device: DeviceSpec) -> dict[str, str]:
    """The axes that leave a format's own loss alone in a figure: native products with fp32 activations, where the kernels read it; else none, and what torch
    rounds beside it (activations to 16 bits, or to what the format says) counts as its own."""
    if fmt == STORED:  # the file's own blocks lose nothing: what is left is what the native kernels' activations cost
        return {"linear": "native", "activations": "auto"}
    if device.no_native or fmt not in native.FORMAT_KINDS:
        return {}
    return {"linear": "native", "activations": "fp32"}


@contextmanager
def _built(sweep: Sweep, fmt: str, method: str, on_progress: OnProgress) -> Iterator[tuple[str, ModelFiles, str | None]]:
    """(name, files, weight format to ask for) of a point: the model itself, rounded as it is loaded, or what a quantizer wrote of it, removed afterwards.

    Embedding and head are held in the format, too, whatever the method: points differ in one thing at a time.
    """
    if method == RTN:
        yield sweep.model, sweep.files, fmt
        return
    with TemporaryDirectory(prefix="quantized-", dir=sweep.folder) as folder:
        target = Path(folder) / "model"
        quantize(
            sweep.model, target, format=fmt, method=method, embed=fmt, calibrate=sweep.calibrate, context=sweep.text.windows.context,
            samples=sweep.samples, memory=sweep.budget.memory_bytes, offline=sweep.offline, on_progress=on_progress,
        )  # fmt: skip
        yield str(target), resolve(str(target), offline=True), STORED


def _record(sweep: Sweep, rows: Sequence[Mapping[str, Any]], left_out: Mapping[tuple[str, str], str]) -> Record:
    notes = f"{sweep.model}; KL to its own weights in {sweep.dtype}; {sweep.text.windows.describe()}"
    notes += "".join(f"; left out {fmt} by {method}: {why}" for (fmt, method), why in left_out.items())
    ordered = sorted(rows, key=lambda row: (row["bytes"], row["mean_kl"]))
    record = new_record("sweep", command=command_line(), device=sweep.device, repeats=1, rows=ordered, notes=notes)
    return replace(record, rows=tuple({**row, "pareto": is_best(row, ordered)} for row in ordered))


def is_best(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no other point takes no more bytes and loses less, or fewer and no more."""
    return not any(
        other["bytes"] <= row["bytes"] and other["mean_kl"] <= row["mean_kl"] and (other["bytes"], other["mean_kl"]) != (row["bytes"], row["mean_kl"])
        for other in rows
    )


def point_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A point in words: format, method, weights, bits, KL, its 99%, same top token, perplexity."""
    return (
        row["format"],
        row["method"],
        format_bytes(row["bytes"]),
        f"{row['bits_per_weight']:.2f}",
        f"{row['mean_kl']:.3g} ± {row['kl_error']:.1g}",
        f"{row['p99_kl']:.3g}",
        f"{row['top1_agreement']:.2%}",
        f"{row['perplexity']:.5g}",
    )


def sweep_table(record: Record) -> Table:
    """The points by size, those that nothing beats marked."""
    table = Table("", "format", "method", title=record.notes.split("; left out")[0], title_justify="left")
    for column in ("weights", "bits", "mean KL", "KL 99%", "same top", "perplexity"):
        table.add_column(column, justify="right")
    for row in record.rows:
        table.add_row(
            "*" if row["pareto"] else "",
            *point_cells(row),
        )
    table.caption = "* nothing takes fewer bytes and loses less"
    table.caption_justify = "left"
    return table
