"""A file's pieces, each read by several threads while the one before is used: from the page cache one thread copies a few GB/s, which a device outruns.

The two buffers are pinned where there is a CUDA device, so that a transfer from them needs no further copy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from tradespace.errors import CorruptFileError, InputError
from tradespace.loading.rawfile import open_weight_file, read_exactly

READERS = 4
LEAST_BYTES = 1 << 20  # of a thread's share


def read_ahead(path: Path, pieces: Sequence[tuple[int, int]], what: str) -> Iterator[Tensor]:
    """The bytes (uint8) of each (offset, size) in order. **Each is a view of a buffer that the next but one is read into**: it is free to be overwritten as
    soon as the next is asked for. Raises CorruptFileError, with `what` in front, where the file ends before, InputError where it cannot be read.
    """
    if not pieces:
        return
    most = max(size for _, size in pieces)
    buffers = [torch.empty(most, dtype=torch.uint8, pin_memory=torch.cuda.is_available()) for _ in range(min(2, len(pieces)))]
    with open_weight_file(path, buffering=0) as (file, _), ThreadPoolExecutor(READERS) as readers:
        if not hasattr(os, "preadv"):  # no reading at a place without moving the file's own
            for offset, size in pieces:
                read_exactly(file, buffers[0][:size].numpy().data, offset, what)
                yield buffers[0][:size]
            return

        def begin(index: int) -> list[Future[None]]:
            offset, size = pieces[index]
            view, share = buffers[index % 2][:size].numpy().data, max(LEAST_BYTES, -(-size // READERS))
            parts = range(0, size, share)
            return [readers.submit(_read_at, file.fileno(), view[at : at + share], offset + at, what) for at in parts]

        under_way = begin(0)
        for index, (_, size) in enumerate(pieces):
            for part in under_way:
                part.result()
            under_way = begin(index + 1) if index + 1 < len(pieces) else []
            yield buffers[index % 2][:size]


def _read_at(descriptor: int, buffer: memoryview, offset_bytes: int, what: str) -> None:
    have_bytes = 0
    while have_bytes < len(buffer):
        try:
            got_bytes = os.preadv(descriptor, [buffer[have_bytes:]], offset_bytes + have_bytes)
        except OSError as error:
            raise InputError(f"{what}: reading failed at byte {offset_bytes + have_bytes}: {error}") from error
        if not got_bytes:
            raise CorruptFileError(f"{what}: needs {len(buffer)} bytes from byte {offset_bytes} on, has {have_bytes}: the file ends there. Fetch it again")
        have_bytes += got_bytes
