"""Sampling in C++ (`kernels/native/source/sample.cpp`): one call for all rows of a step, shared over the step's own threads. The reference's tokens.

Memory: two rows of logits for each thread, or for each row where there are fewer; taken once.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from math import inf, log

import torch
from torch import Tensor

from tradespace.kernels.native import Library, load
from tradespace.kernels.native.library import Choice
from tradespace.kernels.sample import Shape
from tradespace.spec.native import sample_bytes


class NativeSampling:
    """Sampling of rows of at most `vocab_size` logits, `max_rows` in one call (more come in several).

    threads   those of the model's step: another number would make the pool of threads anew at each call
    """

    name = "native"

    def __init__(self, *, vocab_size: int, max_rows: int, threads: int, library: Library | None = None):
        self.vocab_size, self.max_rows, self.threads = vocab_size, max_rows, threads
        self.library = library or load()
        self._scratch = torch.zeros(sample_bytes(vocab_size, max_rows, threads) // 4)
        array = (Choice * max_rows)()
        # objects over the array's entries, made once: an index makes a new one each time
        self._array, self._choices = array, [array[row] for row in range(max_rows)]
        self._scratch_address = ctypes.c_void_p(self._scratch.data_ptr())
        self._last: Callable[[], Tensor | None] = lambda: None  # what `_rows_of` saw last, if it is still there, and what it found
        self._found = (0, 0)

    @property
    def nbytes(self) -> int:
        return self._scratch.nbytes

    def workspace_bytes(self, vocab_size: int) -> int:
        """Bytes held for the sampler's lifetime; a step adds none."""
        assert vocab_size <= self.vocab_size, f"{vocab_size} logits a row; made for {self.vocab_size}"
        return self.nbytes

    def best(self, logits_RV: Tensor) -> list[int | None]:
        """The first index of each row's largest logit; None where that is not a finite number."""
        found: list[int | None] = []
        address, stride = self._rows_of(logits_RV)
        for start in range(0, len(logits_RV), self.max_rows):
            choices = self._choices[: len(logits_RV) - start]
            for row, choice in enumerate(choices, start):
                choice.logits = address + row * stride
                choice.temperature = 0
            found += self._run(choices, logits_RV.shape[1])
        return found

    def draw(self, logits_RV: Tensor, rows: Sequence[int], shapes: Sequence[Shape], keys: Sequence[int]) -> list[int | None]:
        """A token from each of these rows: the best where the temperature is 0, else a draw from what its shape leaves."""
        found: list[int | None] = []
        address, stride = self._rows_of(logits_RV)
        for start in range(0, len(rows), self.max_rows):
            choices = self._choices[: len(rows) - start]
            for index, choice in enumerate(choices, start):
                shape = shapes[index]
                choice.logits = address + rows[index] * stride
                choice.key = keys[index]
                choice.top_k, choice.top_p, choice.temperature = shape.top_k, shape.top_p, shape.temperature
                choice.min_logit = log(shape.min_p) if shape.min_p else -inf
            found += self._run(choices, logits_RV.shape[1])
        return found

    def _rows_of(self, logits_RV: Tensor) -> tuple[int, int]:
        """Address of the first row, and bytes from one to the next. The step's own buffer comes again and again: it is looked at once."""
        if logits_RV is not self._last():
            stride, step = logits_RV.stride()
            assert logits_RV.dtype == torch.float32 and (step == 1 or logits_RV.shape[1] == 1), f"rows of {logits_RV.dtype}, {step} apart"
            assert 0 < logits_RV.shape[1] <= self.vocab_size, f"{logits_RV.shape[1]} logits a row; made for {self.vocab_size}"
            self._last, self._found = weakref.ref(logits_RV), (logits_RV.data_ptr(), 4 * stride)
        return self._found

    def _run(self, choices: Sequence[Choice], V: int) -> list[int | None]:
        self.library.ts_sample(self._array, len(choices), V, self._scratch_address, self.threads)
        return [None if (token := choice.token) < 0 else token for choice in choices]
