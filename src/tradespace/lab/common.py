"""What several experiments share: request lengths out of a trace or drawn, and text to read."""

from __future__ import annotations

import csv
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tradespace.errors import EngineError, InputError

# The evaluation data lies beside a checkout, or in it, and is no part of the package.
_BESIDE, _INSIDE = (Path(__file__).resolve().parents[number] / "shared" / "data" for number in (4, 3))
DATA = _INSIDE if _INSIDE.is_dir() else _BESIDE
SEED = 20231116


@dataclass(frozen=True, slots=True)
class Length:
    """Tokens of one request: prompt, and output."""

    prompt: int
    output: int


def data_file(*parts: str) -> Path:
    """A file of the evaluation data. Raises InputError where this checkout has none beside it."""
    path = DATA.joinpath(*parts)
    if not path.is_file():
        raise InputError(f"this experiment reads {'/'.join(parts)} of the evaluation data, which is not beside this checkout (shared/data)")
    return path


def trace_lengths(count: int, *, name: str = "conv", max_prompt: int | None = None, max_output: int | None = None, seed: int = SEED) -> list[Length]:
    """`count` requests drawn without replacement from the Azure 2023 trace, clipped where asked, in the drawn order."""
    with data_file("traces", f"AzureLLMInferenceTrace_{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = [Length(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    drawn = random.Random(seed).sample([row for row in rows if row.prompt > 0 and row.output > 0], count)
    return [Length(min(row.prompt, max_prompt or row.prompt), min(row.output, max_output or row.output)) for row in drawn]


def uniform_lengths(count: int, low: int, high: int, *, seed: int = SEED) -> list[Length]:
    """`count` requests whose final length is uniform on low … high, with the prompt's share of it uniform, too."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        total = draw.randint(low, high)
        prompt = draw.randint(1, total - 1)
        found.append(Length(prompt, total - prompt))
    return found


def read_text(*parts: str) -> str:
    return data_file(*parts).read_text(encoding="utf-8")


def record_file(experiment: str) -> str:
    """The name of an experiment's record in results/: commands are written with hyphens, files with underscores.

    >>> record_file("kv-cache")
    'kv_cache.json'
    """
    return f"{experiment.replace('-', '_')}.json"


def command_line() -> str:
    """The command that this process runs under, without folders: where the record goes is not part of what was measured."""
    program = Path(sys.argv[0]).name
    words = ["tradespace" if program in ("__main__.py", "main.py") else program]
    arguments = iter(sys.argv[1:])
    for word in arguments:
        if word in ("--output", "-o"):
            next(arguments, None)
        elif not word.startswith("--output="):
            words.append(word)
    return shlex.join(words)


def timed_process(arguments: Sequence[str | Path], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> tuple[float, str]:
    """Seconds and standard output of a process. Raises EngineError with the last line that it wrote where it fails."""
    start = time.perf_counter()
    done = subprocess.run([str(word) for word in arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    elapsed_s = time.perf_counter() - start
    if done.returncode:
        raise EngineError(f"{' '.join(map(str, arguments[:4]))} ended with {done.returncode}: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    return elapsed_s, done.stdout


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table; the first `left` columns are text, the others figures."""
    marks = [":--" if column < left else "--:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, marks, *rows])


def commits_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on where the parts of a record were measured, if not all at one commit."""
    parts: dict[str, list[str]] = {}
    for row in rows:
        if "commit" in row and row["part"] not in (named := parts.setdefault(row["commit"][:10], [])):
            named.append(row["part"])
    if len(parts) < 2:
        return ""
    return "Measured at different commits: " + "; ".join(f"{', '.join(named)} at {commit}" for commit, named in parts.items()) + "."
