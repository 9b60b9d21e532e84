"""Attention over what a retention policy kept: keys in any order, other ones for each head, the mask from their positions; and the weights that a policy
chooses by.

Three ways to compute it, for the three kernels that call `attend_kept`: all scores at once (`whole`), in blocks of keys with an online softmax (`blocks`), and
torch's fused kernel (`fused`), which gives no weights. What is kept is short by design, and queries go QUERIES at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from tradespace.kernels.attention.pattern import visible
from tradespace.kernels.view import Kept, KeptView, KVView, Span, StepBatch
from tradespace.spec.attention import chunk_size
from tradespace.spec.attention_workspace import KEPT_QUERIES as QUERIES
from tradespace.spec.mixers import Attention

# (q (T, N, H), k (S, K, H), v (S, K, Hv), hidden_KTS, mixer, sinks, rows to weigh) → (out (T, N, Hv), weights_KS or None)
Inner = Callable[[Tensor, Tensor, Tensor, Tensor, Attention, Tensor | None, int], tuple[Tensor, Tensor | None]]


def attend_kept(q_TNH: Tensor, view: KVView, batch: StepBatch, mixer: Attention, sinks_N: Tensor | None, inner: Inner) -> Tensor:
    """out_TNHv in q's dtype; gives `view` the weights that it asks for."""
    view = cast(KeptView, view)
    out_TNH = q_TNH.new_empty((q_TNH.shape[0], mixer.N, mixer.Hv))
    for span in batch.spans:
        if span.num_queries:
            _attend_span(q_TNH, view, span, mixer, sinks_N, inner, out_TNH)
    return out_TNH


def _attend_span(q_TNH: Tensor, view: KeptView, span: Span, mixer: Attention, sinks_N: Tensor | None, inner: Inner, out_TNH: Tensor) -> None:
    kept = view.kept(span)
    weighed = span.num_queries - min(view.weigh_last(span), span.num_queries)  # queries before that are of no interest
    weights_KS: Tensor | None = None
    for start in range(0, span.num_queries, QUERIES):
        stop = min(start + QUERIES, span.num_queries)
        queries_T = torch.arange(span.first_position + start, span.first_position + stop, device=q_TNH.device)
        rows = slice(span.query_start + start, span.query_start + stop)
        hidden_KTS = ~seen(kept, mixer, queries_T)
        part, found_KS = inner(q_TNH[rows], kept.k_SKH, kept.v_SKH, hidden_KTS, mixer, sinks_N, stop - max(start, min(stop, weighed)))
        out_TNH[rows] = part.to(q_TNH.dtype)
        if found_KS is not None:
            weights_KS = found_KS if weights_KS is None else weights_KS.add_(found_KS)
    if weights_KS is not None:
        view.take_weights(span, weights_KS)


def seen(kept: Kept, mixer: Attention, queries_T: Tensor) -> Tensor:
    """seen_KTS (bool; one row of heads where all keep the same): the layer's pattern, and what sliding retention leaves of it."""
    keys_KS = kept.positions_KS
    queries_KT = queries_T.expand(keys_KS.shape[0], -1)
    seen_KTS = visible(mixer, queries_KT, keys_KS)
    if kept.window is None:
        return seen_KTS
    return seen_KTS & ((keys_KS[:, None, :] > queries_KT[..., None] - kept.window) | (keys_KS[:, None, :] < kept.sinks))


def _scores(q_TNH: Tensor, k_SKH: Tensor, hidden_KTS: Tensor, mixer: Attention) -> Tensor:
    """scores_KGTS in fp32, -inf where hidden."""
    q_KRH = q_TNH.float().view(-1, mixer.K, mixer.G, mixer.H).permute(1, 2, 0, 3).reshape(mixer.K, -1, mixer.H)
    scores_KGTS = (torch.bmm(q_KRH, k_SKH.float().permute(1, 2, 0)) * mixer.softmax_scale).view(mixer.K, mixer.G, len(q_TNH), -1)
    if mixer.logit_softcap is not None:
        scores_KGTS = torch.tanh(scores_KGTS / mixer.logit_softcap) * mixer.logit_softcap
    return scores_KGTS.masked_fill_(hidden_KTS[:, None], float("-inf"))


def _join(out_KGTH: Tensor) -> Tensor:
    return out_KGTH.permute(2, 0, 1, 3).flatten(1, 2)


