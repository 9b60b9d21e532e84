"""The README's first block as a visitor meets it: from a clone to the first table, without torch and with nothing cached."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tradespace.errors import EngineError, InputError
from tradespace.lab.common import command_line, markdown_table, timed_process
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Figure, Record, new_record

ROOT = Path(__file__).resolve().parents[3]
LIMIT_S = 30.0  # from the clone to the table


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """From a clone of this checkout to the first table: clone, environment, `pip install .` with nothing in pip's cache, `tradespace plan`."""
    if not (ROOT / ".git").exists():
        raise InputError("this experiment clones the checkout that it lies in, and this installation lies in none")
    rounds = 1 if quick else 3
    asked = ("plan", "llama-2-70b", "--memory", "40GB")
    steps: dict[str, list[float]] = {"clone": [], "environment": [], "install": [], "plan": [], "all": []}
    shown = ""
    for _ in range(rounds):
        folder = Path(tempfile.mkdtemp(prefix="tradespace-first-"))
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        env |= {"PIP_NO_CACHE_DIR": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "100"}
        tree, python = folder / "tree", folder / "venv" / "bin" / "python"
        try:
            steps["clone"].append(timed_process(["git", "clone", "--quiet", "--no-local", ROOT, tree], env=env)[0])
            steps["environment"].append(timed_process([sys.executable, "-m", "venv", folder / "venv"], env=env)[0])
            steps["install"].append(timed_process([python, "-m", "pip", "install", "--quiet", "."], cwd=tree, env=env)[0])
            seconds, shown = timed_process([python.with_name("tradespace"), *asked], cwd=folder, env=env)
            steps["plan"].append(seconds)
            without = timed_process([python, "-c", "import importlib.util as u; print(u.find_spec('torch') is None)"], cwd=folder, env=env)[1]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if "best:" not in shown or without.strip() != "True":
            raise EngineError("the first block gave no plan" if "best:" not in shown else "pip install . brought torch")
        steps["all"].append(sum(values[-1] for name, values in steps.items() if name != "all"))
        say(f"clone to table: {steps['all'][-1]:.1f} s")
    figures = {name: Figure.of(values, "s") for name, values in steps.items()}
    notes = f"a clone over git's own transport from this disk, packages over the network with nothing cached; bar {LIMIT_S:.0f} s; torch is not there"
    rows = [{"commands": f"git clone; python -m venv; pip install .; tradespace {' '.join(asked)}"}]
    return new_record("first-block", command=command_line(), device=this_machine(), repeats=rounds, figures=figures, rows=rows, notes=notes)


def markdown(record: Record) -> str:
    """Seconds of each step."""
    rows = [(name, f"{figure.median:.1f} [{figure.min:.1f}–{figure.max:.1f}]") for name, figure in record.figures.items()]
    return f"`{record.rows[0]['commands']}`\n\n{markdown_table(('step', 'seconds'), rows)}"
