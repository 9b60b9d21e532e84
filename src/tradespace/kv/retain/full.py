"""Full retention: every token stays. Exact, and the cache grows by one token's keys and values per token."""

from __future__ import annotations


class Full:
    """Position p stands in the p-th slot of its sequence."""

    exact = True

    def kept(self, length: int) -> int:
        """Slots in use by a sequence of `length` tokens, from the sequence's first slot on; equals `spec.kv.Retain.tokens`."""
        return length