def whole(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, hidden_KTS: Tensor, mixer: Attention, sinks_N: Tensor | None, weigh: int
) -> tuple[Tensor, Tensor | None]:
    """All scores written out, in fp32."""
    scores_KGTS = _scores(q_TNH, k_SKH, hidden_KTS, mixer)
    if sinks_N is not None:
        sinks_KGT1 = sinks_N.float().view(mixer.K, mixer.G, 1, 1).expand(-1, -1, len(q_TNH), 1)
        scores_KGTS = torch.cat((scores_KGTS, sinks_KGT1), dim=-1)
    weights_KGTS = torch.softmax(scores_KGTS, dim=-1)[..., : len(k_SKH)]
    out_KGTH = torch.matmul(weights_KGTS, v_SKH.float().transpose(0, 1)[:, None])
    return _join(out_KGTH), weights_KGTS[:, :, len(q_TNH) - weigh :].sum((1, 2)) if weigh else None


def blocks(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, hidden_KTS: Tensor, mixer: Attention, sinks_N: Tensor | None, weigh: int
) -> tuple[Tensor, Tensor | None]:
    """√S keys at a time, more where queries are few; the weights take a second pass, when every row's largest score and sum are known."""
    T, S = len(q_TNH), len(k_SKH)
    size = chunk_size(S) * max(1, QUERIES // T)  # as many scores at a time for one query as for a block of them
    shape = (mixer.K, mixer.G, T)
    if sinks_N is None:
        peak_KGT, sum_KGT = q_TNH.new_full(shape, float("-inf"), dtype=torch.float32), q_TNH.new_zeros(shape, dtype=torch.float32)
    else:
        peak_KGT = sinks_N.float().view(mixer.K, mixer.G, 1).expand(shape)
        sum_KGT = torch.ones_like(peak_KGT)
    out_KGTH = q_TNH.new_zeros((*shape, mixer.Hv), dtype=torch.float32)
    for start in range(0, S, size):
        part = slice(start, min(start + size, S))
        scores_KGTS = _scores(q_TNH, k_SKH[part], hidden_KTS[..., part], mixer)
        new_KGT = torch.maximum(peak_KGT, scores_KGTS.amax(-1))
        base_KGT = new_KGT.masked_fill(new_KGT == float("-inf"), 0.0)  # a row that has seen no key yet
        weights_KGTS = scores_KGTS.sub_(base_KGT[..., None]).exp_()
        keep_KGT = torch.exp(peak_KGT - base_KGT)
        sum_KGT = sum_KGT * keep_KGT + weights_KGTS.sum(-1)
        out_KGTH = out_KGTH.mul_(keep_KGT[..., None]).add_(torch.matmul(weights_KGTS, v_SKH[part].float().transpose(0, 1)[:, None]))
        peak_KGT = new_KGT
    out_TNH = _join(out_KGTH / sum_KGT[..., None])
    if not weigh:
        return out_TNH, None
    weights_KS = q_TNH.new_empty((mixer.K, S), dtype=torch.float32)
    for start in range(0, S, size):
        part = slice(start, min(start + size, S))
        scores_KGTS = _scores(q_TNH[T - weigh :], k_SKH[part], hidden_KTS[:, T - weigh :, part], mixer)
        weights_KGTS = scores_KGTS.sub_(peak_KGT[..., T - weigh :, None]).exp_().div_(sum_KGT[..., T - weigh :, None])
        weights_KS[:, part] = weights_KGTS.sum((1, 2))
    return out_TNH, weights_KS


def fused(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, hidden_KTS: Tensor, mixer: Attention, sinks_N: Tensor | None, weigh: int
) -> tuple[Tensor, Tensor | None]:
    """torch's fused kernel with a mask of the block."""
    assert sinks_N is None and not weigh, "dispatch gave sdpa a layer that it does not support"
    wide = max(mixer.H, mixer.Hv)
    k_SKH, v_SKH, q_TNH = (x if x.shape[-1] == wide else pad(x, (0, wide - x.shape[-1])) for x in (k_SKH, v_SKH, q_TNH))
    mask_KTS = torch.zeros(hidden_KTS.shape, dtype=q_TNH.dtype, device=q_TNH.device).masked_fill_(hidden_KTS, float("-inf"))
    # heads of a group beside the queries: keys and values are never repeated
    q_KGTH = q_TNH.view(-1, mixer.K, mixer.G, wide).permute(1, 2, 0, 3)
    k_K1SH, v_K1SH = (x.transpose(0, 1)[:, None].expand(-1, mixer.G, -1, -1) for x in (k_SKH, v_SKH))
    mask_KGTS = mask_KTS[:, None].expand(mixer.K, mixer.G, -1, -1)
    out_KGTH = scaled_dot_product_attention(q_KGTH, k_K1SH, v_K1SH, attn_mask=mask_KGTS, scale=mixer.softmax_scale)
    return _join(out_KGTH[..., : mixer.Hv]), None
