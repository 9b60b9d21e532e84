"""A run's checkpoints: atomic, checksummed, the last two kept. Killed at any moment, a run goes on from the newest whole one, bit for bit.

    RUN/checkpoint-00000040/   trained.safetensors, states.safetensors, state.json (step, settings, sha256 of both)

A checkpoint is written under another name, flushed to the disk and renamed; only then is the oldest one removed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tradespace.errors import BudgetError, InputError
from tradespace.quantize.shards import sync_folder, write_shard
from tradespace.units import format_bytes

PREFIX, KEPT = "checkpoint-", 2
FILES = ("trained.safetensors", "states.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """One that was found whole: settings and progress, and where its tensors lie."""

    folder: Path
    step: int
    state: dict[str, Any]

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(trained parameters, optimizer states by "parameter|state")."""
        trained, states = (load_file(self.folder / name) for name in FILES)
        return trained, states


def save(run: Path, step: int, state: Mapping[str, Any], trained: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Writes checkpoint `step` and removes all but the last two. Raises BudgetError where the disk is full: what was whole before stays."""
    final = run / f"{PREFIX}{step:08d}"
    partial = run / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    flat = {f"{key}|{name}": tensor for key, held in states.items() for name, tensor in held.items()}
    need_bytes = sum(tensor.nbytes for tensor in (*trained.values(), *flat.values()))
    try:
        partial.mkdir(parents=True)
        for name, tensors in zip(FILES, (trained, flat), strict=True):
            write_shard(partial / name, {key: tensor.detach().cpu() for key, tensor in tensors.items()})
        body = {**state, "step": step, "sha256": {name: _sha256(partial / name) for name in FILES}}
        with open(partial / "state.json", "w", encoding="utf-8") as file:
            json.dump(body, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(partial)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        sync_folder(run)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        have = shutil.disk_usage(run).free
        last = latest(run)
        kept = f"The last good one is {last.folder}" if last else "There is none before it"
        raise BudgetError(
            f"a checkpoint needs {format_bytes(need_bytes)} of disk; {format_bytes(have)} are free at {run}. {kept}. Free some space and go on with --resume",
            need_bytes=need_bytes,
            have_bytes=have,
        ) from error
    for old in sorted(run.glob(f"{PREFIX}*"))[:-KEPT]:
        shutil.rmtree(old)
    return final


def latest(run: Path, say: Callable[[str], None] = lambda line: None) -> Checkpoint | None:
    """The newest checkpoint whose checksums hold; damaged ones are named and passed over."""
    for folder in sorted(run.glob(f"{PREFIX}*"), reverse=True):
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            for name in FILES:
                if _sha256(folder / name) != state["sha256"][name]:
                    raise InputError(f"{name} does not match its checksum")
            return Checkpoint(folder, int(state["step"]), state)
        except (OSError, ValueError, KeyError, InputError) as error:
            say(f"{folder} is damaged ({error}); an older checkpoint is used")
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
