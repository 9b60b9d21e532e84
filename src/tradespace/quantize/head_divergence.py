"""KL divergences of many final hidden states from one, with the head streamed: neither the head nor a row of logits is ever whole in memory.

Per token, over runs of the vocabulary, with p = softmax(a) and q = softmax(b):  KL = Σ e^(a-m) (a - b) / Σ e^(a-m) - log Σ e^a + log Σ e^b. Maxima are kept
as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tradespace.spec.model import ModelSpec


class RunningKL:
    """KL(p ‖ q) per token of logits that come in runs of the vocabulary. Sums in fp64."""

    def __init__(self, num_tokens: int):
        self.top_p = torch.full((num_tokens,), -torch.inf, dtype=torch.float64)
        self.top_q = self.top_p.clone()
        self.sum_p, self.sum_q, self.sum_difference = (torch.zeros(num_tokens, dtype=torch.float64) for _ in range(3))

    def add(self, p_TV: Tensor, q_TV: Tensor) -> None:
        """The next run of both, fp32."""
        top_p = torch.maximum(self.top_p, p_TV.amax(1).double())
        top_q = torch.maximum(self.top_q, q_TV.amax(1).double())
        old_p, old_q = (self.top_p - top_p).exp_(), (self.top_q - top_q).exp_()
        shares_TV = (p_TV - top_p.float()[:, None]).exp_()
        self.sum_p.mul_(old_p).add_(shares_TV.sum(1, dtype=torch.float64))
        self.sum_difference.mul_(old_p).add_(shares_TV.mul_(p_TV - q_TV).sum(1, dtype=torch.float64))
        self.sum_q.mul_(old_q).add_((q_TV - top_q.float()[:, None]).exp_().sum(1, dtype=torch.float64))
        self.top_p, self.top_q = top_p, top_q

    def mean(self) -> float:
        """Nats per token."""
        kl_T = self.sum_difference / self.sum_p - (self.top_p + self.sum_p.log()) + (self.top_q + self.sum_q.log())
        return float(kl_T.clamp_min(0).mean())


def logits_of(spec: ModelSpec, normed_TD: Tensor, rows_VD: Tensor) -> Tensor:
    """Logits of a run of the vocabulary."""
    logits_TV = normed_TD @ rows_VD.T
    if spec.logit_scale != 1.0:
        logits_TV = logits_TV * spec.logit_scale
    if spec.logit_softcap is not None:
        logits_TV = (logits_TV / spec.logit_softcap).tanh_().mul_(spec.logit_softcap)
    return logits_TV


def divergences(
    spec: ModelSpec,
    chunks: Iterator[tuple[Tensor, dict[str, Tensor]]],
    reference_TD: Tensor,
    variants: int,
    read: Callable[[int], Tensor],
    head_of: Callable[[int], str | None],
) -> list[float]:
    """Mean KL of each variant, in nats per token.

    chunks     runs of the head's rows (V, D), and the same rows as each of several formats rounds them
    read(v)    the variant's final hidden states (T, D), already through the final norm; `reference_TD` likewise
    head_of(v) the format in which the variant holds its head; None: as it is
    """
    running = [RunningKL(len(reference_TD)) for _ in range(variants)]
    for rows_VD, rounded in chunks:
        wanted_TV = logits_of(spec, reference_TD, rows_VD)
        for variant in range(variants):
            fmt = head_of(variant)
            running[variant].add(wanted_TV, logits_of(spec, read(variant), rows_VD if fmt is None else rounded[fmt]))
    return [entry.mean() for entry in running]
