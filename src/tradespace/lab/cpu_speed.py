"""Does the CPU engine hold its bars? Decode, prefill and batches beside the peers on the same files, interleaved; start-up and memory of `tradespace run`.

A bar that is a ratio means the smaller of that ratio and 88% of what reading the same bytes would allow at the read bandwidth measured in the same rounds.
In parts (`lab run cpu-speed --only decode`), each to be run alone on the machine.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tradespace.errors import EngineError
from tradespace.lab.bench.command import ready_machine
from tradespace.lab.bench.models import prepare
from tradespace.lab.bench.rounds import Cell, measure_cell
from tradespace.lab.bench.tables import figures_of, rows_of, spread
from tradespace.lab.bench.task import Task
from tradespace.lab.bench.work import work_of
from tradespace.lab.common import command_line, commits_of, markdown_table
from tradespace.lab.timing import first_byte_s
from tradespace.measure.record import Figure, Record, commit_of, new_record
from tradespace.units import MiB

ROUNDS, QUICK_ROUNDS = 7, 2
OF_LIMIT = 0.88
TOKENS, BATCH_TOKENS, SEQUENCES, BATCH_PROMPT = 64, 32, 16, 128
SHORT, LONG = 128, 2048
TORCH_BYTES = 220 * MiB
MEMORY_BAR, START_BAR_S, MBU_BAR = 1.15, 2.5, 0.80
PROMPT = "Why is the sky blue?"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, the format that its file is made in (None: as it comes), and what decode at 128 positions must reach against llama.cpp."""

    name: str
    model: str
    file_format: str | None
    decode_bar: float
    mbu_bar: float | None = None


Q4_0 = Subject(name="SmolLM2-135M Q4_0", model="smollm2-135m", file_format="q4_0", decode_bar=2.2)
SUBJECTS = (
    Q4_0,
    Subject(name="SmolLM2-135M Q4_1", model="smollm2-135m", file_format=None, decode_bar=2.8),
    Subject(name="SmolLM2-135M Q8_0", model="smollm2-135m", file_format="q8_0", decode_bar=2.0),
    Subject(name="Gemma 3 270M Q4_K_M", model="gemma3-270m", file_format=None, decode_bar=2.0),
    Subject(name="1B Llama shape Q4_0", model="random:llama-3.2-1b", file_format="q4_0", decode_bar=1.5, mbu_bar=MBU_BAR),
)
LONG_BAR, BATCH_BAR = 2.5, 2.7
PREFILL_BARS = {512: {"llama.cpp": 2.2, "openvino": 1.2, "transformers": 2.0}, 2048: {"llama.cpp": 2.2, "openvino": 1.0, "transformers": 2.0}}

Say = Callable[[str], None]


@dataclass
class Found:
    """What a run gathers."""

    figures: dict[str, Figure]
    rows: list[dict[str, Any]]

    def take(self, part: str, subject: Subject, cell: Cell, bars: dict[str, float], say: Say) -> None:
        """A cell's figures, its engines, and a bar for each peer that took part."""
        self.figures |= figures_of(cell, f"{part}: {subject.name}: ")
        self.rows += rows_of(cell, part=part, subject=subject.name)
        for name, bar in bars.items():
            what = f"{subject.name}, {cell.task.label}: × {name}"
            peer = cell.engine(name)
            if peer is None:
                self.bar(part, what, bar, "×", absent=cell.absent.get(name, "not asked"), say=say)
                continue
            limit = OF_LIMIT * cell.limit_tokens_per_s() / statistics.median(peer.tokens_per_s)
            speeds = f"{spread(cell.ours.tokens_per_s, 0)} against {spread(peer.tokens_per_s, 0)} tok/s"
            self.bar(part, what, bar, "×", values=cell.ratios(peer), limit=limit, note=speeds, say=say)

    def bar(
        self,
        part: str,
        what: str,
        bar: float,
        unit: str,
        *,
        values: Sequence[float] = (),
        limit: float | None = None,
        at_most: bool = False,
        note: str = "",
        absent: str = "",
        say: Say,
    ) -> None:
        """A row that says whether a bar is held: the median of `values` at least `bar`, or the `limit` where that is lower; or at most `bar`."""
        row: dict[str, Any] = {"part": part, "what": what, "bar": bar, "unit": unit, "at_most": at_most, "limit": limit, "note": note, "absent": absent}
        if values:
            figure = statistics.median(values)
            needed = bar if limit is None else min(bar, limit)
            row |= {"figure": figure, "low": min(values), "high": max(values), "held": figure <= bar if at_most else figure >= needed}
            say(f"{what}: {figure:.2f} {unit} (bar {bar:g}, {'held' if row['held'] else 'NOT held'}) {note}")
        self.rows.append(row)


