"""Safetensors files that appear whole or not at all: from tensors at hand, or part by part for a matrix larger than memory should hold.

Format: 8 bytes of length, a JSON header (name → dtype, shape, data_offsets), then the tensors end to end. The same tensors give the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

COPY_BYTES = 1 << 20

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write; under its name once the block has ended without an error and the disk has it."""
    partial = path.with_name(path.name + ".new")
    with open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _header(entries: Mapping[str, tuple[torch.dtype, tuple[int, ...], int]]) -> bytes:
    start, header = 0, {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape, nbytes) in entries.items():
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, start + nbytes]}  # pyright: ignore[reportArgumentType]
        start += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _ordered(tensors: Iterable[tuple[str, torch.dtype]]) -> list[str]:
    # wide elements first keeps every tensor aligned to its element
    return [name for name, _ in sorted(tensors, key=lambda entry: (-entry[1].itemsize, entry[0]))]


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes one file of tensors."""
    order = _ordered((name, tensor.dtype) for name, tensor in tensors.items())
    with whole_file(path) as file:
        file.write(_header({name: (tensors[name].dtype, tuple(tensors[name].shape), tensors[name].nbytes) for name in order}))
        for name in order:
            if tensors[name].numel():
                file.write(_bytes(tensors[name]))


def write_in_chunks(path: Path, chunks: Iterable[Mapping[str, Tensor]], *, fixed: Mapping[str, Tensor]) -> dict[str, int]:
    """Writes one file out of chunks, each a part of every tensor along its first dimension, in order; `fixed` tensors are whole. Returns bytes by name.

    Beside a chunk it takes a MiB: each tensor's parts wait in a file of their own until all sizes are known.
    """
    waiting: dict[str, BinaryIO] = {}
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    try:
        for chunk in chunks:
            for name, tensor in chunk.items():
                if name not in waiting:
                    waiting[name] = open(path.with_name(f"{path.name}.part{len(waiting)}"), "w+b")  # noqa: SIM115 (closed below)
                    shapes[name] = (tensor.dtype, (0, *tensor.shape[1:]))
                dtype, shape = shapes[name]
                shapes[name] = (dtype, (shape[0] + tensor.shape[0], *shape[1:]))
                waiting[name].write(_bytes(tensor))
        sizes = {name: file.tell() for name, file in waiting.items()} | {name: tensor.nbytes for name, tensor in fixed.items()}
        entries = {name: (*shapes[name], sizes[name]) for name in waiting}
        entries |= {name: (tensor.dtype, tuple(tensor.shape), tensor.nbytes) for name, tensor in fixed.items()}
        order = _ordered((name, entry[0]) for name, entry in entries.items())
        with whole_file(path) as out:
            out.write(_header({name: entries[name] for name in order}))
            for name in order:
                if name in fixed:
                    out.write(_bytes(fixed[name]))
                    continue
                waiting[name].seek(0)
                while piece := waiting[name].read(COPY_BYTES):
                    out.write(piece)
        return sizes
    finally:
        for file in waiting.values():
            file.close()
            os.unlink(file.name)
