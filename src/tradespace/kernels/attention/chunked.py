"""Attention in blocks of keys with an online softmax. Exact; beside q, k, v and the output it holds O(T·√n) with the default block. arXiv:2112.05682

Per row the largest score so far m, the sum of exponentials l and the weighted values are kept; a new block rescales them by exp(m_old - m_new). Queries are
taken QUERIES at a time, so a long prefill holds no more than min(T, QUERIES) · N · √n scores. Differentiable, but autograd keeps every block's weights: for
training wrap it in recomputation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tradespace.kernels.attention.kept import attend_kept, blocks
from tradespace.kernels.attention.pattern import check_prefix, chosen_blocks, earliest_key, keys_end, visible
from tradespace.kernels.view import KVView, StepBatch
from tradespace.spec.attention import chunk_size, refusal
from tradespace.spec.attention_workspace import CHUNKED_QUERIES as QUERIES
from tradespace.spec.mixers import Attention


def supports(mixer: Attention, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this kernel cannot take such a layer; None: it can."""
    if (reason := refusal("chunked", mixer)) is not None:
        return reason
    return None if dtype.is_floating_point else f"chunked needs a floating dtype, not {dtype}"


def attend(
    q_TNH: Tensor, view: KVView, batch: StepBatch, mixer: Attention, sinks_N: Tensor | None = None, *, block: int | None = None, queries: int = QUERIES
) -> Tensor:
    """out_TNHv in q's dtype; `block` keys at a time (None: √n of each sequence), `queries` rows at a time."""
    if not view.keeps_all:
        return attend_kept(q_TNH, view, batch, mixer, sinks_N, blocks)
    out_TNH = q_TNH.new_empty((q_TNH.shape[0], mixer.N, mixer.Hv))
    for span in batch.spans:
        if span.num_queries == 0:
            continue
        check_prefix(mixer, span)
        k_SKH, v_SKH = view.read(span)
        chosen_NIJ = chosen_blocks(q_TNH[span.query_start : span.query_start + span.num_queries], k_SKH, span.first_position, mixer)
        row = span.query_start - span.first_position
        for first in range(span.first_position, span.length, queries):
            stop = min(first + queries, span.length)
            low = earliest_key(mixer, first)
            size = block or chunk_size(span.length)
            end = min(keys_end(mixer, stop), span.length)
            q_part_TNH = q_TNH[row + first : row + stop]
            out_TNH[row + first : row + stop] = _online(q_part_TNH, k_SKH[low:end], v_SKH[low:end], first, low, mixer, sinks_N, size, chosen_NIJ)
        del k_SKH, v_SKH  # a copy, if the cache pages: free it before the next one is made
    return out_TNH


def _online(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    first: int,
    low: int,
    mixer: Attention,
    sinks_N: Tensor | None,
    block: int,
    chosen_NIJ: Tensor | None = None,
) -> Tensor:
    """Queries at positions first … over keys at positions low …, whose last is the last that any of them sees: (T, N, Hv) in fp32."""
    num_queries, num_keys = q_TNH.shape[0], k_SKH.shape[0]
    K, G, rows = mixer.K, mixer.G, mixer.G * num_queries
    q_KRH = (q_TNH.float() * mixer.softmax_scale).view(num_queries, K, G, mixer.H).permute(1, 2, 0, 3).reshape(K, rows, mixer.H)
    queries_T = torch.arange(first, first + num_queries, device=q_TNH.device)
    if sinks_N is None:
        peak_KR = q_KRH.new_full((K, rows), float("-inf"))
        sum_KR = q_KRH.new_zeros((K, rows))
    else:  # a sink is a key seen before all others: its logit is the first peak, its exponential the first sum, its value nothing
        peak_KR = sinks_N.float().view(K, G, 1).expand(K, G, num_queries).reshape(K, rows)
        sum_KR = torch.ones_like(peak_KR)
    out_KRH = q_KRH.new_zeros((K, rows, mixer.Hv))
    for start in range(0, num_keys, block):
        stop = min(start + block, num_keys)
        scores_KRS = torch.bmm(q_KRH, k_SKH[start:stop].float().permute(1, 2, 0))
        if mixer.logit_softcap is not None:
            scores_KRS = torch.tanh(scores_KRS / mixer.logit_softcap) * mixer.logit_softcap
        if (
            mixer.pattern is not None or low + stop - 1 > first or earliest_key(mixer, first + num_queries - 1) > low + start
        ):  # else every row sees the whole block
            hidden = ~visible(mixer, queries_T, torch.arange(low + start, low + stop, device=q_TNH.device), chosen_NIJ)
            hidden = hidden if chosen_NIJ is None else hidden.view(K, G, num_queries, stop - start)
            scores_KRS = scores_KRS.view(K, G, num_queries, stop - start).masked_fill(hidden, float("-inf")).view(K, rows, stop - start)
        new_peak_KR = torch.maximum(peak_KR, scores_KRS.amax(dim=-1)).detach()  # what it is does not change the result: no gradient
        base_KR = new_peak_KR.masked_fill(new_peak_KR == float("-inf"), 0.0)  # a row that has seen no key yet: exp(-inf - 0) = 0, not NaN
        weights_KRS = torch.exp(scores_KRS - base_KR[..., None])
        keep_KR = torch.exp(peak_KR - base_KR)
        sum_KR = sum_KR * keep_KR + weights_KRS.sum(dim=-1)
        out_KRH = torch.baddbmm(out_KRH * keep_KR[..., None], weights_KRS, v_SKH[start:stop].float().transpose(0, 1))
        peak_KR = new_peak_KR
    out_KRH = out_KRH / sum_KR[..., None]
    return out_KRH.view(K, G, num_queries, mixer.Hv).permute(2, 0, 1, 3).reshape(num_queries, mixer.N, mixer.Hv)
