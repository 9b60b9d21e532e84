"""A run of load in figures: percentiles of latencies, tokens a second, goodput under a service level objective (SLO; DistServe, OSDI 2024), errors by kind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tradespace.lab.serving.load import Run

PERCENTILES = (50, 90, 99)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear between the two nearest ranks, as numpy has it; None of nothing.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 50)
    2.5
    """
    if not values:
        return None
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = math.floor(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Where the median of what was sampled lies with this confidence, whatever its distribution: two order statistics (David and Nagaraja, section 7.1).

    The whole range where there are too few values for so much.

    >>> median_interval(list(range(1, 21)))
    (6, 15)
    """
    ordered, count = sorted(values), len(values)
    below, rank = 0.0, 0  # P(fewer than `rank` + 1 of them lie below the median)
    while rank < count // 2 and below + math.comb(count, rank) / 2**count <= (1 - confidence) / 2:
        below += math.comb(count, rank) / 2**count
        rank += 1
    rank = max(rank, 1)
    return ordered[rank - 1], ordered[count - rank]


def summarize(run: Run, *, slo_ttft_s: float | None = None, slo_tpot_s: float | None = None) -> dict[str, Any]:
    """One flat mapping of figures. Latencies are of requests that ended well; goodput counts those of them within the SLO, a second; seconds throughout."""
    good = [answer for answer in run.answers if answer.error is None]
    kinds = {
        "ttft": [answer.ttft_s for answer in good if answer.ttft_s is not None],
        "tpot": [answer.tpot_s for answer in good if answer.tpot_s is not None],
        "itl": [gap for answer in good for gap in answer.itl_s],
        "e2e": [answer.e2e_s for answer in good],
    }
    found: dict[str, Any] = {
        "requests": len(run.answers),
        "completed": len(good),
        "errors": dict(Counter(answer.error for answer in run.answers if answer.error is not None)),
        "wall_s": run.wall_s,
        "requests_per_s": len(good) / run.wall_s if run.wall_s else 0.0,
        "prompt_tokens": sum(answer.prompt_tokens for answer in good),
        "output_tokens": sum(answer.output_tokens for answer in good),
        "cached_tokens": sum(answer.cached_tokens for answer in good),
    }
    found["output_tokens_per_s"] = found["output_tokens"] / run.wall_s if run.wall_s else 0.0
    found["client_cpu_share"] = run.client_cpu_s / run.wall_s if run.wall_s else 0.0
    for name, values in kinds.items():
        found[f"{name}_mean_s"] = sum(values) / len(values) if values else None
        found |= {f"{name}_p{percent}_s": percentile(values, percent) for percent in PERCENTILES}
    if slo_ttft_s is not None or slo_tpot_s is not None:
        # an answer of one token has no TPOT, and so cannot break a bound on it
        within = [a for a in good if (slo_ttft_s is None or (a.ttft_s or math.inf) <= slo_ttft_s) and (slo_tpot_s is None or (a.tpot_s or 0.0) <= slo_tpot_s)]
        found |= {"slo_ttft_s": slo_ttft_s, "slo_tpot_s": slo_tpot_s, "within_slo": len(within)}
        found["goodput_per_s"] = len(within) / run.wall_s if run.wall_s else 0.0
    return found
