"""GGUF files, versions 2 and 3: a reader for files that nobody vouches for, and (from `gguf_writer`) a small writer.

The reader believes nothing: each count, length and offset is held against the bytes that the file still has before anything is allocated for it,
so time and memory are linear in the header that is there (at most `MAX_HEADER_BYTES`), not in what it claims. It keeps no tensor data:
`loading.dequantize` reads that by row. Every string (keys, names, values, tokens within arrays) must be valid UTF-8; one that is not is refused and
named, since no `str` could hold it without loss.

Format: the GGUF specification of the ggml project (docs/gguf.md). Needs no torch.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tradespace.errors import CorruptFileError, InputError, UnsupportedError
from tradespace.loading.ggml_types import (
    ARRAY,
    DEFAULT_ALIGNMENT,
    GGML_TYPES,
    MAGIC,
    MAX_DIMS,
    REMOVED_TYPES,
    STRING,
    TYPE_NAMES,
    VALUE_TYPES,
    VERSIONS,
    tensor_nbytes,
)
from tradespace.loading.gguf_split import join_parts
from tradespace.loading.gguf_writer import write_gguf
from tradespace.loading.rawfile import open_weight_file, read_exactly, shown
from tradespace.units import MiB, format_bytes

__all__ = ["GGML_TYPES", "GGUFFile", "GGUFTensor", "read_floats", "read_gguf", "read_raw", "tensor_nbytes", "write_gguf"]

# a quarter-million tokens with their merges take about 20 MiB; what is far beyond that is no vocabulary
MAX_HEADER_BYTES = 64 * MiB
MAX_ARRAY_DEPTH = 4
_LEAST_BYTES = {STRING: 8, ARRAY: 12}  # of one value: an empty string is its length, an empty array its type and its length
_LEAST_PAIR_BYTES = 8 + 4 + 1  # length of the key, type of the value, one byte of value
_LEAST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # length of the name, number of dimensions, one dimension, type, offset


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """Where a tensor lies. `shape` is row-major, outermost first: ggml's `ne` reversed. `offset_bytes` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset_bytes: int
    nbytes: int
    path: Path


@dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """A parsed header. `metadata` holds plain Python values (arrays as lists); `metadata_types` their GGUF types, such as "uint32" or "array[string]"."""

    path: Path
    version: int
    metadata: dict[str, Any] = field(repr=False)
    metadata_types: dict[str, str] = field(repr=False)
    tensors: dict[str, GGUFTensor] = field(repr=False)
    alignment: int


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Reads and checks the whole header. Linear in the header's bytes; no tensor data is read.

    Any part of a split model (NAME-00001-of-00003.gguf) stands for the whole: its other parts are looked for beside it.

    Raises CorruptFileError (file, field, need, have) for a file that is truncated or inconsistent, UnsupportedError for a big-endian file, another version
    or a tensor type that ggml has dropped, InputError where there is no such file or a part is missing. A tensor of a known type that tradespace cannot
    dequantize is fine here: reading its data is what raises.
    """
    found = _read_one(Path(path))
    return join_parts(found, _read_one) if found.metadata.get("split.count", 0) > 1 else found


def _read_one(path: Path) -> GGUFFile:
    with open_weight_file(path) as (file, size_bytes):
        held = _HELD[-1] if _HELD else None
        if held is None:
            return _parse(_Cursor(file, path, size_bytes))
        stated = os.fstat(file.fileno())
        key = (path, stated.st_dev, stated.st_ino, stated.st_size, stated.st_mtime_ns)
        if key not in held:
            held[key] = _parse(_Cursor(file, path, size_bytes))
        return held[key]


_BLOCK_BYTES = 256 * 1024  # of strings that are read at once
_LONG_LIST = 4096
_HELD: list[dict[tuple[Path, int, int, int, int], GGUFFile]] = []


class HeldHeaders:
    """Headers that are parsed already."""

    def __init__(self, parsed: dict[tuple[Path, int, int, int, int], GGUFFile]):
        self._parsed = parsed

    def drop_vocabularies(self) -> None:
        """Lets go of long lists, which are a tokenizer's and take tens of megabytes. What reads them after that finds none."""
        for file in self._parsed.values():
            for key in [key for key, value in file.metadata.items() if isinstance(value, list) and len(value) > _LONG_LIST]:
                del file.metadata[key], file.metadata_types[key]


@contextmanager
def held_headers() -> Iterator[HeldHeaders]:
    """Within it a header is parsed once, however many parts of the program read it: a vocabulary of a quarter of a million strings takes half a second.

    What was parsed is let go of at the end.
    """
    _HELD.append({})
    try:
        yield HeldHeaders(_HELD[-1])
    finally:
        _HELD.pop()


