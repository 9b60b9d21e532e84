"""Every pattern, pair by pair: who sees whom is written out here from the definitions, and shares no code with the kernels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.attention_cases import Case, make_case
from tradespace.errors import InputError, UnsupportedError
from tradespace.kernels.attention import KERNELS, supports
from tradespace.kernels.attention.pattern import keys_end
from tradespace.spec.attention_imposed import impose
from tradespace.spec.attention_pattern import BlockSparse, Causal, Documents, Pattern, Prefix, Selected, Sliding, parse_pattern
from tradespace.spec.mixers import Attention
from tradespace.spec.model import LayerSpec, ModelSpec

torch.set_num_threads(1)

patterns = st.one_of(
    st.just(Causal()),
    st.builds(Sliding, window=st.sampled_from([1, 7, 40])),
    st.builds(
        BlockSparse, block=st.sampled_from([16, 32]), local=st.integers(1, 3), leading=st.integers(0, 2), random=st.integers(0, 2), seed=st.integers(0, 5)
    ),
    st.builds(Prefix, length=st.sampled_from([1, 5, 20, 90])),
    st.sampled_from([Documents(boundaries=(1, 2, 50)), Documents(boundaries=(30,))]),
    st.builds(Selected, block=st.just(16), share=st.sampled_from([0.1, 0.4, 1.0])),
)


def sees(pattern: Pattern, query: int, key: int, chosen: dict[int, set[int]]) -> bool:
    """The definitions, one pair at a time. `chosen`: blocks of keys by block of queries, one head's."""
    if isinstance(pattern, Prefix):
        return key <= query or (key < pattern.length and query < pattern.length)
    if key > query:
        return False
    if isinstance(pattern, Sliding):
        return query - key < pattern.window
    if isinstance(pattern, Documents):
        return sum(b <= query for b in pattern.boundaries) == sum(b <= key for b in pattern.boundaries)
    if isinstance(pattern, BlockSparse):
        row, column = query // pattern.block, key // pattern.block
        return row - column < pattern.local or column < pattern.leading or column in pattern.blocks_of(row)
    if isinstance(pattern, Selected):
        return key // pattern.block in chosen.get(query // pattern.block, set(range(query // pattern.block + 1)))
    return True


