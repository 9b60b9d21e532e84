"""Safetensors files, single or sharded: a header reader for files that nobody vouches for.

The header is JSON, and a small one can ask a general parser for twenty times its size in lists. So only the form that the format allows is parsed, entry
by entry: time and memory are linear in the tensors that are there. No tensor data is read: `loading.dequantize` does that by row.

Format: the safetensors project's README. Needs no torch.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tradespace.errors import CorruptFileError, InputError
from tradespace.loading.rawfile import open_weight_file, read_exactly, shown
from tradespace.units import format_bytes

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_ENTRY_CHARS = 4096  # one tensor's dtype, shape and offsets, spaces included
SINGLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"

# dtype → bits of an element
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

# possessive, so that a hostile string cannot make the match backtrack
_STRING = re.compile(r'[ \t\r\n]*+("(?:[^"\\\x00-\x1f]++|\\.)*+")')
_PUNCTUATION = re.compile(r"[ \t\r\n]*+([{}:,])")
_FLAT_OBJECT = re.compile(rf"[ \t\r\n]*+(\{{[^{{}}]{{0,{MAX_ENTRY_CHARS}}}+\}})")
_SPACE = re.compile(r"[ \t\r\n\x00]*+$")  # some writers pad with zero bytes


@dataclass(frozen=True, kw_only=True)
class SafetensorsTensor:
    """Where a tensor lies. `shape` is row-major, outermost first; `offset_bytes` counts from the start of the file at `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    nbytes: int
    path: Path


@dataclass(frozen=True, kw_only=True)
class SafetensorsFile:
    """One file, or a folder of shards (`path` is the folder, and each tensor names its own file)."""

    path: Path
    tensors: dict[str, SafetensorsTensor] = field(repr=False)
    metadata: dict[str, str] = field(repr=False)


def read_safetensors_header(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Reads and checks one file's header; reads no tensor data.

    Raises CorruptFileError (file, field, need, have) for a header longer than the file or than 100 MB, JSON of another form, a duplicate name, an unknown
    dtype, a size that is not shape × dtype, and tensors that overlap, leave gaps or do not end with the file. InputError where there is no such file.
    """
    path = Path(path)
    with open_weight_file(path) as (file, size_bytes):
        head = bytearray(8)
        read_exactly(file, memoryview(head), 0, f"{path}: length of the header")
        header_bytes = int.from_bytes(head, "little")
        limit_bytes = min(MAX_HEADER_BYTES, size_bytes - 8)
        if not 2 <= header_bytes <= limit_bytes:
            limit = f"{limit_bytes} bytes follow" if limit_bytes < MAX_HEADER_BYTES else f"{format_bytes(MAX_HEADER_BYTES, decimal=True)} are allowed"
            raise _corrupt(path, "length of the header", f"claims {header_bytes} bytes; {limit}")
        raw = bytearray(header_bytes)
        read_exactly(file, memoryview(raw), 8, f"{path}: header")
    text = _decoded(path, raw)
    del raw
    tensors: dict[str, SafetensorsTensor] = {}
    metadata: dict[str, str] = {}
    scan = _Scanner(path, "header", text)
    for name in scan.keys():  # noqa: SIM118 (a scanner is no dict)
        if name == "__metadata__":
            metadata = {key: scan.string(f"__metadata__ {shown(key)}") for key in scan.keys()}  # noqa: SIM118
        else:
            tensors[name] = _tensor(path, name, scan.flat_object(f"tensor {shown(name)}"), 8 + header_bytes)
    scan.end()
    _check_layout(path, tensors, 8 + header_bytes, size_bytes)
    return SafetensorsFile(path=path, tensors=tensors, metadata=metadata)


def read_sharded(folder: str | os.PathLike[str]) -> SafetensorsFile:
    """The tensors of a model folder: `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    The single file wins where both are there, as in transformers. The index decides which tensors belong to the model: a shard may hold more.
    `metadata` is the first shard's. Raises as `read_safetensors_header`, InputError for a missing shard, and CorruptFileError where the index names a file
    outside the folder or a tensor that its shard does not hold.
    """
    folder = Path(folder)
    if os.path.isfile(folder / SINGLE_NAME):  # which, unlike Path.is_file, takes a name that no file can have for a missing one
        return read_safetensors_header(folder / SINGLE_NAME)
    index_path = folder / INDEX_NAME
    if not os.path.isfile(index_path):
        raise InputError(f"{folder}: holds neither {SINGLE_NAME} nor {INDEX_NAME}")
    shards: dict[str, SafetensorsFile] = {}
    tensors: dict[str, SafetensorsTensor] = {}
    for name, shard_name in _weight_map(index_path).items():
        if shard_name not in shards:
            if not os.path.isfile(folder / shard_name):
                raise InputError(f"{index_path}: tensor {shown(name)} lies in {shown(shard_name)}, which is not in the folder. Fetch the missing shard")
            shards[shard_name] = read_safetensors_header(folder / shard_name)
        if name not in shards[shard_name].tensors:
            raise _corrupt(index_path, f"tensor {shown(name)}", f"should be in {shown(shard_name)}, which does not hold it")
        tensors[name] = shards[shard_name].tensors[name]
    metadata = next(iter(shards.values())).metadata if shards else {}
    return SafetensorsFile(path=folder, tensors=tensors, metadata=metadata)


def _weight_map(index_path: Path) -> dict[str, str]:
    with open_weight_file(index_path) as (file, size_bytes):
        if size_bytes > MAX_HEADER_BYTES:
            raise _corrupt(index_path, "index", f"has {size_bytes} bytes; {format_bytes(MAX_HEADER_BYTES, decimal=True)} are allowed")
        raw = bytearray(size_bytes)
        read_exactly(file, memoryview(raw), 0, f"{index_path}: index")
    text = _decoded(index_path, raw)
    weight_map: dict[str, str] | None = None
    scan = _Scanner(index_path, "index", text)
    for section in scan.keys():  # noqa: SIM118 (a scanner is no dict)
        if section != "weight_map":
            scan.flat_object(f"section {shown(section)}")
            continue
        weight_map = {}
        for name in scan.keys():  # noqa: SIM118
            shard_name = scan.string(f"tensor {shown(name)}")
            # a bare file name and nothing else: an index must not reach outside its folder
            if not re.fullmatch(r"[^/\\:\x00]+\.safetensors", shard_name) or shard_name.startswith("."):
                raise _corrupt(index_path, f"tensor {shown(name)}", f"a shard is a file *.safetensors in the same folder, not {shown(shard_name)}")
            weight_map[name] = shard_name
    scan.end()
    if weight_map is None:
        raise _corrupt(index_path, "weight_map", "is missing")
    return weight_map


def _corrupt(path: Path, what: str, why: str) -> CorruptFileError:
    return CorruptFileError(f"{path}: {what}: {why}. The file is damaged or not what it claims; fetch it again")


def _decoded(path: Path, raw: bytes | bytearray) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _corrupt(path, "header", f"byte {error.start} is not UTF-8") from error


class _Scanner:
    """Walks over JSON of a known form, holding only what it returns. Positions are characters of the text."""

    def __init__(self, path: Path, what: str, text: str):
        self.path, self.what, self.text, self.position = path, what, text, 0

    def error(self, what: str, why: str) -> CorruptFileError:
        return _corrupt(self.path, self.what, f"{what}: {why} at character {self.position}")

    def _next(self, pattern: re.Pattern[str], what: str, needed: str) -> str:
        match = pattern.match(self.text, self.position)
        if not match:
            raise self.error(what, f"needs {needed}, has {shown(self.text[self.position : self.position + 20])}")
        self.position = match.end()
        return match.group(1)

    def _punctuation(self, allowed: str, what: str) -> str:
        mark = self._next(_PUNCTUATION, what, " or ".join(allowed))
        if mark not in allowed:
            raise self.error(what, f"needs {' or '.join(allowed)}, has {mark}")
        return mark

    def keys(self) -> Iterator[str]:
        """The keys of the object that starts here; the caller reads each value before it asks for the next key."""
        self._punctuation("{", "object")
        if (empty := _PUNCTUATION.match(self.text, self.position)) and empty.group(1) == "}":
            self.position = empty.end()
            return
        seen: set[str] = set()
        mark = ","
        while mark == ",":
            key = self.string("name")
            if key in seen:
                raise self.error(f"name {shown(key)}", "appears twice")
            seen.add(key)
            self._punctuation(":", f"name {shown(key)}")
            yield key
            mark = self._punctuation(",}", f"after {shown(key)}")

    def string(self, what: str) -> str:
        quoted = self._next(_STRING, what, "a string")
        value = self._json(quoted, what) if "\\" in quoted else quoted[1:-1]
        # JSON can spell half a surrogate pair, which no file name, terminal or tokenizer accepts
        if not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise self.error(what, "a string with half a surrogate pair")
        return value

    def flat_object(self, what: str) -> dict[str, Any]:
        """A small object without objects within; its lists may be anything."""
        return self._json(self._next(_FLAT_OBJECT, what, f"an object of plain values in at most {MAX_ENTRY_CHARS} characters"), what)

    def _json(self, text: str, what: str) -> Any:
        try:
            return _DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            raise self.error(what, f"not valid JSON ({type(error).__name__})") from error

    def end(self) -> None:
        if not _SPACE.match(self.text, self.position):
            raise self.error("end", f"needs nothing more, has {shown(self.text[self.position : self.position + 20])}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63  # type() because True is an int to isinstance


def _tensor(path: Path, name: str, entry: dict[str, Any], data_start_bytes: int) -> SafetensorsTensor:
    what = f"tensor {shown(name)}"
    if set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(path, what, f"needs dtype, shape and data_offsets, has {shown(', '.join(entry))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _corrupt(path, what, f"dtype must be one of {', '.join(DTYPE_BITS)}, has {shown(dtype)}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise _corrupt(path, what, "shape must be a list of sizes of at least 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)) or offsets[0] > offsets[1]:
        raise _corrupt(path, what, "data_offsets must be two rising byte offsets")
    num_bits = DTYPE_BITS[dtype]
    for size in shape:
        num_bits *= size
    if num_bits != 8 * (offsets[1] - offsets[0]):
        raise _corrupt(path, what, f"shape {shown(str(shape))} as {dtype} needs {shown(-(-num_bits // 8))} bytes, has {offsets[1] - offsets[0]}")
    return SafetensorsTensor(name=name, dtype=dtype, shape=tuple(shape), offset_bytes=data_start_bytes + offsets[0], nbytes=offsets[1] - offsets[0], path=path)


def _check_layout(path: Path, tensors: dict[str, SafetensorsTensor], data_start_bytes: int, size_bytes: int) -> None:
    """Tensors must fill the data section end to end: what nothing names could hide something, and what two name is a lie."""
    end_bytes = data_start_bytes
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset_bytes, tensor.nbytes)):
        if tensor.offset_bytes != end_bytes:
            fault = "overlaps the tensor before it" if tensor.offset_bytes < end_bytes else "leaves a gap before it"
            raise _corrupt(path, f"tensor {shown(tensor.name)}", f"must start at byte {end_bytes}, starts at {tensor.offset_bytes}: {fault}")
        end_bytes += tensor.nbytes
    if end_bytes != size_bytes:
        raise _corrupt(path, "data", f"needs {end_bytes} bytes in the file, has {size_bytes}")
