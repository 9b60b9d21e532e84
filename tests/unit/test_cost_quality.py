"""Loss: exact is exact, figures name their source, and what nobody measured is unknown."""

import pytest

from tradespace.cost.quality import FIGURES, NEAREST, REFERENCE_TEXT, Figure, combine, find_figure, kv_quality, quality, weight_quality
from tradespace.spec.estimate import Estimate
from tradespace.spec.kv import STORES, KVPlan, Retain
from tradespace.spec.weights import FORMATS, WeightPlan
from tradespace.spec.zoo import find_model
from unit.cost_examples import tiny_model, tiny_plan


def test_exact_choices_lose_nothing():
    for dense in ("fp32", "bf16"):
        found = quality(tiny_model(), tiny_plan(weights=WeightPlan(default=dense), kv=KVPlan(store=dense), kv_tokens=128))
        assert found == Estimate(0.0, "exact")


def test_fp16_is_exact_only_for_what_was_stored_so():
    stored = find_model("llama-2-7b")
    assert weight_quality(stored, "fp16").value == (0.0 if stored.stored_dtype in ("fp16", "float16") else 0.00002515)
    assert weight_quality(tiny_model(), "fp16").value == 0.00002515


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
        assert figure.choice in (FORMATS if figure.kind == "weights" else STORES)
    for kind, choice in NEAREST:
        assert find_figure(kind, choice, tiny_model()) is None, "a figure makes the hint moot"


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
    assert not quality(tiny_model(), narrow).known


def test_forgetting_is_exact_only_behind_the_window():
    forgetful = tiny_plan(kv=KVPlan(retain=Retain(kind="sliding", window=32), store="fp32"))
    assert quality(tiny_model(window=32), forgetful).value == 0
    assert not quality(tiny_model(window=64), forgetful).known
    assert not quality(tiny_model(), forgetful).known
