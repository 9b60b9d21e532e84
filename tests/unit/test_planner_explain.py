"""The ways out of a tight spot, the shapes of models, and the tables that show them."""

import json

import pytest
from rich.console import Console

from tradespace.cli.plan_view import alternatives_view, frontier_view, ledger_view, rejections_view, shown, what_if_view
from tradespace.planner.explain import alternatives, compare_shapes, relatives
from tradespace.planner.search import plan_frontier
from tradespace.spec.device_zoo import find_device
from tradespace.spec.kv import token_bytes
from tradespace.spec.weights import WeightPlan, weight_bytes
from tradespace.spec.workload import Workload
from tradespace.spec.zoo import find_model
from unit.cost_examples import cpu, tiny_model

WORKLOAD = Workload(context_tokens=4096)


@pytest.fixture(scope="module")
def seventy():
    return alternatives(find_model("llama-2-70b"), find_device("a100-40gb"), WORKLOAD, 40 * 10**9)


def test_a_70b_model_and_40_gb(seventy):
    by_kind = {found.kind: found.candidate for found in seventy}
    assert list(by_kind) == ["resident", "devices", "streamed", "smaller model"]
    assert by_kind["resident"].weights.default == "int4" and by_kind["resident"].bytes_each <= 40 * 10**9
    assert (by_kind["devices"].weights.default, by_kind["devices"].tensor_parallel) == ("int8", 2)
    assert by_kind["devices"].bytes_each <= 40 * 10**9 < by_kind["devices"].total_bytes
    streamed = by_kind["streamed"]
    assert streamed.placement.streamed_layers > 0 and streamed.decode.bound == "link"
    assert 0 < streamed.decode_tokens_per_s.require() < by_kind["resident"].decode_tokens_per_s.require() / 5
    assert by_kind["smaller model"].question.model.name == "llama-2-13b" and by_kind["smaller model"].weights.default == "bf16"
    for found in seventy:
        assert found.candidate.ledger.total_bytes().value == found.candidate.bytes_each
        assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["kind"] == found.kind


def test_no_alternatives_where_nothing_is_lost():
    assert alternatives(find_model("llama-2-7b"), find_device("a100-80gb"), WORKLOAD, 80 * 10**9) == []


def test_relatives_are_smaller_and_of_the_family():
    names = [model.name for model in relatives(find_model("llama-2-70b"))]
    assert names == ["llama-2-13b", "llama-2-7b"]
    assert relatives(find_model("llama-2-7b")) == []


def test_shapes_side_by_side():
    models = [find_model("llama-2-7b"), find_model("llama-2-70b")]
    rows = compare_shapes(models, find_device("a100-80gb"), Workload(context_tokens=4096, concurrency=16))
    assert [row.layers for row in rows] == [32, 80] and [row.kv_heads for row in rows] == [32, 8]
    for model, row in zip(models, rows, strict=True):
        assert row.weight_bytes == weight_bytes(model, WeightPlan())
        assert row.kv_workload_bytes == 16 * 4096 * token_bytes(model, "bf16") == 16 * 4096 * row.kv_token_bytes
        assert json.dumps(row.to_dict())


def lines_of(*renderables) -> list[str]:
    console = Console(width=100, highlight=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for renderable in renderables:
        console.print(renderable)
    return console.export_text().splitlines()


def test_tables_fit_and_say_what_they_must(seventy):
    found = plan_frontier(find_model("llama-2-70b"), find_device("a100-40gb"), WORKLOAD, memory_bytes=40 * 10**9)
    assert found.best is not None
    lines = lines_of(ledger_view(found.best.ledger, title="best"), frontier_view(found), rejections_view(found), alternatives_view(seventy))
    text = "\n".join(lines)
    assert max(len(line) for line in lines) <= 100
    assert "…" not in text.replace("wait …", ""), "nothing may be cut off"
    for word in ("kv cache", "weights: gate_up", "peak of device", "→", "int4", "streamed", "llama-2-13b", "2 × a100-40gb", "unknown"):
        assert word in text, word
    assert found.best in shown(found, 4) and len(shown(found, 4)) <= 5


def test_tables_of_a_hopeless_budget():
    found = plan_frontier(tiny_model(), cpu(), Workload(context_tokens=256, prompt_tokens=64), memory_bytes=1 << 20)
    text = "\n".join(lines_of(frontier_view(found), rejections_view(found)))
    assert "0 of them fit" in text and "does not fit" in text
    rows = compare_shapes([tiny_model()], cpu(), Workload(context_tokens=256, prompt_tokens=64))
    assert "tiny" in "\n".join(lines_of(what_if_view(rows)))
