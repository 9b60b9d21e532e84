"""Sliding windows score every token once; perplexity, bits per byte and their errors by hand, and on a real forward pass against transformers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.family_models import make_pair
from tradespace.errors import EngineError, InputError
from tradespace.quality.forward import Forward, Passage
from tradespace.quality.perplexity import SlidingWindows, summarize, token_nats


@given(num=st.integers(2, 60), context=st.integers(2, 20), stride=st.integers(1, 20), bos=st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_token_is_scored_once_with_what_came_before(num, context, stride, bos):
    body = context - bos
    if num < body or stride > body:
        with pytest.raises(InputError):
            SlidingWindows(range(num), context=context, stride=stride, bos_id=1000 if bos else None)
        return
    windows = SlidingWindows(range(num), context=context, stride=stride, bos_id=1000 if bos else None)
    scored = []
    for index, passage in enumerate(windows):
        assert len(passage.ids) <= context and 1 <= passage.first < len(passage.ids)
        ids = [token for token in passage.ids if token != 1000]
        assert ids == list(range(ids[0], ids[0] + len(ids))), "a window is a stretch of the text"
        new = list(passage.ids[passage.first :])
        if index and stride < body:
            assert passage.first >= min(body, num) - stride or new[-1] == num - 1, "what is new has at least context - stride tokens before it"
        scored += new
    assert scored == [token for token in range(num) if token not in windows.unscored]
    assert windows.num_scored == len(scored)
    assert len(windows) == len(list(windows))
    assert f"{len(scored):,} tokens scored" in windows.describe()


def test_windows_by_hand():
    assert [(list(p.ids), p.first) for p in SlidingWindows(range(7), context=3)] == [([0, 1, 2], 1), ([3, 4, 5], 1)]
    assert SlidingWindows(range(7), context=3).unscored == [0, 3, 6]
    assert [(list(p.ids), p.first) for p in SlidingWindows(range(7), context=3, bos_id=9)] == [([9, 0, 1], 1), ([9, 2, 3], 1), ([9, 4, 5], 1), ([9, 6], 1)]
    assert [(list(p.ids), p.first) for p in SlidingWindows(range(6), context=4, stride=2)] == [([0, 1, 2, 3], 1), ([2, 3, 4, 5], 2)]


@pytest.mark.parametrize(("num", "context", "stride"), [(5, 8, None), (0, 2, None), (5, 1, None), (5, 4, 0), (5, 4, 5)])
def test_windows_that_leave_text_out_or_predict_nothing_are_refused(num, context, stride):
    with pytest.raises(InputError, match=r"--context|--stride|needs"):
        SlidingWindows(range(num), context=context, stride=stride)


def test_figures_by_hand():
    """Four tokens of a quarter each: perplexity 4, two bits a token; over two bytes four bits a byte."""
    found = summarize(num_tokens=4, mean_nats=math.log(4), mean_error=0.5, num_bytes=2, protocol="p")
    assert found.perplexity == pytest.approx(4)
    assert found.error == pytest.approx(2)
    assert found.bits_per_byte == pytest.approx(4)
    assert found.byte_perplexity == pytest.approx(16)


def test_nats_are_those_of_the_tokens_that_came():
    logprobs_RV = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    nats = token_nats(lambda passage: iter(logprobs_RV.split(1)), [Passage([0, 0, 1])])
    assert nats.tolist() == pytest.approx([math.log(2), -math.log(0.75)])
    with pytest.raises(InputError, match="no token"):
        token_nats(lambda passage: iter(()), [])
    with pytest.raises(EngineError, match="NaN"):
        token_nats(lambda passage: iter([torch.tensor([[math.nan, 0.0]])]), [Passage([0, 0])])


@pytest.mark.parametrize("stride", [None, 5, 12])
def test_perplexity_is_transformers_by_the_same_protocol(tmp_path, stride):
    """The recipe that transformers' documentation gives: a window's tokens that were scored before count as context alone."""
    pair = make_pair("gemma2", 5, tmp_path)
    ids = torch.randint(0, pair.spec.V, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    context = 16
    expected, before = [], 0
    for begin in range(0, len(ids), stride or context):
        end = min(begin + context, len(ids))
        inputs = torch.tensor(ids[begin:end])[None]
        labels = inputs.clone()
        labels[:, : before - begin] = -100
        logits = pair.oracle(inputs).logits[0, :-1].float()
        lost = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="none")
        expected.append(lost[labels[0, 1:] != -100])
        before = end
        if end == len(ids):
            break
    model = pair.ours(max_context=context)
    nats = token_nats(Forward(model, rows=3).logprobs, SlidingWindows(ids, context=context, stride=stride))
    assert float(nats.mean()) == pytest.approx(float(torch.cat(expected).double().mean()), abs=1e-4)
    assert len(nats) == len(torch.cat(expected))
