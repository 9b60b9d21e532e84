"""What llama.cpp says to a text of ours, small enough to commit: tests/model/references/MODEL.json, which `make test` compares with.

Of the text's token ids it predicts the next at each of POSITIONS rows: the TOP best tokens with their log-probabilities and the mass of all others; and it
continues the text's first tokens greedily, with the distance of the best logit from the second at each.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from tradespace.lab.agreement import GREEDY_PROMPT, GREEDY_TOKENS, LlamaCpp, require_llama_cpp
from tradespace.loading.tokenizer import Tokenizer
from tradespace.measure.record import write_atomically

REFERENCES = Path(__file__).resolve().parents[1] / "model" / "references"
TEXT = (REFERENCES / "text.txt").read_text(encoding="utf-8")
TOKENS, POSITIONS, TOP = 640, 32, 8  # more tokens than Gemma 3's sliding window of 512


def record(f32: Path, tokenizer: Tokenizer) -> dict:
    """The reference of a model in an F32 GGUF file."""
    ids = tokenizer.encode(TEXT)[:TOKENS]
    assert len(ids) == TOKENS, f"the text has {len(ids)} tokens; {TOKENS} are needed to cross Gemma's window"
    # evenly from a few tokens of context to all of them
    positions = [round(TOKENS * (row + 1) / POSITIONS) - 1 for row in range(POSITIONS)]
    with LlamaCpp(f32, context=TOKENS) as oracle:
        # only the wanted rows are kept of 640 × 262,144
        pieces, start = [], 0
        for piece_RV in oracle.logprobs(ids):
            wanted = [position - start for position in positions if start <= position < start + len(piece_RV)]
            pieces.append(piece_RV[wanted].double().log_softmax(-1))
            start += len(piece_RV)
        tokens, gaps = oracle.greedy(ids[:GREEDY_PROMPT], GREEDY_TOKENS)
    return {
        "llama_cpp_python": require_llama_cpp().__version__,
        "ids": ids,
        "positions": positions,
        **_top(torch.cat(pieces)),
        "greedy": {"prompt": GREEDY_PROMPT, "tokens": tokens, "gaps": [round(gap, 6) for gap in gaps]},
    }


def _top(logprobs_RV: Tensor) -> dict:
    best = logprobs_RV.topk(TOP)
    tail_R = logprobs_RV.exp().scatter(1, best.indices, 0.0).sum(-1)
    return {
        "top": best.indices.tolist(),
        "logprobs": [[round(value, 7) for value in row] for row in best.values.tolist()],
        "tail": [float(f"{value:.7g}") for value in tail_R.tolist()],
    }


def write(model: str, found: dict) -> Path:
    """One line per field, so that a refreshed reference shows what changed."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in found.items())
    path = REFERENCES / f"{model}.json"
    write_atomically(path, f"{{\n{lines}\n}}\n")
    return path
