"""Which keys a query may look at: causal, sliding window, or the query's own chunk. One place, so that every kernel means the same."""

from __future__ import annotations

import torch
from torch import Tensor

from tradespace.spec.mixers import Attention


def earliest_key(mixer: Attention, position: int) -> int:
    """The first key that the query at `position` sees; the last is its own position.

    >>> [earliest_key(Attention(N=1, K=1, H=8, window=3), p) for p in (0, 2, 3, 7)]
    [0, 0, 1, 5]
    >>> [earliest_key(Attention(N=1, K=1, H=8, window=3, chunked=True), p) for p in (0, 2, 3, 7)]
    [0, 0, 3, 6]
    """
    if mixer.window is None:
        return 0
    if mixer.chunked:
        return position // mixer.window * mixer.window
    return max(0, position - mixer.window + 1)


def visible(mixer: Attention, queries_T: Tensor, keys_S: Tensor) -> Tensor:
    """seen_TS (bool) for query positions and key positions (int64); leading dimensions, if any, are the same for both."""
    query_T1, key_1S = queries_T[..., :, None], keys_S[..., None, :]
    seen_TS = key_1S <= query_T1
    if mixer.window is None:
        return seen_TS
    if mixer.chunked:
        return seen_TS & (key_1S >= torch.div(query_T1, mixer.window, rounding_mode="floor") * mixer.window)
    return seen_TS & (key_1S > query_T1 - mixer.window)
