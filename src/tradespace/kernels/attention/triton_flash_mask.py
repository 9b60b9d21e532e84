"""Which tiles of keys a tile of queries meets, and which pairs inside a tile see each other: shared by the forward and the backward kernels.

Positions count from the segment's first key. A tile lies in one of two loops: where every pair sees each other nothing is masked; the rest, at most two runs
of tiles (where a window begins, and at the diagonal), is masked pair by pair. Patterns of blocks come as lists of tiles instead of runs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keys_of(low, high, first, num_keys, base, window, prefix, WINDOW: tl.constexpr, PREFIX: tl.constexpr, N: tl.constexpr):
    """(run, full, end, stop): keys that queries at positions low … high - 1 meet, in tiles of N.

    Masked from run to full, unmasked from full to end, masked from end to stop.
    """
    low = tl.maximum(low, first)
    high = tl.minimum(high, num_keys)
    run = 0
    all_from = 0
    all_to = low + 1
    stop = high
    if WINDOW == 1:
        run = tl.maximum(low - window + 1, 0)
        all_from = tl.maximum(high - window, 0)
    if WINDOW == 2:
        run = tl.maximum((low + base) // window * window - base, 0)
        all_from = tl.maximum((high - 1 + base) // window * window - base, 0)
    if PREFIX:
        reach = tl.minimum(prefix, num_keys)
        if low < reach:
            stop = tl.maximum(stop, reach)
            all_to = tl.maximum(all_to, reach)
    run = run // N * N
    full = tl.minimum((all_from + N - 1) // N * N, (stop + N - 1) // N * N)
    end = tl.maximum(full, all_to // N * N)
    return run, full, end, stop


@triton.jit
def queries_of(low, high, first, num_keys, base, window, prefix, WINDOW: tl.constexpr, PREFIX: tl.constexpr, M: tl.constexpr):
    """The same for keys at positions low … high - 1: the queries that meet them, in tiles of M. Unmasked tiles are whole: no row before the step's first."""
    high = tl.minimum(high, num_keys)
    whole = (first + M - 1) // M * M
    run = tl.maximum(low, first)
    full = tl.maximum((high - 1 + M - 1) // M * M, whole)
    stop = num_keys
    all_to = num_keys
    if WINDOW == 1:
        stop = tl.minimum(stop, high - 1 + window)
        all_to = tl.minimum(all_to, low + window)
    if WINDOW == 2:
        stop = tl.minimum(stop, ((high - 1 + base) // window + 1) * window - base)
        all_to = tl.minimum(all_to, ((low + base) // window + 1) * window - base)
    if PREFIX:
        if low < prefix:
            run = first
        if high <= prefix:
            full = whole
    run = run // M * M
    full = tl.maximum(run, tl.minimum(full, (stop + M - 1) // M * M))
    end = tl.maximum(full, all_to // M * M)
    return run, full, end, stop


@triton.jit
def sees(query, key, base, window, prefix, WINDOW: tl.constexpr, PREFIX: tl.constexpr):
    """Whether queries see keys, for positions that broadcast against each other. Rows and keys past the segment's end are the caller's concern."""
    seen = key <= query
    if PREFIX:
        seen = seen | ((key < prefix) & (query < prefix))
    if WINDOW == 1:
        seen = seen & (key > query - window)
    if WINDOW == 2:
        seen = seen & (key + base >= (query + base) // window * window)
    return seen


@triton.jit
def masked_tile(index, run, full, end, begin, items, block, SIZE: tl.constexpr, LISTED: tl.constexpr):
    """Where the index-th masked tile of SIZE positions starts: in a run before `full` or from `end` on, or in the blocks listed from `begin` on."""
    if LISTED:
        each = block // SIZE
        start = tl.load(items + begin + index // each) * block + index % each * SIZE
    else:
        before = (full - run) // SIZE
        start = tl.where(index < before, run + index * SIZE, end + (index - before) * SIZE)
    return start


@triton.jit
def load_tile(source, row, column, stride, low, high, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, TMA: tl.constexpr, CHECK: tl.constexpr):
    """ROWS rows of a matrix from `row` on, WIDTH columns from `column` on, zeros up to PADDED; with CHECK rows outside low … high - 1 are zeros, too.

    TMA: `source` is a descriptor, whose box is the tile: rows outside are then whatever lies there (or zeros past the end), and the caller masks them.
    """
    if TMA:
        tile = source.load([row, column])
    else:
        rows = tl.arange(0, ROWS)
        columns = tl.arange(0, PADDED)
        pointers = source + row.to(tl.int64) * stride + column + rows[:, None] * stride + columns[None, :]
        if CHECK:
            inside = (row + rows >= low) & (row + rows < high)
            tile = tl.load(pointers, mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0)
        elif WIDTH < PADDED:
            tile = tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(target, tile, row, column, stride, low, high, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Writes the rows of low … high - 1 and WIDTH columns of a tile."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    pointers = target + row.to(tl.int64) * stride + column + rows[:, None] * stride + columns[None, :]
    inside = (row + rows >= low) & (row + rows < high)
    tl.store(pointers, tile.to(target.dtype.element_ty), mask=inside[:, None] & (columns < WIDTH)[None, :])
