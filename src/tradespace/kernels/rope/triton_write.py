"""One kernel between the fused qkv product and attention: norms of heads, rotation, and keys and values into the paged cache, quantized on the way (Triton).

Reads each row of qkv once and writes q where it is asked for. What a store holds is what `kv/store/` specifies, to the bit where arithmetic is in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tradespace.kernels.attention.paged import Planes
from tradespace.kernels.attention.triton_interpreter import interprets
from tradespace.kernels.triton_launch import after, ceil_div, launch, padded, present, release
from tradespace.spec.mixers import Attention

HEADS = 8  # of a token in one program


@triton.jit
def nearest(x):
    """x rounded to a whole number, halves to even; for magnitudes below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def e4m3_bits(x):
    """The e4m3 bit pattern (int32) nearest to x, ties to even, magnitudes cut at 448: where the hardware has no conversion, and under the interpreter."""
    size = tl.minimum(tl.abs(x), 448.0)
    exponent = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    unit = ((exponent - 3 + 127) << 23).to(tl.float32, bitcast=True)  # one step of the mantissa there
    steps = nearest(size / unit).to(tl.int32)  # 0 … 16, the last being the next exponent's first
    return ((exponent + 6) * 8 + steps) | tl.where(x < 0, 128, 0)


@triton.jit
def stored(plane, scales, at, scale_at, x, known, CODE: tl.constexpr, FAST: tl.constexpr):
    """Writes rows of heads' elements (heads, elements) as their store holds them."""
    if CODE == "int8":
        scale = (tl.max(tl.where(known, tl.abs(x), 0.0), 1) / 127.0).to(tl.float16)
        codes = nearest(x / tl.maximum(scale.to(tl.float32), 6e-8)[:, None])
        codes = tl.minimum(tl.maximum(codes, -127.0), 127.0)
        tl.store(plane + at, codes.to(tl.int8), mask=known)
        tl.store(scales + scale_at, scale, mask=tl.max(known.to(tl.int32), 1) > 0)
    elif CODE == "fp8":
        if FAST:
            cut = tl.minimum(tl.maximum(x, -448.0), 448.0)
            tl.store(plane + at, cut.to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=known)
        else:
            tl.store(plane + at, e4m3_bits(x).to(tl.uint8), mask=known)
    else:
        tl.store(plane + at, x.to(plane.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["eps"])
def write_kernel(
    qkv, table, positions, slots, keys, values, key_scales, value_scales, q_out, k_out, q_norm, k_norm,
    eps, num_q, num_kv, qkv_stride, k_slot, k_head, v_slot, v_head, s_slot, s_head, out_stride, out_head,
    H: tl.constexpr, HV: tl.constexpr, HP: tl.constexpr, HVP: tl.constexpr, DIMS: tl.constexpr, INTERLEAVED: tl.constexpr, NORMS: tl.constexpr,
    CODE: tl.constexpr, KEPT: tl.constexpr, HEADS: tl.constexpr, FAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per token and HEADS heads: blocks of queries, then of keys, then of values."""
    token = tl.program_id(0)
    block = tl.program_id(1)
    release(PDL)
    row = qkv + token.to(tl.int64) * qkv_stride
    slot = tl.load(slots + token)  # slots, positions and the table are older than the kernel before this one
    if DIMS > 0:
        half: tl.constexpr = DIMS // 2
        h = tl.arange(0, HP)
        if INTERLEAVED:
            partner = h ^ 1
            pair = h // 2
            sign = tl.where(h % 2 == 0, -1.0, 1.0)
        else:
            partner = tl.where(h < half, h + half, h - half)
            pair = h % half
            sign = tl.where(h < half, -1.0, 1.0)
        turned = h < DIMS
        angle = table + (tl.load(positions + token) * half + pair) * 2
        cos = tl.load(angle, mask=turned, other=1.0)
        sin = tl.load(angle + 1, mask=turned, other=0.0) * sign
    after(PDL)
    q_blocks = (num_q + HEADS - 1) // HEADS
    kv_blocks = (num_kv + HEADS - 1) // HEADS
    if block < q_blocks + kv_blocks:
        is_key = block >= q_blocks
        first = tl.where(is_key, (block - q_blocks) * HEADS, block * HEADS)
        head = first + tl.arange(0, HEADS)
        inside = head < tl.where(is_key, num_kv, num_q)
        h = tl.arange(0, HP)
        known = inside[:, None] & (h < H)[None, :]
        source = row + tl.where(is_key, num_q * H, 0)
        place = head[:, None] * H
        x = tl.load(source + place + h[None, :], mask=known, other=0.0).to(tl.float32)
        if NORMS:
            root = tl.rsqrt(tl.sum(x * x, 1) / H + eps)[:, None]
            weight = tl.where(is_key, tl.load(k_norm + h, mask=h < H, other=0.0).to(tl.float32), tl.load(q_norm + h, mask=h < H, other=0.0).to(tl.float32))
            x = (x * root * weight[None, :]).to(qkv.dtype.element_ty).to(tl.float32)
        if DIMS > 0:
            other = tl.load(source + place + partner[None, :], mask=turned[None, :] & known, other=0.0).to(tl.float32)
            if NORMS:
                there = turned & (h < H)
                weight = tl.where(
                    is_key,
                    tl.load(k_norm + partner, mask=there, other=0.0).to(tl.float32),
                    tl.load(q_norm + partner, mask=there, other=0.0).to(tl.float32),
                )
                other = (other * root * weight[None, :]).to(qkv.dtype.element_ty).to(tl.float32)
            x = tl.where(turned[None, :], x * cos[None, :] + other * sin[None, :], x)
        rounded = x.to(qkv.dtype.element_ty)
        if is_key:
            at = slot * k_slot + head[:, None] * k_head + h[None, :]
            stored(keys, key_scales, at, slot * s_slot + head * s_head, rounded.to(tl.float32), known & (slot >= 0), CODE, FAST)
            if KEPT:
                tl.store(k_out + (token.to(tl.int64) * num_kv + head[:, None]) * H + h[None, :], rounded.to(k_out.dtype.element_ty), mask=known)
        else:
            out = q_out + token.to(tl.int64) * out_stride + head[:, None] * out_head + h[None, :]
            tl.store(out, rounded.to(q_out.dtype.element_ty), mask=known)
    else:
        head = (block - q_blocks - kv_blocks) * HEADS + tl.arange(0, HEADS)
        c = tl.arange(0, HVP)
        used = (head < num_kv)[:, None] & (c < HV)[None, :]
        value = tl.load(row + (num_q + num_kv) * H + head[:, None] * HV + c[None, :], mask=used, other=0.0).to(tl.float32)
        at = slot * v_slot + head[:, None] * v_head + c[None, :]
        stored(values, value_scales, at, slot * s_slot + head * s_head, value, used & (slot >= 0), CODE, FAST)


def rope_write(
    qkv_TX: Tensor,
    table_SH2: Tensor | None,
    positions_T: Tensor,
    slots_T: Tensor,
    planes: Planes,
    q_out_TNH: Tensor,
    mixer: Attention,
    *,
    k_out_TKH: Tensor | None = None,
    q_norm_H: Tensor | None = None,
    k_norm_H: Tensor | None = None,
    eps: float = 0.0,
    pdl: bool = False,
) -> Tensor:
    """q_out_TNH, rotated; keys (rotated) and values of the step into `planes` at `slots_T` (-1: a row of padding, which writes nothing).

    qkv_TX holds q, k and v side by side. `table_SH2` is `RopeTable.table_SH2`, None where nothing rotates. q_out is no view of qkv: other programs still
    read there. Norms are per head (Qwen3), before the rotation. `k_out_TKH`, in one piece, gets the rotated keys, too.
    """
    T = len(qkv_TX)
    if T == 0:
        return q_out_TNH
    assert qkv_TX.shape[1] == mixer.N * mixer.H + mixer.K * (mixer.H + mixer.Hv), f"rows of {qkv_TX.shape[1]} hold other heads"
    assert qkv_TX.stride(1) == q_out_TNH.stride(2) == 1 and (mixer.rope is None) == (table_SH2 is None), "rows in one piece; a table where there is a rope"
    scales = planes.key_scales
    strides = (
        qkv_TX.stride(0),
        *(x for plane in (planes.keys, planes.values) for x in (plane.stride(0), plane.stride(1))),
        *((0, 0) if scales is None else (scales.stride(0), scales.stride(1))),
        *(q_out_TNH.stride(0), q_out_TNH.stride(1)),
    )
    some = qkv_TX
    heads = min(HEADS, padded(max(mixer.N, mixer.K)))
    blocks = ceil_div(mixer.N, heads) + 2 * ceil_div(mixer.K, heads)
    launch(
        write_kernel, (T, blocks), qkv_TX,
        qkv_TX, present(table_SH2, some), positions_T, slots_T, planes.keys, planes.values, present(planes.key_scales, some),
        present(planes.value_scales, some), q_out_TNH, present(k_out_TKH, some), present(q_norm_H, some), present(k_norm_H, some), eps, mixer.N, mixer.K,
        *strides,
        H=mixer.H, HV=mixer.Hv, HP=padded(mixer.H), HVP=padded(mixer.Hv),
        DIMS=0 if mixer.rope is None else mixer.rope.dims,
        INTERLEAVED=mixer.rope is not None and mixer.rope.interleaved, NORMS=q_norm_H is not None, CODE=planes.code, KEPT=k_out_TKH is not None,
        HEADS=heads, FAST=not interprets(), num_warps=4, pdl=pdl, beside=True,
    )  # fmt: skip
    return q_out_TNH
