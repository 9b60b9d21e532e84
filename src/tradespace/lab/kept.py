"""Trainings that an experiment need not repeat. The result of each finished one is kept in the cache folder, under the name of all that defines it; one that
was cut goes on from its own checkpoints, bit for bit. TRADESPACE_HOME says where: the folder can be carried to another machine and back.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tradespace.home import cache_folder
from tradespace.measure.record import write_atomically
from tradespace.train import checkpoints
from tradespace.train.loop import Trainer

RECIPE = 1  # raised when what training computes changes: older results then count no more
RESULT = "result.json"


def settings_of(**values: Any) -> dict[str, Any]:
    """What defines a result: these values, the recipe, and torch's version."""
    return {**values, "recipe": RECIPE, "torch": torch.__version__}


def kept(experiment: str, settings: Mapping[str, Any], work: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """The result of `work(folder)` under these settings: as it was kept, or worked out now in a folder of its own and kept."""
    text = json.dumps(dict(settings), sort_keys=True)
    folder = cache_folder() / "lab" / experiment / hashlib.sha256(text.encode()).hexdigest()[:20]
    path = folder / RESULT
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))["result"]
    folder.mkdir(parents=True, exist_ok=True)
    result = dict(work(folder))
    write_atomically(path, json.dumps({"settings": dict(settings), "result": result}, indent=1) + "\n")
    for checkpoint in folder.glob(f"{checkpoints.PREFIX}*"):
        shutil.rmtree(checkpoint)
    return result


def go_on(trainer: Trainer, folder: Path, say: Callable[[str], None]) -> int:
    """Runs `trainer` to its limits, from the last checkpoint in `folder` where there is one. Returns the step that it began at."""
    if (last := checkpoints.latest(folder, say)) is not None:
        trainer.restore(last)
        say(f"goes on from step {trainer.step} of {trainer.limits.steps}")
    began = trainer.step
    trainer.run(folder, say=say)
    return began
