"""Attention by torch's fused kernel (scaled_dot_product_attention), arranged for the CPU. Beside q, k, v and the output it holds O(T + n).

How the calls are arranged was measured on a CPU with AVX-512 (results of the kernel bench):
- Few queries a sequence (decode, a verified draft): the G query heads of a kv head and their queries are rows of one product, [B, K, G·T, H]. Keys and
  values are never repeated, and in bf16 this is 3 to 6 times as fast as one head at a time. Sequences of similar length share a call: gathering their keys
  into one padded block costs less than the calls that it saves, in the contiguous layout too, as long as the block stays in the cache (GATHER_BYTES).
- Many queries (prefill): blocks of QUERIES queries over the keys that any of them sees. Nothing is computed for blocks that the mask would hide whole, which
  `is_causal` does not achieve for short prompts, and a window costs only its width.
- The mask of such a block depends on key - query alone. With the queries reversed it is a view, strides (1, 1), into one vector per window: there is no
  (T, n) matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard, runtime_checkable
from weakref import ref

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from tradespace.kernels.attention.kept import attend_kept, fused
from tradespace.kernels.attention.packed import attend_packed, fits
from tradespace.kernels.attention.pattern import earliest_key, visible
from tradespace.kernels.view import KVView, PackedView, Span, StepBatch
from tradespace.spec.attention import refusal
from tradespace.spec.attention_workspace import GATHER_BYTES, fused_key_bytes
from tradespace.spec.attention_workspace import SDPA_FEW as FEW
from tradespace.spec.attention_workspace import SDPA_QUERIES as QUERIES
from tradespace.spec.mixers import Attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@runtime_checkable
class GatherView(KVView, Protocol):
    """A view that can also find and copy the tokens of many sequences at once. Views of one `cache` locate alike, whatever the layer.

    `locate` names the cache rows of positions starts[i] … starts[i] + width - 1 of spans[i], one sequence after the other; past a sequence's end it repeats
    its last row, so that nothing is read that was not written. A slice where a single sequence's rows are consecutive: `gather` then copies nothing.
    """

    @property
    def cache(self) -> object: ...

    def locate(self, spans: Sequence[Span], starts: Sequence[int], width: int) -> Tensor | slice: ...

    def gather(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]: ...


def supports(mixer: Attention, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this kernel cannot take such a layer; None: it can."""
    if (reason := refusal("sdpa", mixer)) is not None:
        return reason
    if device.type != "cpu":
        return f"sdpa is arranged for the CPU, not for {device.type}"
    return None if dtype in DTYPES else f"torch's fused attention takes fp32, bf16 and fp16, not {dtype}"


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences of a step with equally many queries that share one call."""

    spans: tuple[Span, ...]
    starts: tuple[int, ...]  # the first key that each one needs
    width: int  # keys per sequence in the call, padding included
    rows_R: Tensor | slice  # their queries in the step
    mask_B1RS: Tensor | None  # None: every query sees every key


class Sdpa:
    """Call it like any attention kernel. It keeps what a step's layers share (groups, masks, rows to gather) until the next step comes, and one mask vector per
    window, at most twice as long as the longest sequence; so each engine has its own.
    """

    def __init__(self) -> None:
        self._spans: tuple[Span, ...] | None = None
        self._groups: dict[tuple, list[_Group]] = {}
        self._located: dict[tuple, Tensor | slice] = {}
        self._rulers: dict[tuple, Tensor] = {}
        self._gathers: dict[type, bool] = {}

    def __call__(self, q_TNH: Tensor, view: KVView, batch: StepBatch, mixer: Attention, sinks_N: Tensor | None = None) -> Tensor:
        """out_TNHv in q's dtype: each of the step's T queries over the keys and values that `view` holds of its sequence."""
        assert sinks_N is None and mixer.logit_softcap is None, "dispatch gave sdpa a layer that it does not support"
        if not view.keeps_all:
            return attend_kept(q_TNH, view, batch, mixer, sinks_N, fused)
        if isinstance(view, PackedView) and q_TNH.requires_grad and torch.is_grad_enabled() and fits(mixer, batch):
            return attend_packed(q_TNH, view.k_TKH, view.v_TKH, batch, mixer)
        if self._spans is not batch.spans:
            self._spans = batch.spans
            self._groups.clear()
            self._located.clear()
        out_TNH = q_TNH.new_empty((q_TNH.shape[0], mixer.N, mixer.Hv))
        if not self._can_gather(view):
            for span in batch.spans:
                self._many(q_TNH, view, span, mixer, out_TNH)
            return out_TNH
        for span in batch.spans:
            if span.num_queries > FEW:
                self._many(q_TNH, view, span, mixer, out_TNH)
        self._few(q_TNH, view, batch, mixer, out_TNH)
        return out_TNH

    def _can_gather(self, view: KVView) -> TypeGuard[GatherView]:
        found = self._gathers.get(type(view))
        if found is None:  # asked once per type: the check of a protocol takes as long as a short attention
            found = self._gathers[type(view)] = isinstance(view, GatherView)
        return found

    def _many(self, q_TNH: Tensor, view: KVView, span: Span, mixer: Attention, out_TNH: Tensor) -> None:
        """One sequence, a block of queries at a time: [K, G, T, H], keys and values expanded over G with stride 0."""
        k_SKH, v_SKH = _equally_wide(*view.read(span))
        shape = (mixer.K, mixer.G, -1, k_SKH.shape[-1])
        k_KGSH, v_KGSH = (x_SKH.transpose(0, 1)[:, None].expand(shape) for x_SKH in (k_SKH, v_SKH))
        row = span.query_start - span.first_position  # + position: row in the step
        first = span.first_position
        while first < span.length:
            stop = min(first + QUERIES, span.length)
            if mixer.chunked and mixer.window is not None:  # a block within one chunk is plainly causal
                stop = min(stop, (first // mixer.window + 1) * mixer.window)
            low = earliest_key(mixer, first)
            mask_TS = self._band(None if mixer.chunked else mixer.window, stop - first, stop - low, q_TNH)
            queries = slice(row + first, row + stop)
            out_TNH[queries] = _prefill(q_TNH[queries], k_KGSH[:, :, low:stop], v_KGSH[:, :, low:stop], mask_TS, mixer)
            first = stop

    def _band(self, window: int | None, num_queries: int, num_keys: int, like: Tensor) -> Tensor | None:
        """mask_TS of a block whose last query is the last key, queries in reverse: row i, column j is key - query = i + j - (S - 1)."""
        if num_queries == 1:
            return None  # the keys were cut to what it sees
        ruler = self._rulers.get((window, like.dtype))
        if ruler is None or ruler.shape[0] < num_keys + QUERIES:
            reach = 1 << (num_keys - 1).bit_length()
            ahead = torch.arange(-reach, QUERIES, device=like.device)  # key - query
            seen = ahead <= 0 if window is None else (ahead <= 0) & (ahead > -window)
            ruler = torch.zeros(reach + QUERIES, dtype=like.dtype, device=like.device).masked_fill(~seen, float("-inf"))
            self._rulers[window, like.dtype] = ruler
        return ruler.as_strided((num_queries, num_keys), (1, 1), ruler.shape[0] - QUERIES - (num_keys - 1))

    def _few(self, q_TNH: Tensor, view: GatherView, batch: StepBatch, mixer: Attention, out_TNH: Tensor) -> None:
        """Decoding sequences in groups: [B, K, T·G, H] queries against [B, K, S, H] keys, where S is the group's longest."""
        pattern = (mixer.window, mixer.chunked, GATHER_BYTES // fused_key_bytes(mixer, q_TNH.element_size()), mixer.G, q_TNH.dtype)
        groups = self._groups.get(pattern)
        if groups is None:
            groups = self._groups[pattern] = _form_groups(batch.spans, mixer, q_TNH, pattern[2])
        for index, group in enumerate(groups):
            where = (ref(view.cache), pattern, index)  # a cache that is gone otherwise must not live on in what a kernel remembers
            rows = self._located.get(where)
            if rows is None:
                rows = self._located[where] = view.locate(group.spans, group.starts, group.width)
            out_TNH[group.rows_R] = _decode(q_TNH[group.rows_R], *view.gather(rows), group, mixer)


def _prefill(q_TNH: Tensor, k_KGSH: Tensor, v_KGSH: Tensor, mask_TS: Tensor | None, mixer: Attention) -> Tensor:
    """One block of queries, (T, N, Hv). A function of its own, so that what one block needs is free before the next one starts."""
    q_TNW = _widened(q_TNH.flip(0), k_KGSH.shape[-1])
    q_KGTW = q_TNW.view(q_TNW.shape[0], mixer.K, mixer.G, -1).permute(1, 2, 0, 3)
    part_KGTH = scaled_dot_product_attention(q_KGTW, k_KGSH, v_KGSH, attn_mask=mask_TS, scale=mixer.softmax_scale)
    return part_KGTH[..., : mixer.Hv].permute(2, 0, 1, 3).flip(0).reshape(-1, mixer.N, mixer.Hv)


def _decode(q_RNH: Tensor, k_XKH: Tensor, v_XKH: Tensor, group: _Group, mixer: Attention) -> Tensor:
    """One shared call, (R, N, Hv). A function of its own, so that one group's keys are free before the next one's are gathered."""
    k_XKH, v_XKH = _equally_wide(k_XKH, v_XKH)
    num, num_queries, wide = len(group.spans), group.spans[0].num_queries, k_XKH.shape[-1]
    q_RNH = _widened(q_RNH, wide)
    if num_queries == 1:  # the same values in the same order: fewer views to make
        q_BKRH = q_RNH.view(num, mixer.K, mixer.G, wide)
    else:
        q_BKRH = q_RNH.view(num, num_queries, mixer.K, mixer.G, wide).transpose(1, 2).reshape(num, mixer.K, num_queries * mixer.G, wide)
    part_BKRH = scaled_dot_product_attention(
        q_BKRH,
        k_XKH.view(num, group.width, mixer.K, wide).transpose(1, 2),
        v_XKH.view(num, group.width, mixer.K, wide).transpose(1, 2),
        attn_mask=group.mask_B1RS,
        scale=mixer.softmax_scale,
    )
    if wide != mixer.Hv:
        part_BKRH = part_BKRH[..., : mixer.Hv]
    if num_queries == 1:
        return part_BKRH.reshape(num, mixer.N, mixer.Hv)
    part_BTKGH = part_BKRH.view(num, mixer.K, num_queries, mixer.G, mixer.Hv).transpose(1, 2)
    return part_BTKGH.reshape(num * num_queries, mixer.N, mixer.Hv)


def _equally_wide(k_SKH: Tensor, v_SKH: Tensor) -> tuple[Tensor, Tensor]:
    """The fused kernel wants keys and values equally wide; zeros change neither the scores nor the columns that are kept."""
    wide = max(k_SKH.shape[-1], v_SKH.shape[-1])
    return _widened(k_SKH, wide), _widened(v_SKH, wide)


def _widened(x: Tensor, wide: int) -> Tensor:
    return x if x.shape[-1] == wide else pad(x, (0, wide - x.shape[-1]))


def _form_groups(spans: Sequence[Span], mixer: Attention, like: Tensor, most_keys: int) -> list[_Group]:
    """Sequences with few queries, those of similar length together, at most `most_keys` keys to a group unless one sequence alone has more."""
    needs = sorted(
        ((span.num_queries, span.length - earliest_key(mixer, span.first_position), span) for span in spans if 0 < span.num_queries <= FEW), key=_size
    )
    groups: list[_Group] = []
    members: list[Span] = []
    widest = 0
    for num_queries, width, span in reversed(needs):
        # padding costs as much as keys: a sequence much shorter than the group's longest starts a new one, unless both are short
        near = widest - width <= max(widest // 4, 64)
        if members and (members[0].num_queries != num_queries or not near or (len(members) + 1) * widest > most_keys):
            groups.append(_group(members, widest, mixer, like))
            members = []
        if not members:
            widest = width
        members.append(span)
    if members:
        groups.append(_group(members, widest, mixer, like))
    return groups


def _size(need: tuple[int, int, Span]) -> tuple[int, int]:
    return need[:2]


def _group(members: list[Span], width: int, mixer: Attention, like: Tensor) -> _Group:
    spans = tuple(sorted(members, key=lambda span: span.query_start))
    num_queries = spans[0].num_queries
    starts = tuple(earliest_key(mixer, span.first_position) for span in spans)
    rows = [row for span in spans for row in range(span.query_start, span.query_start + num_queries)]
    consecutive = rows[-1] - rows[0] == len(rows) - 1
    mask_B1RS = None
    if num_queries > 1 or any(span.length - start != width for span, start in zip(spans, starts, strict=True)):
        keys_BS = torch.tensor(starts, device=like.device)[:, None] + torch.arange(width, device=like.device)
        queries_BT = torch.tensor([span.first_position for span in spans], device=like.device)[:, None] + torch.arange(num_queries, device=like.device)
        hidden_BTS = ~visible(mixer, queries_BT, keys_BS)
        mask_BTS = torch.zeros(hidden_BTS.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden_BTS, float("-inf"))
        mask_B1RS = mask_BTS[:, None, :, None].expand(-1, 1, -1, mixer.G, -1).reshape(len(spans), 1, num_queries * mixer.G, width)
    return _Group(spans, starts, width, slice(rows[0], rows[-1] + 1) if consecutive else torch.tensor(rows, device=like.device), mask_B1RS)
