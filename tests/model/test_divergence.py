"""KL, agreement and perplexity: by hand on paper-sized distributions, against torch on drawn ones, and on a real forward pass against transformers."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.family_models import make_pair
from tradespace.errors import InputError
from tradespace.quality.divergence import compare, kl_rows, next_token_logprobs, windows

HALF, QUARTER = math.log(0.5), math.log(0.25)


def test_kl_by_hand():
    even, skewed = torch.tensor([[HALF, HALF]]), torch.tensor([[math.log(0.75), QUARTER]])
    # ½ ln(½ / ¾) + ½ ln(½ / ¼) = ½ ln(4/3), and the other way round ¾ ln(3/2) + ¼ ln(1/2)
    assert kl_rows(even, skewed).item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
    assert kl_rows(skewed, even).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert kl_rows(skewed, skewed).item() == 0.0


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 20), spread=st.sampled_from([1e-3, 1.0, 30.0]))
@settings(max_examples=30, deadline=None)
def test_kl_is_that_of_torch(seed, rows, spread):
    generator = torch.Generator().manual_seed(seed)
    logits_RV = torch.randn(rows, 50, generator=generator) * 5
    other_RV = logits_RV + torch.randn(rows, 50, generator=generator) * spread
    found_R = kl_rows(logits_RV.log_softmax(-1), other_RV.log_softmax(-1))
    expected_RV = torch.nn.functional.kl_div(other_RV.double().log_softmax(-1), logits_RV.double().log_softmax(-1), log_target=True, reduction="none")
    torch.testing.assert_close(found_R, expected_RV.sum(-1), rtol=1e-4, atol=1e-9)


def test_kl_of_close_models_is_not_rounding():
    """Two models 1e-5 apart in every logit lie about 5e-11 nats apart; fp32's rounding of the logarithms alone would show up to 1e-6."""
    generator = torch.Generator().manual_seed(0)
    logits_RV = torch.randn(4, 50_000, generator=generator) * 3
    moved_RV = logits_RV + torch.randn(4, 50_000, generator=generator) * 1e-5
    assert 1e-11 < kl_rows(logits_RV.log_softmax(-1), moved_RV.log_softmax(-1)).mean() < 1e-9


def test_compare_by_hand():
    """Three predictions in pieces of two rows, the last of which belongs to no token of the window."""
    reference_TV = torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.25, 0.75], [0.9, 0.1]]).log()
    other_TV = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.75, 0.25], [0.1, 0.9]]).log()
    found = compare(lambda _: iter(reference_TV.split(2)), lambda _: iter(other_TV.split(2)), [[0, 0, 1, 1]])
    first, third = 0.5 * math.log(4 / 3), 0.75 * math.log(3) + 0.25 * math.log(1 / 3)
    assert found.num_tokens == 3
    assert found.mean_kl == pytest.approx((first + third) / 3, rel=1e-6)
    # between the second largest and the largest of three values lies half of the range: 99% stands at 0.98 of that half
    assert found.p99_kl == pytest.approx(first + 0.98 * (third - first), rel=1e-6)
    assert found.top1_agreement == pytest.approx(2 / 3)  # a tie counts as its first token
    assert found.reference_perplexity == pytest.approx((0.5 * 0.25 * 0.75) ** (-1 / 3), rel=1e-6)
    assert found.perplexity == pytest.approx((0.75 * 0.25 * 0.25) ** (-1 / 3), rel=1e-6)


def test_a_model_against_itself_and_against_transformers(tmp_path):
    pair = make_pair("llama", 0, tmp_path)
    model = pair.ours(max_context=48)
    texts = windows(torch.randint(0, pair.spec.V, (100,), generator=torch.Generator().manual_seed(1)).tolist(), 40)
    own = partial(next_token_logprobs, model, rows=7)
    same = compare(own, own, texts)
    assert (same.mean_kl, same.p99_kl, same.top1_agreement, same.num_tokens) == (0.0, 0.0, 1.0, 78)

    def oracle(window):
        yield from pair.logits(torch.tensor(window)).log_softmax(-1).split(7)

    found = compare(oracle, own, texts)
    assert found.mean_kl < 1e-8
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-5)
    moved = compare(own, lambda window: (piece * 1.1 for piece in own(window)), texts)
    assert moved.mean_kl > 1e-4


def test_windows():
    assert windows(range(7), 3) == [[0, 1, 2], [3, 4, 5]]
    assert windows(range(7), 3, bos_id=9) == [[9, 0, 1], [9, 2, 3], [9, 4, 5]]
    assert windows(range(7), 3, bos_id=9, count=2) == [[9, 0, 1], [9, 2, 3]]
    assert windows(range(2), 3, bos_id=9) == [[9, 0, 1]]
    assert windows(range(6), 3, count=10) == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(("ids", "context", "options"), [(2, 3, {}), (0, 2, {}), (5, 1, {}), (5, 1, {"bos_id": 0}), (5, 0, {}), (5, 2, {"count": 0})])
def test_windows_that_predict_nothing_are_refused(ids, context, options):
    with pytest.raises(InputError):
        windows(range(ids), context, **options)


@pytest.mark.parametrize("texts", [[], [[]], [[3]]])
def test_comparing_nothing_is_refused(texts):
    with pytest.raises(InputError, match="token to predict"):
        compare(lambda _: iter(()), lambda _: iter(()), texts)
