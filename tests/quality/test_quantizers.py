"""Experiment `quantizers`: a model in memory is quantized and read as the layer-by-layer tools do it, and its verdicts follow from the rows alone."""

from __future__ import annotations

import pytest
import torch

from model.family_models import make_pair
from quantize.models import CONTEXT, stored
from tradespace.lab.quantizers import cases, split
from tradespace.lab.quantizers_model import HeldHidden, HeldSensitivities, HeldWeights, Reader, embedded, quantize_whole
from tradespace.lab.quantizers_table import bars, markdown
from tradespace.measure.record import Record
from tradespace.quantize.methods import find_method
from tradespace.quantize.sensitivity import SensitivityPass
from tradespace.quantize.stream import LayerRunner
from tradespace.spec.weights import WeightPlan


@pytest.fixture(scope="module")
def held(tmp_path_factory) -> HeldWeights:
    folder = tmp_path_factory.mktemp("model")
    make_pair("llama", 0, folder)
    return HeldWeights(str(folder))


def _windows(weights: HeldWeights, count: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(count)
    return torch.randint(0, weights.spec.V, (count, CONTEXT), generator=draw).tolist()


def test_a_model_does_not_differ_from_itself_and_fewer_bits_lose_more(held):
    reader = Reader(held, _windows(held, 4), together=2)
    runner, calibration = LayerRunner(held.spec, CONTEXT, windows=2), embedded(held, _windows(held, 6), together=2)
    losses = []
    for fmt, method in (("fp32", "rtn"), ("int8", "rtn"), ("int4-g32", "gptq"), ("int2-g32", "rtn")):
        model = quantize_whole(held, WeightPlan(default=fmt), find_method(method), runner, calibration)
        found = reader.divergence(model)
        assert found.num_tokens == 4 * (CONTEXT - 1), "a window's last position is not scored"
        losses.append(found.mean_kl)
    assert losses[0] < 1e-9
    assert losses == sorted(losses)


def test_windows_together_are_windows_alone(held):
    windows = _windows(held, 4)
    alone, together = (Reader(held, windows, together=count).reference for count in (1, 4))
    torch.testing.assert_close(torch.cat(alone.pieces), torch.cat(together.pieces), atol=1e-5, rtol=1e-5)


def test_sensitivities_in_memory_are_those_of_the_files(held, tmp_path):
    windows, formats, method = _windows(held, 2), ["int4-g32", "int2-g32"], find_method("gptq")
    kept = HeldSensitivities(held, method, formats, windows, tmp_path / "held").run({})
    files = SensitivityPass(
        stored("llama", tmp_path / "model"), method, formats, windows, tmp_path / "files", progress=lambda what, done, total: None
    ).run({})  # fmt: skip
    assert [(entry.tensor, entry.fmt) for entry in kept] == [(entry.tensor, entry.fmt) for entry in files]
    for ours, theirs in zip(kept, files, strict=True):
        assert ours.kl == pytest.approx(theirs.kl, rel=1e-3, abs=1e-8)


def test_hidden_states_are_not_shared():
    hidden = HeldHidden([torch.zeros(2, 2)])
    other = hidden.copied()
    other.write_all(iter([torch.ones(2, 2)]))
    hidden.read(0).add_(5)
    assert hidden.read(0).sum() == 0 and other.read(0).sum() == 4


def test_every_case_is_measured_once():
    wanted = cases(64, rotates=True)
    assert len(set(wanted)) == len(wanted)
    assert sorted(map(repr, wanted)) == sorted(repr(case) for some in split(wanted) for case in some)


def _record(**kl: float) -> Record:
    base = {
        "model": "tiny", "stored": "F32", "plan": "", "bytes": 8, "bits_per_weight": 4.0, "num_tokens": 10, "kl_error": 0.01, "p99_kl": 1.0,
        "top1_agreement": 0.9, "perplexity": 20.0, "reference_perplexity": 19.9, "log_ratio": 0.005, "log_ratio_error": 0.001, "scope": "linears",
        "rule": "uniform", "like": "",
    }  # fmt: skip
    rows = [base | {"format": "int4-g64", "method": method.replace("_", "-"), "mean_kl": loss} for method, loss in kl.items()]
    rows += [base | {"format": "e8", "method": "gptq", "mean_kl": 0.4, "bytes": 7}, base | {"format": "int2-g64", "method": "gptq", "mean_kl": 1.0}]
    rows += [base | {"format": "int8", "method": "rtn", "scope": "all", "mean_kl": 0.001}]
    rows += [base | {"format": "bf16", "method": "rtn", "scope": "all", "mean_kl": 0.0}]
    rows += [base | {"format": "w8a8", "method": name, "mean_kl": 0.1, "perplexity": ppl} for name, ppl in (("rtn", 21.0), ("smoothquant", 20.05))]
    return Record(experiment="quantizers", command="x", commit="y", dirty=False, date="2026-11-25", device={}, versions={}, repeats=1, rows=rows, notes="n")


def test_verdicts_follow_from_the_rows():
    verdicts = {bar.sentence: bar.holds for bar in bars(_record(rtn=0.5, gptq=0.2, awq=0.6))}
    assert verdicts == {
        "GPTQ < RTN at int4": True,
        "AWQ < RTN at int4": False,
        "e8 at 2 bits < half of GPTQ at int2-g64": True,
        "e8 at 2 bits: with fewer bytes": True,
        "SmoothQuant W8A8 (α for the model) within 0.5% of bf16's perplexity, plain W8A8 not": True,
        "claim: INT8 costs < 1% of perplexity": True,
        "claim: INT4 costs at most 3% of perplexity, linears by GPTQ": True,
        "claim: INT4 costs at most 3% of perplexity, linears by AWQ": True,
    }


def test_a_difference_within_its_error_is_said():
    close = next(bar for bar in bars(_record(rtn=0.201, gptq=0.2)) if bar.sentence == "GPTQ < RTN at int4")
    assert close.holds and "of its standard error" in close.figures
    table = markdown(_record(rtn=0.5, gptq=0.2, awq=0.6))
    assert "| tiny | AWQ < RTN at int4 | NOT held |" in table
