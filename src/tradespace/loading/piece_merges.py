"""The merges of a SentencePiece vocabulary: every way to cut a piece in two that are pieces as well.

A vocabulary of 262144 pieces has two million cuts, half a million of which are merges. Looked up one by one in Python they take two to three seconds, most of
the start of such a model. Here all cuts of some ten thousand pieces are hashed at once: the hash of a text is the polynomial Σ cᵢ·bⁱ of its code points modulo
2⁶⁴, so that those of all heads and tails of a piece are differences of one running sum. What a hash finds is compared letter by letter.
"""

from collections.abc import Sequence

import numpy as np

Integers = np.ndarray  # one-dimensional, int64 or uint64

BASES = (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xC2B2AE3D27D4EB4F)  # odd, so that powers have inverses
CHARACTERS = 1 << 18  # that are hashed at once, of whole texts
FILTER_BITS = 22


def find_merges(tokens: Sequence[str], chosen: Sequence[int]) -> tuple[Integers, Integers, Integers]:
    """All (piece, left, right), as ids, with tokens[piece] = tokens[left] + tokens[right]; `piece` runs over `chosen` in its order, `left` and `right` over all
    tokens, which differ from each other and are not empty. Of one piece the cuts come in the order of (left, right).
    """
    for base in BASES:
        found = _found_by_hash(tokens, np.asarray(chosen, np.int64), base)
        if found is not None:
            return found
    return _found_one_by_one(tokens, chosen)


def _found_one_by_one(tokens: Sequence[str], chosen: Sequence[int]) -> tuple[Integers, Integers, Integers]:
    """For texts made so that they share their hash under every base, as the Thue-Morse sequence and its complement do."""
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    found = []
    for piece in chosen:
        text = tokens[piece]
        cuts = ((ids.get(text[:at]), ids.get(text[at:])) for at in range(1, len(text)))
        found += [(piece, left, right) for left, right in sorted((left, right) for left, right in cuts if left is not None and right is not None)]
    piece, left, right = np.array(found, np.int64).reshape(-1, 3).T
    return piece, left, right


class _Texts:
    """Code points of all tokens, one after the other."""

    def __init__(self, tokens: Sequence[str]):
        self.lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.points = np.frombuffer("".join(tokens).encode("utf-32-le", "surrogatepass"), np.uint32)

    def divided(self, ids: Integers) -> list[Integers]:
        """These tokens in runs of about CHARACTERS, or of one that is longer."""
        if len(ids) == 0:
            return []
        through = np.cumsum(self.lengths[ids]) // CHARACTERS
        return np.split(ids, np.flatnonzero(np.diff(through)) + 1)

    def gathered(self, ids: Integers) -> tuple[np.ndarray, Integers, Integers]:
        """The code points of these tokens one after the other, and where each begins and ends in them."""
        lengths = self.lengths[ids]
        ends = np.cumsum(lengths)
        starts = ends - lengths
        return self.points[np.repeat(self.starts[ids] - starts, lengths) + np.arange(ends[-1] if len(ends) else 0)], starts, ends

    def same(self, ids: Integers, points: np.ndarray, starts: Integers) -> np.ndarray:
        """Whether each token stands in `points` at its start."""
        lengths = self.lengths[ids]
        ends = np.cumsum(lengths)
        inner = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        equal = self.points[np.repeat(self.starts[ids], lengths) + inner] == points[np.repeat(starts, lengths) + inner]
        return np.logical_and.reduceat(equal, ends - lengths) if len(ids) else np.zeros(0, bool)


class _Hashes:
    """Hashes of stretches of a text. `powers` and `inverses` are those of the base."""

    def __init__(self, points: np.ndarray, powers: Integers, inverses: Integers):
        self.sums = np.zeros(len(points) + 1, np.uint64)
        np.cumsum((points.astype(np.uint64) + np.uint64(1)) * powers[: len(points)], out=self.sums[1:])
        self.inverses = inverses

    def of(self, starts: Integers, ends: Integers) -> Integers:
        return (self.sums[ends] - self.sums[starts]) * self.inverses[starts]


