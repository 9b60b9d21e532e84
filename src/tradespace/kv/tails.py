"""Full retention in stores that code neighbouring tokens together: a sequence's last tokens wait in fp16, in a ring of its own, until their group is old
enough.

Of n tokens the first `Store.coded(n)` are coded, whole groups; the rest, `tail` to tail + group - 1 of them, lies at position % ring. A step's own tokens are
attended to as they were computed, whatever becomes of them when the step is settled (as KIVI prefills; arXiv:2402.02750).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tradespace.kernels.view import Span, StepBatch
from tradespace.kv.coded import StepView
from tradespace.kv.store.channels import Channels
from tradespace.kv.store.codec import Codec, read_into, write
from tradespace.spec.kv_stores import Store
from tradespace.spec.mixers import Attention

if TYPE_CHECKING:
    from tradespace.kv.cache import KVCache


@dataclass(frozen=True, slots=True)
class Part:
    """Keys or values of one layer: coded planes, and the rings of all sequences (rows, ring, K, W) in fp16, empty where the store needs none."""

    store: Store
    codec: Codec | Channels
    planes: tuple[Tensor, ...]
    rings: Tensor

    def read(self, cache: KVCache, span: Span, own_TKW: Tensor, out_SKW: Tensor) -> None:
        """All of the sequence: coded, waiting, own."""
        before = span.first_position
        coded = self.store.coded(before)
        if coded:
            slots = cache.slots(span, 0, coded)
            if isinstance(self.codec, Channels):
                self.codec.read_into(self.planes, slots, out_SKW[:coded])
            else:
                read_into(self.codec, self.planes, slots, out_SKW[:coded])
        if before > coded:
            places = torch.arange(coded, before, device=out_SKW.device) % self.store.tail_slots
            out_SKW[coded:before] = self.rings[span.row].index_select(0, places).to(out_SKW.dtype)
        out_SKW[before:] = own_TKW

    def settle(self, cache: KVCache, span: Span, own_TKW: Tensor) -> None:
        """Codes the groups that are old enough now, and keeps what is not."""
        before, length = span.first_position, span.length
        old, new = self.store.coded(before), self.store.coded(length)
        ring = self.store.tail_slots
        if new > old:
            waiting = torch.arange(old, min(before, new), device=own_TKW.device)
            parts = [self.rings[span.row].index_select(0, waiting % ring)] if len(waiting) else []
            # through fp16 whether it waited or not: a group's codes do not depend on how its tokens came
            fresh_TKW = torch.cat([*parts, own_TKW[: max(0, new - before)].to(self.rings.dtype)]) if ring else own_TKW[: new - before]
            slots = cache.slots(span, old, new)
            if isinstance(self.codec, Channels):
                self.codec.write_groups(self.planes, slots, fresh_TKW)
            else:
                write(self.codec, self.planes, slots, fresh_TKW)
        first = max(before, new)
        if ring and length > first:
            places = torch.arange(first, length, device=own_TKW.device) % ring
            self.rings[span.row].index_copy_(0, places, own_TKW[first - before :].to(self.rings.dtype))


class TailView(StepView):
    """Keys and values, one of them or both with a tail."""

    def __init__(self, cache: KVCache, mixer: Attention, keys: Part, values: Part):
        super().__init__(cache, mixer, None)
        self.keys, self.values = keys, values

    def write(self, k_TKH: Tensor, v_TKH: Tensor, batch: StepBatch) -> None:
        self.cache.check_rows(batch.spans)
        super().write(k_TKH, v_TKH, batch)

    def read(self, span: Span) -> tuple[Tensor, Tensor]:
        k_SKH, v_SKH = self.room(span.length)
        rows = slice(span.query_start, span.query_start + span.num_queries)
        self.keys.read(self.cache, span, self.brought.k_TKH[rows], k_SKH)
        self.values.read(self.cache, span, self.brought.v_TKH[rows], v_SKH)
        return k_SKH, v_SKH

    def settle(self, batch: StepBatch) -> None:
        for span in batch.spans:
            rows = slice(span.query_start, span.query_start + span.num_queries)
            self.keys.settle(self.cache, span, self.brought.k_TKH[rows])
            self.values.settle(self.cache, span, self.brought.v_TKH[rows])
        super().settle(batch)
