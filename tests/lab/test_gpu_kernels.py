"""The experiment `gpu-kernels`, without a card: what it counts, what its passes compute, and that its table says what was measured."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from tradespace.errors import UnsupportedError
from tradespace.lab import gpu_kernels
from tradespace.lab.experiments import EXPERIMENTS
from tradespace.measure.record import Figure, new_record
from tradespace.spec.device_zoo import find_device
from tradespace.spec.mixers import Attention, Rope
from tradespace.spec.model import DenseFFN
from tradespace.spec.weights import WeightPlan
from tradespace.spec.zoo import find_model

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter (conftest.py sets TRITON_INTERPRET=1)")

MIXER = Attention(N=4, K=2, H=16, rope=Rope(dims=16))


def test_bytes_are_those_of_keys_and_values_and_scales():
    shape = {"sequences": 3, "length": 100, "context": 256, "mixer": MIXER}
    assert gpu_kernels.Cell(store="bf16", **shape).nbytes == 3 * 100 * 2 * 32 * 2
    assert gpu_kernels.Cell(store="fp8", **shape).nbytes == 3 * 100 * 2 * 32
    assert gpu_kernels.Cell(store="int8", **shape).nbytes == 3 * 100 * 2 * (32 + 4)
    assert gpu_kernels.Cell(store="int8", **shape).layers == gpu_kernels.MOST_LAYERS


@pytest.mark.parametrize("store", list(gpu_kernels.STORES))
def test_a_pass_attends_to_every_cache(store, monkeypatch):
    """All tiles, shipped and others, give the same; rows come fastest first, with the share of reading that their time makes."""
    from tradespace.kernels.attention import paged

    outs: list[torch.Tensor] = []
    decode = paged.paged_decode
    monkeypatch.setattr(paged, "paged_decode", lambda *given, **named: outs.append(decode(*given, **named).clone()))
    cell = gpu_kernels.Cell(store=store, sequences=2, length=70, context=128, mixer=MIXER)
    torch.manual_seed(0)
    call = gpu_kernels.attention_call(cell, torch.device("cpu"), 2)
    others = [paged.PagedTiles(N=32, stages=1, least=32, gather=gather) for gather in (True, False)]
    for tiles in (None, *others):
        call(tiles)
    assert len(outs) == 6 and torch.isfinite(torch.stack(outs)).all() and float(outs[0].abs().max()) > 0
    for index, out in enumerate(outs):
        torch.testing.assert_close(out.float(), outs[index % 2].float(), atol=2e-2, rtol=2e-2)
    monkeypatch.setattr(gpu_kernels, "MOST_LAYERS", 1)
    rows = gpu_kernels.attention_rows(cell, torch.device("cpu"), 1e9, others)
    assert [row["part"] for row in rows] == ["tiles"] * 2 and rows[0]["us"] <= rows[1]["us"]
    assert rows[0]["share"] == pytest.approx(cell.nbytes / (rows[0]["us"] * 1e-6) / 1e9)


def test_the_table_has_the_fastest_tiles_of_each():
    row = {"part": "tiles", "what": "1 × 2,048 tokens", "format": "int8", "share": 0.5}
    fast, slow = {**row, "us": 10.0, "tiles": {"N": 64, "M": 0}}, {**row, "us": 20.0, "tiles": {"N": 32, "M": 0}}
    record = new_record(
        "gpu-kernels", command="", device=find_device("h100-80gb"), repeats=1, figures={"reading": Figure.of([3000.0], "GB/s")}, rows=[fast, slow]
    )
    table = gpu_kernels.markdown(record)
    assert "10.0" in table and "N 64" in table and "20.0" not in table


def test_products_are_timed_as_a_step_computes_them(monkeypatch):
    """Every matrix of a small model at few rows and more, each once a layer: what is counted is what its codes and scales take."""
    from tradespace.kernels.linear import triton_rows
    from tradespace.tile_search import Request, chains_of

    spec = find_model("llama-3.2-1b")
    layer = replace(spec.layers[0], mixer=MIXER, ffn=DenseFFN(F=96))
    spec = replace(spec, D=64, V=96, layers=(layer,) * 2, name="small")
    weights = WeightPlan(default="int8", layout="cuda")
    met: list[int] = []
    linear = triton_rows.rows_linear
    monkeypatch.setattr(triton_rows, "rows_linear", lambda x, weight, *given, **named: met.append(weight.rows) or linear(x, weight, *given, **named))
    chains = chains_of(Request(spec=spec, weights=weights, rows=(1, 9), index=0))
    rows = [gpu_kernels.product_rows(chain, "int8", torch.device("cpu"), 1e9) for chain in chains]
    assert [row["what"].split(",")[0] for row in rows] == ["qkv", "out", "gate and up", "down", "head"] * 2
    assert met[:4] == [128] * 4, "both layers' qkv, to compile and to be timed"
    held = {"qkv": 128, "out": 64, "gate and up": 192, "down": 64, "head": 96}  # rows of each, of a chunk of codes and a scale
    for row in rows:
        assert row["share"] * row["us"] * 1e3 == pytest.approx(held[row["what"].split(",")[0]] * (128 + 4), rel=1e-6)


def test_without_a_card_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="CUDA device"):
        EXPERIMENTS["gpu-kernels"].run(quick=True, say=print)
