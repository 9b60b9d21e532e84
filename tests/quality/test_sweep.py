"""Which points a sweep has, and which of them nothing beats. The sweep itself runs in tests/cli/test_eval.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tradespace.errors import InputError, UnsupportedError
from tradespace.lab import sweep as sweep_module
from tradespace.lab.experiments import EXPERIMENTS
from tradespace.lab.sweep import choose_pairs, is_best
from tradespace.measure.record import Record
from tradespace.quantize.methods import METHODS
from tradespace.spec.formats import ALIASES, FORMATS


def test_all_formats_by_all_methods_that_have_what_they_learn_from():
    without, with_text = choose_pairs(None, None, "fp32"), choose_pairs(None, None, "fp32", calibrate=Path("text"))
    assert {fmt for fmt, _ in without} == {fmt.name for fmt in FORMATS.values() if fmt.runs_since} - {"fp32"}
    assert not {fmt for fmt, _ in without} & set(ALIASES), "no format twice"
    assert {method for _, method in without} == {name for name, method in METHODS.items() if not method.needs_text}
    assert {method for _, method in with_text} == set(METHODS)
    assert {method for fmt, method in with_text if fmt == "bf16"} == {"rtn"}
    assert len(with_text) == len(set(with_text))


def test_what_is_asked_for_is_what_is_measured():
    assert choose_pairs(["int8", "int8-tensor"], ["rtn"], "fp32") == [("int8", "rtn"), ("int8-tensor", "rtn")]
    assert choose_pairs(["int4", "int4-g128"], ["rtn"], "fp32") == [("int4-g128", "rtn")]


def test_what_cannot_be_measured_is_refused(monkeypatch):
    with pytest.raises(InputError, match="--calibrate"):
        choose_pairs(["int8"], ["gptq"], "fp32")
    with pytest.raises(InputError, match="unknown method"):
        choose_pairs(["int8"], ["guess"], "fp32")
    from dataclasses import replace

    monkeypatch.setattr(sweep_module, "find_format", lambda name: replace(FORMATS["int8"], runs_since=None))
    with pytest.raises(UnsupportedError, match="cannot run yet"):
        choose_pairs(["int8"], ["rtn"], "fp32")


def test_the_front():
    points = [{"bytes": size, "mean_kl": loss} for size, loss in ((1, 9.0), (2, 5.0), (2, 6.0), (3, 5.0), (4, 1.0), (4, 1.0))]
    assert [is_best(point, points) for point in points] == [True, True, False, False, True, True]


def test_its_picture_lies_beside_the_record(tmp_path):
    pytest.importorskip("matplotlib")
    points = (("int8", 2**27, 0.01), ("e8", 2**25, 2.0))
    rows = [{"format": fmt, "method": "rtn", "bytes": size, "mean_kl": kl, "kl_error": kl / 9, "pareto": True} for fmt, size, kl in points]
    about = {"command": "", "commit": "", "dirty": False, "date": "", "device": {}, "versions": {}, "repeats": 1, "notes": "tiny"}
    drawn = EXPERIMENTS["sweep"].draw(Record(experiment="sweep", rows=rows, **about), tmp_path / "sweep.json")
    assert drawn is not None and drawn == tmp_path / "sweep.png" and drawn.read_bytes().startswith(b"\x89PNG")
    assert EXPERIMENTS["memory"].draw(Record(experiment="memory", **about), tmp_path / "memory.json") is None and not (tmp_path / "memory.png").exists()
