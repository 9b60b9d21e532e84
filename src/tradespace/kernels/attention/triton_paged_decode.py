"""One query a sequence over a paged cache: the G query heads of a key-value head meet its keys, which may be split over programs.

A short context takes one program, whose result is the answer. Results of a longer one's splits are combined in a fixed order (arXiv:2311.01282), so that they
are the same bits every time: by the last split to finish, or, where there may be many, by a kernel of its own that many programs share. What is older than the
kernel before this one (lengths, tables, all keys but the newest) is read or asked for before that has ended.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tradespace.kernels.attention.triton_paged_kernel import met, put, queries
from tradespace.kernels.triton_launch import after, release
from tradespace.kernels.triton_prefetch import ask


@triton.jit
def shares(length, window, splits, N: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr):
    """(first tile, tiles, tiles of a split, splits that have any) of a sequence. A short one takes fewer splits than there are programs: each has LEAST keys at
    least, and who has none does nothing at all."""
    low = 0
    if WINDOW == 1:
        low = tl.maximum(length - window, 0)
    if WINDOW == 2:
        low = tl.maximum(length - 1, 0) // window * window
    first = low // N
    tiles = (length + N - 1) // N
    each = tl.maximum((tiles - first + splits - 1) // splits, (LEAST + N - 1) // N)
    return first, tiles, each, tl.maximum((tiles - first + each - 1) // each, 1)


@triton.jit(do_not_specialize=["window", "prefix", "splits"])
def decode_kernel(
    q, keys, values, key_scales, value_scales, tables, lengths, sinks, out, partial, sums, counters,
    scale, cap, window, prefix, splits, num_kv, q_stride, q_head, k_slot, k_head, v_slot, v_head, s_slot, s_head, table_stride, out_stride, out_head,
    G: tl.constexpr, GP: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, HP: tl.constexpr, HVP: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    CODE: tl.constexpr, PAIRED: tl.constexpr,
    LEAST: tl.constexpr, SPLIT: tl.constexpr, GATHER: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per sequence, key-value head and split. GP: G padded to what the tensor cores take; GROUP: to a power of two; SPLIT: splits, likewise;
    GATHER: `gather_kernel` follows."""
    pair = tl.program_id(0)
    split = tl.program_id(1)
    sequence = pair // num_kv
    head = pair % num_kv
    half = head % 2
    scale_head = head // 2 if PAIRED else head * s_head
    length = tl.load(lengths + sequence)
    first, tiles, each, active = shares(length, window, splits, N, LEAST, WINDOW)  # pyright: ignore[reportGeneralTypeIssues]
    begin = first + split * each
    end = tl.minimum(begin + each, tiles)
    lane = tl.arange(0, N)
    if FAST:
        position = tl.maximum(tl.minimum(begin * N + lane, length - 2), 0)
        slot = tl.load(tables + sequence * table_stride + position // P).to(tl.int64) * P + position % P
        ask(keys + head * k_head, slot * k_slot)
        ask(values + head * v_head, slot * v_slot)
    after(PDL)
    g = tl.arange(0, GP)
    there = g < G
    at = sequence.to(tl.int64) * q_stride + (head * G + g) * q_head
    step: tl.constexpr = 1 if CODE == "plain" else 2
    q0 = queries(q, at, there, q_stride, 0, step, H, HP)
    q1 = q0
    if CODE != "plain":
        q1 = queries(q, at, there, q_stride, 1, step, H, HP)
    acc = tl.zeros([GP, HVP], tl.float32)
    more = acc
    peak = tl.zeros([GP], tl.float32) + float("-inf")
    total = tl.zeros([GP], tl.float32)
    position_M1 = tl.zeros([GP, 1], tl.int32) + (length - 1)
    for index in tl.range(begin, end, num_stages=STAGES):
        acc, more, peak, total = met(
            acc, more, peak, total, q0, q1, keys + head * k_head, values + head * v_head, key_scales + scale_head, value_scales + scale_head,
            tables + sequence * table_stride, index * N, length, position_M1, scale * 1.4426950408889634, scale, cap, window, prefix, k_slot, v_slot,
            s_slot, half, CODE, PAIRED, N, P, H, HV, HP, HVP, WINDOW, False, SOFTCAP, True, FAST, PRECISION,
        )  # fmt: skip
    release(PDL)
    if (SPLIT == 1) | (active == 1):
        if split == 0:
            if SINKS:
                sink = tl.load(sinks + head * G + g, mask=there, other=0.0).to(tl.float32) * 1.4426950408889634
                ground = tl.maximum(peak, sink)
                shrink = tl.math.exp2(peak - ground)
                acc, more = acc * shrink[:, None], more * shrink[:, None]
                total = total * shrink + tl.math.exp2(sink - ground)
            some = tl.where(total == 0.0, 1.0, total)
            put(out, acc / some[:, None], more / some[:, None], sequence.to(tl.int64) * out_stride + (head * G + g) * out_head, there, CODE, HV, HVP)
    elif split < active:
        some = tl.where(total == 0.0, 1.0, total)
        own = ((sequence * num_kv + head) * G + g) * splits + split
        put(partial, acc / some[:, None], more / some[:, None], own * HV, there & (begin < end), CODE, HV, HVP)
        tl.store(sums + own, peak + tl.math.log2(some), mask=there)
        if not GATHER:
            tl.debug_barrier()
            if tl.atomic_add(counters + pair, 1, sem="acq_rel") == active - 1:
                combine(partial, sums, sinks + head * G, out + sequence.to(tl.int64) * out_stride + head * G * out_head, pair * G, splits, active, out_head,
                        G, GROUP, HV, SPLIT, SINKS)  # fmt: skip
                tl.store(counters + pair, 0)


@triton.jit
def combine(partial, sums, sinks, out, first, splits, active, out_head, G: tl.constexpr, GROUP: tl.constexpr, HV: tl.constexpr, SPLIT: tl.constexpr,
            SINKS: tl.constexpr):  # fmt: skip
    """The softmax over the `active` splits of G heads, from each split's own result and log-sum."""
    g = tl.arange(0, GROUP)
    channel = tl.arange(0, triton.next_power_of_2(HV))
    index = tl.arange(0, SPLIT)
    known = (g < G)[:, None] & (index < active)[None, :]
    weight = tl.load(sums + (first + g)[:, None] * splits + index[None, :], mask=known, other=float("-inf"), cache_modifier=".cg")
    peak = tl.max(weight, 1)
    if SINKS:
        sink = tl.load(sinks + g, mask=g < G, other=0.0).to(tl.float32) * 1.4426950408889634
        peak = tl.maximum(peak, sink)
    ground = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.math.exp2(weight - ground[:, None]), 1)
    if SINKS:
        total += tl.math.exp2(sink - ground)
    acc = tl.zeros([GROUP, triton.next_power_of_2(HV)], tl.float32)
    ways: tl.constexpr = 8
    way = tl.arange(0, ways)
    for start in tl.range(0, active, ways):
        place = (first + g)[None, :] * splits + (start + way)[:, None]
        inside = (start + way < active)[:, None] & (g < G)[None, :]
        share = tl.math.exp2(tl.load(sums + place, mask=inside, other=float("-inf"), cache_modifier=".cg") - ground[None, :])
        used = (share > 0.0)[:, :, None] & (channel < HV)[None, None, :]
        found = tl.load(partial + place[:, :, None] * HV + channel[None, None, :], mask=used, other=0.0, cache_modifier=".cg")
        acc += tl.sum(found * share[:, :, None], 0)
    some = tl.where(total == 0.0, 1.0, total)
    tl.store(out + g[:, None] * out_head + channel[None, :], (acc / some[:, None]).to(out.dtype.element_ty), mask=(g < G)[:, None] & (channel < HV)[None, :])


