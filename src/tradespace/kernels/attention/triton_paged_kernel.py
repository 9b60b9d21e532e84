"""Attention of a ragged step over a paged cache: keys and values are found through block tables and decoded in registers.

Rows of a program are tokens times the G query heads of one key-value head. Coded stores are read as 16-bit pairs of neighbouring channels: even channels meet
even ones in one product, odd ones in another, and nothing is ever shuffled. Decoding: `triton_paged_decode.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tradespace.kernels.attention.triton_flash_forward import capped
from tradespace.kernels.attention.triton_flash_mask import sees
from tradespace.kernels.linear.triton_decode import two


@triton.jit
def channels(source, rows, row_stride, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """(rows, PADDED) elements from `source` on; zeros past WIDTH."""
    place = tl.arange(0, PADDED)
    pointers = source + rows[:, None] * row_stride + place[None, :]
    if WIDTH < PADDED:
        found = tl.load(pointers, mask=(place < WIDTH)[None, :], other=0)
    else:
        found = tl.load(pointers)
    return found


@triton.jit
def scale_at(scales, slot, s_slot, half, PAIRED: tl.constexpr):
    """fp32 scales of these slots. PAIRED: two heads' fp16 in a word, of which `half` is ours: words can come by asynchronous copies, halves cannot."""
    if PAIRED:
        word = tl.load(scales + slot * s_slot)
        found = (word >> half * 16 & 65535).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        found = tl.load(scales + slot * s_slot)
    return found.to(tl.float32)


