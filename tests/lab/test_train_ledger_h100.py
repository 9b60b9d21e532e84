"""The ledger of a training step against what an H100 was measured at: the record's bytes, predicted again by the code as it is now."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tradespace.cost.training import activation_peak
from tradespace.lab.train_ledger import BAR, GRIDS, plan_of
from tradespace.spec.zoo import find_model
from tradespace.units import MiB

RECORD = json.loads((Path(__file__).parents[2] / "results" / "train_ledger_h100.json").read_text(encoding="utf-8"))
ONCE = 24 * MiB  # what a library may have allocated for good in the step that was measured: seen in one row, of the smallest model


@pytest.mark.parametrize("row", RECORD["rows"], ids=lambda row: f"{row['model']}-{row['micro_batch']}x{row['context']}-{row['policy']}")
def test_the_step_is_within_the_bar(row):
    way = next(way for way in GRIDS["cuda"] if way.name == row["model"])
    spec = replace(find_model(way.spec), max_context=row["context"])
    plan = plan_of(way, spec, context=row["context"], micro_batch=row["micro_batch"], policy=row["policy"], on_device=True)
    _, peak = activation_peak(spec, plan)
    off = peak - row["measured"]["step"]
    assert abs(off) <= max(BAR * row["measured"]["step"], ONCE), f"{off / MiB:+.0f} MiB"
