"""Read bandwidth by working-set size, without a compiler: the reduction that comes nearest to a bare load loop.

With torch it is `sum` over fp32 on all threads. Beside an AVX-512 load loop in C on two Zen 5 cores it read 151 against 112 to 208 GB/s at 2 MiB, 170 against
132 to 186 at 8 MiB, 102 against 86 to 101 at 32 MiB and 40 to 48 against 39 to 44 from 128 MiB on: the same within the spread of a shared machine. A dot
product comes near in main memory and loses 60% inside the caches; max, aminmax and matrix-vector products are bound by arithmetic throughout (a bf16 one
reads at 17 GB/s where 47 are to be had). Without torch it is numpy: bitwise `or` over int64, one slice for each thread (numpy lets go of the
interpreter's lock inside a reduction), true in main memory, a half to a fifth of the truth inside the
caches, where handing out the slices takes longer than reading them: there it is a lower bound, and labelled so.

Each point is the best of several repeats: what the memory can do, not what neighbours left of it. Limits: one size is read again and again, so every
size up to the last cache measures that cache; a cache shared with other tenants holds less than its size; beyond it the figure is one moment's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tradespace.measure.timer import time_repeats
from tradespace.units import GiB, MiB

_SIZES = tuple(size * MiB for size in (2, 8, 32, 128, 512, 1024))
_BYTES_PER_POINT = 2 * GiB  # read per point: small sets are repeated more often, for the clock's sake


def working_set_sizes(free_bytes: int, last_cache_bytes: int | None) -> tuple[int, ...]:
    """2 MiB to 1 GiB in steps of 4, at most an eighth of the free memory, and where that allows it at least to four times the last cache.

    >>> [size // 2**20 for size in working_set_sizes(2 * 2**30, None)]
    [2, 8, 32, 128]
    >>> [size // 2**20 for size in working_set_sizes(64 * 2**30, 768 * 2**20)][-2:]
    [1024, 3072]
    """
    sizes = _SIZES
    if last_cache_bytes is not None and 4 * last_cache_bytes > sizes[-1]:
        sizes = (*sizes, 4 * last_cache_bytes)
    return tuple(size for size in sizes if size <= max(_SIZES[0], free_bytes // 8))


def bandwidth_curve(sizes: tuple[int, ...], threads: int, *, backend: str, budget_s: float = 2.0) -> Iterator[tuple[int, float]]:
    """(working set in bytes, bytes/s) for each size, ascending. `backend`: "torch" or "numpy". Takes about `budget_s` and the largest size in memory."""
    buffer = np.empty(max(sizes), dtype=np.uint8)
    buffer.fill(1)  # untouched pages are all one page of zeros, and would be read out of the first cache
    with ThreadPoolExecutor(threads) as pool:
        for size in sizes:
            read = _torch_reader(buffer[:size]) if backend == "torch" else _numpy_reader(buffer[:size], threads, pool)
            repeats = min(200, max(6, _BYTES_PER_POINT // size))
            yield size, size / min(time_repeats(read, repeats=repeats, budget_s=budget_s / len(sizes)))


def at_least_as_fast_as_larger(curve: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """The curve (ascending sizes) with every rate at least that of the next larger set: what reads a gigabyte at a rate reads any part of it at that rate.
    A smaller set that came out slower was not: its threads were waiting to start.

    >>> at_least_as_fast_as_larger([(1, 5.0), (2, 9.0), (3, 4.0)])
    ((1, 9.0), (2, 9.0), (3, 4.0))
    """
    rates = [rate for _, rate in curve]
    return tuple((size, max(rates[index:])) for index, (size, _) in enumerate(curve))


def _torch_reader(data: np.ndarray) -> Callable[[], object]:
    import torch

    values = torch.from_numpy(data.view(np.float32))
    return values.sum


def _numpy_reader(data: np.ndarray, threads: int, pool: ThreadPoolExecutor) -> Callable[[], object]:
    slices = np.array_split(data.view(np.int64), threads)
    return lambda: list(pool.map(np.bitwise_or.reduce, slices))
