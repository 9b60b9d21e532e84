"""Flash attention backward: weights are computed again from the log-sums, tile by tile. Nothing of size n² is held. arXiv:2205.14135, 2307.08691

Two kernels without atomics, so gradients are the same bits in every run: one keeps a tile of keys and values and passes over the queries of its group of heads,
one keeps a tile of queries and passes over keys. Beside the gradients: one fp32 number per query and head (`flash_delta`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from tradespace.kernels.attention.triton_flash_forward import capped
from tradespace.kernels.attention.triton_flash_mask import keys_of, load_tile, masked_tile, queries_of, sees, store_tile


@triton.jit(do_not_specialize=["tokens"])
def flash_delta(out, dout, delta, tokens, out_stride, out_head, dout_stride, dout_head, HV: tl.constexpr, HVP: tl.constexpr, M: tl.constexpr):
    """delta = Σ out · dout of each query and head: what the softmax's gradient subtracts."""
    head, row = tl.program_id(1), tl.program_id(0) * M
    o_MV = load_tile(out, row, head * out_head, out_stride, 0, tokens, M, HV, HVP, False, True).to(tl.float32)
    do_MV = load_tile(dout, row, head * dout_head, dout_stride, 0, tokens, M, HV, HVP, False, True).to(tl.float32)
    rows = row + tl.arange(0, M)
    tl.store(delta + head * tokens.to(tl.int64) + rows, tl.sum(o_MV * do_MV, 1), mask=rows < tokens)


