"""Attention as it is defined, in fp32: the specification of every other kernel. Cost: scores written out, O(T·n); each query is computed in a tile of 8.

softmax(softcap(q·k · scale) over the visible keys and the sink) · v, with softcap(x) = c · tanh(x / c).

A request gets the same bits whatever else is in the batch and however its prefill was cut. A query is computed in the tile of ROWS absolute positions that
holds it, against keys from an absolute multiple of KEYS up to one; rows and keys that the step does not bring are zeros. So the shape of every product, and
with it the library's order of summation, depends on the query's position alone. Differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tradespace.kernels.attention.kept import attend_kept, whole
from tradespace.kernels.attention.pattern import check_prefix, chosen_blocks, earliest_key, keys_end, visible
from tradespace.kernels.view import KVView, Span, StepBatch
from tradespace.spec.attention import refusal
from tradespace.spec.attention_pattern import Prefix
from tradespace.spec.attention_workspace import REFERENCE_KEYS as KEYS
from tradespace.spec.attention_workspace import REFERENCE_ROWS as ROWS
from tradespace.spec.mixers import Attention


def supports(mixer: Attention, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this kernel cannot take such a layer; None: it can."""
    if (reason := refusal("reference", mixer)) is not None:
        return reason
    return None if dtype.is_floating_point else f"reference needs a floating dtype, not {dtype}"


def attend(q_TNH: Tensor, view: KVView, batch: StepBatch, mixer: Attention, sinks_N: Tensor | None = None) -> Tensor:
    """out_TNHv in q's dtype: each of the step's T queries over the keys and values that `view` holds of its sequence.

    q_TNH (T, N, H) lies as `batch.spans` say; sinks_N holds learned logits that join the softmax and carry no value.
    """
    if not view.keeps_all:
        return attend_kept(q_TNH, view, batch, mixer, sinks_N, whole)
    out = [q_TNH.new_zeros((0, mixer.N, mixer.Hv))]
    for span in batch.spans:
        if span.num_queries == 0:
            continue
        check_prefix(mixer, span)
        k_SKH, v_SKH = view.read(span)
        chosen_NIJ = chosen_blocks(q_TNH[span.query_start : span.query_start + span.num_queries], k_SKH, span.first_position, mixer)
        for start in range(span.first_position // ROWS * ROWS, span.length, ROWS):
            out.append(_tile(q_TNH, k_SKH, v_SKH, span, start, mixer, sinks_N, chosen_NIJ).to(q_TNH.dtype))
        del k_SKH, v_SKH  # a copy, if the cache pages: free it before the next one is made
    return torch.cat(out)


def _tile(q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, span: Span, start: int, mixer: Attention, sinks_N: Tensor | None, chosen_NIJ: Tensor | None) -> Tensor:
    """The queries of `span` at positions start … start + ROWS - 1, computed in a full tile."""
    first, stop = max(start, span.first_position), min(start + ROWS, span.length)
    low = earliest_key(mixer, start) // KEYS * KEYS
    end = keys_end(mixer, start + ROWS)
    high = -(-end // KEYS) * KEYS
    last = min(end, span.length) if end > start + ROWS else stop  # keys from here on are padding
    row = span.query_start - span.first_position  # + position: row in the step
    # pad always copies: the products also see the same strides and alignment
    q_RNH = pad(q_TNH[row + first : row + stop].float(), (0, 0, 0, 0, first - start, start + ROWS - stop))
    k_SKH, v_SKH = (pad(x[low:last].float(), (0, 0, 0, 0, 0, high - last)) for x in (k_SKH, v_SKH))
    q_KRH = q_RNH.view(ROWS, mixer.K, mixer.G, mixer.H).permute(1, 2, 0, 3).reshape(mixer.K, mixer.G * ROWS, mixer.H)
    scores_NRS = (torch.bmm(q_KRH, k_SKH.permute(1, 2, 0)) * mixer.softmax_scale).view(mixer.N, ROWS, high - low)
    if mixer.logit_softcap is not None:
        scores_NRS = torch.tanh(scores_NRS / mixer.logit_softcap) * mixer.logit_softcap
    positions = torch.arange(low, max(high, start + ROWS), device=q_TNH.device)
    seen_RS = visible(mixer, positions[start - low : start - low + ROWS], positions[: high - low], chosen_NIJ)
    if isinstance(mixer.pattern, Prefix):  # it shows what comes later, and padding comes later, too
        # rows of padding keep theirs: one that saw nothing would be nan, and so would gradients
        seen_RS = seen_RS & ((positions[: high - low] < last) | (positions[start - low : start - low + ROWS, None] >= stop))
    scores_NRS = scores_NRS.masked_fill(~seen_RS, float("-inf"))
    if sinks_N is not None:
        scores_NRS = torch.cat([scores_NRS, sinks_N.float()[:, None, None].expand(mixer.N, ROWS, 1)], dim=-1)
    weights_NRS = torch.softmax(scores_NRS, dim=-1)[..., : high - low]
    out_KRH = torch.bmm(weights_NRS.reshape(mixer.K, mixer.G * ROWS, high - low), v_SKH.transpose(0, 1))
    out_RNH = out_KRH.view(mixer.N, ROWS, mixer.Hv).transpose(0, 1)
    return out_RNH[first - start : stop - start]
