"""A run's checkpoints: atomic, checksummed, the last two kept. Killed at any moment, a run goes on from the newest whole one, bit for bit.

    RUN/checkpoint-00000040/   trained.safetensors, states.safetensors, state.json (step, settings, sha256 of all)

A checkpoint is written under another name, flushed to the disk and renamed; only then is the oldest one removed. Of several ranks each writes its own part
(trained-0-of-2.safetensors …), and rank 0 renames when all are done.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tradespace.errors import BudgetError, EngineError, InputError
from tradespace.quantize.shards import sync_folder, write_shard
from tradespace.train.ranks import ALONE, Ranks
from tradespace.units import format_bytes

PREFIX, KEPT = "checkpoint-", 2
KINDS = ("trained", "states")


def files_of(ranks: Ranks = ALONE) -> tuple[str, ...]:
    """What a rank writes."""
    part = "" if ranks.world == 1 else f"-{ranks.rank}-of-{ranks.world}"
    return tuple(f"{kind}{part}.safetensors" for kind in KINDS)


@dataclass(frozen=True)
class Checkpoint:
    """One that was found whole: settings and progress, and where its tensors lie."""

    folder: Path
    step: int
    state: dict[str, Any]

    def tensors(self, ranks: Ranks = ALONE) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(trained parameters, optimizer states by "parameter|state") of a rank."""
        trained, states = (load_file(self.folder / name) for name in files_of(ranks))
        return trained, states


def save(
    run: Path,
    step: int,
    state: Mapping[str, Any],
    trained: Mapping[str, Tensor],
    states: Mapping[str, Mapping[str, Tensor]],
    ranks: Ranks = ALONE,
) -> Path:
    """Writes checkpoint `step` and removes all but the last two; every rank must call. Raises BudgetError where the disk is full: what was whole stays."""
    final = run / f"{PREFIX}{step:08d}"
    partial = run / f".{final.name}.partial"
    flat = {f"{key}|{name}": tensor for key, held in states.items() for name, tensor in held.items()}
    need_bytes = sum(tensor.nbytes for tensor in (*trained.values(), *flat.values()))
    with _one_for_all(ranks, partial, need_bytes):
        if ranks.leader:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    sums: dict[str, str] = {}
    with _one_for_all(ranks, partial, need_bytes):
        for name, tensors in zip(files_of(ranks), (trained, flat), strict=True):
            write_shard(partial / name, {key: tensor.detach().cpu() for key, tensor in tensors.items()})
            sums[name] = _sha256(partial / name)
    all_sums = {name: digest for part in ranks.gather(sums) for name, digest in part.items()}
    with _one_for_all(ranks, partial, need_bytes):
        if ranks.leader:
            _finish(partial, final, {**state, "step": step, "sha256": all_sums})
    return final


def _finish(partial: Path, final: Path, body: Mapping[str, Any]) -> None:
    """The last word of a checkpoint, and its name."""
    run = final.parent
    with open(partial / "state.json", "w", encoding="utf-8") as file:
        json.dump(body, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(partial)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    sync_folder(run)
    for old in sorted(run.glob(f"{PREFIX}*"))[:-KEPT]:
        shutil.rmtree(old)


@contextmanager
def _one_for_all(ranks: Ranks, partial: Path, need_bytes: int) -> Iterator[None]:
    """A part of a checkpoint's writing, which fails on all ranks where it fails on one: none may wait for another that is gone."""
    failed: OSError | None = None
    try:
        yield
    except OSError as error:
        failed = error
    codes = [code for code in ranks.gather(None if failed is None else failed.errno) if code is not None]
    if not codes:
        return
    if ranks.leader:
        shutil.rmtree(partial, ignore_errors=True)
    if not set(codes) & {errno.ENOSPC, errno.EDQUOT}:
        raise failed or EngineError(f"another rank could not write its part of {partial}: {os.strerror(codes[0])}")
    run = partial.parent
    have, last = shutil.disk_usage(run).free, latest(run)
    kept = f"The last good one is {last.folder}" if last else "There is none before it"
    raise BudgetError(
        f"a checkpoint needs {format_bytes(need_bytes * ranks.world)} of disk; {format_bytes(have)} are free at {run}. {kept}. "
        "Free some space and go on with --resume",
        need_bytes=need_bytes * ranks.world,
        have_bytes=have,
    ) from failed


def latest(run: Path, say: Callable[[str], None] = lambda line: None) -> Checkpoint | None:
    """The newest checkpoint whose checksums hold; damaged ones are named and passed over."""
    for folder in sorted(run.glob(f"{PREFIX}*"), reverse=True):
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if not state["sha256"]:
                raise InputError("it names no files")
            for name, digest in state["sha256"].items():
                if _sha256(folder / Path(name).name) != digest:
                    raise InputError(f"{name} does not match its checksum")
            return Checkpoint(folder, int(state["step"]), state)
        except (OSError, ValueError, KeyError, InputError) as error:
            say(f"{folder} is damaged ({error}); an older checkpoint is used")
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
