"""Sliding retention: the last `window` tokens in a ring, the first `sinks` before it. O(window) bytes a sequence; exact only for a sliding pattern.
arXiv:2309.17453

Keys keep the rotary positions that they were written with (see `spec/kv_retain.py`). A query sees its own token as one of the `window`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tradespace.kernels.view import Kept, Span, StepBatch
from tradespace.kv.coded import StepView
from tradespace.spec.kv_retain import Retain


class Sliding:
    """Which slot a position has, and which position a slot."""

    def __init__(self, retain: Retain):
        self.window, self.sinks = (retain.recent, 0) if retain.rebuilds else (retain.window, retain.sinks)

    def kept(self, length: int) -> int:
        return min(length, self.window + self.sinks)

    def slots(self, positions_X: Tensor) -> Tensor:
        """Slot of each position in its sequence."""
        return torch.where(positions_X < self.sinks, positions_X, self.sinks + (positions_X - self.sinks) % self.window)

    def positions(self, length: int) -> Tensor:
        """positions_S of a sequence's slots once `length` tokens have been kept."""
        slots_S = torch.arange(self.kept(length))
        place_S = slots_S - self.sinks
        rounds_S = torch.div(length - 1 - slots_S, self.window, rounding_mode="floor") if self.window else torch.zeros_like(slots_S)
        return torch.where(slots_S < self.sinks, slots_S, self.sinks + place_S + rounds_S.clamp_min(0) * self.window)

    def staying(self, span: Span) -> Tensor:
        """Those of the step's own positions that are kept when it is settled."""
        own_T = torch.arange(span.first_position, span.length)
        return own_T[(own_T < self.sinks) | (own_T >= span.length - self.window)]


class SlidingView(StepView):
    """Reads what was kept before the step and the step's own; keeps of those what stays once the step is settled."""

    @property
    def sliding(self) -> Sliding:
        found = self.cache.retain
        assert isinstance(found, Sliding)
        return found

    @property
    def keeps_all(self) -> bool:
        return False

    def kept(self, span: Span) -> Kept:
        assert self.held is not None
        before = span.first_position
        positions_S = self.sliding.positions(before)
        count = len(positions_S)
        k_SKH, v_SKH = self.room(count + span.num_queries)
        if count:
            self.held.read_into(self.cache.slots(span, 0, count), positions_S, self.brought, k_SKH[:count], v_SKH[:count])
        self.put_own(span, k_SKH, v_SKH)
        positions_1S = torch.cat((positions_S, torch.arange(before, span.length)))[None]
        return Kept(k_SKH, v_SKH, positions_1S, self.sliding.window, self.sliding.sinks)

    def read(self, span: Span) -> tuple[Tensor, Tensor]:
        raise AssertionError("a kernel asks a view that has dropped tokens for what it kept")

    def weigh_last(self, span: Span) -> int:
        return 0

    def take_weights(self, span: Span, weights_KS: Tensor) -> None:
        """Never asked for."""

    def settle(self, batch: StepBatch) -> None:
        assert self.held is not None
        for span in batch.spans:
            keep_into(self.cache, self.sliding, self, span)
        super().settle(batch)


def keep_into(cache, sliding: Sliding, view: StepView, span: Span) -> None:
    """Writes the step's tokens that stay into the ring of their sequence."""
    positions_X = sliding.staying(span)
    if len(positions_X):
        assert view.held is not None
        table = cache.slots(span, 0, sliding.kept(span.length))
        view.held.write(table[sliding.slots(positions_X)], view.brought, positions_X - span.first_position + span.query_start)
