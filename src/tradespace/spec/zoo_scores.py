"""Published scores of the zoo's models on one test, MMLU (5 shots, base models unless the source says otherwise; arXiv:2009.03300). Cited, never measured here.

Each figure was looked up in its source on 2026-11-26; figures given to two places are rounded to one. One test says little about a model; it is here to
put models in an order that somebody else has published. What nobody published in this form is absent.
"""

from __future__ import annotations

from tradespace.spec.estimate import Estimate

_SOURCES: dict[str, dict[str, float]] = {
    "arXiv:2302.13971, table 9": {"llama-7b": 35.1, "llama-13b": 46.9, "llama-30b": 57.8, "llama-65b": 63.4},
    "arXiv:2307.09288, tables 3 and 19": {"llama-2-7b": 45.3, "llama-2-13b": 54.8, "llama-2-70b": 68.9, "falcon-7b": 26.2, "falcon-40b": 55.4},
    "the test's own list, github.com/hendrycks/test": {"gpt-3-175b": 43.9},
    "Llama 3.1's model card": {"llama-3.1-8b": 66.7, "llama-3.1-70b": 79.3, "llama-3.1-405b": 85.2},
    "arXiv:2310.06825, table 2": {"mistral-7b-v0.1": 60.1},
    "arXiv:2401.04088, table 2": {"mixtral-8x7b": 70.6},
    "arXiv:2404.14219, of the tuned models (no base model was published)": {"phi-3-mini-4k": 68.8, "phi-3-medium-4k": 78.0},
    "arXiv:2408.00118, table 13": {"gemma-2-2b": 52.2, "gemma-2-9b": 71.3, "gemma-2-27b": 75.2},
    "arXiv:2503.19786": {"gemma-3-4b": 59.6, "gemma-3-12b": 74.5, "gemma-3-27b": 78.6},
    "arXiv:2505.09388, tables 3 to 8": {
        "qwen2.5-0.5b": 47.5, "qwen2.5-1.5b": 60.9, "qwen2.5-3b": 65.6, "qwen2.5-7b": 74.2, "qwen2.5-14b": 79.7, "qwen2.5-32b": 83.3, "qwen2.5-72b": 86.1,
        "qwen3-0.6b": 52.8, "qwen3-1.7b": 62.6, "qwen3-4b": 73.0, "qwen3-8b": 76.9, "qwen3-14b": 81.1, "qwen3-32b": 83.6, "qwen3-30b-a3b": 81.4,
        "qwen3-235b-a22b": 87.8,
    },
    "arXiv:2412.19437, table 3": {"deepseek-v3": 87.1},
    "Llama 4's model card": {"llama-4-scout-17b-16e": 79.6, "llama-4-maverick-17b-128e": 85.5},
}  # fmt: skip
SCORES: dict[str, Estimate] = {name: Estimate(score, f"cited: MMLU, {source}") for source, scores in _SOURCES.items() for name, score in scores.items()}
# a tier is a band of the score; within a band the test does not tell models apart
TIERS = ((80.0, "A"), (70.0, "B"), (60.0, "C"), (45.0, "D"), (0.0, "E"))


def score(name: str) -> Estimate:
    """The published score of a zoo model, or unknown."""
    return SCORES.get(name, Estimate.unknown("no score published in this form that we know"))


def tier(found: Estimate) -> str:
    """The band of a score: A from 80, B from 70, C from 60, D from 45, E below; "?" where no score is known.

    >>> tier(score("llama-2-70b")), tier(score("gpt2"))
    ('C', '?')
    """
    return "?" if found.value is None else next(letter for least, letter in TIERS if found.value >= least)