class _Table:
    """Tokens by their hashes. `unique` is false where two share one."""

    def __init__(self, hashes: Integers):
        self.order = np.argsort(hashes, kind="stable")
        self.hashes = hashes[self.order]
        self.unique = not (self.hashes[1:] == self.hashes[:-1]).any()
        self.known = np.zeros(1 << FILTER_BITS, bool)  # by the hash's upper bits: most stretches of text are no token, and need no search
        self.known[self._upper(hashes)] = True

    @staticmethod
    def _upper(hashes: Integers) -> Integers:
        return (hashes >> np.uint64(64 - FILTER_BITS)).astype(np.int64)

    def find(self, hashes: Integers) -> Integers:
        """The token of each hash, or -1."""
        found = np.full(len(hashes), -1, np.int64)
        maybe = np.flatnonzero(self.known[self._upper(hashes)])
        place = np.minimum(np.searchsorted(self.hashes, hashes[maybe]), len(self.hashes) - 1)
        hit = self.hashes[place] == hashes[maybe]
        found[maybe[hit]] = self.order[place[hit]]
        return found


def _powers(base: int, count: int) -> Integers:
    found = np.full(count, base, np.uint64)
    found[:1] = 1
    return np.cumprod(found, out=found)


def _found_by_hash(tokens: Sequence[str], chosen: Integers, base: int) -> tuple[Integers, Integers, Integers] | None:
    """None where two tokens share their hash."""
    texts = _Texts(tokens)
    chunks, pieces = texts.divided(np.arange(len(tokens))), texts.divided(chosen)
    longest = max((int(texts.lengths[ids].sum()) for ids in (*chunks, *pieces)), default=0)
    powers, inverses = _powers(base, longest + 1), _powers(pow(base, -1, 1 << 64), longest + 1)
    hashed = []
    for ids in chunks:
        points, starts, ends = texts.gathered(ids)
        hashed.append(_Hashes(points, powers, inverses).of(starts, ends))
    table = _Table(np.concatenate([np.zeros(0, np.uint64), *hashed]))
    if not table.unique:
        return None
    none = np.zeros(0, np.int64)
    columns = zip((none, none, none), *(_cuts(ids, texts, powers, inverses, table) for ids in pieces), strict=True)
    piece, left, right = (np.concatenate(column) for column in columns)
    return piece, left, right


def _cuts(ids: Integers, texts: _Texts, powers: Integers, inverses: Integers, table: _Table) -> tuple[Integers, Integers, Integers]:
    """The merges of some pieces."""
    points, starts, ends = texts.gathered(ids)
    hashes = _Hashes(points, powers, inverses)
    each = np.maximum(texts.lengths[ids] - 1, 0)
    which = np.repeat(np.arange(len(ids)), each)  # a cut's piece, by its place in `ids`
    at = starts[which] + 1 + np.arange(len(which)) - np.repeat(np.cumsum(each) - each, each)
    left = table.find(hashes.of(starts[which], at))
    kept = left >= 0
    which, at, left = which[kept], at[kept], left[kept]
    right = table.find(hashes.of(at, ends[which]))
    kept = right >= 0
    which, at, left, right = which[kept], at[kept], left[kept], right[kept]
    # as long as the stretch, and the same letters
    kept = (texts.lengths[left] == at - starts[which]) & (texts.lengths[right] == ends[which] - at)
    which, at, left, right = which[kept], at[kept], left[kept], right[kept]
    kept = texts.same(left, points, starts[which]) & texts.same(right, points, at)
    which, left, right = which[kept], left[kept], right[kept]
    ordered = np.lexsort((right, left, which))
    return ids[which[ordered]], left[ordered], right[ordered]
