"""Flash attention forward: a tile of queries stays, tiles of keys and values pass by, softmax goes along. arXiv:2205.14135, 2307.08691

Beside the output it writes one log-sum per query and head (base 2). One program per tile of queries and head, the last tiles first: they have most to do, and
those of one head run together and share its keys in the second-level cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tradespace.kernels.attention.triton_flash_mask import keys_of, load_tile, masked_tile, sees, store_tile


@triton.jit
def capped(scores, scale, cap):
    """tanh(scores · scale / cap), through a sigmoid: exact at both ends."""
    return 2.0 * tl.sigmoid(scores * (2.0 * scale / cap)) - 1.0


@triton.jit
def absorb(acc, peak, total, q, k, v, hidden_from, position_M1, position_1N, factor, scale, cap, base, window, prefix,
           SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tile of keys and values into (acc, peak, total). Scores are in units of log 2 from here on: exp2 is what the hardware has."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SOFTCAP:
        scores = capped(scores, scale, cap) * (cap * 1.4426950408889634)
    if MASKED:
        seen = sees(position_M1, position_1N, base, window, prefix, WINDOW, PREFIX) & (position_1N < hidden_from)
        scores = tl.where(seen, scores, float("-inf"))
    if SOFTCAP:
        new_peak = tl.maximum(peak, tl.max(scores, 1))
    else:
        new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
    if MASKED:  # a row that has seen nothing yet: exp2(-inf - 0) = 0, not NaN
        ground = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    else:
        ground = new_peak
    if SOFTCAP:
        weights = tl.math.exp2(scores - ground[:, None])
    else:
        weights = tl.math.exp2(scores * factor - ground[:, None])
    keep = tl.math.exp2(peak - ground)
    total = total * keep + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
    return acc, new_peak, total


@triton.jit(do_not_specialize=["tokens", "window", "prefix"])
def flash_forward(
    q, k, v, out, lse, sinks, segments, starts, items,
    scale, cap, tokens, window, prefix, block,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, out_stride, out_head,
    G: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, HP: tl.constexpr, HVP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, LISTED: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """segments: (query row, queries, key row, keys, base, list row, list rows a head) each; the queries are the last of the positions."""
    head = tl.program_id(1)
    row_of = segments + tl.program_id(2) * 8
    q_row, num_queries = tl.load(row_of), tl.load(row_of + 1)
    k_row, num_keys, base = tl.load(row_of + 2), tl.load(row_of + 3), tl.load(row_of + 4)
    first = num_keys - num_queries
    tile = (num_keys + M - 1) // M - 1 - tl.program_id(0)
    if num_queries > 0 and tile >= first // M:
        low = tile * M
        kv_head = head // G
        row = q_row + low - first
        q_MH = load_tile(q, row, head * q_head, q_stride, q_row, q_row + num_queries, M, H, HP, False, True)
        position_M1 = (low + tl.arange(0, M))[:, None]
        keys_N = tl.arange(0, N)
        factor = scale * 1.4426950408889634
        acc = tl.zeros([M, HVP], tl.float32)
        if SINKS:  # a key seen before all others, whose value is nothing
            peak = tl.zeros([M], tl.float32) + tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
            total = tl.zeros([M], tl.float32) + 1.0
        else:
            peak = tl.zeros([M], tl.float32) + float("-inf")
            total = tl.zeros([M], tl.float32)
        if LISTED:
            listed = tl.load(row_of + 5) + head * tl.load(row_of + 6) + low // block
            begin = tl.load(starts + listed)
            num_masked = (tl.load(starts + listed + 1) - begin) * (block // N)
            run, full, end = 0, 0, 0
        else:
            begin = 0
            run, full, end, stop = keys_of(low, low + M, first, num_keys, base, window, prefix, WINDOW, PREFIX, N)
            num_masked = (full - run) // N + tl.maximum(stop - end + N - 1, 0) // N
            for start in tl.range(full, end, N):
                k_NH = load_tile(k, k_row + start, kv_head * k_head, k_stride, k_row, k_row + num_keys, N, H, HP, TMA, False)
                v_NV = load_tile(v, k_row + start, kv_head * v_head, v_stride, k_row, k_row + num_keys, N, HV, HVP, TMA, False)
                acc, peak, total = absorb(acc, peak, total, q_MH, k_NH, v_NV, num_keys, position_M1, (start + keys_N)[None, :],
                                          factor, scale, cap, base, window, prefix, SOFTCAP, WINDOW, PREFIX, False, PRECISION)  # fmt: skip
        for index in tl.range(0, num_masked):
            start = masked_tile(index, run, full, end, begin, items, block, N, LISTED)
            k_NH = load_tile(k, k_row + start, kv_head * k_head, k_stride, k_row, k_row + num_keys, N, H, HP, TMA, True)
            v_NV = load_tile(v, k_row + start, kv_head * v_head, v_stride, k_row, k_row + num_keys, N, HV, HVP, TMA, True)
            acc, peak, total = absorb(acc, peak, total, q_MH, k_NH, v_NV, num_keys, position_M1, (start + keys_N)[None, :],
                                      factor, scale, cap, base, window, prefix, SOFTCAP, WINDOW, PREFIX, True, PRECISION)  # fmt: skip
        some = tl.where(total == 0.0, 1.0, total)  # rows of no query
        store_tile(out, acc / some[:, None], row, head * out_head, out_stride, q_row, q_row + num_queries, M, HV, HVP)
        rows = row + tl.arange(0, M)
        inside = (rows >= q_row) & (rows < q_row + num_queries)
        tl.store(lse + head * tokens.to(tl.int64) + rows, peak + tl.math.log2(some), mask=inside)
