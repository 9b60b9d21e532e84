"""The search for tile sizes: what it keeps, what it passes over, and that a whole search runs (under Triton's interpreter) and is taken up again."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

from tradespace import tile_search  # noqa: E402
from tradespace.errors import UnsupportedError  # noqa: E402
from tradespace.kernels.attention.triton_interpreter import interprets  # noqa: E402
from tradespace.kernels.linear import triton_rows_search as searching  # noqa: E402
from tradespace.kernels.linear.triton_rows_tiles import (  # noqa: E402
    RowTiles,
    keep_measured,
    measured_file,
    measured_tiles,
    read_measured,
    ships_tiles,
)
from tradespace.spec.plan import Plan  # noqa: E402
from tradespace.spec.weights import WeightPlan  # noqa: E402
from tradespace.spec.zoo import find_model  # noqa: E402


class Pretended:
    """A chain whose seconds are made up: the nearer to `best`, the faster."""

    def __init__(self, start: RowTiles):
        self.tiles = start

    def start(self) -> RowTiles:
        return self.tiles

    candidates = searching.Chain.candidates
    weights = (type("W", (), {"layout": type("L", (), {"plain": True})}),)


def distance(tiles: RowTiles, best: RowTiles) -> float:
    return sum(abs(getattr(tiles, name) - getattr(best, name)) / getattr(best, name) for name in searching.CHOICES)


def test_it_finds_the_best_of_sizes_that_do_not_depend_on_each_other():
    best, told = RowTiles(N=128, K=64, warps=2, stages=6, programs=528), []
    found = searching.search_tiles(
        Pretended(RowTiles(N=32)), seconds=lambda tiles: 1 + distance(tiles, best), tell=lambda done, of: told.append((done, of))
    )  # fmt: skip
    assert found.tiles == best and found.seconds == 1.0
    assert found.before == RowTiles(N=32) and found.before_s > found.seconds
    assert told[0][0] == 1 and told[-1][0] == told[-1][1] and sorted(told) == told


def test_it_keeps_what_it_has_where_nothing_is_faster_and_passes_over_what_does_not_fit():
    start = RowTiles(N=64, stages=3)
    still = searching.search_tiles(Pretended(start), seconds=lambda tiles: 1.0 if tiles == start else 0.995)
    assert still.tiles == start, "half a percent is noise"
    never = searching.search_tiles(Pretended(start), seconds=lambda tiles: 2.0 if tiles == start else float("inf"))
    assert never.tiles == start and never.seconds == 2.0


def test_measured_tiles_are_kept_and_found_by_size(tmp_path, monkeypatch):
    monkeypatch.setenv("TRADESPACE_HOME", str(tmp_path))
    path = measured_file("NVIDIA Made-Up 9000")
    assert path.is_relative_to(tmp_path) and measured_tiles(path, "int4-128", 8, 4096 * 4096) is None
    keep_measured(path, {("int4-128", 8, 4096 * 4096): RowTiles(N=64, warps=8)})
    keep_measured(path, {("int4-128", 16, 4096 * 4096): RowTiles(N=128), ("bf16", 8, 640): RowTiles(N=32, K=64)})
    assert measured_tiles(path, "int4-128", 8, 4096 * 4096) == RowTiles(N=64, warps=8)
    assert measured_tiles(path, "int4-128", 8, 4096 * 4128) == RowTiles(N=64, warps=8), "a vocabulary that is padded differs a little"
    assert measured_tiles(path, "int4-128", 8, 4096 * 14336) is None, "another size is another product"
    assert measured_tiles(path, "int4-128", 64, 4096 * 4096) is None, "64 tokens were not measured"
    assert measured_tiles(path, "bf16", 8, 640) == RowTiles(N=32, K=64)
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing half-written is left"


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"bf16": {"8": {"640": {"N": 32, "nonsense": 1}}}}', '{"bf16": 3}'])
def test_a_damaged_file_counts_as_none(tmp_path, text):
    path = tmp_path / "card.json"
    path.write_text(text)
    assert read_measured(path) == {}
    keep_measured(path, {("bf16", 8, 640): RowTiles(N=32)})
    assert json.loads(path.read_text()).keys() == {"bf16"}
    read_measured.cache_clear()


def test_which_cards_have_tiles_and_which_rows_a_plan_needs():
    assert ships_tiles((9, 0)), "measured on an H100"
    assert not ships_tiles((8, 0)) and not ships_tiles((8, 9)), "never measured"
    assert tile_search.rows_of(1) == (1,) and tile_search.rows_of(8) == (1,)
    assert tile_search.rows_of(9) == (1, 16) and tile_search.rows_of(32) == (1, 16, 64) and tile_search.rows_of(300) == (1, 16, 64, 128)


def asked(**more) -> tile_search.Request:
    spec = replace(find_model("llama-3.2-1b"), D=64, V=96, name="small")
    layer = spec.layers[0]
    layer = replace(layer, mixer=replace(layer.mixer, N=4, K=2, H=16), ffn=replace(layer.ffn, F=96))
    spec = replace(spec, layers=(layer,) * 3)
    weights = WeightPlan(default="int4-g64", exceptions={"embed": "bf16"}, layout="cuda")
    return tile_search.Request(spec=spec, weights=weights, rows=(1,), index=0, **more)


@pytest.mark.skipif(not interprets(), reason="needs TRITON_INTERPRET=1")
def test_a_whole_search_measures_each_product_once_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("TRADESPACE_HOME", str(tmp_path))
    monkeypatch.setattr(searching, "CHOICES", {"N": (32, 64), "programs": (1, 6)})
    said: list[dict] = []
    request = pickle.loads(pickle.dumps(asked()))
    tile_search.answer(request, said.append)
    found = [line["found"] for line in said if "found" in line]
    assert [row["name"] for row in found] == ["qkv", "out", "gate and up", "down", "head"]
    assert all(row["seconds"] > 0 and row["read_bytes"] > 0 and row["rows"] == 1 for row in found)
    assert {line["what"] for line in said if "what" in line} >= {"qkv, 1 tokens", "head, 1 tokens"}
    said.clear()
    tile_search.answer(request, said.append)
    assert said == [], "all of it is known now"
    tile_search.answer(replace(request, again=True), said.append)
    assert sum("found" in line for line in said) == 5


@pytest.mark.skipif(not interprets(), reason="needs TRITON_INTERPRET=1")
def test_the_process_reports_what_it_measures_and_why_it_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("TRADESPACE_HOME", str(tmp_path))
    request, told = asked(), []
    plan = Plan(model="small", weights=request.weights, linear="cuda", attention="paged", max_sequences=1, memory_bytes=2**30)
    monkeypatch.setattr(tile_search, "rows_of", lambda sequences: (1,))
    found = tile_search.search(plan, request.spec, index=0, tell=lambda *line: told.append(line))
    assert {row["name"] for row in found} == {"qkv", "out", "gate and up", "down", "head"} and told
    broken = replace(request.spec, layers=())
    with pytest.raises(tile_search.EngineError, match="the search for tile sizes ended with 1: "):
        tile_search.search(plan, broken, index=0, tell=lambda *line: None)


def test_a_model_that_the_step_does_not_compute_is_refused_before_any_process_begins():
    spec = find_model("mixtral-8x7b")
    plan = Plan(model=spec.name, weights=WeightPlan(layout="cuda"), linear="cuda", attention="paged")
    with pytest.raises(UnsupportedError, match=r"mixtral-8x7b: "):
        tile_search.search(plan, spec, index=0, tell=lambda *line: None)


@pytest.mark.skipif(not interprets(), reason="needs TRITON_INTERPRET=1")
def test_sizes_that_no_card_holds_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TRADESPACE_HOME", str(tmp_path))
    with pytest.raises(UnsupportedError, match="qkv, 1 tokens: no tile size of int4-64 fits this card"):
        tile_search.answer(asked(), lambda line: None, seconds=lambda tiles: float("inf"))
    assert not list(tmp_path.rglob("*.json"))