def run(*, quick: bool, say: Say, only: Sequence[str]) -> Record:
    """The parts `only`; quick: two rounds of the first model, the first length and the first peer."""
    device = ready_machine()
    rounds = QUICK_ROUNDS if quick else ROUNDS
    bench = _Bench(threads=device.cores or 1, rounds=rounds, quick=quick, say=say)
    found = Found({}, [])
    for part in only:
        _PARTS[part](bench, found)
    commit, date = commit_of(Path(__file__).parent)[0], time.strftime("%Y-%m-%d")
    rows = [{**row, "commit": commit, "date": date} for row in found.rows]
    notes = (
        f"rounds interleaved, order rotated, the first not counted; {bench.threads} threads; medians of paired ratios [spread]; limit: {OF_LIMIT:.0%} of what "
        "reading the same bytes would allow"
    )
    return new_record("cpu-speed", command=command_line(), device=device, repeats=rounds, figures=found.figures, rows=rows, notes=notes)


@dataclass(frozen=True, kw_only=True)
class _Bench:
    threads: int
    rounds: int
    quick: bool
    say: Say

    def path(self, subject: Subject) -> Path:
        return prepare(subject.model, file_format=subject.file_format, say=self.say)

    def cell(self, subject: Subject, against: Sequence[str], **task: Any) -> Cell:
        wanted = Task(path=str(self.path(subject)), threads=self.threads, **task)
        return measure_cell(wanted, against, rounds=self.rounds, tell=lambda what, done, total: None, say=self.say)


def _decode(bench: _Bench, found: Found) -> None:
    for subject in SUBJECTS[:1] if bench.quick else SUBJECTS:
        for prompt in (SHORT,) if bench.quick else (SHORT, LONG):
            cell = bench.cell(subject, ["llama.cpp"], kind="decode", prompt=prompt, tokens=TOKENS)
            found.take("decode", subject, cell, {"llama.cpp": subject.decode_bar if prompt == SHORT else LONG_BAR}, bench.say)
            if prompt != SHORT:
                continue
            if subject.mbu_bar is not None:
                shares = [speed * cell.work.bytes_per_token / read for speed, read in zip(cell.ours.tokens_per_s, cell.read_bytes_per_s, strict=True)]
                found.bar("decode", f"{subject.name}, {cell.task.label}: MBU", subject.mbu_bar, "of reading", values=shares, say=bench.say)
            kv_bytes = int(cell.ours.facts["kv_bytes"])
            _memory_bar(found, "decode", f"{subject.name}, {cell.task.label}", cell.ours.peak_bytes, cell.work.weight_bytes, kv_bytes, bench.say)


def _prefill(bench: _Bench, found: Found) -> None:
    for prompt, bars in list(PREFILL_BARS.items())[: 1 if bench.quick else None]:
        cell = bench.cell(Q4_0, list(bars)[: 1 if bench.quick else None], kind="prefill", prompt=prompt, tokens=0)
        found.take("prefill", Q4_0, cell, bars, bench.say)


def _batch(bench: _Bench, found: Found) -> None:
    cell = bench.cell(Q4_0, ["llama.cpp"], kind="batch", prompt=BATCH_PROMPT, tokens=BATCH_TOKENS, sequences=SEQUENCES)
    found.take("batch", Q4_0, cell, {"llama.cpp": BATCH_BAR}, bench.say)


