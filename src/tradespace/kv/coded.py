"""Full retention in a store that must be decoded: keys and values of every token, or the layer's input. Reading decodes into a fresh copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tradespace.kernels.view import ProjectKV, Span, StepBatch
from tradespace.kv.held import Held, Input, Pair, Step
from tradespace.spec.mixers import Attention

if TYPE_CHECKING:
    from tradespace.kv.cache import KVCache


class StepView:
    """What all views of this kind share: they remember the step's keys and values until it is settled. One view serves one layer of one step."""

    def __init__(self, cache: KVCache, mixer: Attention, held: Held | None):
        self.cache, self.mixer, self.held = cache, mixer, held
        self.step: Step | None = None
        self._input: tuple[Tensor, ProjectKV] | None = None

    @property
    def keeps_all(self) -> bool:
        return True

    @property
    def holds_inputs(self) -> bool:
        return isinstance(self.held, Input)

    def take_inputs(self, x_TD: Tensor, project: ProjectKV) -> None:
        self._input = (x_TD, project)

    def write(self, k_TKH: Tensor, v_TKH: Tensor, batch: StepBatch) -> None:
        self.step = Step(k_TKH, v_TKH) if self._input is None else Step(k_TKH, v_TKH, *self._input)

    def settle(self, batch: StepBatch) -> None:
        """Lets go of the step."""
        self.step = self._input = None

    @property
    def brought(self) -> Step:
        assert self.step is not None, "a layer writes before it reads"
        return self.step

    def room(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of so many tokens, unfilled, in the activations' dtype."""
        dtype, device, mixer = self.cache.dtype, self.cache.device, self.mixer
        return (torch.empty((num_tokens, mixer.K, width), dtype=dtype, device=device) for width in (mixer.H, mixer.Hv))  # type: ignore[return-value]

    def put_own(self, span: Span, k_SKH: Tensor, v_SKH: Tensor) -> None:
        """The step's own tokens at the end of what is read: exactly as they were computed."""
        rows = slice(span.query_start, span.query_start + span.num_queries)
        before = len(k_SKH) - span.num_queries
        k_SKH[before:], v_SKH[before:] = self.brought.k_TKH[rows], self.brought.v_TKH[rows]


class CodedView(StepView):
    """Keys and values in any store per token: written first, then read back as they are held, the step's own included. Many sequences at once, too."""

    def write(self, k_TKH: Tensor, v_TKH: Tensor, batch: StepBatch) -> None:
        assert isinstance(self.held, Pair)
        self.held.write(batch.slots_T, Step(k_TKH, v_TKH), slice(None))

    def read(self, span: Span) -> tuple[Tensor, Tensor]:
        return self.gather(self.cache.locate((span,), (0,), span.length))

    def locate(self, spans: Sequence[Span], starts: Sequence[int], width: int) -> Tensor | slice:
        return self.cache.locate(spans, starts, width)

    def gather(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Keys and values of the plane rows that `locate` named."""
        assert isinstance(self.held, Pair)
        k_SKH, v_SKH = self.room(rows.stop - rows.start if isinstance(rows, slice) else len(rows))
        self.held.read_into(rows, None, None, k_SKH, v_SKH)
        return k_SKH, v_SKH


class InputView(StepView):
    """The layer's input of every token. The step's own keys and values are used as they were computed, older ones are projected anew."""

    def read(self, span: Span) -> tuple[Tensor, Tensor]:
        k_SKH, v_SKH = self.room(span.length)
        before = span.first_position
        if before:
            assert self.held is not None
            rows = self.cache.locate((span,), (0,), before)
            self.held.read_into(rows, torch.arange(before, device=k_SKH.device), self.brought, k_SKH[:before], v_SKH[:before])
        self.put_own(span, k_SKH, v_SKH)
        return k_SKH, v_SKH

    def settle(self, batch: StepBatch) -> None:
        assert self.held is not None
        self.held.write(batch.slots_T, self.brought, slice(None))
        super().settle(batch)
