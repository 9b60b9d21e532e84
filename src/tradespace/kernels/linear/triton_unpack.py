"""Rows of a packed weight as floats (Triton): a tile for the dense product of many rows of activations, or the rows that ids name, an embedding's look-up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tradespace.kernels.attention.triton_interpreter import interprets
from tradespace.kernels.linear.packed import PackedWeight
from tradespace.kernels.linear.triton_decode import four, two
from tradespace.kernels.linear.triton_rows import TYPES, table_of
from tradespace.kernels.linear.triton_rows_kernel import scale_of, zero_of
from tradespace.kernels.triton_launch import ceil_div, launch

ROWS = 16


@triton.jit
def put_run(out, row, column, values, factor, inside, num_columns, stride):
    """values · factor of a run of columns, in out's dtype."""
    scaled = values.to(tl.float32) * factor[:, None]
    tl.store(
        out + row[:, None].to(tl.int64) * stride + column[None, :], scaled.to(out.dtype.element_ty), mask=inside[:, None] & (column < num_columns)[None, :]
    )


@triton.jit(do_not_specialize=["first", "num_rows", "first_row"])
def unpack_kernel(
    ids, codes, scale, zero, nested, table, offset, out, first, num_rows, num_columns, row_stride, scale_stride, first_row, num_groups, out_stride,
    KIND: tl.constexpr, BYTES: tl.constexpr, NESTED: tl.constexpr, ZERO: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, IDS: tl.constexpr,
    FAST: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program per ROWS rows and chunk of columns."""
    target = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(1)
    inside = target < num_rows
    if IDS:
        rows = tl.load(ids + target, mask=inside, other=0).to(tl.int32)
    else:
        rows = first + tl.where(inside, target, 0)
    if KIND == "bf16" or KIND == "w8a8":
        place = chunk * K + tl.arange(0, K)
        found = tl.load(codes + rows[:, None].to(tl.int64) * row_stride + place[None, :], mask=inside[:, None] & (place < num_columns)[None, :], other=0)
        factor = tl.full([ROWS], 1.0, tl.float32)
        if KIND == "w8a8":
            factor = tl.load(scale + rows)
        put_run(out, target, place, found, factor, inside, num_columns, out_stride)
    else:
        per_row: tl.constexpr = K // 2 if (KIND == "int8" or KIND == "fp8") else K // 4
        place = tl.arange(0, per_row)
        column = chunk * K + place
        at = (rows // 32).to(tl.int64) * row_stride + chunk * (32 * per_row) + rows % 32 * per_row
        words = tl.load(codes + at[:, None] + place[None, :], mask=inside[:, None], other=0)
        if KIND == "int8" or KIND == "fp8":
            w0, w1 = two(words, KIND == "fp8", FAST, TYPE)  # pyright: ignore[reportGeneralTypeIssues]
            factor = tl.load(scale + rows)
            put_run(out, target, column, w0, factor, inside, num_columns, out_stride)
            put_run(out, target, column + per_row, w1, factor, inside, num_columns, out_stride)
        else:
            w0, w1, w2, w3 = four(words, table, KIND == "nf4", FAST, TYPE)  # pyright: ignore[reportGeneralTypeIssues]
            group = chunk * GROUPS
            factor = scale_of(scale, nested, table, offset, scale_stride, first_row, num_groups, rows, group, BYTES, NESTED)
            after = factor
            shift = tl.zeros([ROWS], tl.float32)
            shift_after = shift
            if ZERO:
                shift = zero_of(zero, scale_stride, rows, group)
                shift_after = shift
            if GROUPS == 2:
                after = scale_of(scale, nested, table, offset, scale_stride, first_row, num_groups, rows, group + 1, BYTES, NESTED)
                if ZERO:
                    shift_after = zero_of(zero, scale_stride, rows, group + 1)
            put_run(out, target, column, w0.to(tl.float32) - shift[:, None], factor, inside, num_columns, out_stride)
            put_run(out, target, column + per_row, w1.to(tl.float32) - shift[:, None], factor, inside, num_columns, out_stride)
            put_run(out, target, column + 2 * per_row, w2.to(tl.float32) - shift_after[:, None], after, inside, num_columns, out_stride)
            put_run(out, target, column + 3 * per_row, w3.to(tl.float32) - shift_after[:, None], after, inside, num_columns, out_stride)


def unpack_into(weight: PackedWeight, out_RC: Tensor, *, first: int = 0, ids_T: Tensor | None = None) -> Tensor:
    """Rows first … first + R - 1 of the weight, or those that `ids_T` names, as floats of out's dtype; levels of nf4 as bf16 holds them where out is bf16."""
    rows = len(out_RC) if ids_T is None else len(ids_T)
    if rows == 0:
        return out_RC
    layout = weight.layout
    grouped = layout.group is not None and layout.group > 0
    codes = weight.codes if layout.plain else weight.codes.view(torch.int16)
    scale, zero = (x.view(torch.int32) if grouped and x is not None else x for x in (weight.scale, weight.zero))
    K = 128 if layout.plain else layout.columns
    none = out_RC
    launch(
        unpack_kernel, (ceil_div(rows, ROWS), ceil_div(weight.columns, K)), out_RC,
        none if ids_T is None else ids_T, codes, none if scale is None else scale, none if zero is None else zero,
        none if weight.nested is None else weight.nested, table_of(out_RC.device), none if weight.offset is None else weight.offset, out_RC,
        first, rows, weight.columns, codes.stride(0), 0 if scale is None else scale.stride(0), weight.first_row, layout.groups(weight.columns),
        out_RC.stride(0),
        KIND=layout.kind, BYTES=layout.scale_bytes if grouped else 0, NESTED=max(1, layout.nested), ZERO=zero is not None,
        GROUPS=layout.columns // layout.group if grouped and layout.group else 1, K=K, IDS=ids_T is not None,
        FAST=out_RC.dtype == torch.bfloat16 and not interprets(), TYPE=TYPES[out_RC.dtype], ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return out_RC