@triton.jit
def queries(q, rows, seen, stride, FIRST: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Channels FIRST, FIRST + STEP, … of query rows that begin at `q + rows`."""
    place = tl.arange(0, PADDED)
    return tl.load(q + rows[:, None] + (FIRST + STEP * place)[None, :], mask=seen[:, None] & (FIRST + STEP * place < WIDTH)[None, :], other=0.0)


@triton.jit
def even_and_odd(q, rows, seen, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """(even, odd) channels of query rows that begin at `q + rows`, read side by side: for many rows, where reading every other channel twice takes longer."""
    place = tl.arange(0, 2 * PADDED)
    both = tl.load(q + rows[:, None] + place[None, :], mask=seen[:, None] & (place < WIDTH)[None, :], other=0.0)
    return tl.split(tl.reshape(both, (rows.shape[0], PADDED, 2)))


@triton.jit
def met(acc, more, peak, total, q0, q1, keys, values, key_scales, value_scales, table, first, length, position_M1,
        factor, scale, cap, window, prefix, k_slot, v_slot, s_slot, half, CODE: tl.constexpr, PAIRED: tl.constexpr, N: tl.constexpr,
        P: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
        HP: tl.constexpr, HVP: tl.constexpr, WINDOW: tl.constexpr, PREFIX: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, FAST: tl.constexpr,
        PRECISION: tl.constexpr):  # fmt: skip
    """N keys from position `first` on into (acc, more, peak, total); `more` holds odd channels of coded values. Scores are in units of log 2."""
    position = first + tl.arange(0, N)
    near = tl.minimum(position, length - 1)  # past the end the last token is read again, and hidden
    slot = tl.load(table + near // P).to(tl.int64) * P + near % P
    k = channels(keys, slot, k_slot, H if CODE == "plain" else H // 2, HP)
    if CODE == "plain":
        scores = tl.dot(q0, tl.trans(k.to(q0.dtype)), input_precision=PRECISION)
    else:
        k0, k1 = two(k, CODE == "fp8", FAST, q0.dtype)
        scores = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        scores = tl.dot(q1, tl.trans(k1), scores, input_precision=PRECISION)
    if CODE == "int8":
        scores *= scale_at(key_scales, slot, s_slot, half, PAIRED)[None, :]
    if SOFTCAP:
        scores = capped(scores, scale, cap) * (cap * 1.4426950408889634)
    else:
        scores = scores * factor
    if MASKED:
        seen = sees(position_M1, position[None, :], 0, window, prefix, WINDOW, PREFIX) & (position < length)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    ground = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.math.exp2(scores - ground[:, None])
    keep = tl.math.exp2(peak - ground)
    total = total * keep + tl.sum(weights, 1)
    v = channels(values, slot, v_slot, HV if CODE == "plain" else HV // 2, HVP)
    if CODE == "int8":
        weights *= scale_at(value_scales, slot, s_slot, half, PAIRED)[None, :]
    if CODE == "plain":
        acc = tl.dot(weights.to(q0.dtype), v.to(q0.dtype), acc * keep[:, None], input_precision=PRECISION)
    else:
        v0, v1 = two(v, CODE == "fp8", FAST, q0.dtype)
        acc = tl.dot(weights.to(q0.dtype), v0, acc * keep[:, None], input_precision=PRECISION)
        more = tl.dot(weights.to(q0.dtype), v1, more * keep[:, None], input_precision=PRECISION)
    return acc, more, new_peak, total


@triton.jit
def put(target, acc, more, rows, seen, CODE: tl.constexpr, HV: tl.constexpr, HVP: tl.constexpr):
    """Writes rows of values that begin at `target + rows`."""
    place = tl.arange(0, HVP)
    if CODE == "plain":
        tl.store(target + rows[:, None] + place[None, :], acc.to(target.dtype.element_ty), mask=seen[:, None] & (place < HV)[None, :])
    else:
        known = seen[:, None] & (place < HV // 2)[None, :]
        tl.store(target + rows[:, None] + 2 * place[None, :], acc.to(target.dtype.element_ty), mask=known)
        tl.store(target + rows[:, None] + 2 * place[None, :] + 1, more.to(target.dtype.element_ty), mask=known)


@triton.jit
def put_many(target, acc, more, rows, seen, CODE: tl.constexpr, HV: tl.constexpr, HVP: tl.constexpr):
    """As `put`, of many rows: coded channels are brought together first, so that a row is written in one piece."""
    if CODE == "plain":
        put(target, acc, more, rows, seen, CODE, HV, HVP)
    else:
        place = tl.arange(0, 2 * HVP)
        both = tl.interleave(acc.to(target.dtype.element_ty), more.to(target.dtype.element_ty))
        tl.store(target + rows[:, None] + place[None, :], both, mask=seen[:, None] & (place < HV)[None, :])


@triton.jit(do_not_specialize=["num_sequences", "window", "prefix"])
def ragged_kernel(
    q, keys, values, key_scales, value_scales, tables, starts, lengths, sinks, out,
    scale, cap, window, prefix, num_sequences, q_stride, q_head, k_slot, k_head, v_slot, v_head, s_slot, s_head, table_stride, out_stride, out_head,
    G: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, HP: tl.constexpr, HVP: tl.constexpr, N: tl.constexpr,
    P: tl.constexpr, CODE: tl.constexpr, PAIRED: tl.constexpr,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per tile of M / GROUP tokens and key-value head. Tiles of sequence b are numbered from starts[b] // tokens + b on: some are empty."""
    tokens: tl.constexpr = M // GROUP
    number = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tiles of a sequence have most to do
    head = tl.program_id(1)
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // tokens + middle <= number:
            low = middle
        else:
            high = middle
    query_row = tl.load(starts + low)
    num_queries = tl.load(starts + low + 1) - query_row
    first_token = (number - query_row // tokens - low) * tokens
    if (first_token < num_queries) & (first_token >= 0):
        half = head % 2
        scale_head = head // 2 if PAIRED else head * s_head
        length = tl.load(lengths + low)
        row = tl.arange(0, M)
        token = first_token + row // GROUP
        g = row % GROUP
        there = (token < num_queries) & (g < G)
        past = length - num_queries
        position_M1 = (past + token)[:, None]
        at = (query_row + token).to(tl.int64) * q_stride + (head * G + g) * q_head
        if CODE == "plain":
            q0 = queries(q, at, there, q_stride, 0, 1, H, HP)
            q1 = q0
        else:
            q0, q1 = even_and_odd(q, at, there, H, HP)  # pyright: ignore[reportGeneralTypeIssues]
        earliest = past + first_token
        stop = tl.minimum(earliest + tokens, length)
        if PREFIX:  # noqa: SIM102 - the first is known when the kernel is compiled
            if earliest < prefix:
                stop = tl.maximum(stop, tl.minimum(prefix, length))
        begin = 0
        full = (earliest + 1) // N
        if WINDOW == 1:
            begin = tl.maximum(earliest - window + 1, 0) // N
            full = begin
        if WINDOW == 2:
            begin = earliest // window * window // N
            full = begin
        acc = tl.zeros([M, HVP], tl.float32)
        more = acc
        if SINKS:
            peak = tl.load(sinks + head * G + g, mask=g < G, other=0.0).to(tl.float32) * 1.4426950408889634
            total = tl.zeros([M], tl.float32) + 1.0
        else:
            peak = tl.zeros([M], tl.float32) + float("-inf")
            total = tl.zeros([M], tl.float32)
        factor = scale * 1.4426950408889634
        for index in tl.range(begin, full, num_stages=STAGES):
            acc, more, peak, total = met(
                acc, more, peak, total, q0, q1, keys + head * k_head, values + head * v_head, key_scales + scale_head, value_scales + scale_head,
                tables + low * table_stride, index * N, length, position_M1, factor, scale, cap, window, prefix, k_slot, v_slot, s_slot, half,
                CODE, PAIRED, N, P, H, HV, HP, HVP, WINDOW, PREFIX, SOFTCAP, False, FAST, PRECISION,
            )  # fmt: skip
        for index in tl.range(full, (stop + N - 1) // N, num_stages=STAGES):
            acc, more, peak, total = met(
                acc, more, peak, total, q0, q1, keys + head * k_head, values + head * v_head, key_scales + scale_head, value_scales + scale_head,
                tables + low * table_stride, index * N, length, position_M1, factor, scale, cap, window, prefix, k_slot, v_slot, s_slot, half,
                CODE, PAIRED, N, P, H, HV, HP, HVP, WINDOW, PREFIX, SOFTCAP, True, FAST, PRECISION,
            )  # fmt: skip
        some = tl.where(total == 0.0, 1.0, total)
        put_many(
            out, acc / some[:, None], more / some[:, None], (query_row + token).to(tl.int64) * out_stride + (head * G + g) * out_head, there, CODE, HV, HVP
        )
