"""Contiguous layout: one region of max_context tokens per sequence. Reading never copies; what a sequence does not fill is wasted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Contiguous:
    """A sequence has exactly one block, as long as the longest sequence may become."""

    def slots_per_sequence(self, tokens: int, block_size: int) -> int:
        """Token slots that a sequence of `tokens` takes."""
        return block_size

    def rows(self, blocks: Sequence[int], start: int, stop: int, block_size: int) -> Tensor | slice:
        """Where the slots start … stop - 1 of a sequence lie in the plane: always one piece."""
        first = blocks[0] * block_size
        return slice(first + start, first + stop)

    def rows_of_many(self, tables: Sequence[Sequence[int]], starts: Sequence[int], lasts: Sequence[int], width: int, block_size: int) -> Tensor:
        """rows of slots starts[i] … starts[i] + width - 1 of each sequence, none past lasts[i], which repeats instead: int64, len(starts) · width."""
        offsets_BS = torch.tensor(starts)[:, None] + torch.arange(width)
        offsets_BS = torch.minimum(offsets_BS, torch.tensor(lasts)[:, None])
        return (offsets_BS + torch.tensor([table[0] * block_size for table in tables])[:, None]).flatten()
