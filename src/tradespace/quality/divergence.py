"""KL divergence and perplexity of token predictions: the unit of quality everywhere is KL(reference ‖ other) in nats per token.

Both models read the same windows of a text, and every scored token counts once. The columns are those that llama.cpp's users know from
`llama-perplexity --kl-divergence`: both perplexities and the logarithm of their ratio, KL with its percentiles, the share of equal top tokens, and Δp, the
change of the probability given to the token that is really next. Standard errors take tokens as independent, as llama.cpp's do.

Nothing grows with text × vocabulary: a few rows of logits are held at a time, and five numbers are kept for each token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tradespace.errors import EngineError, InputError
from tradespace.kernels.view import StepBatch, positions_of
from tradespace.model.transformer import Transformer
from tradespace.quality.forward import ROWS, Passage

DOUBLE_ROWS = 8  # of the rows held at a time, in double: 16 MiB a tensor for the largest vocabulary in use
QUANTILES = (0.0, 0.001, 0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 0.999, 1.0)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Of `num_tokens` predictions. KL in nats per token; Δp = p(other) - p(reference) of the token that is next, as a share (0.01: one percent).

    log_ratio is the mean of ln(perplexity / reference_perplexity), correlation that of both models' nats over the tokens (nan where one is constant).
    Fields that end in _error are standard errors. kl_quantiles and dp_quantiles stand at QUANTILES, minimum and maximum included.
    """

    num_tokens: int
    mean_kl: float
    p99_kl: float
    top1_agreement: float
    reference_perplexity: float
    perplexity: float
    kl_error: float
    median_kl: float
    max_kl: float
    top1_error: float
    mean_dp: float
    dp_error: float
    rms_dp: float
    rms_dp_error: float
    reference_perplexity_error: float
    perplexity_error: float
    log_ratio: float
    log_ratio_error: float
    correlation: float | None
    kl_quantiles: tuple[float, ...]
    dp_quantiles: tuple[float, ...]


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


@dataclass
class Tally:
    """What is kept of each scored token: KL, both models' nats, and whether their likeliest tokens agree. 25 bytes a token."""

    kl: list[Tensor] = field(default_factory=list)
    reference_nats: list[Tensor] = field(default_factory=list)
    nats: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)

    def add(self, reference_RV: Tensor, other_RV: Tensor, targets_R: Tensor) -> None:
        """One piece: log-probabilities of both models (R, V), and the R tokens that were really next."""
        self.kl.append(kl_rows(reference_RV, other_RV))
        self.same.append(reference_RV.argmax(-1) == other_RV.argmax(-1))
        self.reference_nats.append(-reference_RV.gather(1, targets_R[:, None])[:, 0].double())
        self.nats.append(-other_RV.gather(1, targets_R[:, None])[:, 0].double())

    def result(self) -> Divergence:
        kl, reference, nats, same = (torch.cat(parts).double() for parts in (self.kl, self.reference_nats, self.nats, self.same))
        if not bool((kl.isfinite() & reference.isfinite() & nats.isfinite()).all()):
            raise EngineError("a model predicted NaN, or gave no probability at all to a token that came: its weights are damaged, or its activations overflow")
        dp = (-nats).exp() - (-reference).exp()
        kl_at, dp_at = quantiles(kl), quantiles(dp)
        squares, ppl, reference_ppl = dp.square(), math.exp(float(nats.mean())), math.exp(float(reference.mean()))
        rms = math.sqrt(float(squares.mean()))
        return Divergence(
            num_tokens=len(kl),
            mean_kl=float(kl.mean()),
            p99_kl=kl_at[QUANTILES.index(0.99)],
            top1_agreement=float(same.mean()),
            reference_perplexity=reference_ppl,
            perplexity=ppl,
            kl_error=standard_error(kl),
            median_kl=kl_at[QUANTILES.index(0.50)],
            max_kl=kl_at[-1],
            top1_error=standard_error(same),
            mean_dp=float(dp.mean()),
            dp_error=standard_error(dp),
            rms_dp=rms,
            rms_dp_error=standard_error(squares) / (2 * rms) if rms else 0.0,  # d√x = dx / 2√x
            reference_perplexity_error=reference_ppl * standard_error(reference),
            perplexity_error=ppl * standard_error(nats),
            log_ratio=float((nats - reference).mean()),
            log_ratio_error=standard_error(nats - reference),
            correlation=_correlation(reference, nats),
            kl_quantiles=kl_at,
            dp_quantiles=dp_at,
        )


def standard_error(values: Tensor) -> float:
    """Of the mean of independent values: sample deviation / √n; 0 for a single one, which has none to show."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def quantiles(values: Tensor) -> tuple[float, ...]:
    """At QUANTILES, with linear interpolation between neighbours."""
    ordered = values.double().sort().values
    places = torch.tensor(QUANTILES, dtype=torch.float64) * (len(ordered) - 1)
    low = places.floor().long()
    high = (low + 1).clamp_max(len(ordered) - 1)
    found = ordered[low] + (ordered[high] - ordered[low]) * (places - low)
    return tuple(found.tolist())


def _correlation(reference: Tensor, nats: Tensor) -> float | None:
    a, b = reference - reference.mean(), nats - nats.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else None


def compare(
    reference: Callable[..., Iterator[Tensor]],
    other: Callable[..., Iterator[Tensor]],
    texts: Iterable[Sequence[int]] | Iterable[Passage],
    *,
    on_token: Callable[[int], None] | None = None,
) -> Divergence:
    """Divergence of `other` from `reference` over windows of token ids, or over passages that say from which token on they are scored.

    Both yield log-probabilities in equal pieces of rows: for a window from its first position on, for a passage from the one before its first scored token
    (`next_token_logprobs` and `Forward.logprobs`). `on_token` is told how many tokens have been scored.
    Raises InputError where no window has the two tokens that it takes to predict one.
    """
    tally, predicted, count = Tally(), 0, 0
    for text in texts:
        count += 1
        ids, at = (text.ids, text.first) if isinstance(text, Passage) else (text, 1)
        for reference_RV, other_RV in zip(reference(text), other(text), strict=True):
            targets_R = torch.tensor(ids[at : at + len(reference_RV)], dtype=torch.int64)
            at += len(reference_RV)
            if not len(targets_R):  # a window's last position predicts a token that is not in it
                continue
            tally.add(reference_RV[: len(targets_R)], other_RV[: len(targets_R)], targets_R)
            predicted += len(targets_R)
            if on_token is not None:
                on_token(predicted)
    if not predicted:
        raise InputError(f"{count} windows without a token to predict. Give at least one of at least 2 tokens")
    return tally.result()
