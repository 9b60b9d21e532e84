"""Which keys a query may look at: causal, a window, the query's own chunk, and the patterns of `spec/attention_pattern.py`. One place, so that every kernel
means the same. Choosing blocks at run time (`chosen_blocks`) holds (n/block)² scores a head, everything else nothing that grows faster than n.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tradespace.errors import UnsupportedError
from tradespace.kernels.view import Span
from tradespace.spec.attention_pattern import BlockSparse, Documents, Prefix, Selected, Sliding
from tradespace.spec.mixers import Attention


def earliest_key(mixer: Attention, position: int) -> int:
    """No key before this one is seen by the query at `position`, nor by any later query.

    >>> [earliest_key(Attention(N=1, K=1, H=8, window=3), p) for p in (0, 2, 3, 7)]
    [0, 0, 1, 5]
    >>> [earliest_key(Attention(N=1, K=1, H=8, window=3, chunked=True), p) for p in (0, 2, 3, 7)]
    [0, 0, 3, 6]
    """
    low = 0
    if isinstance(mixer.pattern, Documents):
        low = mixer.pattern.start_of(position)
    elif isinstance(mixer.pattern, Sliding):
        low = max(0, position - mixer.pattern.window + 1)
    if mixer.window is None:
        return low
    if mixer.chunked:
        return max(low, position // mixer.window * mixer.window)
    return max(low, position - mixer.window + 1)


def keys_end(mixer: Attention, stop: int) -> int:
    """One past the last key that any query before position `stop` sees: `stop` itself, or the end of a prefix that reaches further."""
    return max(stop, mixer.pattern.length) if isinstance(mixer.pattern, Prefix) else stop


def check_prefix(mixer: Attention, span: Span) -> None:
    """Raises UnsupportedError where a prefix comes in pieces: its first tokens were computed without having seen its last ones."""
    if isinstance(mixer.pattern, Prefix) and span.num_queries > 1 and 0 < span.first_position < mixer.pattern.length:
        raise UnsupportedError(
            f"a prefix of {mixer.pattern.length} tokens that see each other must come in one step; this one was cut at {span.first_position}. "
            f"Give a step at least {mixer.pattern.length} tokens"
        )


def visible(mixer: Attention, queries_T: Tensor, keys_S: Tensor, chosen_NIJ: Tensor | None = None) -> Tensor:
    """seen_TS (bool) for query positions and key positions (int64); leading dimensions, if any, are the same for both.

    With `chosen_NIJ` (what `chosen_blocks` gave, one sequence) it is seen_NTS: each head sees what was chosen for it.
    """
    query_T1, key_1S = queries_T[..., :, None], keys_S[..., None, :]
    pattern = mixer.pattern
    seen_TS = key_1S <= query_T1
    if isinstance(pattern, Prefix):
        seen_TS = seen_TS | (key_1S < pattern.length) & (query_T1 < pattern.length)
    elif isinstance(pattern, Documents):
        starts = torch.tensor(pattern.boundaries, device=keys_S.device)
        document_T1, document_1S = (torch.bucketize(x, starts, right=True) for x in (query_T1, key_1S))
        seen_TS = seen_TS & (document_T1 == document_1S)
    elif isinstance(pattern, Sliding):
        seen_TS = seen_TS & (key_1S > query_T1 - pattern.window)
    elif isinstance(pattern, BlockSparse):
        seen_TS = seen_TS & _sparse_blocks(pattern, queries_T, keys_S)
    if mixer.window is not None:
        first_T1 = torch.div(query_T1, mixer.window, rounding_mode="floor") * mixer.window if mixer.chunked else query_T1 - mixer.window + 1
        seen_TS = seen_TS & (key_1S >= first_T1)
    if chosen_NIJ is None:
        return seen_TS
    assert isinstance(pattern, Selected), "only a selected pattern chooses blocks"
    # a tile's padding may reach past the last block: what it sees does not matter
    row_T, column_S = ((x // pattern.block).clamp(max=most - 1) for x, most in zip((queries_T, keys_S), chosen_NIJ.shape[1:], strict=True))
    return seen_TS & chosen_NIJ[:, row_T][:, :, column_S]


def _sparse_blocks(pattern: BlockSparse, queries_T: Tensor, keys_S: Tensor) -> Tensor:
    """Whether the key's block is one that the query's block looks at; later blocks count as unseen or seen, the causal mask decides on them."""
    row_T1, column_1S = queries_T[..., :, None] // pattern.block, keys_S[..., None, :] // pattern.block
    seen_TS = (column_1S > row_T1 - pattern.local) | (column_1S < pattern.leading)
    if pattern.random == 0 or queries_T.numel() == 0:
        return seen_TS
    first, last = int(queries_T.min()) // pattern.block, int(queries_T.max()) // pattern.block
    table = [list(pattern.blocks_of(max(0, row))) for row in range(first, last + 1)]
    width = max(map(len, table))
    blocks_IW = torch.tensor([[*row, *[-1] * (width - len(row))] for row in table], device=queries_T.device)
    drawn_T1W = blocks_IW[row_T1 - first]
    for column in range(width):  # one at a time: all at once would hold a flag for each of them, query and key
        seen_TS = seen_TS | (drawn_T1W[..., column] == column_1S)
    return seen_TS


@torch.no_grad()
def chosen_blocks(q_TNH: Tensor, k_SKH: Tensor, first_position: int, mixer: Attention) -> Tensor | None:
    """keep_NIJ (bool): the blocks of keys J that each block of queries I looks at, head by head. Rows count from the sequence's start, those before the
    step are empty.

    q_TNH holds one sequence's queries from `first_position` on, k_SKH all its keys. None: no such pattern, or a step shorter than a block, which sees all.
    """
    pattern = mixer.pattern
    if not isinstance(pattern, Selected) or q_TNH.shape[0] < pattern.block:
        return None
    size, num_keys = pattern.block, k_SKH.shape[0]
    positions_T = torch.arange(first_position, first_position + q_TNH.shape[0], device=q_TNH.device)
    queries_INH = _block_means(q_TNH, positions_T // size, -(-num_keys // size))
    keys_JKH = _block_means(k_SKH, torch.arange(num_keys, device=k_SKH.device) // size, -(-num_keys // size))
    num_blocks = keys_JKH.shape[0]
    scores_NIJ = torch.einsum("ikgh,jkh->kgij", queries_INH.unflatten(1, (mixer.K, mixer.G)), keys_JKH).flatten(0, 1)
    if mixer.softmax_scale < 0:
        scores_NIJ = -scores_NIJ
    first_row = first_position // size
    rows_I = torch.arange(num_blocks, device=q_TNH.device)
    causal_IJ = rows_I[None, :] <= rows_I[:, None]
    always_IJ = (rows_I[None, :] == rows_I[:, None]) | (rows_I[None, :] == 0)
    ranked_NIJ = scores_NIJ.masked_fill(always_IJ, float("inf")).masked_fill(~causal_IJ, float("-inf"))
    order_NIJ = ranked_NIJ.argsort(dim=-1, descending=True, stable=True)
    kept_I = torch.tensor([pattern.kept_of(row) for row in range(num_blocks)], device=q_TNH.device)
    best_NIJ = (rows_I[None, :] < kept_I[:, None]).expand_as(order_NIJ)
    keep_NIJ = torch.zeros_like(best_NIJ, memory_format=torch.contiguous_format).scatter_(2, order_NIJ, best_NIJ)
    return keep_NIJ & causal_IJ & (rows_I >= first_row)[:, None]


def _block_means(x_TNH: Tensor, block_T: Tensor, num_blocks: int) -> Tensor:
    """fp32 means of the rows of each block; zero where a block has none."""
    sums = torch.zeros((num_blocks, *x_TNH.shape[1:]), device=x_TNH.device).index_add_(0, block_T, x_TNH.float())
    return sums / torch.bincount(block_T, minlength=num_blocks).clamp(min=1)[:, None, None]
