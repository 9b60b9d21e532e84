"""The two commands that a visitor types first, run for real, with what they print kept in a record."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tradespace.errors import EngineError, InputError
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Figure, Record, new_record

ROOT = Path(__file__).resolve().parents[3]


def _make(experiment: str, target: str, say: Callable[[str], None], keep: Callable[[Sequence[str]], Sequence[str]]) -> Record:
    if not (ROOT / "Makefile").is_file():
        raise InputError("this experiment runs make in a checkout, and this installation lies in none")
    start = time.perf_counter()
    done = subprocess.run(["make", "-s", target], cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "100"})
    elapsed_s = time.perf_counter() - start
    if done.returncode:
        raise EngineError(f"make {target} failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    say(f"make {target}: {elapsed_s:.0f} s")
    figures = {"duration": Figure.of([elapsed_s], "s")}
    rows = [{"output": "\n".join(line.rstrip() for line in keep(done.stdout.splitlines()))}]
    return new_record(experiment, command=f"make {target}", device=this_machine(), repeats=1, figures=figures, rows=rows)


def run_demo(*, quick: bool, say: Callable[[str], None]) -> Record:
    return _make("demo", "demo", say, lambda lines: lines)


def run_tests(*, quick: bool, say: Callable[[str], None]) -> Record:
    """Only how each tool ended is kept: the dots in between say nothing."""
    endings = ("All checks passed", "files already formatted", "errors, ", "Contracts:", " passed")
    return _make("tests", "test", say, lambda lines: [line for line in lines if any(ending in line for ending in endings)])


def markdown(record: Record) -> str:
    return f"```\n$ {record.command}\n{record.rows[0]['output']}\n```"