@triton.jit
def keys_step(dk, dv, k_NH, v_NV, q_MH, do_MV, lse_M, delta_M, position_1M, position_N1, factor, scale, cap, base, window, prefix,
              SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tile of queries into the gradients of a tile of keys and values. Rows of no query have an infinite log-sum: their weights are 0."""
    scores = tl.dot(k_NH, tl.trans(q_MH), input_precision=PRECISION)
    if SOFTCAP:
        bent = capped(scores, scale, cap)
        weights = tl.math.exp2(bent * (cap * 1.4426950408889634) - lse_M[None, :])
    else:
        bent = scores
        weights = tl.math.exp2(scores * factor - lse_M[None, :])
    if MASKED:
        weights = tl.where(sees(position_1M, position_N1, base, window, prefix, WINDOW, PREFIX), weights, 0.0)
    dv = tl.dot(weights.to(do_MV.dtype), do_MV, dv, input_precision=PRECISION)
    dscores = weights * (tl.dot(v_NV, tl.trans(do_MV), input_precision=PRECISION) - delta_M[None, :])
    if SOFTCAP:
        dscores = dscores * (1.0 - bent * bent)
    dk = tl.dot(dscores.to(q_MH.dtype), q_MH, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["tokens", "window", "prefix"])
def flash_keys(
    q, k, v, dout, lse, delta, dk, dv, segments, starts, items,
    scale, cap, tokens, window, prefix, block,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, do_stride, do_head, dk_stride, dk_head, dv_stride, dv_head,
    G: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, HP: tl.constexpr, HVP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, LISTED: tl.constexpr, SOFTCAP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values: one program per tile of N keys and kv head. `starts` and `items` list the blocks of queries that see a block of keys."""
    kv_head = tl.program_id(1)
    row_of = segments + tl.program_id(2) * 8
    q_row, num_queries = tl.load(row_of), tl.load(row_of + 1)
    k_row, num_keys, base = tl.load(row_of + 2), tl.load(row_of + 3), tl.load(row_of + 4)
    first = num_keys - num_queries
    low = tl.program_id(0) * N
    if low < num_keys:
        k_NH = load_tile(k, k_row + low, kv_head * k_head, k_stride, k_row, k_row + num_keys, N, H, HP, False, True)
        v_NV = load_tile(v, k_row + low, kv_head * v_head, v_stride, k_row, k_row + num_keys, N, HV, HVP, False, True)
        position_N1 = (low + tl.arange(0, N))[:, None]
        rows_M = tl.arange(0, M)
        factor = scale * 1.4426950408889634
        dk_NH = tl.zeros([N, HP], tl.float32)
        dv_NV = tl.zeros([N, HVP], tl.float32)
        for member in tl.range(0, G):
            head = kv_head * G + member
            sums = lse + head * tokens.to(tl.int64) + q_row - first
            deltas = delta + head * tokens.to(tl.int64) + q_row - first
            if LISTED:
                listed = tl.load(row_of + 5) + head * tl.load(row_of + 6) + low // block
                begin = tl.load(starts + listed)
                num_masked = (tl.load(starts + listed + 1) - begin) * (block // M)
                run, full, end = 0, 0, 0
            else:
                begin = 0
                run, full, end, stop = queries_of(low, low + N, first, num_keys, base, window, prefix, WINDOW, PREFIX, M)
                num_masked = (full - run) // M + tl.maximum(stop - end + M - 1, 0) // M
                for start in tl.range(full, end, M):
                    row = q_row - first + start
                    q_MH = load_tile(q, row, head * q_head, q_stride, q_row, q_row + num_queries, M, H, HP, TMA, False)
                    do_MV = load_tile(dout, row, head * do_head, do_stride, q_row, q_row + num_queries, M, HV, HVP, TMA, False)
                    lse_M, delta_M = tl.load(sums + start + rows_M), tl.load(deltas + start + rows_M)
                    dk_NH, dv_NV = keys_step(dk_NH, dv_NV, k_NH, v_NV, q_MH, do_MV, lse_M, delta_M, (start + rows_M)[None, :], position_N1,
                                             factor, scale, cap, base, window, prefix, SOFTCAP, WINDOW, PREFIX, False, PRECISION)  # fmt: skip
            for index in tl.range(0, num_masked):
                start = masked_tile(index, run, full, end, begin, items, block, M, LISTED)
                row = q_row - first + start
                q_MH = load_tile(q, row, head * q_head, q_stride, q_row, q_row + num_queries, M, H, HP, TMA, True)
                do_MV = load_tile(dout, row, head * do_head, do_stride, q_row, q_row + num_queries, M, HV, HVP, TMA, True)
                inside_M = (start + rows_M >= first) & (start + rows_M < num_keys)
                lse_M = tl.load(sums + start + rows_M, mask=inside_M, other=float("inf"))
                delta_M = tl.load(deltas + start + rows_M, mask=inside_M, other=0.0)
                dk_NH, dv_NV = keys_step(dk_NH, dv_NV, k_NH, v_NV, q_MH, do_MV, lse_M, delta_M, (start + rows_M)[None, :], position_N1,
                                         factor, scale, cap, base, window, prefix, SOFTCAP, WINDOW, PREFIX, True, PRECISION)  # fmt: skip
        store_tile(dk, dk_NH * scale, k_row + low, kv_head * dk_head, dk_stride, k_row, k_row + num_keys, N, H, HP)
        store_tile(dv, dv_NV, k_row + low, kv_head * dv_head, dv_stride, k_row, k_row + num_keys, N, HV, HVP)


@triton.jit
def queries_step(dq, q_MH, do_MV, lse_M, delta_M, k_NH, v_NV, hidden_from, position_M1, position_1N, factor, scale, cap, base, window, prefix,
                 SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tile of keys and values into the gradient of a tile of queries."""
    scores = tl.dot(q_MH, tl.trans(k_NH), input_precision=PRECISION)
    if SOFTCAP:
        bent = capped(scores, scale, cap)
        weights = tl.math.exp2(bent * (cap * 1.4426950408889634) - lse_M[:, None])
    else:
        bent = scores
        weights = tl.math.exp2(scores * factor - lse_M[:, None])
    if MASKED:
        seen = sees(position_M1, position_1N, base, window, prefix, WINDOW, PREFIX) & (position_1N < hidden_from)
        weights = tl.where(seen, weights, 0.0)
    dscores = weights * (tl.dot(do_MV, tl.trans(v_NV), input_precision=PRECISION) - delta_M[:, None])
    if SOFTCAP:
        dscores = dscores * (1.0 - bent * bent)
    return tl.dot(dscores.to(k_NH.dtype), k_NH, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tokens", "window", "prefix"])
def flash_queries(
    q, k, v, dout, lse, delta, dq, segments, starts, items,
    scale, cap, tokens, window, prefix, block,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, do_stride, do_head, dq_stride, dq_head,
    G: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, HP: tl.constexpr, HVP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, LISTED: tl.constexpr, SOFTCAP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of queries: one program per tile of M queries and head, in the forward's order."""
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
        do_MV = load_tile(dout, row, head * do_head, do_stride, q_row, q_row + num_queries, M, HV, HVP, False, True)
        position_M = low + tl.arange(0, M)
        inside_M = (position_M >= first) & (position_M < num_keys)
        offset = head * tokens.to(tl.int64) + row
        lse_M = tl.load(lse + offset + tl.arange(0, M), mask=inside_M, other=float("inf"))
        delta_M = tl.load(delta + offset + tl.arange(0, M), mask=inside_M, other=0.0)
        position_M1 = position_M[:, None]
        keys_N = tl.arange(0, N)
        factor = scale * 1.4426950408889634
        dq_MH = tl.zeros([M, HP], tl.float32)
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
                dq_MH = queries_step(dq_MH, q_MH, do_MV, lse_M, delta_M, k_NH, v_NV, num_keys, position_M1, (start + keys_N)[None, :],
                                     factor, scale, cap, base, window, prefix, SOFTCAP, WINDOW, PREFIX, False, PRECISION)  # fmt: skip
        for index in tl.range(0, num_masked):
            start = masked_tile(index, run, full, end, begin, items, block, N, LISTED)
            k_NH = load_tile(k, k_row + start, kv_head * k_head, k_stride, k_row, k_row + num_keys, N, H, HP, TMA, True)
            v_NV = load_tile(v, k_row + start, kv_head * v_head, v_stride, k_row, k_row + num_keys, N, HV, HVP, TMA, True)
            dq_MH = queries_step(dq_MH, q_MH, do_MV, lse_M, delta_M, k_NH, v_NV, num_keys, position_M1, (start + keys_N)[None, :],
                                 factor, scale, cap, base, window, prefix, SOFTCAP, WINDOW, PREFIX, True, PRECISION)  # fmt: skip
        store_tile(dq, dq_MH * scale, row, head * dq_head, dq_stride, q_row, q_row + num_queries, M, H, HP)
