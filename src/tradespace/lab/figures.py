"""The planner's measured figures of quality, out of the records of `quality` and `kv-quality`: `python -m tradespace.lab.figures [--check]` beside `results/`.

The planner imports no torch and is installed without `results/`, so what it needs of the record is kept as data in the package, and never written by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tradespace.cost.quality import MEASURED_FILE, REFERENCE_TEXT
from tradespace.measure.record import Record, read_record, write_atomically
from tradespace.spec.formats import FORMATS

RECORD = Path("results") / "quality.json"
KV_RECORD = Path("results") / "kv_quality.json"


def figures_of(record: Record) -> list[dict[str, Any]]:
    """One figure for each row of the record, as `cost.quality.Figure` takes them. A format that this version no longer has is left out."""
    return [
        {
            "kind": row["kind"],
            "choice": row["format"],
            "kl_nats": row["mean_kl"],
            "family": row["family"],
            "parameters": row["parameters"],
            "model": row["model"],
            "held_as": held_as(row),
            "source": f"measured: {RECORD.as_posix()}",
            "date": record.date[:10],
            "text": REFERENCE_TEXT,
        }
        for row in record.rows
        if row["format"] in FORMATS
    ]


def held_as(row: Mapping[str, Any]) -> str:
    """What was measured in fact."""
    if row["kind"] == "activations":
        return f"a scale per 32, weights {row['stored']} as stored, to fp32"
    return f"rounded to nearest from {row['stored']}, to fp32"


def kv_figures_of(record: Record) -> list[dict[str, Any]]:
    """One figure for each store and policy of the cache's record; a policy's holds for the very same number of tokens alone."""
    found = []
    for row in record.rows:
        if "mean_kl" not in row:
            continue
        forgets = row["retain"] != "full"
        found.append(
            {
                "kind": "retain" if forgets else "kv",
                "choice": row["retain"] if forgets else row["store"],
                "kl_nats": row["mean_kl"],
                "family": row["family"],
                "parameters": row["parameters"],
                "model": row["model"],
                "held_as": f"cache {row['kv']}",
                "source": f"measured: {KV_RECORD.as_posix()}",
                "date": record.date[:10],
                "text": REFERENCE_TEXT,
            }
        )
    return found


def rendered(record: Record | None, kv_record: Record | None = None) -> str:
    """What the planner's file should hold; without records: no figures."""
    figures = [*([] if record is None else figures_of(record)), *([] if kv_record is None else kv_figures_of(kv_record))]
    return json.dumps(figures, indent=1, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    """Writes (or with --check compares) the planner's figures from the record in the present folder's results."""
    wanted = rendered(*(read_record(path) if path.is_file() else None for path in (RECORD, KV_RECORD)))
    if "--check" in arguments:
        if MEASURED_FILE.read_text(encoding="utf-8") != wanted:
            print(f"{MEASURED_FILE.name} differs from {RECORD}: run python -m tradespace.lab.figures", file=sys.stderr)
            return 1
        return 0
    write_atomically(MEASURED_FILE, wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
