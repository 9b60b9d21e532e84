"""Merges found by hashes against the definition, cut by cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradespace.loading import piece_merges
from tradespace.loading.piece_merges import find_merges


def by_definition(tokens: list[str], chosen: list[int]) -> list[tuple[int, int, int]]:
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    found = []
    for piece in chosen:
        text = tokens[piece]
        cuts = [(ids[text[:at]], ids[text[at:]]) for at in range(1, len(text)) if text[:at] in ids and text[at:] in ids]
        found += [(piece, left, right) for left, right in sorted(cuts)]
    return found


def found(tokens: list[str], chosen: list[int]) -> list[tuple[int, int, int]]:
    return list(zip(*(column.tolist() for column in find_merges(tokens, chosen)), strict=True))


LETTERS = st.text(st.sampled_from("ab\u2581\u00e9\U0001f600\ud800\x00"), min_size=1, max_size=9)


@settings(max_examples=300, deadline=None)
@given(st.lists(LETTERS, unique=True, max_size=60), st.randoms(use_true_random=False), st.sampled_from([1, 13, 1 << 18]))
def test_merges_are_those_of_the_definition(tokens, random, at_once):
    chosen = random.sample(range(len(tokens)), random.randint(0, len(tokens)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(piece_merges, "CHARACTERS", at_once)
        assert found(tokens, chosen) == by_definition(tokens, chosen)


def test_stretches_that_share_a_hash_with_a_token_are_no_merges(monkeypatch):
    """With a base of 1 a hash is the sum of the letters."""
    tokens = ["abcd", "ad", "bc", "a", "bcd"]  # "ad" and "bc" share theirs: another base is taken
    monkeypatch.setattr(piece_merges, "BASES", (1, *piece_merges.BASES))
    assert found(tokens, [0, 4, 1]) == by_definition(tokens, [0, 4, 1]) == [(0, 3, 4)]
    tokens = ["abc", "a", "cb"]  # none do, but a stretch of the first has that of the last
    monkeypatch.setattr(piece_merges, "BASES", (1,))
    assert found(tokens, [0]) == by_definition(tokens, [0]) == []


def test_texts_that_share_their_hash_under_every_base():
    """Thue and Morse: of 2^11 letters the sequence and its complement have one polynomial modulo 2^64, whatever the base."""
    letters = "".join("ab"[bin(place).count("1") % 2] for place in range(1 << 11))
    other = letters.translate(str.maketrans("ab", "ba"))
    tokens = [letters, other, "a", "b", "ab", letters[1:]]
    assert all(piece_merges._found_by_hash(tokens, np.arange(6), base) is None for base in piece_merges.BASES)
    assert found(tokens, [0, 1, 4]) == by_definition(tokens, [0, 1, 4]) == [(0, 2, 5), (4, 2, 3)]
