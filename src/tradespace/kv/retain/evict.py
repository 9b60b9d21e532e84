"""Eviction under a budget, for every layer and key-value head by itself: what H2O and SnapKV share. They differ in what a token's score is.

Beside its key and value a slot has, for each head, the token's position and score. A step's own tokens are attended to whole; when it is settled, as many as
the budget allows stay: the last `protected` ones, then those with the best scores, an earlier one before a later one of equal score. A head's new tokens go
into the slots of those that it drops: nothing else moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from tradespace.kernels.view import Kept, Span, StepBatch
from tradespace.kv.coded import StepView
from tradespace.kv.held import Pair
from tradespace.kv.store.codec import write_vectors
from tradespace.spec.mixers import Attention

if TYPE_CHECKING:
    from tradespace.kv.cache import KVCache


class Policy(Protocol):
    """budget and protected: tokens. `weigh_last`: how many of a step's last queries it wants the weights of."""

    budget: int
    protected: int

    def weigh_last(self, num_queries: int) -> int: ...

    def score(self, old_KS: Tensor, weights_KS: Tensor | None, positions_KS: Tensor, num_queries: int) -> Tensor:
        """scores_KS of all tokens, from those of before (0 for the step's own) and the step's attention weights."""
        ...


class EvictingView(StepView):
    """One layer of a cache that evicts."""

    def __init__(self, cache: KVCache, mixer: Attention, held: Pair, positions_SK: Tensor, scores_SK: Tensor):
        super().__init__(cache, mixer, held)
        self.positions_SK, self.scores_SK = positions_SK, scores_SK
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # by row of the step: slots, positions, scores
        self._weights: dict[int, Tensor] = {}

    @property
    def policy(self) -> Policy:
        return self.cache.retain  # type: ignore[return-value]

    @property
    def keeps_all(self) -> bool:
        return False

    def kept(self, span: Span) -> Kept:
        assert isinstance(self.held, Pair)
        before, num_queries = span.first_position, span.num_queries
        count = min(before, self.policy.budget)
        slots_S = self.cache.slots(span, 0, count)
        k_SKH, v_SKH = self.room(count + num_queries)
        if count:
            self.held.read_into(slots_S, None, None, k_SKH[:count], v_SKH[:count])
        self.put_own(span, k_SKH, v_SKH)
        K, device = self.mixer.K, k_SKH.device
        own_KT = torch.arange(before, span.length, device=device).expand(K, -1)
        positions_KS = torch.cat((self.positions_SK.index_select(0, slots_S).T.long(), own_KT), dim=1)
        scores_KS = torch.cat((self.scores_SK.index_select(0, slots_S).T, torch.zeros((K, num_queries), device=device)), dim=1)
        self._kept[span.query_start] = slots_S, positions_KS, scores_KS
        return Kept(k_SKH, v_SKH, positions_KS)

    def read(self, span: Span) -> tuple[Tensor, Tensor]:
        raise AssertionError("a kernel asks a view that has dropped tokens for what it kept")

    def weigh_last(self, span: Span) -> int:
        return self.policy.weigh_last(span.num_queries)

    def take_weights(self, span: Span, weights_KS: Tensor) -> None:
        self._weights[span.query_start] = weights_KS

    def settle(self, batch: StepBatch) -> None:
        for span in batch.spans:
            if span.num_queries:
                self._settle_span(span)
        self._kept.clear()
        self._weights.clear()
        super().settle(batch)

    def _settle_span(self, span: Span) -> None:
        assert isinstance(self.held, Pair)
        _, positions_KS, scores_KS = self._kept[span.query_start]
        scores_KS = self.policy.score(scores_KS, self._weights.get(span.query_start), positions_KS, span.num_queries)
        stays = min(span.length, self.policy.budget)
        before = min(span.first_position, self.policy.budget)
        keep_KS = chosen(scores_KS, positions_KS, stays, first_protected=span.length - self.policy.protected)
        slots_C = self.cache.slots(span, 0, stays)
        K, device = self.mixer.K, scores_KS.device
        # tokens that had a slot keep it; a head's new ones fill those that are left, as many as there are
        free_KC = torch.ones((K, stays), dtype=torch.bool, device=device)
        free_KC[:, :before] = ~keep_KS[:, :before]
        heads_X, targets_X = free_KC.nonzero(as_tuple=True)
        _, own_X = keep_KS[:, before:].nonzero(as_tuple=True)
        assert len(own_X) == len(targets_X), f"{len(own_X)} new tokens for {len(targets_X)} free slots"
        if before:
            self.scores_SK.index_copy_(0, slots_C[:before], scores_KS[:, :before].T.contiguous())
        if len(own_X):
            rows_X = slots_C[targets_X] * K + heads_X
            step, tokens_X = self.brought, own_X + span.query_start
            write_vectors(self.held.keys, self.held.key_planes, rows_X, step.k_TKH[tokens_X, heads_X])
            write_vectors(self.held.values, self.held.value_planes, rows_X, step.v_TKH[tokens_X, heads_X])
            self.positions_SK.view(-1).index_copy_(0, rows_X, (own_X + span.first_position).to(torch.int32))
            self.scores_SK.view(-1).index_copy_(0, rows_X, scores_KS[heads_X, own_X + before])


def chosen(scores_KS: Tensor, positions_KS: Tensor, count: int, *, first_protected: int) -> Tensor:
    """keep_KS (bool), `count` tokens a head: all from position `first_protected` on, then the best scores, the earlier of equals first."""
    keep_KS = torch.zeros_like(scores_KS, dtype=torch.bool)
    if count == scores_KS.shape[1]:
        return ~keep_KS
    scores_KS = scores_KS.masked_fill(positions_KS >= first_protected, float("inf"))
    by_age_KS = positions_KS.argsort(dim=1)
    order_KS = scores_KS.gather(1, by_age_KS).argsort(dim=1, descending=True, stable=True)
    return keep_KS.scatter_(1, by_age_KS.gather(1, order_KS[:, :count]), True)
