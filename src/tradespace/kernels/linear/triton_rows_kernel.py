"""Few rows of activations times a packed matrix, on tensor cores: a tile of N weight rows is decoded in registers and meets all activations at once.

The weights are the left operand (N x K), the activations the right one (K x M, M = 8 … 128 tokens): padding costs no bandwidth. Long columns are split; the
last of a tile's splits to finish adds the partial sums, in a fixed order, so results are the same bits every time. Group scales meet fp32 sums, not weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tradespace.kernels.activation.triton_functions import activation
from tradespace.kernels.linear.triton_decode import e4m3, four, two
from tradespace.kernels.triton_launch import after, release
from tradespace.kernels.triton_prefetch import ask


@triton.jit
def in_word(word, index, BYTES: tl.constexpr):
    """The `index`-th number of so many bytes in each 32-bit word."""
    return word >> (index % (4 // BYTES) * (8 * BYTES)) & (65535 if BYTES == 2 else 255)


@triton.jit
def scale_of(scale, nested, table, offset, stride, first_row, num_groups, rows, group, BYTES: tl.constexpr, NESTED: tl.constexpr):
    """Scales of a tile's rows in one group: fp32, fp16, or codes of nf4's nested scales. Words of 4 bytes, which an asynchronous copy can bring."""
    word = tl.load(scale + group // (4 // BYTES) * stride + rows)
    if BYTES == 4:
        found = word.to(tl.float32, bitcast=True)
    elif BYTES == 2:
        found = in_word(word, group, 2).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        place = ((first_row + rows).to(tl.int64) * num_groups + group) // NESTED
        found = tl.load(table + 16 + in_word(word, group, 1)) * tl.load(nested + place) + tl.load(offset)
    return found


@triton.jit
def zero_of(zero, stride, rows, group):
    """Zero points of a tile's rows in one group, less the 8 that decoding has taken off already."""
    return in_word(tl.load(zero + group // 4 * stride + rows), group, 1).to(tl.float32) - 8.0


@triton.jit
def less(w, shift, FAST: tl.constexpr):
    """w - shift of its row: small whole numbers, exact in 16 bits (the interpreter has no arithmetic of those)."""
    return w - shift[:, None].to(w.dtype) if FAST else (w.to(tl.float32) - shift[:, None]).to(w.dtype)


@triton.jit
def run_of(x, t, column, num_tokens, num_columns, x_stride, EVEN: tl.constexpr):
    """Activations of all tokens at some columns, as the right side of a product: (columns, M)."""
    seen = (t < num_tokens)[:, None]
    if not EVEN:
        seen = seen & (column < num_columns)[None, :]
    return tl.trans(tl.load(x + t[:, None] * x_stride + column[None, :], mask=seen, other=0.0))


@triton.jit
def met(acc, w, x0, x1, x2, x3, scale, zero, nested, table, offset, rows, group, scale_stride, first_row, num_groups,
        KIND: tl.constexpr, BYTES: tl.constexpr, NESTED: tl.constexpr, ZERO: tl.constexpr, GROUPS: tl.constexpr, FAST: tl.constexpr,
        TYPE: tl.constexpr):  # fmt: skip
    """acc += a tile of codes times its runs of activations. `group`: the tile's first."""
    if KIND == "bf16":
        acc = tl.dot(w.to(TYPE), x0, acc)
    elif KIND == "w8a8":
        acc = tl.dot(w, x0, acc, out_dtype=tl.int32)
    elif KIND == "f8a8":
        if FAST:  # sums of a tile alone: within a product of e4m3 they keep 14 bits
            acc += tl.dot(w, x0)
        else:
            acc += tl.dot(e4m3(w.to(tl.int32)), e4m3(x0.to(tl.int32)), input_precision="ieee")
    elif KIND == "int8" or KIND == "fp8":
        w0, w1 = two(w, KIND == "fp8", FAST, TYPE)  # pyright: ignore[reportGeneralTypeIssues]
        acc = tl.dot(w0, x0, acc)
        acc = tl.dot(w1, x1, acc)
    else:
        w0, w1, w2, w3 = four(w, table, KIND == "nf4", FAST, TYPE)  # pyright: ignore[reportGeneralTypeIssues]
        factor = scale_of(scale, nested, table, offset, scale_stride, first_row, num_groups, rows, group, BYTES, NESTED)
        if ZERO:
            shift = zero_of(zero, scale_stride, rows, group)
            w0, w1 = less(w0, shift, FAST), less(w1, shift, FAST)
            if GROUPS == 2:
                shift = zero_of(zero, scale_stride, rows, group + 1)
            w2, w3 = less(w2, shift, FAST), less(w3, shift, FAST)
        part = tl.dot(w0, x0)
        part = tl.dot(w1, x1, part)
        if GROUPS == 2:  # half of the chunk's columns each
            acc += part * factor[:, None]
            factor = scale_of(scale, nested, table, offset, scale_stride, first_row, num_groups, rows, group + 1, BYTES, NESTED)
            part = tl.dot(w2, x2)
        else:
            part = tl.dot(w2, x2, part)
        part = tl.dot(w3, x3, part)
        acc += part * factor[:, None]
    return acc


@triton.jit
def product(acc, up, x, codes, scale, zero, nested, table, offset, begin, end, rows, t, gate_rows, num_tokens, num_columns, x_stride, row_stride,
            scale_stride, first_row, num_groups, KIND: tl.constexpr, BYTES: tl.constexpr, NESTED: tl.constexpr, ZERO: tl.constexpr,
            GROUPS: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr, TYPE: tl.constexpr,
            STAGES: tl.constexpr):  # fmt: skip
    """acc (N, M) += W[rows] · x over tiles begin … end - 1 of K columns; GATED: up likewise of rows + gate_rows, with the same activations.
    row_stride: 16-bit elements from one row (of chunks) to the next.
    """
    PLAIN: tl.constexpr = KIND == "bf16" or KIND == "w8a8" or KIND == "f8a8"
    upper = rows + gate_rows
    if PLAIN:
        per_row: tl.constexpr = K
        step: tl.constexpr = K
        first = rows.to(tl.int64) * row_stride
        above = upper.to(tl.int64) * row_stride
    else:
        per_row: tl.constexpr = K // 2 if (KIND == "int8" or KIND == "fp8") else K // 4
        step: tl.constexpr = 32 * per_row
        first = (rows // 32).to(tl.int64) * row_stride + rows % 32 * per_row
        above = (upper // 32).to(tl.int64) * row_stride + upper % 32 * per_row
    place = tl.arange(0, per_row)
    for index in tl.range(begin, end, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        start = index * K
        known = (start + place < num_columns)[None, :]  # only where rows lie as they are may a tile reach past them
        if EVEN or not PLAIN:
            w = tl.load(codes + first[:, None] + place[None, :] + index * step)
        else:
            w = tl.load(codes + first[:, None] + place[None, :] + index * step, mask=known, other=0 if KIND == "w8a8" else 0.0)
        x0 = run_of(x, t, start + place, num_tokens, num_columns, x_stride, EVEN)
        x1 = x0
        x2 = x0
        x3 = x0
        if not PLAIN:
            x1 = run_of(x, t, start + per_row + place, num_tokens, num_columns, x_stride, EVEN)
            if KIND != "int8" and KIND != "fp8":
                x2 = run_of(x, t, start + 2 * per_row + place, num_tokens, num_columns, x_stride, EVEN)
                x3 = run_of(x, t, start + 3 * per_row + place, num_tokens, num_columns, x_stride, EVEN)
        acc = met(acc, w, x0, x1, x2, x3, scale, zero, nested, table, offset, rows, index * GROUPS, scale_stride, first_row, num_groups, KIND, BYTES,
                  NESTED, ZERO, GROUPS, FAST, TYPE)  # fmt: skip
        if GATED != "none":
            if EVEN or not PLAIN:
                w = tl.load(codes + above[:, None] + place[None, :] + index * step)
            else:
                w = tl.load(codes + above[:, None] + place[None, :] + index * step, mask=known, other=0 if KIND == "w8a8" else 0.0)
            up = met(up, w, x0, x1, x2, x3, scale, zero, nested, table, offset, upper, index * GROUPS, scale_stride, first_row, num_groups, KIND, BYTES,
                     NESTED, ZERO, GROUPS, FAST, TYPE)  # fmt: skip
    return acc, up


@triton.jit
def ask_chunks(codes, first, end_row, begin, end, row_stride, KIND: tl.constexpr, N: tl.constexpr, K: tl.constexpr, AHEAD: tl.constexpr):
    """Asks for the first AHEAD chunks of a program's rows: weights are all that is known while the kernel before this one still runs."""
    per_row: tl.constexpr = K // 2 if (KIND == "int8" or KIND == "fp8") else K // 4
    row = tl.minimum(first + 32 * tl.arange(0, N // 32), end_row - 1)
    line = begin * (32 * per_row) + 64 * tl.arange(0, AHEAD * per_row // 2)  # of 128 bytes
    ask(codes, (row // 32).to(tl.int64)[:, None] * row_stride + tl.minimum(line, end * (32 * per_row) - 64)[None, :])


@triton.jit(do_not_specialize=["num_tokens", "first_row", "splits"])
def rows_kernel(
    x, x_scale, codes, scale, zero, nested, table, offset, bias, residual, squares, out, next_weight, next_x, next_squares, partial, counters,
    num_tokens, num_rows, num_columns, x_stride, row_stride, scale_stride, out_stride, residual_stride, next_stride, first_row, num_groups,
    gate_rows, splits, num_squares, eps,
    KIND: tl.constexpr, BYTES: tl.constexpr, NESTED: tl.constexpr, ZERO: tl.constexpr, GROUPS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SQUARES: tl.constexpr, NEXT: tl.constexpr, HALVES: tl.constexpr,
    EVEN: tl.constexpr, FAST: tl.constexpr,
    TYPE: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per tile of N rows of the result (gated: of both its halves) and split of the columns. SQUARES, NEXT: partial sums of a token, padded;
    HALVES: there is one token, with two of each.
    AHEAD: chunks that are asked for before the kernel before this one has ended."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n = tile * N + tl.arange(0, N)
    rows = tl.minimum(n, num_rows - 1)
    t = tl.arange(0, M)
    steps = (num_columns + K - 1) // K
    each = (steps + splits - 1) // splits
    begin = tl.minimum(split * each, steps)
    end = tl.minimum(begin + each, steps)
    if AHEAD > 0:
        ask_chunks(codes, tile * N, num_rows, begin, end, row_stride, KIND, N, K, AHEAD)
        if GATED != "none":
            ask_chunks(codes, tile * N + gate_rows, gate_rows + num_rows, begin, end, row_stride, KIND, N, K, AHEAD)
    after(PDL)
    inside = (n < num_rows)[:, None] & (t < num_tokens)[None, :]
    if SQUARES > 0:  # what the end needs is on its way before the loop
        entries = tl.arange(0, SQUARES)
        parts = tl.load(squares + t[:, None] * num_squares + entries[None, :], mask=(t < num_tokens)[:, None] & (entries < num_squares)[None, :], other=0.0)
    if RESIDUAL:
        added = tl.load(residual + t[None, :] * residual_stride + n[:, None], mask=inside, other=0.0)
    if NEXT > 0:
        next_norm = tl.load(next_weight + rows)
    acc = tl.zeros([N, M], tl.int32 if KIND == "w8a8" else tl.float32)
    acc, up = product(acc, acc, x, codes, scale, zero, nested, table, offset, begin, end, rows, t, gate_rows, num_tokens, num_columns, x_stride, row_stride,
                      scale_stride, first_row, num_groups, KIND, BYTES, NESTED, ZERO, GROUPS, K, GATED, EVEN, FAST, TYPE, STAGES)  # fmt: skip
    release(PDL)
    if KIND == "w8a8" or KIND == "f8a8":
        per_token = tl.load(x_scale + t, mask=t < num_tokens, other=0.0)[None, :]
        acc = acc.to(tl.float32) * per_token
        up = up.to(tl.float32) * per_token
    last = True
    if SPLIT:
        halves: tl.constexpr = 1 if GATED == "none" else 2
        place = tl.arange(0, N)[:, None] * M + t[None, :]
        own = partial + (tile * splits + split) * halves * N * M
        tl.store(own + place, acc)
        if GATED != "none":
            tl.store(own + N * M + place, up)
        tl.debug_barrier()
        last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == splits - 1
        if last:
            acc = tl.zeros([N, M], tl.float32)
            up = tl.zeros([N, M], tl.float32)
            for index in tl.range(0, splits):
                other = partial + (tile * splits + index) * halves * N * M
                acc += tl.load(other + place, cache_modifier=".cg")
                if GATED != "none":
                    up += tl.load(other + N * M + place, cache_modifier=".cg")
            tl.store(counters + tile, 0)
    if last:
        if BYTES == 0 and KIND != "bf16":
            acc *= tl.load(scale + rows)[:, None]
        if SQUARES > 0:  # the rms of the row that the activations come from
            root = tl.rsqrt(tl.sum(parts, 1) / num_columns + eps)
            acc *= root[None, :]
            if GATED != "none":
                up *= root[None, :]
        if BIAS:
            acc += tl.load(bias + rows).to(tl.float32)[:, None]
        if GATED != "none":
            if BYTES == 0 and KIND != "bf16":
                up *= tl.load(scale + rows + gate_rows)[:, None]
            if BIAS:
                up += tl.load(bias + rows + gate_rows).to(tl.float32)[:, None]
            acc = activation(acc, GATED) * up
        if RESIDUAL:
            acc += added.to(tl.float32)
        rounded = acc.to(out.dtype.element_ty)
        tl.store(out + t[None, :] * out_stride + n[:, None], rounded, mask=inside)
        if NEXT > 0:
            held = tl.where(inside, rounded.to(tl.float32), 0.0)
            weighted = held * next_norm.to(tl.float32)[:, None]
            tl.store(next_x + t[None, :] * next_stride + n[:, None], weighted.to(next_x.dtype.element_ty), mask=inside)
            blocks = (num_rows + 31) // 32
            wide: tl.constexpr = 2 if HALVES else 1
            first = tile * (N // 32)
            here = tl.arange(0, N // 32)
            spread = tl.where(here == 0, 1.0, 0.0)[:, None] * tl.sum(held * held, 0)[None, :]
            known = (first + here < blocks)[:, None] & (t < num_tokens)[None, :]
            tl.store(next_squares + t[None, :] * (blocks * wide) + (first + here)[:, None], spread, mask=known)
            if HALVES:  # of one row, whose blocks others may compute by halves
                tl.store(next_squares + (blocks + first + here)[:, None] + t[None, :], tl.zeros_like(spread), mask=known)