@triton.jit(do_not_specialize=["window", "splits"])
def gather_kernel(
    partial, sums, sinks, lengths, out, window, splits, num_q, out_stride, out_head,
    HV: tl.constexpr, C: tl.constexpr, N: tl.constexpr, LEAST: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The softmax over a query head's splits, from each one's own result and log-sum: one program per sequence and head, and C of its channels. A sequence that
    took one split is left alone."""
    row = tl.program_id(0)
    sequence = row // num_q
    head = row % num_q
    channel = tl.program_id(1) * C + tl.arange(0, C)
    _, _, _, active = shares(tl.load(lengths + sequence), window, splits, N, LEAST, WINDOW)  # pyright: ignore[reportGeneralTypeIssues]
    index = tl.arange(0, SPLIT)
    known = (index < active) & (active > 1)
    after(PDL)
    weight = tl.load(sums + row * splits + index, mask=known, other=float("-inf"))
    used = (weight > float("-inf"))[:, None] & (channel < HV)[None, :]
    found = tl.load(partial + (row * splits + index)[:, None] * HV + channel[None, :], mask=used, other=0.0)
    release(PDL)
    peak = tl.max(weight, 0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        peak = tl.maximum(peak, sink)
    ground = tl.where(peak == float("-inf"), 0.0, peak)
    share = tl.math.exp2(weight - ground)
    total = tl.sum(share, 0)
    if SINKS:
        total += tl.math.exp2(sink - ground)
    acc = tl.sum(found * share[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + sequence.to(tl.int64) * out_stride + head * out_head + channel, acc.to(out.dtype.element_ty), mask=(channel < HV) & (active > 1))
