"""Heavy hitters: a token's score is the sum of all attention weights that it has had, over all queries since it came. Half of the budget is recent.
arXiv:2306.14048

A chunk of a prompt is scored and evicted from as a whole; tokens that decode, one by one, as in the paper.
"""

from __future__ import annotations

from torch import Tensor

from tradespace.spec.kv_retain import Retain


class H2O:
    def __init__(self, retain: Retain):
        self.budget, self.protected = retain.budget, retain.protected

    def kept(self, length: int) -> int:
        return min(length, self.budget)

    def weigh_last(self, num_queries: int) -> int:
        """Every query counts."""
        return num_queries

    def score(self, old_KS: Tensor, weights_KS: Tensor | None, positions_KS: Tensor, num_queries: int) -> Tensor:
        assert weights_KS is not None, "dispatch chose a kernel that returns weights"
        return old_KS + weights_KS