def chosen_by_hand(pattern: Selected, q_TH: torch.Tensor, k_SH: torch.Tensor, first: int) -> dict[int, set[int]]:
    """The best blocks of one head by mean query and mean key, the first and the queries' own always."""
    size, stop = pattern.block, k_SH.shape[0]
    if q_TH.shape[0] < size:
        return {}
    found = {}
    for row in range(first // size, -(-stop // size)):
        query = q_TH[max(0, row * size - first) : (row + 1) * size - first].double().mean(0)
        score = {column: float(query @ k_SH[column * size : (column + 1) * size].double().mean(0)) for column in range(row + 1)}
        others = sorted((column for column in score if column not in (0, row)), key=lambda column: -score[column])
        count = max(2, math.ceil(round(pattern.share * (row + 1), 9))) - len({0, row})
        found[row] = {0, row, *others[: max(0, count)]}
    return found


def expected(case: Case, mixer: Attention, pattern: Pattern) -> torch.Tensor:
    out = []
    for span, k, v in zip(case.batch.spans, case.keys, case.values, strict=True):
        q = case.q_TNH[span.query_start : span.query_start + span.num_queries].double()
        first = span.length - span.num_queries
        for t in range(span.num_queries):
            row = []
            for head in range(mixer.N):
                kh = k[:, head // mixer.G].double()
                chosen = {}
                if isinstance(pattern, Selected):
                    chosen = chosen_by_hand(pattern, q[:, head], kh, first)
                seen = torch.tensor([sees(pattern, first + t, s, chosen) for s in range(span.length)])
                scores = (kh @ q[t, head] * mixer.softmax_scale).masked_fill(~seen, float("-inf"))
                row.append(torch.softmax(scores, 0) @ v[:, head // mixer.G].double())
            out.append(torch.stack(row))
    return torch.stack(out) if out else torch.zeros((0, mixer.N, mixer.Hv), dtype=torch.float64)


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
@settings(max_examples=25, deadline=None)
@given(pattern=patterns, cuts=st.lists(st.sampled_from([(0, 40), (0, 70), (0, 1), (33, 1), (48, 16)]), max_size=2), seed=st.integers(0, 10**6))
def test_every_pattern_matches_its_definition(kernel, pattern, cuts, seed):
    mixer = Attention(N=2, K=1, H=8, pattern=pattern)
    if isinstance(pattern, Prefix):
        cuts = [(before, new) for before, new in cuts if before == 0 or new == 1]
    case = make_case(mixer, cuts, "paged", torch.float32, seed)
    out = KERNELS[kernel]()(case.q_TNH, case.cache.view(0), case.batch, mixer)
    torch.testing.assert_close(out.double(), expected(case, mixer, pattern), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_computed_says_why():
    for pattern in (BlockSparse(), Prefix(length=4), Documents(boundaries=(3,)), Selected()):
        mixer = Attention(N=2, K=1, H=8, pattern=pattern)
        for kernel in ("sdpa", "native"):
            assert pattern.kind in str(supports(kernel, mixer, torch.float32))
        assert all(supports(kernel, mixer, torch.float32) is None for kernel in ("reference", "chunked", "flash"))


def test_a_prefix_in_pieces_is_refused():
    mixer = Attention(N=2, K=1, H=8, pattern=Prefix(length=30))
    case = make_case(mixer, [(10, 30)], "paged", torch.float32, 0)
    for kernel in ("reference", "chunked", "flash"):
        with pytest.raises(UnsupportedError, match="one step"):
            KERNELS[kernel]()(case.q_TNH, case.cache.view(0), case.batch, mixer)
    assert keys_end(mixer, 8) == 30


def test_random_blocks_are_the_same_everywhere():
    """Written down once: another machine, another Python, the same blocks."""
    pattern = BlockSparse(block=16, local=2, leading=1, random=3, seed=7)
    assert pattern.blocks_of(20) == (0, 5, 9, 12, 19, 20)
    assert len({BlockSparse(random=2, seed=seed).blocks_of(40) for seed in range(20)}) > 15
    assert all(len(set(pattern.blocks_of(i))) == len(pattern.blocks_of(i)) == min(i + 1, 6) for i in range(30))


@pytest.mark.parametrize(
    "text", ["causal", "sliding:5", "prefix:7", "documents:3,9", "block-sparse:block=32,local=1,leading=0,random=0,seed=3", "selected:share=0.5"]
)
def test_a_pattern_reads_back_what_it_wrote(text):
    assert parse_pattern(parse_pattern(text).describe()) == parse_pattern(text)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("diagonal", "unknown"),
        ("sliding:0", "at least 1"),
        ("sliding", "sliding:1024"),
        ("selected:share=2", "share"),
        ("block-sparse:block=20", "power of two"),
        ("block-sparse:cells=2", "block-sparse:"),
        ("documents:5,5", "ascending"),
        ("documents:a", "documents:100"),
    ],
)
def test_bad_patterns_say_what_is_wrong(text, word):
    with pytest.raises(InputError, match=word):
        parse_pattern(text)


def test_imposing_reaches_the_layers_that_see_everything():
    wide, narrow = Attention(N=2, K=1, H=8), Attention(N=2, K=1, H=8, window=4)
    model = ModelSpec(name="m", family="llama", D=8, V=8, layers=tuple(LayerSpec(mixer=m, ffn=None) for m in (wide, narrow)), max_context=64)
    sparse = impose(model, "block-sparse:local=2")
    assert sparse.layers[0].mixer == replace(wide, pattern=BlockSparse(local=2)) and sparse.layers[1] == model.layers[1]
    assert sparse.imposed == BlockSparse(local=2).describe()
    assert impose(model, "sliding:16").layers[0].mixer == replace(wide, window=16)
    assert impose(model, "") == model
    with pytest.raises(InputError, match="packed text"):
        impose(model, "documents:4")
