"""One query a sequence over a paged cache: the G query heads of a key-value head meet its keys, which are split over programs and, within one, over its warps.

Keys and values are the left operands of both products and queries the right ones, so that few heads are padded to 8 and not to 16; each warp has keys, peaks
and sums of its own until the end. The last of a head's splits to finish combines their results in a fixed order (arXiv:2311.01282), so that results are the
same bits every time. Coded stores are read as 16-bit pairs of neighbouring channels, as in `triton_paged_kernel.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tradespace.kernels.attention.triton_flash_forward import capped
from tradespace.kernels.attention.triton_paged_kernel import scale_at
from tradespace.kernels.linear.triton_decode import two
from tradespace.kernels.triton_launch import after, release


@triton.jit
def channels(source, slot, slot_stride, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """(W, N, PADDED) elements of these slots; zeros past WIDTH."""
    place = tl.arange(0, PADDED)
    pointers = source + slot[:, :, None] * slot_stride + place[None, None, :]
    if WIDTH < PADDED:
        found = tl.load(pointers, mask=(place < WIDTH)[None, None, :], other=0)
    else:
        found = tl.load(pointers)
    return found


@triton.jit
def queries(q, head_stride, FIRST: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
            W: tl.constexpr):  # fmt: skip
    """(W, PADDED, GP): channels FIRST, FIRST + STEP, … of G heads, the same for every warp."""
    channel = FIRST + STEP * tl.arange(0, PADDED)
    g = tl.arange(0, GP)
    found = tl.load(q + g[None, :, None] * head_stride + channel[None, None, :], mask=(g < G)[None, :, None] & (channel < WIDTH)[None, None, :], other=0.0)
    return tl.broadcast_to(tl.permute(found, (0, 2, 1)), (W, PADDED, GP))


@triton.jit
def ask(source, offset):
    """Asks for the line at each of these offsets (elements)."""
    address = (source + offset).to(tl.int64)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def put(target, acc, more, head_stride, CODE: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, HV: tl.constexpr, HVP: tl.constexpr):
    """Writes (HVP, GP) values of G heads; `more` holds odd channels of coded ones."""
    place = tl.arange(0, HVP)
    g = tl.arange(0, GP)
    if CODE == "plain":
        tl.store(target + g[None, :] * head_stride + place[:, None], acc.to(target.dtype.element_ty), mask=(g < G)[None, :] & (place < HV)[:, None])
    else:
        known = (g < G)[None, :] & (place < HV // 2)[:, None]
        at = target + g[None, :] * head_stride + 2 * place[:, None]
        tl.store(at, acc.to(target.dtype.element_ty), mask=known)
        tl.store(at + 1, more.to(target.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["window", "splits"])
def decode_kernel(
    q, keys, values, key_scales, value_scales, tables, lengths, sinks, out, partial, sums, counters,
    scale, cap, window, splits, num_kv, q_stride, q_head, k_slot, k_head, v_slot, v_head, s_slot, s_head, table_stride, out_stride, out_head,
    G: tl.constexpr, GP: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, HP: tl.constexpr, HVP: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    P: tl.constexpr, LEAST: tl.constexpr, CODE: tl.constexpr, PAIRED: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per sequence, key-value head and split; W warps with N keys each at a time. GP: G padded to what the tensor cores take; GROUP: to a power
    of two; SPLIT: splits, likewise. LEAST: keys of a split.
    """
    pair = tl.program_id(0)
    split = tl.program_id(1)
    sequence = pair // num_kv
    head = pair % num_kv
    half = head % 2
    scale_head = head // 2 if PAIRED else head * s_head
    length = tl.load(lengths + sequence)  # lengths and tables are older than the kernel before this one
    low = 0
    if WINDOW == 1:
        low = tl.maximum(length - window, 0)
    if WINDOW == 2:
        low = tl.maximum(length - 1, 0) // window * window
    step: tl.constexpr = W * N
    tiles = (length + step - 1) // step
    # a short sequence takes fewer splits than there are programs: each has LEAST keys at least, and who has none does nothing at all
    each = tl.maximum((tiles - low // step + splits - 1) // splits, (LEAST + step - 1) // step)
    active = tl.maximum((tiles - low // step + each - 1) // each, 1)
    begin = low // step + split * each
    end = tl.minimum(begin + each, tiles)
    keys += head * k_head
    values += head * v_head
    tables += sequence * table_stride
    lane = tl.arange(0, W)[:, None] * N + tl.arange(0, N)[None, :]
    if FAST:  # the first keys and values, less the newest, which may not be written yet, come to L2 while the kernel before this one ends
        position = tl.maximum(tl.minimum(begin * step + lane, length - 2), 0)
        slot = tl.load(tables + position // P).to(tl.int64) * P + position % P
        ask(keys, slot * k_slot)
        ask(values, slot * v_slot)
    after(PDL)
    pairs: tl.constexpr = 1 if CODE == "plain" else 2
    own_q = q + sequence.to(tl.int64) * q_stride + head * G * q_head
    q0 = queries(own_q, q_head, 0, pairs, H, HP, G, GP, W)
    q1 = q0
    if CODE != "plain":
        q1 = queries(own_q, q_head, 1, pairs, H, HP, G, GP, W)
    acc = tl.zeros([W, HVP, GP], tl.float32)
    more = acc
    peak = tl.zeros([W, GP], tl.float32) + float("-inf")
    total = tl.zeros([W, GP], tl.float32)
    for index in tl.range(begin, end, num_stages=STAGES):
        position = index * step + lane
        near = tl.minimum(position, length - 1)  # past the end the last token is read again, and hidden
        slot = tl.load(tables + near // P).to(tl.int64) * P + near % P
        k = channels(keys, slot, k_slot, H if CODE == "plain" else H // 2, HP)
        if CODE == "plain":
            scores = tl.dot(k.to(q0.dtype), q0, input_precision=PRECISION)
        else:
            k0, k1 = two(k, CODE == "fp8", FAST, q0.dtype)
            scores = tl.dot(k0, q0, input_precision=PRECISION)
            scores = tl.dot(k1, q1, scores, input_precision=PRECISION)
        if CODE == "int8":
            scores *= scale_at(key_scales + scale_head, slot, s_slot, half, PAIRED)[:, :, None]
        if SOFTCAP:
            scores = capped(scores, scale, cap) * (cap * 1.4426950408889634)
        else:
            scores *= scale * 1.4426950408889634
        scores = tl.where(((position >= low) & (position < length))[:, :, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        ground = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.math.exp2(scores - ground[:, None, :])
        keep = tl.math.exp2(peak - ground)
        total = total * keep + tl.sum(weights, 1)
        peak = new_peak
        v = channels(values, slot, v_slot, HV if CODE == "plain" else HV // 2, HVP)
        if CODE == "int8":
            weights *= scale_at(value_scales + scale_head, slot, s_slot, half, PAIRED)[:, :, None]
        if CODE == "plain":
            acc = tl.dot(tl.permute(v.to(q0.dtype), (0, 2, 1)), weights.to(q0.dtype), acc * keep[:, None, :], input_precision=PRECISION)
        else:
            v0, v1 = two(v, CODE == "fp8", FAST, q0.dtype)
            acc = tl.dot(tl.permute(v0, (0, 2, 1)), weights.to(q0.dtype), acc * keep[:, None, :], input_precision=PRECISION)
            more = tl.dot(tl.permute(v1, (0, 2, 1)), weights.to(q0.dtype), more * keep[:, None, :], input_precision=PRECISION)
    release(PDL)
    most = tl.max(peak, 0)
    ground = tl.where(most == float("-inf"), 0.0, most)
    share = tl.math.exp2(peak - ground[None, :])
    total = tl.sum(total * share, 0)
    acc = tl.sum(acc * share[:, None, :], 0)
    if CODE != "plain":
        more = tl.sum(more * share[:, None, :], 0)
    else:
        more = acc
    g = tl.arange(0, GP)
    if (SPLIT == 1) | (active == 1):
        if split == 0:
            if SINKS:
                sink = tl.load(sinks + head * G + g, mask=g < G, other=0.0).to(tl.float32) * 1.4426950408889634
                ground = tl.maximum(most, sink)
                shrink = tl.math.exp2(most - ground)
                acc, more = acc * shrink[None, :], more * shrink[None, :]
                total = total * shrink + tl.math.exp2(sink - ground)
            some = tl.where(total == 0.0, 1.0, total)[None, :]
            put(out + sequence.to(tl.int64) * out_stride + head * G * out_head, acc / some, more / some, out_head, CODE, G, GP, HV, HVP)
    elif split < active:
        some = tl.where(total == 0.0, 1.0, total)
        own = pair * G * splits + split
        put(partial + own * HV, acc / some[None, :], more / some[None, :], splits * HV, CODE, G, GP, HV, HVP)
        tl.store(sums + own + g * splits, most + tl.math.log2(some), mask=g < G)
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
