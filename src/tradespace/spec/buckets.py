"""The numbers of rows at which products run on a CPU in bf16 and fp16: a step's rows are padded up to the next bucket.

torch's library compiles a kernel for every shape that it meets and keeps up to 1,024 of them, about 0.6 MB each: an engine whose steps are all of different
lengths would grow by hundreds of MB. With a few buckets, all of them are compiled while the engine is built, and counted.
"""

from __future__ import annotations

from bisect import bisect_left

_STEPS = (1, 2, 4, 8, 16, 32, 48, 64, 96)


def bucket(rows: int) -> int:
    """The next bucket: 1, 2, 4, 8, 16, 32, 48, 64, 96, then every power of two and its half more; 0 stays 0.

    >>> [bucket(rows) for rows in (0, 1, 3, 33, 97, 129, 512, 700)]
    [0, 1, 4, 48, 128, 192, 512, 768]
    """
    if rows <= _STEPS[-1]:
        return _STEPS[bisect_left(_STEPS, rows)] if rows else 0
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if rows <= power * 3 // 4 else power


def buckets_up_to(rows: int) -> tuple[int, ...]:
    """All buckets that steps of at most `rows` rows use.

    >>> buckets_up_to(40)
    (1, 2, 4, 8, 16, 32, 48)
    """
    found = [1]
    while found[-1] < rows:
        found.append(bucket(found[-1] + 1))
    return tuple(found)
