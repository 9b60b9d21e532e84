"""The last `recent` tokens' keys and values stay; older ones are rebuilt from token ids at every step, exactly. `model/rebuild.py` does the rebuilding.

Resident: O(recent) keys and values, 4 bytes a token of ids. Transient: one sequence's residual stream and one layer's keys and values of all its older
tokens, O(n). So "O(√n)" is true of what stays between steps alone. Time: every step costs a prefill of all older tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tradespace.errors import EngineError
from tradespace.kernels.view import Span, StepBatch
from tradespace.kv.coded import StepView
from tradespace.kv.retain.sliding import Sliding, keep_into


class Recent(Sliding):
    """A ring of the last tokens; what is older has no slot."""

    def old(self, before: int) -> int:
        """Tokens of a sequence of `before` whose keys and values are gone."""
        return max(0, before - self.window)


class RecentView(StepView):
    """Rebuilt keys and values, then the ring, then the step's own: every token in order, so that any kernel reads it. `rebuilt` comes before `read`."""

    _rebuilt: tuple[Tensor, Tensor] | None = None

    def rebuilt(self, k_SKH: Tensor, v_SKH: Tensor) -> None:
        """Takes this layer's keys and values of all tokens that have no slot any more."""
        self._rebuilt = (k_SKH, v_SKH)

    def read(self, span: Span) -> tuple[Tensor, Tensor]:
        recent = self.cache.retain
        assert isinstance(recent, Recent)
        before, old = span.first_position, recent.old(span.first_position)
        k_SKH, v_SKH = self.room(span.length)
        if old:
            if self._rebuilt is None or len(self._rebuilt[0]) != old:
                raise EngineError("keys and values older than the last ones must be rebuilt first: run this cache through model.rebuild.Rebuilding")
            k_SKH[:old], v_SKH[:old] = self._rebuilt
        if before > old:
            assert self.held is not None
            positions_S = torch.arange(old, before)
            slots = self.cache.slots(span, 0, recent.kept(before))[recent.slots(positions_S)]
            self.held.read_into(slots, positions_S, self.brought, k_SKH[old:before], v_SKH[old:before])
        self.put_own(span, k_SKH, v_SKH)
        return k_SKH, v_SKH

    def settle(self, batch: StepBatch) -> None:
        recent = self.cache.retain
        assert isinstance(recent, Recent)
        if recent.window:
            for span in batch.spans:
                keep_into(self.cache, recent, self, span)
        self._rebuilt = None
        super().settle(batch)
