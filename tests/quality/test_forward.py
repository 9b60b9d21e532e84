"""Reading a model: through the engine's cache in small steps, packed, with shared starts, or whole: always the same numbers, and transformers' numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.family_models import make_pair
from tradespace.errors import InputError
from tradespace.kv.cache import KVCache
from tradespace.quality.forward import BYTES_PER_LOGIT, ROWS, Forward, Passage, rows_within
from tradespace.spec.kv import KVPlan

CONTEXT = 64


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair("llama", 3, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(pair):
    return pair.ours(max_context=CONTEXT)


def forward(model, layout: str = "none", *, step_tokens: int = 7, rows: int = 5, blocks: int = 40) -> Forward:
    if layout == "none":
        return Forward(model, rows=rows)
    paged = layout == "paged"
    size = 4 if paged else CONTEXT
    plan = KVPlan(store="fp32", layout=layout, **({"block_size": size} if paged else {}))
    cache = KVCache(model.spec, plan, num_blocks=blocks if paged else 1, block_size=size, dtype=torch.float32)
    return Forward(model, cache=cache, block_size=size, step_tokens=step_tokens, rows=rows)


def draw(count: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("layout", ["none", "paged", "contiguous"])
@pytest.mark.parametrize("first", [1, 9, 39])
def test_logprobs_are_transformers(pair, model, layout, first):
    (ids,) = draw(1, 40, pair.spec.V)
    expected_RV = pair.logits(torch.tensor(ids)).log_softmax(-1)[first - 1 : -1]
    reading = forward(model, layout)
    pieces = list(reading.logprobs(Passage(ids, first)))
    torch.testing.assert_close(torch.cat(pieces), expected_RV, rtol=1e-4, atol=1e-4)
    assert [len(piece) for piece in pieces] == list(reading.pieces(Passage(ids, first)))
    assert max(len(piece) for piece in pieces) <= 5


@given(
    step_tokens=st.integers(1, 30),
    lengths=st.lists(st.tuples(st.integers(2, 24), st.integers(0, 23), st.integers(1, 23)), min_size=1, max_size=6),
    layout=st.sampled_from(["paged", "contiguous", "none"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_scores_of_a_batch_are_those_of_each_alone(pair, model, step_tokens, lengths, layout, seed):
    """Ragged passages, some of which begin as the one before them: packed into steps, too long for one, or alone."""
    passages: list[Passage] = []
    for index, (length, common, first) in enumerate(lengths):
        (ids,) = draw(1, length, pair.spec.V, seed=100 * seed + index)
        before = list(passages[-1].ids[:common]) if passages else []
        ids = [*before, *ids[len(before) :]] if len(before) < length else ids
        shared = len(before) if len(before) < length else 0
        passages.append(Passage(ids, min(first, length - 1), shared))
    found = list(forward(model, layout, step_tokens=step_tokens, blocks=8).scores(passages))
    for (nats, best), passage in zip(found, passages, strict=True):
        logprobs_RV = pair.logits(torch.tensor(passage.ids)).log_softmax(-1)[passage.first - 1 : -1]
        targets = torch.tensor(passage.ids[passage.first :])
        assert nats == pytest.approx(float(logprobs_RV.gather(1, targets[:, None]).sum()), abs=2e-3)
        gaps = logprobs_RV.max(-1).values - logprobs_RV.gather(1, targets[:, None])[:, 0]
        if not ((gaps > 0) & (gaps < 1e-3)).any():
            assert best == bool((gaps == 0).all())


def test_a_shared_start_is_computed_once(pair, model):
    """Four answers to one question: the blocks of the question are read by all and written by the first."""
    question, *tails = draw(5, 20, pair.spec.V)
    passages = [Passage([*question, *tail[: 3 + index]], 20, 20 if index else 0) for index, tail in enumerate(tails)]
    computed: list[int] = []
    reading = forward(model, "paged", step_tokens=64)
    step = reading._step
    reading._step = lambda spans, tokens: (computed.append(len(tokens)), step(spans, tokens))[1]  # type: ignore[method-assign]
    scores = list(reading.scores(passages))
    # the question's last token predicts the first of each answer, so its block is each one's own: 16 of 19 tokens are shared
    assert computed == [22 + sum(19 - 16 + 3 + index for index in (1, 2, 3))]
    alone = [next(iter(forward(model, "none").scores([Passage(p.ids, p.first)]))) for p in passages]
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in alone], abs=1e-3)


def test_what_the_passage_before_never_read_is_not_shared(pair, model):
    """A passage's last token is predicted and has no key: one that goes on from there computes that block itself."""
    (ids,) = draw(1, 12, pair.spec.V)
    passages = [Passage(ids[:8], 7), Passage(ids, 9, 8)]
    found = [nats for nats, _ in forward(model, "paged", step_tokens=64).scores(passages)]
    assert found == pytest.approx([next(iter(forward(model).scores([passage])))[0] for passage in passages], abs=1e-3)


def test_a_shorter_vocabulary_is_normalized_over_what_is_left(pair, model):
    (ids,) = draw(1, 12, 10)
    whole = torch.cat(list(Forward(model).logprobs(Passage(ids))))
    short = torch.cat(list(Forward(model, vocabulary=10).logprobs(Passage(ids))))
    assert short.shape == (11, 10)
    torch.testing.assert_close(short, whole[:, :10].log_softmax(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ids", "first"), [([], 1), ([1], 1), ([1, 2], 0), ([1, 2], 2)])
def test_a_passage_without_a_prediction_is_refused(model, ids, first):
    with pytest.raises(InputError, match="nothing to predict"):
        list(Forward(model).logprobs(Passage(ids, first)))


def test_a_passage_longer_than_the_cache_is_refused(pair, model):
    with pytest.raises(InputError, match="smaller context"):
        list(forward(model, "paged", blocks=2).logprobs(Passage(draw(1, 20, pair.spec.V)[0])))


def test_rows_follow_from_the_bytes_there_are():
    assert rows_within(10 * BYTES_PER_LOGIT * 1000, 1000) == 10
    assert rows_within(0, 1000) == 1
    assert rows_within(1 << 40, 1000) == ROWS
    assert rows_within(64 << 20, 262_144) == 10
