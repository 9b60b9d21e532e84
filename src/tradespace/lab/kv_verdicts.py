"""The bars that the cache's quality is held to, and what a record says of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]


def verdicts(rows: Iterable[Row]) -> list[dict[str, str]]:
    """One row a bar: "holds", "fails", or for what is only reported "reported"."""
    rows = list(rows)
    kl = {row["name"]: row["mean_kl"] for row in rows if "mean_kl" in row}
    keys = {row["name"].removeprefix("pass key: "): row["share_found"] for row in rows if "share_found" in row}

    def bar(text: str, holds: bool | None, measured: str) -> dict[str, str]:
        return {"bar": text, "verdict": "reported" if holds is None else "holds" if holds else "fails", "measured": measured}

    found = [
        bar("int8 per token and head below 1e-3", kl["int8"] < 1e-3, f"{kl['int8']:.2g}"),
        bar("int4 with keys per channel below 1.2e-2", kl["int4c"] < 1.2e-2, f"{kl['int4c']:.2g}"),
        bar("int4 per token", None, f"{kl['int4']:.2g}"),
        bar("int2 as KIVI does it at least 5 times below per token", kl["int2-token"] >= 5 * kl["int2"], f"{kl['int2-token'] / kl['int2']:.1f} times"),
        bar("and 1.8 times at an equal tail", kl["int2-token-tail"] >= 1.8 * kl["int2"], f"{kl['int2-token-tail'] / kl['int2']:.1f} times"),
    ]
    for name in ("H2O", "SnapKV"):
        found.append(bar(f"{name} below the window without sinks", kl[name] < kl["window"], f"{kl[name]:.2g} against {kl['window']:.2g}"))
        text = f"{kl[name]:.2g} against {kl['sinks + window']:.2g}; pass keys {keys[name]:.0%} against {keys['sinks + window']:.0%}"
        found.append(bar(f"{name} against sinks and window", None, text))
    return found
