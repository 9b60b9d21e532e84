"""The columns beside KL, by hand and against torch; `tests/model/test_divergence.py` has KL itself."""

from __future__ import annotations

import math

import pytest
import torch

from tradespace.errors import EngineError
from tradespace.quality.divergence import QUANTILES, compare, quantiles, standard_error
from tradespace.quality.forward import Passage


def run(reference_TV: torch.Tensor, other_TV: torch.Tensor, ids: list[int], first: int = 1):
    passage = Passage(ids, first)
    kept = slice(first - 1, len(ids) - 1)
    return compare(lambda _: iter(reference_TV.log()[kept].split(2)), lambda _: iter(other_TV.log()[kept].split(2)), [passage])


def test_columns_by_hand():
    reference = torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    other = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.75, 0.25]], dtype=torch.float64)
    found = run(reference, other, [0, 0, 1, 1])
    dp = torch.tensor([0.25, 0.0, -0.5], dtype=torch.float64)  # of tokens 0, 1 and 1
    assert found.mean_dp == pytest.approx(float(dp.mean()))
    assert found.dp_error == pytest.approx(float(dp.std() / math.sqrt(3)))
    assert found.rms_dp == pytest.approx(float(dp.square().mean().sqrt()))
    assert found.rms_dp_error == pytest.approx(float(dp.square().std() / math.sqrt(3) / (2 * dp.square().mean().sqrt())))
    assert found.dp_quantiles[0] == pytest.approx(-0.5) and found.dp_quantiles[-1] == pytest.approx(0.25)
    assert found.top1_error == pytest.approx(math.sqrt((2 / 3) * (1 / 3) / 2))  # n - 1 below
    nats, reference_nats = -torch.tensor([0.75, 0.25, 0.25]).double().log(), -torch.tensor([0.5, 0.25, 0.75]).double().log()
    assert found.log_ratio == pytest.approx(float((nats - reference_nats).mean()))
    assert found.log_ratio_error == pytest.approx(float((nats - reference_nats).std() / math.sqrt(3)))
    assert found.perplexity_error == pytest.approx(found.perplexity * float(nats.std() / math.sqrt(3)))
    assert found.correlation == pytest.approx(float(torch.corrcoef(torch.stack([reference_nats, nats]))[0, 1]))
    assert found.median_kl == found.kl_quantiles[QUANTILES.index(0.5)] == pytest.approx(0.5 * math.log(4 / 3))
    assert found.max_kl == found.kl_quantiles[-1]


def test_a_passage_is_scored_from_its_first_token_on():
    reference = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    other = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)).softmax(-1)
    whole, part = run(reference, other, [0, 1, 2, 3, 4]), run(reference, other, [0, 1, 2, 3, 4], first=3)
    assert (whole.num_tokens, part.num_tokens) == (4, 2)
    assert part.mean_kl == pytest.approx(run(reference[2:], other[2:], [2, 3, 4]).mean_kl)


def test_equal_models_and_single_tokens_have_no_errors():
    same = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    found = run(same, same, [0, 1, 0])
    assert (found.rms_dp, found.rms_dp_error, found.kl_error, found.correlation) == (0.0, 0.0, 0.0, None)
    assert run(same, same, [0, 1]).perplexity_error == 0.0


def test_quantiles_are_torchs():
    values = torch.randn(1001, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert quantiles(values) == pytest.approx(torch.quantile(values, torch.tensor(QUANTILES, dtype=torch.float64)).tolist())
    assert standard_error(values) == pytest.approx(float(values.std() / math.sqrt(1001)))


def test_nan_is_an_error_and_not_a_figure():
    broken = torch.tensor([[math.nan, 0.5], [0.5, 0.5]])
    with pytest.raises(EngineError, match="NaN"):
        run(broken, broken, [0, 1, 0])
