"""Full retention: every token stays. Exact, and the cache grows by one token's keys and values per token."""

from __future__ import annotations

from tradespace.spec.kv_retain import Retain


class Full:
    """Position p stands in the p-th slot of its sequence."""

    def __init__(self, retain: Retain):
        self.retain = retain

    def kept(self, length: int) -> int:
        """Slots in use by a sequence of `length` tokens, from the sequence's first slot on; equals `spec.kv_retain.Retain.tokens`."""
        return length
