"""Writes GGUF files: raw or already packed tensors, one at a time, atomically. For tests, oracles and exports. Needs no torch."""

import os
import secrets
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tradespace.errors import InputError
from tradespace.loading.ggml_types import DEFAULT_ALIGNMENT, GGML_TYPES, MAGIC, MAX_DIMS, VALUE_IDS, VALUE_TYPES, VERSIONS, tensor_nbytes
from tradespace.loading.rawfile import shown

TensorBytes = bytes | bytearray | memoryview
TensorToWrite = tuple[str, Sequence[int], str, Callable[[], TensorBytes | Iterable[TensorBytes]]]


def write_gguf(path: str | os.PathLike[str], metadata: Mapping[str, Any], tensors: Iterable[TensorToWrite], *, types: Mapping[str, str] | None = None) -> None:
    """Writes a GGUF file of version 3, one tensor in memory at a time, and never leaves half of one under `path`.

    `tensors` gives (name, shape outermost first, GGML type name, producer); a producer is called when its turn comes and returns the tensor's bytes as stored,
    or an iterable of pieces of them. `types` names the GGUF type of a metadata value, as `GGUFFile.metadata_types` does; without it a str is a string, a bool a
    bool, an int uint32 (int32 within arrays) or the next that holds it, a float float32. Raises InputError where a value, a shape or a size does not fit.
    """
    path, types, listed = Path(path), types or {}, list(tensors)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise InputError(f"{path}: general.alignment must be a power of two, has {alignment!r}")
    if len({name for name, *_ in listed}) != len(listed):
        raise InputError(f"{path}: two tensors of the same name")
    sizes_bytes = [tensor_nbytes(type_name, shape) for _, shape, type_name, _ in listed]
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(listed), len(metadata)))
    for key, value in metadata.items():
        header += _packed(key, "string", key) + _tagged(value, types.get(key) or _inferred_type(value, key), key)
    offset_bytes = 0
    for (name, shape, type_name, _), nbytes in zip(listed, sizes_bytes, strict=True):
        if len(shape) > MAX_DIMS:
            raise InputError(f"{path}: tensor {name} has {len(shape)} dimensions, GGUF holds {MAX_DIMS}")
        header += _packed(name, "string", name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), GGML_TYPES[type_name][0], offset_bytes)
        offset_bytes += nbytes + -nbytes % alignment
    header += bytes(-len(header) % alignment)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            file.write(header)
            for (name, _, _, produce), nbytes in zip(listed, sizes_bytes, strict=True):
                _write_tensor(file, produce(), nbytes, f"{path}: tensor {name}")
                file.write(bytes(-nbytes % alignment))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_tensor(file: BinaryIO, produced: TensorBytes | Iterable[TensorBytes], nbytes: int, what: str) -> None:
    written_bytes = 0
    for piece in [produced] if isinstance(produced, TensorBytes) else produced:
        written_bytes += file.write(piece)
    if written_bytes != nbytes:
        raise InputError(f"{what}: needs {nbytes} bytes, was given {written_bytes}")


def _inferred_type(value: Any, key: str) -> str:
    items = value if (is_array := isinstance(value, list | tuple)) else [value]
    kinds = {type(item) for item in items}
    if kinds <= {int, float} and float in kinds:
        name = "float32"
    elif kinds == {int}:
        preferred = ("int32", "uint32", "int64", "uint64") if is_array else ("uint32", "int32", "uint64", "int64")
        name = next((name for name in preferred if _fits(items, name)), "")
    else:
        name = {frozenset({bool}): "bool", frozenset({str}): "string", frozenset({list}): "array"}.get(frozenset(kinds), "")
    if not name:
        raise InputError(f"metadata {key}: no GGUF type holds {shown(value)}; name one in types")
    return f"array[{name}]" if is_array else name


def _fits(items: Sequence[int], name: str) -> bool:
    bits = int(name.removeprefix("u").removeprefix("int"))
    low, high = (0, 2**bits) if name.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    return low <= min(items) and max(items) < high


def _tagged(value: Any, type_name: str, key: str) -> bytes:
    outer = type_name.partition("[")[0]
    if outer not in VALUE_IDS:
        raise InputError(f"metadata {key}: {shown(type_name)} is no GGUF type. Known: {', '.join(VALUE_IDS)}, array[…]")
    return struct.pack("<I", VALUE_IDS[outer]) + _packed(value, type_name, key)


def _packed(value: Any, type_name: str, key: str) -> bytes:
    """The bytes of a metadata value; an array of arrays infers the types of the inner ones."""
    outer, _, item = type_name.partition("[")
    try:
        if outer == "string":
            data = value.encode()
            return struct.pack("<Q", len(data)) + data
        if outer != "array":
            return struct.pack(f"<{VALUE_TYPES[VALUE_IDS[outer]][1]}", value)
        item = item.removesuffix("]")
        head = struct.pack("<IQ", VALUE_IDS[item], len(value))
        if code := VALUE_TYPES[VALUE_IDS[item]][1]:
            return head + struct.pack(f"<{len(value)}{code}", *value)
        return head + b"".join(_packed(one, _inferred_type(one, key) if item == "array" else item, key) for one in value)
    except (struct.error, OverflowError, KeyError, AttributeError, TypeError, UnicodeEncodeError) as error:
        raise InputError(f"metadata {key}: {shown(value)} does not fit GGUF type {type_name}: {error}") from error
