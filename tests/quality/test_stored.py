"""Predictions kept on disk in 16 bits an entry come back as they were, nearly; and a comparison with them is the comparison side by side."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tradespace.errors import BudgetError, EngineError
from tradespace.quality import stored as stored_module
from tradespace.quality.divergence import compare
from tradespace.quality.forward import Passage
from tradespace.quality.stored import LEVELS, StoredLogprobs, check_disk, stored_bytes


def rows(count: int, vocabulary: int, seed: int, spread: float = 4.0) -> torch.Tensor:
    return (torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread).log_softmax(-1)


@given(seed=st.integers(0, 999), vocabulary=st.integers(1, 300), spread=st.sampled_from([0.0, 1e-3, 1.0, 10.0]))
@settings(max_examples=30, deadline=None)
def test_an_entry_is_off_by_half_a_step_at_most(tmp_path_factory, seed, vocabulary, spread):
    logprobs_RV = rows(6, vocabulary, seed, spread)
    path = tmp_path_factory.mktemp("stored") / "logprobs"
    with StoredLogprobs(path, vocabulary) as kept:
        for piece_RV in logprobs_RV.split(4):
            kept.append(piece_RV)
        assert kept.num_rows == 6
        back_RV = torch.cat(list(kept.reader(lambda passage: iter([2, 3, 1]))(Passage([0] * 7))))
    span_R = logprobs_RV.max(-1).values - logprobs_RV.min(-1).values
    assert ((back_RV - logprobs_RV).abs().amax(-1) <= span_R / LEVELS * 0.51 + 2e-6).all()
    assert path.stat().st_size == stored_bytes(6, vocabulary)


def test_a_comparison_with_what_was_stored_is_the_one_side_by_side(tmp_path):
    passages = [Passage([1, 2, 3, 4, 5], 2), Passage([4, 3, 2, 1])]
    reference = {2: rows(3, 500, 1), 1: rows(3, 500, 2)}
    other = {first: (logprobs_RV + 0.1 * rows(3, 500, 7 + first)).log_softmax(-1) for first, logprobs_RV in reference.items()}
    beside = compare(lambda p: iter(reference[p.first].split(2)), lambda p: iter(other[p.first].split(2)), passages)
    with StoredLogprobs(tmp_path / "logprobs", 500) as kept:
        for passage in passages:
            kept.append(reference[passage.first])
    with StoredLogprobs(tmp_path / "logprobs", 500, keep=True) as kept:
        for _ in range(2):  # a file is read as often as there is something to compare
            found = compare(kept.reader(lambda p: iter([2, 1])), lambda p: iter(other[p.first].split(2)), passages)
            assert found.mean_kl == pytest.approx(beside.mean_kl, rel=1e-3)
            assert found.perplexity == beside.perplexity
            assert found.reference_perplexity == pytest.approx(beside.reference_perplexity, rel=1e-3)


def test_reading_past_the_end_and_nan_are_errors(tmp_path):
    with StoredLogprobs(tmp_path / "logprobs", 5) as kept:
        kept.append(rows(2, 5, 0))
        with pytest.raises(EngineError, match="end at row 2"):
            list(kept.reader(lambda passage: iter([3]))(Passage([0, 1])))
        with pytest.raises(EngineError, match="NaN"):
            kept.append(torch.full((1, 5), torch.nan))


def test_a_full_disk_is_said_before_anything_is_read(tmp_path, monkeypatch):
    check_disk(tmp_path, 10, 100)
    monkeypatch.setattr(stored_module, "SPARE_BYTES", 1 << 60)
    with pytest.raises(BudgetError, match="of disk") as caught:
        check_disk(tmp_path, 10, 100)
    assert caught.value.need_bytes > caught.value.have_bytes
