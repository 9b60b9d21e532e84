"""What the flash kernels are told about a step: one row of eight numbers a segment, and for patterns of blocks the blocks that meet. O(T + blocks that meet).

A segment is a sequence, or under a documents pattern one document of it: its queries are the last of its positions, and none sees beyond it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from tradespace.kernels.attention.pattern import check_prefix, chosen_blocks
from tradespace.kernels.view import KVView, PackedView, Span, StepBatch
from tradespace.spec.attention_pattern import BlockSparse, Documents, Selected
from tradespace.spec.attention_workspace import GATHER_BYTES, key_bytes
from tradespace.spec.mixers import Attention


@dataclass(frozen=True, slots=True)
class Lists:
    """Blocks that meet, row after row: items[starts[r] : starts[r + 1]] are those of row r."""

    starts: Tensor
    items: Tensor

    @classmethod
    def of(cls, keep_RJ: Tensor) -> Lists:
        counts_R = keep_RJ.sum(dim=-1)
        starts = torch.zeros(len(counts_R) + 1, dtype=torch.int32, device=keep_RJ.device)
        starts[1:] = counts_R.cumsum(0)
        return cls(starts, keep_RJ.nonzero()[:, 1].to(torch.int32).contiguous())


@dataclass(frozen=True, slots=True)
class Layout:
    """segments_B8: query row, queries, key row, keys, base (position of its first key in the sequence), list row, list rows a head, 0.

    keys_of_queries, queries_of_keys: for patterns of blocks, the blocks of keys that each block of queries meets, and the reverse.
    """

    segments_B8: Tensor
    num_segments: int
    most_queries: int
    most_keys: int
    block: int = 0
    keys_of_queries: Lists | None = None
    queries_of_keys: Lists | None = None


def pack(view: KVView, spans: Sequence[Span]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Keys and values of these sequences, one after the other, and the row where each begins. One alone, and the step's own, are not copied together."""
    if isinstance(view, PackedView):
        return view.k_TKH, view.v_TKH, tuple(span.query_start for span in spans)
    if len(spans) == 1:
        return *view.read(spans[0]), (0,)
    rows = (0, *accumulate(span.length for span in spans))
    held: tuple[Tensor, Tensor] | None = None
    for span, row in zip(spans, rows, strict=False):
        read = view.read(span)
        held = held or (read[0].new_empty((rows[-1], *read[0].shape[1:])), read[1].new_empty((rows[-1], *read[1].shape[1:])))
        for whole, part in zip(held, read, strict=True):
            whole[row : row + span.length] = part
    assert held is not None, "a group has at least one sequence"
    return *held, rows[:-1]


def groups(view: KVView, batch: StepBatch, mixer: Attention, element_bytes: int) -> list[list[Span]]:
    """The step's sequences that have queries, in order, as they are computed together: all of them without a cache, else as many as hold GATHER_BYTES of keys
    and values, at least one.
    """
    spans = [span for span in batch.spans if span.num_queries]
    if isinstance(view, PackedView):
        return [spans] if spans else []
    most = GATHER_BYTES // key_bytes(mixer, element_bytes)
    found: list[list[Span]] = []
    total = 0
    for span in spans:
        if not found or total + span.length > most:
            found.append([])
            total = 0
        found[-1].append(span)
        total += span.length
    return found


def lay_out(q_TNH: Tensor, k_SKH: Tensor, rows: tuple[int, ...], spans: Sequence[Span], mixer: Attention) -> Layout:
    """The Layout of sequences whose keys lie in `k_SKH` from `rows` on. Raises UnsupportedError for a prefix that comes in pieces."""
    segments: list[list[int]] = []
    keeps: list[Tensor] = []
    pattern, listed = mixer.pattern, 0
    for span, row in zip(spans, rows, strict=True):
        if span.num_queries == 0:
            continue
        check_prefix(mixer, span)
        if isinstance(pattern, Documents):
            segments += _documents(pattern, span.query_start, span.first_position, span.length, row)
            continue
        found = [span.query_start, span.num_queries, row, span.length, 0, 0, 0, 0]
        if isinstance(pattern, Selected):
            queries = q_TNH[span.query_start : span.query_start + span.num_queries]
            keep_NIJ = chosen_blocks(queries, k_SKH[row : row + span.length], span.first_position, mixer)
            if keep_NIJ is None:  # all blocks up to their own, for all heads alike
                num_blocks = -(-span.length // pattern.block)
                keep_NIJ = torch.ones((1, num_blocks, num_blocks), dtype=torch.bool, device=q_TNH.device).tril_()
                keep_NIJ[:, : span.first_position // pattern.block] = False
            found[5:7] = [listed, keep_NIJ.shape[1] if keep_NIJ.shape[0] > 1 else 0]
            listed += keep_NIJ.shape[0] * keep_NIJ.shape[1]
            keeps.append(keep_NIJ)
        segments.append(found)
    lists: tuple[Lists | None, Lists | None] = (None, None)
    most_keys = max((segment[3] for segment in segments), default=0)
    if isinstance(pattern, Selected) and keeps:
        lists = _joined(keeps), _joined([keep.transpose(1, 2) for keep in keeps])
    elif isinstance(pattern, BlockSparse):
        lists = sparse_lists(pattern, -(-most_keys // pattern.block), q_TNH.device)
    return Layout(
        torch.tensor(segments, dtype=torch.int32, device=q_TNH.device).reshape(-1, 8),
        len(segments),
        max((segment[1] for segment in segments), default=0),
        most_keys,
        pattern.block if isinstance(pattern, BlockSparse | Selected) else 0,
        *lists,
    )


def _documents(pattern: Documents, query_row: int, first: int, length: int, key_row: int) -> list[list[int]]:
    """A segment for each document that has queries in the step."""
    edges = [0, *(b for b in pattern.boundaries if b < length), length]
    found = []
    for start, stop in pairwise(edges):
        if stop > first:
            begin = max(start, first)
            found.append([query_row + begin - first, stop - begin, key_row + start, stop - start, start, 0, 0, 0])
    return found


def _joined(keeps: list[Tensor]) -> Lists:
    """The rows of several sequences, one after the other."""
    parts = [Lists.of(keep.flatten(0, 1)) for keep in keeps]
    starts, offset = [parts[0].starts[:1]], 0
    for part in parts:
        starts.append(part.starts[1:] + offset)
        offset += part.items.shape[0]
    return Lists(torch.cat(starts), torch.cat([part.items for part in parts]))


@lru_cache(maxsize=32)
def sparse_lists(pattern: BlockSparse, num_blocks: int, device: torch.device) -> tuple[Lists, Lists]:
    """Both lists of a fixed pattern: the same for all heads and all sequences. Linear in the number of blocks."""
    rows = [pattern.blocks_of(index) for index in range(num_blocks)]
    columns: list[list[int]] = [[] for _ in range(num_blocks)]
    for index, row in enumerate(rows):
        for block in row:
            columns[block].append(index)
    return _listed(rows, device), _listed(columns, device)


def _listed(rows: list, device: torch.device) -> Lists:
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    items = [item for row in rows for item in row]
    return Lists(torch.tensor(starts, dtype=torch.int32, device=device), torch.tensor(items, dtype=torch.int32, device=device))