def read_floats(file: GGUFFile, tensor_name: str) -> list[float]:
    """A small vector of plain floats that belongs to the configuration (rope factors), without torch. Raises CorruptFileError or UnsupportedError."""
    tensor = file.tensors.get(tensor_name)
    if tensor is None:
        raise CorruptFileError(f"{file.path}: tensor {shown(tensor_name)} is missing, and the configuration needs it")
    dtypes = {"F32": "<f4", "F16": "<f2"}
    if tensor.type_name not in dtypes or tensor.nbytes > MiB:
        have = f"{format_bytes(tensor.nbytes)} of {tensor.type_name}"
        raise UnsupportedError(f"{file.path}: {shown(tensor_name)} is {have}; a small vector of F32 or F16 is needed")
    return np.frombuffer(read_raw(tensor), dtype=dtypes[tensor.type_name]).astype(np.float64).tolist()


def read_raw(tensor: GGUFTensor) -> bytearray:
    """The bytes of a small tensor as stored. Raises CorruptFileError where the file has shrunk."""
    raw = bytearray(tensor.nbytes)
    with open_weight_file(tensor.path) as (stream, _):
        read_exactly(stream, memoryview(raw), tensor.offset_bytes, f"{tensor.path}: tensor {shown(tensor.name)}")
    return raw


