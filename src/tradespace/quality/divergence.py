"""KL divergence and perplexity of token predictions: the unit of quality everywhere is KL(reference ‖ other) in nats per token.

Protocol: the text is cut into windows of `context` tokens that do not overlap, each starts afresh (with the model's BOS if it has one), and every position but
a window's last predicts the next token. The columns are those that llama.cpp's users know: mean KL, its 99th percentile, share of equal top tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tradespace.errors import InputError
from tradespace.kernels.view import StepBatch, positions_of
from tradespace.model.transformer import Transformer

ROWS = 64  # rows of logits held at a time: 64 × 262k × fp32 = 64 MiB for the largest vocabulary in use
DOUBLE_ROWS = 8  # of these, in double at a time: 16 MiB a tensor


@dataclass(frozen=True, slots=True)
class Divergence:
    """Of `num_tokens` predictions: mean and 99th percentile of KL (nats), share of equal top-1 tokens, and both perplexities on the text."""

    num_tokens: int
    mean_kl: float
    p99_kl: float
    top1_agreement: float
    reference_perplexity: float
    perplexity: float


def windows(ids: Sequence[int], context: int, *, bos_id: int | None = None, count: int | None = None) -> list[list[int]]:
    """`ids` in windows of `context` tokens (BOS included), the incomplete last one left out. Raises InputError where not even one fills up."""
    if context < 2 or (count is not None and count < 1):
        raise InputError(f"windows of {context} tokens, {count} of them, predict nothing. Ask for at least one of at least 2")
    body = context - (bos_id is not None)
    full = [[*([] if bos_id is None else [bos_id]), *ids[start : start + body]] for start in range(0, len(ids) - body + 1, body)]
    if not full:
        raise InputError(f"the text has {len(ids)} tokens; one window of {context} needs {body}. Give a longer text or a smaller context")
    return full[:count]


@torch.inference_mode()
def next_token_logprobs(transformer: Transformer, window: Sequence[int], *, rows: int = ROWS) -> Iterator[Tensor]:
    """Log-probabilities (rows, V) in fp32 of the token after each position of `window`, a few rows at a time, without a cache."""
    batch = StepBatch.packed([len(window)])
    hidden_TD = transformer(torch.tensor(window, dtype=torch.int64), positions_of(batch.spans), batch, None)
    for start in range(0, len(window), rows):
        index = torch.arange(start, min(start + rows, len(window)))
        yield transformer.logits(hidden_TD, index).log_softmax(-1)


def kl_rows(reference_RV: Tensor, other_RV: Tensor) -> Tensor:
    """KL(reference ‖ other) per row, in nats (fp64), of finite log-probabilities or logits."""

    def rows(reference_RV: Tensor, other_RV: Tensor) -> Tensor:
        # normalized again: in fp32 a row's logarithms are all off by up to 1e-6 together, and between two close models one would see that and little else
        reference_RV, other_RV = reference_RV.double().log_softmax(-1), other_RV.double().log_softmax(-1)
        return (reference_RV.exp() * (reference_RV - other_RV)).sum(-1).clamp_min(0)

    return torch.cat([rows(*pair) for pair in zip(reference_RV.split(DOUBLE_ROWS), other_RV.split(DOUBLE_ROWS), strict=True)])


def compare(
    reference: Callable[[Sequence[int]], Iterator[Tensor]], other: Callable[[Sequence[int]], Iterator[Tensor]], texts: Sequence[Sequence[int]]
) -> Divergence:
    """Divergence of `other` from `reference` over windows of token ids; both yield log-probabilities in equal pieces of rows.

    Raises InputError where no window has the two tokens that it takes to predict one.
    """
    if not any(len(window) > 1 for window in texts):
        raise InputError(f"{len(texts)} windows without a token to predict. Give at least one of at least 2 tokens")
    kl: list[Tensor] = []
    agree, reference_nats, other_nats, predicted = 0, 0.0, 0.0, 0
    for window in texts:
        start = 0
        for reference_RV, other_RV in zip(reference(window), other(window), strict=True):
            targets = torch.tensor(window[start + 1 : start + 1 + len(reference_RV)], dtype=torch.int64)
            start += len(reference_RV)
            # the window's last position predicts a token that is not in it
            reference_RV, other_RV = reference_RV[: len(targets)], other_RV[: len(targets)]
            kl.append(kl_rows(reference_RV, other_RV))
            agree += int((reference_RV.argmax(-1) == other_RV.argmax(-1)).sum())
            reference_nats -= float(reference_RV.gather(1, targets[:, None]).double().sum())
            other_nats -= float(other_RV.gather(1, targets[:, None]).double().sum())
            predicted += len(targets)
    values = torch.cat(kl)
    return Divergence(
        num_tokens=predicted,
        mean_kl=float(values.mean()),
        p99_kl=float(values.quantile(0.99)),
        top1_agreement=agree / predicted,
        reference_perplexity=math.exp(reference_nats / predicted),
        perplexity=math.exp(other_nats / predicted),
    )
