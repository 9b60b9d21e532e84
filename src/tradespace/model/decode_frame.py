"""A native decode step's inputs, filled in place: one token of each of some sequences, all of which get logits.

Between two steps the processor's caches hold weights, and every Python object that a step touches comes from memory. So the arrays stay where they are, a row
of the block table is written only when its sequence has another block, and one call into the library computes the layers and the logits.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from torch import Tensor

from tradespace.kernels.native.library import Step
from tradespace.kernels.native.program import Program

if TYPE_CHECKING:
    from tradespace.model.recorded import Recorded


class DecodeFrame:
    """For at most `sequences` sequences of at most `width` blocks each. `fill` the first rows, then `run` as many."""

    def __init__(self, recorded: Recorded, sequences: int, width: int):
        self.sequences, self.width = min(sequences, recorded.step_tokens, recorded.logit_rows), width
        self._program: Program = recorded.body.then(recorded.head)
        self._scratch, self._threads, self._out, self._vocabulary = recorded.scratch, recorded.threads, recorded.out, recorded.spec.V
        self._tokens, self._positions = ((ctypes.c_int64 * self.sequences)() for _ in range(2))
        self._rows = (ctypes.c_int64 * self.sequences)(*range(self.sequences))
        self._starts = (ctypes.c_int32 * (self.sequences + 1))(*range(self.sequences + 1))
        self._lengths = (ctypes.c_int32 * self.sequences)()
        self._tables = (ctypes.c_int32 * (self.sequences * width))()
        self._held: list[tuple[int, ...]] = [()] * self.sequences  # the blocks that each row of the table has
        arrays = (self._tokens, self._positions, self._starts, self._lengths, self._tables, self._rows)
        self._step = Step(*map(ctypes.addressof, arrays), table_width=width)
        self._logits: dict[int, Tensor] = {}

    def fill(self, row: int, token: int, position: int, blocks: tuple[int, ...]) -> None:
        """The sequence of this row: its newest token, where it stands, and its blocks, which have room for it."""
        self._tokens[row], self._positions[row], self._lengths[row] = token, position, position + 1
        if blocks is not self._held[row]:
            start = row * self.width
            self._tables[start : start + len(blocks)] = blocks
            self._held[row] = blocks

    def run(self, count: int) -> Tensor:
        """logits_RV in fp32 of the first `count` sequences, in the step's own buffer: valid until the next step."""
        step = self._step
        step.num_tokens = step.num_sequences = step.num_rows = count
        self._program.run(step, self._scratch, self._threads)
        found = self._logits.get(count)
        if found is None:
            stride = self._out.stride
            found = self._logits[count] = self._out.tensor[: count * stride].view(count, stride)[:, : self._vocabulary]
        return found
