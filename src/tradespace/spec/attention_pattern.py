"""Attention patterns: which keys a query may look at, as frozen values. A mixer without one is causal, within its window if it has one.

A pattern is the model's own, or imposed on it (`attention_imposed.py`): then it loses something, its quality is unknown until it is measured, and the plan
says so.
A pattern narrows what the mixer's own window shows (prefix alone widens it: towards the future, inside the prefix).
Positions count from the sequence's start; a block is `block` consecutive positions from a multiple of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any

from tradespace.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Causal:
    """Itself and everything before: n(n + 1)/2 pairs."""

    kind = "causal"

    def describe(self) -> str:
        return "causal"


@dataclass(frozen=True, kw_only=True)
class Sliding:
    """Itself and the `window` - 1 before: at most n·window pairs (Longformer's local part, Mistral; arXiv:2004.05150)."""

    kind = "sliding"
    window: int

    def __post_init__(self):
        _at_least(self, 1, "window")

    def describe(self) -> str:
        return f"sliding:{self.window}"


@dataclass(frozen=True, kw_only=True)
class BlockSparse:
    """Blocks, causal: its own and the `local` - 1 before, the first `leading` (global tokens), and `random` drawn by (seed, block) out of the rest.

    At most n·block·(local + leading + random) pairs. arXiv:2004.05150 (Longformer), arXiv:2007.14062 (BigBird). All heads draw alike.
    """

    kind = "block-sparse"
    block: int = 64
    local: int = 4
    leading: int = 1
    random: int = 2
    seed: int = 0

    def __post_init__(self):
        _power_of_two(self, self.block)
        _at_least(self, 1, "local")  # a query sees its own block, or nothing might be left to see
        _at_least(self, 0, "leading", "random", "seed")

    def describe(self) -> str:
        return f"block-sparse:block={self.block},local={self.local},leading={self.leading},random={self.random},seed={self.seed}"

    def blocks_of(self, index: int) -> tuple[int, ...]:
        """The blocks that queries of block `index` look at, ascending; the last is their own.

        >>> BlockSparse(local=2, leading=1, random=1).blocks_of(1), len(BlockSparse(local=2, leading=1, random=1).blocks_of(9))
        ((0, 1), 4)
        """
        nearest = max(0, index - self.local + 1)
        leading = range(min(self.leading, nearest))
        drawn = _draw(self.seed, index, min(self.leading, nearest), nearest, self.random)
        return (*leading, *drawn, *range(nearest, index + 1))


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The first `length` positions see each other in both directions, what follows is causal (prefix LM, arXiv:1910.10683). They must come in one step."""

    kind = "prefix"
    length: int

    def __post_init__(self):
        _at_least(self, 1, "length")

    def describe(self) -> str:
        return f"prefix:{self.length}"


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Several documents in one sequence: a new one begins at each of `boundaries`, and no query sees past its own document's start."""

    kind = "documents"
    boundaries: tuple[int, ...]

    def __post_init__(self):
        if not self.boundaries or any(b <= a for a, b in pairwise((0, *self.boundaries))):
            raise InputError(f"documents: boundaries must be ascending positions above 0; got {list(self.boundaries)}")

    def describe(self) -> str:
        return "documents:" + ",".join(map(str, self.boundaries))

    def start_of(self, position: int) -> int:
        """Where the document of `position` begins.

        >>> [Documents(boundaries=(3, 5)).start_of(p) for p in (2, 3, 4, 9)]
        [0, 3, 3, 5]
        """
        return max((b for b in self.boundaries if b <= position), default=0)


@dataclass(frozen=True, kw_only=True)
class Selected:
    """Blocks chosen at run time, per head and block of queries: by the product of mean query and mean key, the best ⌈share · candidates⌉ are kept.

    Always kept: the queries' own block and the first. For long prefills; a step that brings fewer queries than a block sees everything. A block of queries
    that a step cuts is scored by the part that the step brings, so what is chosen depends on the chunks: make them multiples of `block`. Held beside the
    output: (n/block)² scores and flags a head. Related: arXiv:2407.02490 (MInference), arXiv:2502.11089 (NSA), arXiv:2502.13189 (MoBA).
    """

    kind = "selected"
    block: int = 64
    share: float = 0.25

    def __post_init__(self):
        _power_of_two(self, self.block)
        if not 0.0 < self.share <= 1.0:
            raise InputError(f"selected: share {self.share} must lie above 0 and at most at 1")

    def describe(self) -> str:
        return f"selected:block={self.block},share={self.share:g}"

    def kept_of(self, index: int) -> int:
        """How many of the index + 1 blocks up to its own a block of queries keeps.

        >>> [Selected(share=0.25).kept_of(i) for i in (0, 1, 7, 39)]
        [1, 2, 2, 10]
        """
        part = Fraction(str(self.share)) * (index + 1)  # as written: 0.1 · 30 is 3, not 3.0000000000000001
        return min(index + 1, max(2, -(-part.numerator // part.denominator)))


Pattern = Causal | Sliding | BlockSparse | Prefix | Documents | Selected
PATTERNS: dict[str, type[Pattern]] = {kind.kind: kind for kind in (Causal, Sliding, BlockSparse, Prefix, Documents, Selected)}


def _at_least(pattern: Pattern, least: int, *names: str) -> None:
    for name in names:
        if getattr(pattern, name) < least:
            raise InputError(f"{pattern.kind}: {name} is {getattr(pattern, name)}; at least {least} is needed")


def _power_of_two(pattern: Pattern, block: int) -> None:
    if block < 16 or block & (block - 1):
        raise InputError(f"{pattern.kind}: block {block} must be a power of two of at least 16")


@lru_cache(maxsize=65536)
def _draw(seed: int, index: int, low: int, high: int, count: int) -> tuple[int, ...]:
    """`count` different numbers of low … high - 1 (all of them where there are not more), ascending, the same on every machine."""
    left = list(range(low, high))
    drawn = []
    for turn in range(min(count, len(left))):
        drawn.append(left.pop(_mixed(seed, index, turn) % len(left)))
    return tuple(sorted(drawn))


def _mixed(*numbers: int) -> int:
    """64 well mixed bits out of a few numbers (the finalizer of splitmix64)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state


_SHORT: dict[str, Callable[[str], Pattern]] = {
    "sliding": lambda text: Sliding(window=int(text)),
    "prefix": lambda text: Prefix(length=int(text)),
    "documents": lambda text: Documents(boundaries=tuple(int(part) for part in text.split(","))),
}


def parse_pattern(text: str) -> Pattern:
    """The pattern that a flag or a plan names; `describe` writes it back. Raises InputError that lists what there is.

    >>> parse_pattern("sliding:256"), parse_pattern("selected:share=0.1").describe()
    (Sliding(window=256), 'selected:block=64,share=0.1')
    """
    name, _, rest = text.strip().partition(":")
    if name not in PATTERNS:
        raise InputError(f"unknown attention pattern '{name}'. Known: causal, sliding:W, block-sparse:local=…, prefix:P, documents:B,…, selected:share=…")
    try:
        if name in _SHORT:
            return _SHORT[name](rest)
        pairs = [part.partition("=") for part in rest.split(",") if part]
        values: dict[str, Any] = {key.strip(): (float if key.strip() == "share" else int)(value) for key, _, value in pairs}
        return PATTERNS[name](**values)
    except (ValueError, TypeError):
        example = {"sliding": "sliding:1024", "prefix": "prefix:128", "documents": "documents:100,250", "selected": "selected:block=64,share=0.25"}
        fallback = "causal" if name == "causal" else "block-sparse:block=64,local=4,leading=1,random=2,seed=0"
        raise InputError(f"attention pattern '{text}' is not complete or not numbers. Write it like {example.get(name, fallback)}") from None
