"""A run of load drawn: how latencies are distributed, and what came and went over time (matplotlib)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tradespace.lab.serving.load import Run

BINS = 120


def draw_run(run: Run, row: dict[str, Any], path: Path) -> None:
    """Three panels: latency distributions, output tokens a second, requests under way. PNG, or whatever the name's ending says."""
    from matplotlib.figure import Figure as Picture

    good = [answer for answer in run.answers if answer.error is None]
    picture = Picture(figsize=(11, 8), layout="constrained")
    upper, middle, lower = picture.subplots(3, 1)
    for label, values, colour in (
        ("TTFT", [a.ttft_s for a in good if a.ttft_s is not None], "#0072B2"),
        ("TPOT", [a.tpot_s for a in good if a.tpot_s is not None], "#009E73"),
        ("ITL", [gap for a in good for gap in a.itl_s], "#56B4E9"),
        ("end to end", [a.e2e_s for a in good], "#D55E00"),
    ):
        ordered = sorted(value for value in values if value > 0)
        if ordered:
            upper.step(ordered, [(rank + 1) / len(ordered) for rank in range(len(ordered))], where="post", label=label, color=colour)
    upper.set(xscale="log", xlabel="seconds", ylabel="share of requests", title=f"{row['model']}: {row['load']}")
    upper.legend()
    upper.grid(alpha=0.3)
    width_s = max(run.wall_s, 1e-9) / BINS
    tokens = [0.0] * BINS
    for answer in good:
        for at_s in answer.event_s or [answer.end_s]:
            share = answer.output_tokens / len(answer.event_s or [answer.end_s])
            tokens[min(BINS - 1, math.floor((at_s - run.start_s) / width_s))] += share
    times = [width_s * (index + 0.5) for index in range(BINS)]
    middle.plot(times, [count / width_s for count in tokens], color="#009E73")
    middle.set(ylabel="output tokens/s", ylim=(0, None))
    middle.grid(alpha=0.3)
    changes = sorted([(a.sent_s - run.start_s, 1) for a in run.answers] + [(a.end_s - run.start_s, -1) for a in run.answers])
    at, counts = [0.0], [0]
    for when_s, change in changes:
        at.append(when_s)
        counts.append(counts[-1] + change)
    lower.step(at, counts, where="post", color="#0072B2")
    lost = [a.end_s - run.start_s for a in run.answers if a.error is not None]
    if lost:
        lower.plot(lost, [0] * len(lost), "x", color="#D55E00", label="ended with an error")
        lower.legend()
    lower.set(xlabel="seconds since the start", ylabel="requests under way", ylim=(0, None))
    lower.grid(alpha=0.3)
    picture.savefig(path, dpi=110)
