"""What a kernel sees of a step and of the cache: `StepBatch` and `KVView`. Nothing here computes.

A step is ragged: T tokens of B sequences lie one after the other, without padding. Each sequence brings `num_queries` new tokens (one when it decodes, several
when a draft is verified, a chunk when it prefills), and attends to `length` tokens: those cached before and its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

# (x_SD, positions_S) → keys (S, K, H) and values (S, K, Hv) of a layer, as they enter its attention
ProjectKV = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's part of a step, known on the host. Its queries stand at positions length - num_queries … length - 1.

    query_start  row of its first token in the step
    num_queries  new tokens
    length       tokens that it holds once this step's are written
    blocks       ids of its cache blocks in order; empty without a cache
    row          which of the sequences under way it is, below the plan's max_sequences: where a cache keeps what is no block's
    adapter      which of the model's adapters its tokens pass through; -1: the base alone, or in training the one that learns
    """

    query_start: int
    num_queries: int
    length: int
    blocks: tuple[int, ...] = ()
    row: int = 0
    adapter: int = -1

    @property
    def first_position(self) -> int:
        return self.length - self.num_queries


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's sequences: device tensors for kernels that read them there, and `spans`, the same on the host, for those that loop there.

    query_starts_B1  int32, B + 1 entries, the last is T
    lengths_B        int32
    block_tables_BM  int32, rows padded with 0
    slots_T          int64: block · block_size + offset, where each token's key and value go; empty without a cache
    """

    query_starts_B1: Tensor
    lengths_B: Tensor
    block_tables_BM: Tensor
    slots_T: Tensor
    spans: tuple[Span, ...]

    @property
    def num_tokens(self) -> int:
        last = self.spans[-1] if self.spans else None
        return last.query_start + last.num_queries if last else 0

    @classmethod
    def from_spans(cls, spans: Sequence[Span], *, block_size: int = 0, device: torch.device | str = "cpu") -> StepBatch:
        """The tensors that belong to `spans`; with `block_size` 0 there is no cache."""
        starts = [span.query_start for span in spans]
        total = spans[-1].query_start + spans[-1].num_queries if spans else 0
        widest = max((len(span.blocks) for span in spans), default=0)
        tables_BM = np.zeros((len(spans), widest), np.int32)
        for row, span in zip(tables_BM, spans, strict=True):
            row[: len(span.blocks)] = span.blocks
        slots = [
            span.blocks[position // block_size] * block_size + position % block_size
            for span in spans
            if block_size
            for position in range(span.first_position, span.length)
        ]
        return cls(
            query_starts_B1=as_tensor(np.array([*starts, total], np.int32), device),
            lengths_B=as_tensor(np.array([span.length for span in spans], np.int32), device),
            block_tables_BM=as_tensor(tables_BM, device),
            slots_T=as_tensor(np.array(slots, np.int64), device),
            spans=tuple(spans),
        )

    @classmethod
    def packed(cls, lengths: Sequence[int], *, device: torch.device | str = "cpu") -> StepBatch:
        """Whole sequences one after the other without a cache: training, perplexity, tests."""
        spans, start = [], 0
        for length in lengths:
            spans.append(Span(start, length, length))
            start += length
        return cls.from_spans(spans, device=device)


def positions_of(spans: Sequence[Span], *, device: torch.device | str = "cpu") -> Tensor:
    """positions_T (int64) of a step's tokens in their sequences."""
    return as_tensor(np.array([p for span in spans for p in range(span.first_position, span.length)], np.int64), device)


def as_tensor(array: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """The array's numbers as a tensor: on the CPU without a copy, and in a third of the time that `torch.tensor` takes over a list."""
    tensor = torch.from_numpy(array)
    return tensor if device == "cpu" or str(device) == "cpu" else tensor.to(device)


class KVView(Protocol):
    """One layer's keys and values as kernels see them, whatever retains, lays out and stores them.

    `write` takes the step's keys and values. `read` gives one sequence's keys (S, K, H) and values (S, K, Hv), S = span.length, in the activations' dtype: a
    view where they lie in one piece, a copy where they do not. `settle` ends the layer's attention: what was held back until then finds its place.

    keeps_all     False: tokens are missing, and a kernel asks a `KeptView` for what is left instead of calling `read`
    holds_inputs  the layer's input is cached, and `take_inputs` comes before `write`
    """

    @property
    def keeps_all(self) -> bool: ...

    @property
    def holds_inputs(self) -> bool: ...

    def write(self, k_TKH: Tensor, v_TKH: Tensor, batch: StepBatch) -> None: ...

    def read(self, span: Span) -> tuple[Tensor, Tensor]: ...

    def take_inputs(self, x_TD: Tensor, project: ProjectKV) -> None: ...

    def settle(self, batch: StepBatch) -> None: ...


@dataclass(frozen=True, slots=True)
class Kept:
    """What is left of one sequence, the step's own tokens last: keys (S, K, H), values (S, K, Hv), and where they stood, positions_KS (int64; one row where all
    heads keep the same). A query sees of these what its layer's pattern shows it, and under sliding retention only its last `window` tokens and the first
    `sinks`.
    """

    k_SKH: Tensor
    v_SKH: Tensor
    positions_KS: Tensor
    window: int | None = None
    sinks: int = 0


class KeptView(KVView, Protocol):
    """A view that has dropped tokens.

    `weigh_last` says how many of a span's last queries the policy wants weights of: the kernel then calls `take_weights` with the sum of their attention
    weights over these queries and over the G query heads of each key-value head, weights_KS in fp32.
    """

    def kept(self, span: Span) -> Kept: ...

    def weigh_last(self, span: Span) -> int: ...

    def take_weights(self, span: Span, weights_KS: Tensor) -> None: ...


class Immediate:
    """What views have in common that keep every token and hold nothing back."""

    __slots__ = ()

    @property
    def keeps_all(self) -> bool:
        return True

    @property
    def holds_inputs(self) -> bool:
        return False

    def take_inputs(self, x_TD: Tensor, project: ProjectKV) -> None:
        """Not asked for."""

    def settle(self, batch: StepBatch) -> None:
        """All was written at once."""


@dataclass(frozen=True, slots=True)
class PackedView(Immediate):
    """No cache: the step's own keys and values are all there is. Gradients flow through it."""

    k_TKH: Tensor
    v_TKH: Tensor

    def write(self, k_TKH: Tensor, v_TKH: Tensor, batch: StepBatch) -> None:
        """Nothing to keep: the view was made of these very tensors."""

    def read(self, span: Span) -> tuple[Tensor, Tensor]:
        rows = slice(span.query_start, span.query_start + span.num_queries)
        return self.k_TKH[rows], self.v_TKH[rows]
