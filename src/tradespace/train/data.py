"""Text and conversations → packed sequences of exactly T tokens, with the documents' boundaries and what of it the loss is on.

Tokens and targets lie in two int32 arrays (8 bytes a token). A long text is cut into blocks; conversations are packed whole, and one that is longer than a
block is cut. Attention never crosses from one document to another, and a document's last token predicts nothing. The order of blocks is a permutation of
(seed, epoch) alone, so that a run can go on anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tradespace.errors import InputError
from tradespace.kernels.view import Span, StepBatch, positions_of

IGNORED = -100  # a target that no loss is on


@dataclass(frozen=True)
class Document:
    """Token ids, and for each whether the loss is on predicting it."""

    ids: Sequence[int]
    learned: Sequence[bool] | None = None  # None: all
    source: str = ""


@dataclass(frozen=True)
class MicroBatch:
    """What is computed at once: some blocks one after the other. targets_T holds the next token of each position, or IGNORED."""

    tokens_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    batch: StepBatch
    blocks: tuple[int, ...]

    @property
    def num_targets(self) -> int:
        return int((self.targets_T != IGNORED).sum())


class Packed:
    """All blocks of a data set. `cuts[b]` are the lengths of block b's pieces of documents; a block may be shorter than T only where conversations end."""

    def __init__(self, tokens: np.ndarray, targets: np.ndarray, starts: Sequence[int], cuts: Sequence[tuple[int, ...]], context: int, source: str):
        self.tokens, self.targets, self.starts, self.cuts, self.context, self.source = tokens, targets, starts, cuts, context, source

    def __len__(self) -> int:
        return len(self.cuts)

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.targets.nbytes

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def num_targets(self, blocks: Sequence[int]) -> int:
        """Tokens of these blocks that the loss is on."""
        return sum(int((self.targets[self.starts[block] : self.starts[block] + sum(self.cuts[block])] != IGNORED).sum()) for block in blocks)

    def micro_batch(self, blocks: Sequence[int], device: torch.device | str = "cpu") -> MicroBatch:
        """These blocks, one after the other."""
        rows = np.concatenate([np.arange(self.starts[block], self.starts[block] + sum(self.cuts[block])) for block in blocks])
        spans, start = [], 0
        for block in blocks:
            for length in self.cuts[block]:
                spans.append(Span(start, length, length))
                start += length
        return MicroBatch(
            tokens_T=torch.from_numpy(self.tokens[rows].astype(np.int64)).to(device),
            positions_T=positions_of(spans, device=device),
            targets_T=torch.from_numpy(self.targets[rows].astype(np.int64)).to(device),
            batch=StepBatch.from_spans(spans, device=device),
            blocks=tuple(blocks),
        )


def pack(documents: Sequence[Document], context: int, *, source: str = "data", split: bool = True) -> Packed:
    """Blocks of `context` tokens. With `split` the documents are one stream that is cut anywhere, and its rest is dropped; without, they stay whole.

    Raises InputError where not even one block comes together, or where the loss is on nothing.
    """
    if context < 2:
        raise InputError(f"--context {context}: a sequence of one token has nothing to predict. Give at least 2")
    found = _stream(documents, context, source) if split else _whole(documents, context, source)
    if not (found.targets != IGNORED).any():
        raise InputError(f"{source}: the loss is on no token: every answer is empty, or cut off by --context {context}")
    return found


def _stream(documents: Sequence[Document], context: int, source: str) -> Packed:
    tokens = np.concatenate([np.asarray(document.ids, np.int32) for document in documents]) if documents else np.empty(0, np.int32)
    count = len(tokens) // context
    if not count:
        raise InputError(f"{source} has {len(tokens)} tokens; one sequence takes {context}. Give more text, or --context {max(2, len(tokens))} or less")
    edges, position = set(), 0
    learned = np.ones(len(tokens), bool)
    for document in documents:
        if document.learned is not None:
            learned[position : position + len(document.ids)] = document.learned
        position += len(document.ids)
        edges.add(position)
    tokens, learned = tokens[: count * context], learned[: count * context]
    targets = np.full(len(tokens), IGNORED, np.int32)
    targets[:-1] = np.where(learned[1:], tokens[1:], IGNORED)
    ends = np.array(sorted({edge for edge in edges if edge <= len(tokens)} | set(range(context, len(tokens) + 1, context))))
    targets[ends - 1] = IGNORED
    cuts: list[tuple[int, ...]] = []
    pieces, last = [], 0
    for end in ends.tolist():
        pieces.append(end - last)
        last = end
        if end % context == 0:
            cuts.append(tuple(pieces))
            pieces = []
    return Packed(tokens, targets, range(0, len(tokens), context), cuts, context, source)


def _whole(documents: Sequence[Document], context: int, source: str) -> Packed:
    tokens, targets, starts, cuts = [], [], [], []
    room = 0
    for document in documents:
        ids = np.asarray(document.ids[:context], np.int32)
        if len(ids) < 2:
            continue
        following = ids[1:] if document.learned is None else np.where(np.asarray(document.learned[:context])[1:], ids[1:], IGNORED)
        if len(ids) > room:
            starts.append(sum(map(len, tokens)) if not starts else starts[-1] + sum(cuts[-1]))
            cuts.append(())
            room = context
        cuts[-1] = (*cuts[-1], len(ids))
        tokens.append(ids)
        targets += [following.astype(np.int32), np.array([IGNORED], np.int32)]
        room -= len(ids)
    if not tokens:
        raise InputError(f"{source} has no document of at least two tokens")
    return Packed(np.concatenate(tokens), np.concatenate(targets), starts, cuts, context, source)


@dataclass(frozen=True)
class Order:
    """Which blocks make up which step. Without `shuffle` they come as they lie; epochs follow each other without a gap.

    micro_batch and accumulation are those of one of `ranks`, of which this is number `rank`: a step's blocks do not depend on how many share them.
    """

    num_blocks: int
    micro_batch: int
    accumulation: int
    seed: int
    shuffle: bool = True
    ranks: int = 1
    rank: int = 0

    @property
    def blocks_per_step(self) -> int:
        return self.micro_batch * self.accumulation * self.ranks

    def all_blocks(self, step: int) -> list[int]:
        """Of all ranks, in order."""
        first = step * self.blocks_per_step
        return [self._block(position) for position in range(first, first + self.blocks_per_step)]

    def blocks(self, step: int) -> list[tuple[int, ...]]:
        """This rank's micro-batches of a step, counted from 0."""
        size = self.micro_batch * self.accumulation
        flat = self.all_blocks(step)[self.rank * size : (self.rank + 1) * size]
        return [tuple(flat[start : start + self.micro_batch]) for start in range(0, size, self.micro_batch)]

    def _block(self, position: int) -> int:
        epoch, within = divmod(position, self.num_blocks)
        return int(_permutation(self.num_blocks, self.seed, epoch)[within]) if self.shuffle else within

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.num_blocks // self.blocks_per_step)


_kept: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    key = (count, seed, epoch)
    if key not in _kept:
        if len(_kept) > 3:
            _kept.clear()
        _kept[key] = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
    return _kept[key]


def batches(data: Packed, order: Order, step: int, device: torch.device | str = "cpu") -> Iterator[MicroBatch]:
    """The micro-batches of one step."""
    for blocks in order.blocks(step):
        yield data.micro_batch(blocks, device)
