"""What an experiment need not work out again, trainings above all. Each finished result is kept in the cache folder, under the name of all that defines it; a
training that was cut goes on from its own checkpoints, bit for bit. TRADESPACE_HOME says where: the folder can be carried to another machine and back.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tradespace.errors import EngineError
from tradespace.home import cache_folder
from tradespace.measure.record import write_atomically
from tradespace.train import checkpoints
from tradespace.train.loop import Trainer

RECIPE = 1  # raised when what training computes changes: older results then count no more
RESULT = "result.json"


@dataclass
class Clock:
    """Seconds since an experiment began, and the most that it may take. None: any."""

    limit_s: float | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def spent_s(self) -> float:
        return time.monotonic() - self.began

    @property
    def left_s(self) -> float | None:
        """At least 0; None without a limit."""
        return None if self.limit_s is None else max(0.0, self.limit_s - self.spent_s)


def settings_of(**values: Any) -> dict[str, Any]:
    """What defines a result: these values, the recipe, and torch's version."""
    return {**values, "recipe": RECIPE, "torch": torch.__version__}


def kept(experiment: str, settings: Mapping[str, Any], work: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """The result of `work(folder)` under these settings: as it was kept, or worked out now in a folder of its own and kept.

    What `work` leaves in its folder stays, but for checkpoints. A result that cannot be read counts as none.
    """
    folder = folder_of(experiment, settings)
    path = folder / RESULT
    if (found := _read(path)) is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    result = dict(work(folder))
    write_atomically(path, json.dumps({"settings": dict(settings), "result": result}, indent=1) + "\n")
    for checkpoint in folder.glob(f"{checkpoints.PREFIX}*"):
        shutil.rmtree(checkpoint)
    return result


def folder_of(experiment: str, settings: Mapping[str, Any]) -> Path:
    """Where the result under these settings is kept."""
    text = json.dumps(dict(settings), sort_keys=True)
    return cache_folder() / "lab" / experiment / hashlib.sha256(text.encode()).hexdigest()[:20]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["result"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def go_on(trainer: Trainer, folder: Path, say: Callable[[str], None], clock: Clock | None = None, *, every: int = 100) -> int:
    """Runs `trainer` to its last step, from the last checkpoint in `folder` where there is one; says its speed every so many steps. Returns the step that it
    began at. Raises EngineError where the clock ran out: a checkpoint was written, and the same experiment goes on from it."""
    if (last := checkpoints.latest(folder, say)) is not None:
        trainer.restore(last)
        say(f"goes on from step {trainer.step} of {trainer.limits.steps}")
    first, began, tokens = trainer.step, time.monotonic(), 0
    if clock is not None:
        trainer.limits = replace(trainer.limits, time_s=clock.left_s)

    def told(report: Any) -> None:
        nonlocal tokens
        tokens += report.tokens
        if report.step % every == 0:
            say(f"  step {report.step}/{trainer.limits.steps}: loss {report.loss:.4f}, {tokens / (time.monotonic() - began):,.0f} tok/s")

    trainer.run(folder, on_step=told, say=say)
    if trainer.step < trainer.limits.steps:
        raise EngineError(
            f"the time limit came at step {trainer.step} of {trainer.limits.steps}; what is finished is kept in {cache_folder() / 'lab'}. "
            "The same command goes on from there"
        )
    return first
