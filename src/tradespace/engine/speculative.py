"""Speculative decoding (arXiv:2211.17192), lossless by construction: drafted tokens are verified several in a step and never change the output.

Sampling noise is a function of (seed, sample, position), so the token that the model would draw at each position is known once its logits are: a draft is
accepted while it equals that token. Greedy decoding is the same rule. The rows behind the first wrong draft were computed from a wrong token and are dropped;
the cache is rolled back by `Scheduler.commit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from tradespace.engine.request import Request

T = TypeVar("T")


class Drafter(Protocol):
    """Guesses the tokens that follow a request's known ones; wrong guesses cost time and never change the output."""

    def propose(self, request: Request) -> Sequence[int]: ...


def accept_drafts(sampled: Sequence[T], drafts: Sequence[int]) -> list[T]:
    """The tokens that stand: `sampled[i]` was drawn after drafts[:i], so it stands while all of those were right.

    >>> accept_drafts([5, 6, 9], [5, 7])
    [5, 6]
    """
    right = 0
    while right < len(drafts) and sampled[right] == drafts[right]:
        right += 1
    return list(sampled[: right + 1])


class NgramDrafter:
    """Copies what followed the last earlier occurrence of the sequence's final n-gram (prompt lookup; LLMA, arXiv:2304.04487). No model, no memory.

    Tries n from `longest` down to `shortest` and proposes up to `count` tokens. O(longest · length) per proposal, within the last `reach` tokens.
    """

    def __init__(self, *, count: int = 4, longest: int = 3, shortest: int = 1, reach: int = 4096):
        self.count, self.longest, self.shortest, self.reach = count, longest, shortest, reach

    def propose(self, request: Request) -> list[int]:
        tokens = request.token_ids[-self.reach :]
        for size in range(min(self.longest, len(tokens) - 1), self.shortest - 1, -1):
            tail = tokens[-size:]
            for start in range(len(tokens) - size - 1, -1, -1):
                if tokens[start] == tail[0] and tokens[start : start + size] == tail:
                    return tokens[start + size : start + size + self.count]
        return []
