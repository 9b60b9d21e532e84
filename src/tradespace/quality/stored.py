"""A reference's predictions kept on disk, for where two models do not fit the budget together: written once, read as often as there is something to compare.

Each row of log-probabilities is held in 16 bits an entry between its own least and greatest (llama.cpp keeps its base logits alike, but cuts the tail): with
40 nats between them an entry is off by up to 3e-4 nats, which moves a mean KL over thousands of tokens by about 1e-8. 2·V + 8 bytes a row.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from tradespace.errors import BudgetError, EngineError
from tradespace.quality.forward import Passage
from tradespace.units import format_bytes

LEVELS = 65535
SPARE_BYTES = 256 * 2**20  # that a disk keeps free


def stored_bytes(num_rows: int, vocabulary: int) -> int:
    """Bytes on disk of so many rows."""
    return num_rows * (2 * vocabulary + 8)


def check_disk(folder: Path, num_rows: int, vocabulary: int) -> None:
    """Raises BudgetError (need, have, remedy) where `folder`'s disk has no room for them."""
    need, have = stored_bytes(num_rows, vocabulary) + SPARE_BYTES, shutil.disk_usage(folder).free
    if need > have:
        fits = max(0, have - SPARE_BYTES) // (2 * vocabulary + 8)
        raise BudgetError(
            f"the reference's predictions of {num_rows:,} tokens need {format_bytes(need)} of disk in {folder}; {format_bytes(have)} are free. "
            + (f"Fits with --tokens {fits}" if fits else "Free some")
            + ", or with a --memory that holds both models",
            need_bytes=need,
            have_bytes=have,
        )


class StoredLogprobs:
    """Rows of log-probabilities in a file, appended in order and read back passage by passage. Closing leaves the file; who made it removes it.

    keep: what is in the file already stays; otherwise it begins anew.
    """

    def __init__(self, path: Path, vocabulary: int, *, keep: bool = False):
        self.path, self.vocabulary = path, vocabulary
        self._file = path.open("r+b" if keep else "w+b")
        self._row_type = np.dtype([("low", "<f4"), ("step", "<f4"), ("level", "<u2", (vocabulary,))])

    def __enter__(self) -> StoredLogprobs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    @property
    def num_rows(self) -> int:
        self._file.seek(0, 2)
        return self._file.tell() // self._row_type.itemsize

    def append(self, logprobs_RV: Tensor) -> None:
        """Keeps rows of finite log-probabilities. Raises EngineError where one is not finite."""
        low_R1, high_R1 = logprobs_RV.min(-1, keepdim=True).values, logprobs_RV.max(-1, keepdim=True).values
        if not bool((low_R1.isfinite() & high_R1.isfinite()).all()):
            raise EngineError("the reference predicted NaN or infinity: its weights are damaged, or its activations overflow their dtype")
        step_R1 = (high_R1 - low_R1) / LEVELS
        # equal entries throughout have no step; any level then gives back the least
        level_RV = ((logprobs_RV - low_R1) / step_R1.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(0, LEVELS)
        rows = np.empty(len(logprobs_RV), dtype=self._row_type)
        rows["low"], rows["step"] = low_R1[:, 0].numpy(), step_R1[:, 0].numpy()
        rows["level"] = level_RV.numpy().astype(np.uint16)
        self._file.seek(0, 2)
        self._file.write(rows.data.cast("B"))
        self._file.flush()

    def reader(self, pieces: Callable[[Passage], Iterator[int]]) -> Callable[[Passage], Iterator[Tensor]]:
        """Reads the rows again from the first on, passage by passage in the order in which they were stored, in pieces as `Forward.pieces` has them."""
        at = 0

        def read(passage: Passage) -> Iterator[Tensor]:
            nonlocal at
            for count in pieces(passage):
                self._file.seek(at * self._row_type.itemsize)
                rows = np.fromfile(self._file, dtype=self._row_type, count=count)
                if len(rows) != count:
                    raise EngineError(f"the reference's predictions end at row {at + len(rows)}; rows up to {at + count} are needed")
                at += count
                levels_RV = torch.from_numpy(rows["level"].astype(np.float32))
                yield levels_RV.mul_(torch.from_numpy(rows["step"].copy())[:, None]).add_(torch.from_numpy(rows["low"].copy())[:, None])

        return read
