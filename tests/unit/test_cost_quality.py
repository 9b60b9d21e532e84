"""Loss: exact is exact, figures name their source, and what nobody measured is unknown."""

from pathlib import Path

import pytest

from tradespace.cost.quality import (
    CITED,
    FIGURES,
    MEASURED,
    MEASURED_FILE,
    NEAREST,
    REFERENCE_TEXT,
    Figure,
    combine,
    find_figure,
    kv_quality,
    quality,
    weight_quality,
)
from tradespace.spec.estimate import Estimate
from tradespace.spec.formats import FORMATS
from tradespace.spec.kv import STORES, KVPlan, Retain, parse_stores
from tradespace.spec.weights import WeightPlan
from tradespace.spec.zoo import find_model
from unit.cost_examples import tiny_model, tiny_plan


def test_exact_choices_lose_nothing():
    for dense in ("fp32", "bf16"):
        found = quality(tiny_model(), tiny_plan(weights=WeightPlan(default=dense), kv=KVPlan(store=dense), kv_tokens=128))
        assert found == Estimate(0.0, "exact")


def test_fp16_is_exact_only_for_what_was_stored_so():
    stored = find_model("llama-2-7b")
    figure = find_figure("weights", "fp16", stored)
    assert figure is not None
    assert weight_quality(stored, "fp16").value == (0.0 if stored.stored_dtype in ("fp16", "float16") else figure.kl_nats)
    assert (weight_quality(tiny_model(), "fp16").value or 0) > 0


def test_unknown_is_never_zero():
    for name in FORMATS:
        found = weight_quality(tiny_model(), name)
        assert found.source == "exact" or found.value is None or found.value > 0
        assert found.known or found.source.startswith("unknown: no figure")
    for store in STORES:
        found = kv_quality(tiny_model(), store, "bf16")
        assert found.source == "exact" or found.value is None or found.value > 0


def test_figures_are_cited_in_full():
    for figure in FIGURES:
        assert figure.label.startswith("cited: ") or figure.source.startswith("measured")
        assert figure.model in figure.label and figure.text in figure.label and figure.date in figure.label
        if figure.kind == "weights":
            assert figure.choice in FORMATS
        elif figure.kind == "kv":
            assert all(name in STORES for name in parse_stores(figure.choice))
        else:
            assert figure.kind in ("retain", "activations", "pattern")
    for kind, choice in NEAREST:
        assert find_figure(kind, choice, tiny_model(), CITED) is None, "a figure makes the hint moot"


def test_a_small_model_does_not_speak_for_a_large_one():
    small = find_figure("weights", "int4", find_model("smollm2-135m"))
    assert small is not None and small.parameters < 10**9
    assert weight_quality(find_model("llama-2-70b"), "int4").value is None


def test_the_nearest_model_speaks():
    seven, seventy = find_model("llama-2-7b"), find_model("llama-3.1-8b")
    assert weight_quality(seven, "int8").value == 0.000369
    assert weight_quality(seventy, "int8").value == 0.001355
    own = Figure(kind="weights", choice="int8", kl_nats=1.0, family="x", parameters=1, model="tiny", held_as="", source="measured", date="2026")
    found = find_figure("weights", "int8", tiny_model(), (*FIGURES, own))
    assert found is own and own.label.startswith("measured")
    other_text = Figure(kind="weights", choice="nf4", kl_nats=1.0, family="llama", parameters=1, model="tiny", held_as="", source="x", date="", text="novels")
    assert other_text.text != REFERENCE_TEXT
    assert find_figure("weights", "nf4", tiny_model(), (other_text,)) is None


def test_losses_add_up_and_say_so():
    lossy, more, none = Estimate(0.1, "cited: a"), Estimate(0.2, "cited: b"), Estimate(0.0, "exact")
    assert combine([none, none]) == none
    assert combine([none, lossy]) == lossy
    assert combine([lossy, more]).value == pytest.approx(0.3)
    assert combine([lossy, more]).source == "sum of cited: a + cited: b"
    assert not combine([lossy, Estimate.unknown("who knows")]).known


def test_a_narrower_exception_counts():
    wide = tiny_plan(weights=WeightPlan(default="int8", exceptions={"embed": "bf16"}))
    narrow = tiny_plan(weights=WeightPlan(default="int8", exceptions={"down": "int4"}))
    assert quality(tiny_model(), wide).known
    wide_loss, narrow_loss, cache_loss = weight_quality(tiny_model(), "int8"), weight_quality(tiny_model(), "int4"), kv_quality(tiny_model(), "bf16", "bf16")
    assert quality(tiny_model(), narrow) == combine([wide_loss, narrow_loss, cache_loss])
    assert quality(tiny_model(), narrow) != quality(tiny_model(), wide)


def test_forgetting_is_exact_only_behind_the_window():
    forgetful = tiny_plan(kv=KVPlan(retain=Retain(kind="sliding", window=32), store="fp32"))
    assert quality(tiny_model(window=32), forgetful).value == 0
    assert not quality(tiny_model(window=64), forgetful).known
    assert not quality(tiny_model(), forgetful).known


def test_measured_figures_are_those_of_the_record():
    """The planner's file holds what results/quality.json says, or nothing where there is no such record: no figure is typed by hand."""
    from tradespace.lab.figures import KV_RECORD, RECORD, rendered
    from tradespace.measure.record import read_record

    paths = [Path(__file__).resolve().parents[2] / record for record in (RECORD, KV_RECORD)]
    assert MEASURED_FILE.read_text(encoding="utf-8") == rendered(*(read_record(path) if path.is_file() else None for path in paths))
    assert (*MEASURED, *CITED) == FIGURES


def test_a_record_becomes_figures():
    from tradespace.lab.figures import figures_of
    from tradespace.measure.record import Record

    row = {"kind": "weights", "model": "tiny", "family": "llama", "parameters": 1000, "format": "int8", "mean_kl": 0.5, "stored": "Q8_0"}
    rows = (row, row | {"format": "a format of the past"}, row | {"kind": "activations", "mean_kl": 0.25})
    record = Record(
        experiment="quality", command="x", commit="y", dirty=False, date="2026-11-22T10:00:00", device={}, versions={}, repeats=1, rows=rows
    )  # fmt: skip
    figure, activations = (Figure(**values) for values in figures_of(record))
    assert (activations.kind, activations.choice, activations.kl_nats) == ("activations", "int8", 0.25)
    assert "weights Q8_0 as stored" in activations.label
    assert (figure.choice, figure.kl_nats, figure.model, figure.date) == ("int8", 0.5, "tiny", "2026-11-22")
    assert figure.label == "measured: results/quality.json, tiny rounded to nearest from Q8_0, to fp32 on wikitext-2 (2026-11-22)"
    assert find_figure("weights", "int8", tiny_model(), (*CITED, figure)) is figure
