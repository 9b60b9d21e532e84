"""What `lab kv-cache` leaves in its folder: the record that the documentation reads, the results as one plain JSON file, the picture, the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tradespace.lab.experiments import Experiment
from tradespace.lab.kv_cache_findings import at, lengths, paragraphs, readings, seconds, verdict_of
from tradespace.lab.kv_cache_plot import draw_html, draw_png
from tradespace.lab.kv_cache_simulation import finding, is_simulated
from tradespace.measure.record import Record, read_record, write_atomically, write_record

RESULTS, PICTURE, PAGE = "llm_kv_cache_results.json", "llm_attention_tradeoff.png", "llm_kv_cache.html"


def write_files(experiment: Experiment, record: Record, only: Sequence[str], folder: Path) -> list[Path]:
    """Writes all of them, the record joined with the parts that it did not measure and that the folder has; picture and page need the real model's part."""
    path = folder / experiment.file
    if len(only) < len(experiment.parts) and path.exists():
        record = experiment.joined(read_record(path), record, only)
    write_record(path, record)
    write_atomically(folder / RESULTS, json.dumps(results(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    written = [path, folder / RESULTS]
    if lengths(record):
        draw_png(record, folder / PICTURE)
        draw_html(record, folder / PAGE)
        written += [folder / PICTURE, folder / PAGE]
    return written


def results(record: Record) -> dict[str, Any]:
    """Lengths, caches at each, both findings, the simulation, and the verdict under each reading: everything by name, nothing to be looked up elsewhere."""
    found: dict[str, Any] = {"command": record.command, "commit": record.commit, "date": record.date, "device": record.device["name"], "notes": record.notes}
    if all_n := lengths(record):
        found["model"] = next(iter(at(record, all_n[-1]).values()))["model"]
        found["lengths"] = {str(n): {name: _cache(record, name, n) for name in at(record, n)} for n in all_n}
        found["findings"] = dict(zip(("windows", "rebuilding"), paragraphs(record), strict=True))
    if is_simulated(record):
        rows = [row for row in record.rows if row["part"] == "simulation"]
        speeds = {(row["way"], row["name"]): record.figures[f"simulation: {row['way']} {row['name']}"] for row in rows}
        found["published_simulation"] = [{**row, "tokens_per_s": speeds[row["way"], row["name"]].median} for row in rows]
        found["simulation_finding"] = finding(record)
    found["claim"] = [{"reading": reading, "sqrt_n": root, "constant": one, "verdict": verdict_of(root, one)} for reading, root, one in readings(record)]
    return found


def _cache(record: Record, name: str, n: int) -> dict[str, Any]:
    figure, over = record.figures[f"model: {name} at {n}"], record.figures[f"model: {name} at {n} over full"]
    row = {key: value for key, value in at(record, n)[name].items() if key not in ("part", "n", "name", "model", "parameters", "speedup")}
    speed = {"tokens_per_s": 1 / seconds(record, name, n), "tokens_per_s_min": 1 / figure.max, "tokens_per_s_max": 1 / figure.min}
    return {**row, **speed, "speedup_over_full": over.median, "speedup_min": over.min, "speedup_max": over.max}
