"""Paged layout: blocks of a few tokens, handed out as a sequence grows and named by its block table. arXiv:2309.06180

Waste is less than one block per sequence. Reading copies, unless the blocks happen to lie one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Paged:
    """Slot s of a sequence lies in block table[s // block_size] at s % block_size."""

    def slots_per_sequence(self, tokens: int, block_size: int) -> int:
        """Token slots that a sequence of `tokens` takes: whole blocks."""
        return -(-tokens // block_size) * block_size

    def rows(self, blocks: Sequence[int], start: int, stop: int, block_size: int) -> Tensor | slice:
        """Where the slots start … stop - 1 of a sequence lie in the plane: a slice where its blocks are consecutive, else int64 indices."""
        head = start // block_size
        used = blocks[head : -(-stop // block_size)]
        if not used:
            return slice(0, 0)
        start, stop = start - head * block_size, stop - head * block_size
        # the cheap half of the test first: a scattered table of a long sequence fails it
        if used[-1] - used[0] == len(used) - 1 and tuple(used) == tuple(range(used[0], used[0] + len(used))):
            first = used[0] * block_size
            return slice(first + start, first + stop)
        return (torch.tensor(used)[:, None] * block_size + torch.arange(block_size)).flatten()[start:stop]

    def rows_of_many(self, tables: Sequence[Sequence[int]], starts: Sequence[int], lasts: Sequence[int], width: int, block_size: int) -> Tensor:
        """rows of slots starts[i] … starts[i] + width - 1 of each sequence, none past lasts[i], which repeats instead: int64, len(starts) · width."""
        longest = max(len(table) for table in tables)
        tables_BM = torch.tensor([[*table, *[0] * (longest - len(table))] for table in tables])
        offsets_BS = torch.tensor(starts)[:, None] + torch.arange(width)
        offsets_BS = torch.minimum(offsets_BS, torch.tensor(lasts)[:, None])
        return (tables_BM.gather(1, offsets_BS // block_size) * block_size + offsets_BS % block_size).flatten()
