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
from tradespace.lab.common import command_line
from tradespace.lab.sweep_plot import draw_html, draw_png, require_plotters
from tradespace.loading.resolve import ModelFiles, resolve
from tradespace.loading.tokenizer import Tokenizer
from tradespace.measure.record import Record, new_record, write_atomically, write_record
from tradespace.quality.forward import rows_within
from tradespace.quality.stored import StoredLogprobs, stored_bytes
from tradespace.quality.text import Text, encode_text
from tradespace.quantize.methods import METHODS, find_method
from tradespace.quantizing import quantize
from tradespace.spec import native
from tradespace.spec.device import DeviceSpec
from tradespace.spec.formats import FORMATS, find_format
from tradespace.spec.tensors import num_parameters
from tradespace.units import format_bytes

RTN = "rtn"  # round to nearest, as every format is filled while it is loaded
REFERENCE = "reference"
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
            None if self.calibrate is None else str(self.calibrate),
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
        model=model, files=files, text=read, dtype=reference_dtype, device=device, budget=budget, folder=output, calibrate=calibrate, offline=offline
    )  # fmt: skip
    rows, left_out = measure_points(sweep, pairs, on_progress, say)
    record = _record(sweep, rows, left_out)
    write_record(output / "sweep.json", record)
    draw_png(record, output / "sweep.png")
    draw_html(record, output / "sweep.html")
    say(f"wrote sweep.json, sweep.png and sweep.html in {output}")
    return record


def choose_pairs(formats: Sequence[str] | None, methods: Sequence[str] | None, dtype: str, *, calibrate: Path | None = None) -> list[tuple[str, str]]:
    """(format, method) of all points; by default of every format that runs and every method that has what it learns from.

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
    # a method that chooses codes has nothing to choose where numbers are only rounded to a float of 16 bits or more
    return [(name, method) for name in dict.fromkeys(chosen) for method in asked if method == RTN or FORMATS[name].bits <= 8]


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
            memory=sweep.budget.memory_bytes, offline=sweep.offline, on_progress=on_progress,
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


def sweep_table(record: Record) -> Table:
    """The points by size, those that nothing beats marked."""
    table = Table("", "format", "method", title=record.notes.split("; left out")[0], title_justify="left")
    for column in ("weights", "bits", "mean KL", "KL 99%", "same top", "perplexity"):
        table.add_column(column, justify="right")
    for row in record.rows:
        table.add_row(
            "*" if row["pareto"] else "",
            row["format"],
            row["method"],
            format_bytes(row["bytes"]),
            f"{row['bits_per_weight']:.2f}",
            f"{row['mean_kl']:.3g} ± {row['kl_error']:.1g}",
            f"{row['p99_kl']:.3g}",
            f"{row['top1_agreement']:.2%}",
            f"{row['perplexity']:.5g}",
        )
    table.caption = "* nothing takes fewer bytes and loses less"
    table.caption_justify = "left"
    return table