def _start(bench: _Bench, found: Found) -> None:
    """`tradespace run` as a user types it: seconds up to the first byte of text, and the peak of a run of 32 tokens with its report."""
    path = bench.path(Q4_0)
    command = [sys.executable, "-m", "tradespace", "run", str(path), PROMPT, "--offline"]
    seconds = [first_byte_s([*command, "--max-tokens", "8"]) for _ in range(bench.rounds + 1)][1:]
    found.figures["start: first token"] = Figure.of(seconds, "s")
    found.bar("start", f"{Q4_0.name}: tradespace run up to the first token", START_BAR_S, "s", values=seconds, at_most=True, say=bench.say)
    report, peak_bytes = _reported_run([*command, "--max-tokens", "32", "--json"])
    kv_bytes = next(round(line["measured"]) for line in report["lines"] if line["name"] == "kv cache")
    weight_bytes = work_of(Task(kind="decode", path=str(path), prompt=SHORT, tokens=1)).weight_bytes
    _memory_bar(found, "start", f"{Q4_0.name}: tradespace run", peak_bytes, weight_bytes, kv_bytes, bench.say)


def _memory_bar(found: Found, part: str, what: str, peak_bytes: int, weight_bytes: int, kv_bytes: int, say: Say) -> None:
    allowed = weight_bytes + kv_bytes + TORCH_BYTES
    found.figures[f"{part}: {what}: peak resident size"] = Figure.of([peak_bytes], "B")
    note = f"{peak_bytes / MiB:,.0f} MiB; weights {weight_bytes / MiB:,.0f}, KV {kv_bytes / MiB:,.0f}, torch {TORCH_BYTES / MiB:,.0f}"
    found.bar(part, f"{what}: peak memory", MEMORY_BAR, "of weights + KV + torch", values=[peak_bytes / allowed], at_most=True, note=note, say=say)


_PARTS: dict[str, Callable[[_Bench, Found], None]] = {"decode": _decode, "prefill": _prefill, "batch": _batch, "start": _start}


def _reported_run(command: list[str]) -> tuple[dict[str, Any], int]:
    """The report of a run with --json, and the most that its process had resident, as the kernel says when it has ended."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise EngineError(f"tradespace run --json ended with {process.returncode}")
    return json.loads(text)["report"], used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def markdown(record: Record) -> str:
    bars = [row for row in record.rows if "bar" in row]
    rows = [tuple(_cells(row)) for row in bars]
    held = sum(bool(row.get("held")) for row in bars)
    lines = [markdown_table(("what", "bar", "limit", "measured", "held", "tok/s, or bytes"), rows), ""]
    lines.append(f"{held} of {len(bars)} bars held. {record.notes}.")
    lines += list(_circumstances(record))
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> Iterator[str]:
    sign = "≤" if row["at_most"] else "≥"
    form = ".0%" if row["unit"].startswith("of reading") else ".2f"
    yield row["what"]
    yield f"{sign} {row['bar']:{form}}{' s' if row['unit'] == 's' else '×' if row['unit'] == '×' else ''}"
    yield f"{row['limit']:.2f}×" if row["limit"] is not None else ""
    if "figure" not in row:
        yield from (row["absent"], "not measured", "")
        return
    several = row["low"] != row["high"]
    yield f"{row['figure']:{form}}" + (f" [{row['low']:{form}}–{row['high']:{form}}]" if several else "")
    yield "yes" if row["held"] else "**no**"
    yield row["note"]


def _circumstances(record: Record) -> Iterator[str]:
    """Versions and settings of the peers; commits, where parts were measured at several."""
    peers: dict[str, set[str]] = {}
    for row in record.rows:
        if "version" in row and row["engine"] != "tradespace":
            peers.setdefault(f"{row['engine']} {row['version']}", set()).add(row["settings"])
    if peers:
        yield "Peers: " + "; ".join(f"{name} ({', '.join(sorted(settings))})" for name, settings in peers.items()) + "."
    if commits := commits_of(record.rows):
        yield commits