class _Cursor:
    """Reads forward, never past the end of the file nor past `MAX_HEADER_BYTES`."""

    def __init__(self, file: BinaryIO, path: Path, size_bytes: int):
        self.file, self.path, self.size_bytes = file, path, size_bytes
        self.position_bytes = 0
        self.limit_bytes = min(size_bytes, MAX_HEADER_BYTES)

    def error(self, what: str, why: str) -> CorruptFileError:
        return CorruptFileError(f"{self.path}: {what}: {why}. The file is damaged or not what it claims; fetch it again")

    def need(self, num_bytes: int, what: str) -> None:
        """Refuses before anything is allocated."""
        left_bytes = self.limit_bytes - self.position_bytes
        if num_bytes > left_bytes:
            limit = "the file" if self.limit_bytes == self.size_bytes else f"the {format_bytes(MAX_HEADER_BYTES)} that a header may take"
            raise self.error(what, f"needs {num_bytes} bytes at byte {self.position_bytes}, has {left_bytes} to the end of {limit}")

    def take(self, num_bytes: int, what: str) -> bytes:
        self.need(num_bytes, what)
        data = self.file.read(num_bytes)
        if len(data) != num_bytes:
            raise self.error(what, f"needs {num_bytes} bytes at byte {self.position_bytes}, has {len(data)}: the file has shrunk")
        self.position_bytes += num_bytes
        return data

    def integer(self, num_bytes: int, what: str) -> int:
        return int.from_bytes(self.take(num_bytes, what), "little")

    def string(self, what: str) -> str:
        data = self.take(self.integer(8, what), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.error(what, f"{shown(data[:32])} is not UTF-8") from error

    def strings(self, count: int, what: str) -> list[str]:
        """The hot loop: a vocabulary has a quarter of a million of these. Read in blocks, of which what was not used is given back at the end."""
        decoded: list[str] = []
        left_bytes, index, data, at = self.limit_bytes - self.position_bytes, 0, b"", 0
        try:
            for index in range(count):
                if at + 8 > len(data):
                    data, at = data[at:] + self.file.read(_BLOCK_BYTES), 0
                start = at + 8
                length_bytes = int.from_bytes(data[at:start], "little")
                left_bytes -= 8 + length_bytes
                if left_bytes < 0:
                    raise self.error(f"{what}[{index}]", f"needs {length_bytes} bytes, has {max(0, left_bytes + length_bytes)}")
                if start + length_bytes > len(data):
                    data, at, start = data[at:] + self.file.read(max(_BLOCK_BYTES, length_bytes)), 0, 8
                    if start + length_bytes > len(data):
                        raise self.error(what, "the file has shrunk while it was read")
                at = start + length_bytes
                decoded.append(data[start:at].decode())
        except UnicodeDecodeError as error:
            raise self.error(f"{what}[{index}]", f"{shown(error.object[:32])} is not UTF-8") from error
        self.file.seek(at - len(data), os.SEEK_CUR)
        self.position_bytes = self.limit_bytes - left_bytes
        return decoded

    def numbers(self, code: str, count: int, what: str) -> list[Any]:
        data = self.take(count * struct.calcsize(f"<{code}"), what)
        if code == "?" and (worst := max(data, default=0)) > 1:
            raise self.error(what, f"a bool must be 0 or 1, has {worst}")
        return np.frombuffer(data, dtype=f"<{code}").tolist()

    def value(self, type_id: int, what: str, depth: int = 0) -> tuple[Any, str]:
        """A metadata value and the name of its type."""
        if type_id not in VALUE_TYPES:
            raise self.error(what, f"value type must be 0 to {max(VALUE_TYPES)}, has {type_id}")
        type_name, code = VALUE_TYPES[type_id]
        if code:
            return self.numbers(code, 1, what)[0], type_name
        if type_id == STRING:
            return self.string(what), type_name
        if depth == MAX_ARRAY_DEPTH:
            raise self.error(what, f"arrays may nest {MAX_ARRAY_DEPTH} deep, has more")
        item_id, count = self.integer(4, what), self.integer(8, what)
        if item_id not in VALUE_TYPES:
            raise self.error(what, f"item type must be 0 to {max(VALUE_TYPES)}, has {item_id}")
        item_name, item_code = VALUE_TYPES[item_id]
        self.need(count * (_LEAST_BYTES.get(item_id) or struct.calcsize(f"<{item_code}")), f"{what} with {count} items")
        if item_code:
            items = self.numbers(item_code, count, what)
        elif item_id == STRING:
            items = self.strings(count, what)
        else:
            items = [self.value(ARRAY, f"{what}[{index}]", depth + 1)[0] for index in range(count)]
        return items, f"array[{item_name}]"


def _parse(cursor: _Cursor) -> GGUFFile:
    if (magic := cursor.take(4, "magic")) != MAGIC:
        raise cursor.error("magic", f"must be {MAGIC!r}, has {magic!r}: not a GGUF file")
    version = cursor.integer(4, "version")
    if version & 0xFFFF == 0 and version:
        raise UnsupportedError(f"{cursor.path}: a big-endian GGUF file; only little-endian is supported. Convert it with gguf_convert_endian")
    if version not in VERSIONS:
        raise UnsupportedError(f"{cursor.path}: GGUF version {version}; supported: {VERSIONS}. Convert the model again with a current llama.cpp")
    num_tensors, num_pairs = cursor.integer(8, "tensor count"), cursor.integer(8, "metadata count")
    cursor.need(num_pairs * _LEAST_PAIR_BYTES + num_tensors * _LEAST_TENSOR_BYTES, f"{num_pairs} metadata pairs and {num_tensors} tensors")
    metadata: dict[str, Any] = {}
    metadata_types: dict[str, str] = {}
    for index in range(num_pairs):
        key = cursor.string(f"key {index} of {num_pairs}")
        if key in metadata:
            raise cursor.error(f"metadata {shown(key)}", "appears twice")
        metadata[key], metadata_types[key] = cursor.value(cursor.integer(4, "value type"), f"metadata {shown(key)}")
    if type(count := metadata.get("split.count", 0)) is not int:
        raise cursor.error("metadata 'split.count'", f"must be an integer, has {shown(count)}")
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if metadata_types.get("general.alignment", "uint32") != "uint32" or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error("metadata 'general.alignment'", f"must be a power of two as uint32, has {shown(alignment)}")
    infos = [_tensor_info(cursor, index, num_tensors) for index in range(num_tensors)]
    data_start_bytes = -(-cursor.position_bytes // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, type_name, offset_bytes, nbytes in infos:
        what = f"tensor {shown(name)}"
        if name in tensors:
            raise cursor.error(what, "appears twice")
        if offset_bytes % alignment:
            raise cursor.error(what, f"offset must be a multiple of {alignment}, has {offset_bytes}")
        offset_bytes += data_start_bytes
        if offset_bytes + nbytes > cursor.size_bytes:
            raise cursor.error(what, f"needs {nbytes} bytes at byte {offset_bytes}, has {max(0, cursor.size_bytes - offset_bytes)} to the end of the file")
        tensors[name] = GGUFTensor(name=name, shape=shape, type_name=type_name, offset_bytes=offset_bytes, nbytes=nbytes, path=cursor.path)
    for before, after in pairwise(sorted(tensors.values(), key=lambda tensor: tensor.offset_bytes)):
        if before.offset_bytes + before.nbytes > after.offset_bytes:
            raise cursor.error(f"tensor {shown(after.name)}", f"starts at byte {after.offset_bytes}, within tensor {shown(before.name)}")
    return GGUFFile(path=cursor.path, version=version, metadata=metadata, metadata_types=metadata_types, tensors=tensors, alignment=alignment)


def _tensor_info(cursor: _Cursor, index: int, num_tensors: int) -> tuple[str, tuple[int, ...], str, int, int]:
    """Name, shape, type, offset within the data section and size of one tensor."""
    name = cursor.string(f"name of tensor {index} of {num_tensors}")
    what = f"tensor {shown(name)}"
    num_dims = cursor.integer(4, what)
    if not 1 <= num_dims <= MAX_DIMS:
        raise cursor.error(what, f"needs 1 to {MAX_DIMS} dimensions, has {num_dims}")
    shape = struct.unpack(f"<{num_dims}Q", cursor.take(8 * num_dims, what))[::-1]
    type_id, offset_bytes = cursor.integer(4, what), cursor.integer(8, what)
    if type_id in REMOVED_TYPES:
        raise UnsupportedError(f"{cursor.path}: {what} is stored as {REMOVED_TYPES[type_id]}, which ggml has dropped. Quantize the model again")
    if type_id not in TYPE_NAMES:
        raise cursor.error(what, f"type must be one of ggml's, has id {type_id}")
    try:
        nbytes = tensor_nbytes(TYPE_NAMES[type_id], shape)
    except InputError as error:
        raise cursor.error(what, str(error)) from error
    if nbytes > cursor.size_bytes:
        raise cursor.error(what, f"shape {list(shape)} as {TYPE_NAMES[type_id]} needs {nbytes} bytes, the file has {cursor.size_bytes}")
    return name, shape, TYPE_NAMES[type_id], offset_bytes, nbytes
