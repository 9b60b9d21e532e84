"""The GGUF writer: read back by the `gguf` package and by our reader."""

import struct

import gguf
import numpy as np
import pytest

from tradespace.errors import InputError, UnsupportedError
from tradespace.loading.gguf import read_gguf, write_gguf

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.rope.freq_base": 10000.0,
    "negative": -3,
    "wide": 2**40,
    "flag": True,
    "tokens": ["a", "é", ""],
    "kinds": [1, 3, -1],
    "scores": [0.5, 1, 2.25],
    "flags": [True, False],
    "nested": [[1, 2], ["x"]],
}


def test_both_readers_read_it_back(tmp_path):
    rng = np.random.default_rng(0)
    packed = gguf.quantize(rng.standard_normal((3, 64), np.float32), gguf.GGMLQuantizationType.Q4_1)
    full, half = rng.standard_normal((2, 5), np.float32), rng.standard_normal(7).astype(np.float16)
    path = tmp_path / "out.gguf"
    flat_metadata = {key: value for key, value in METADATA.items() if key != "nested"}  # the package flattens nested arrays
    tensors = [
        ("full", full.shape, "F32", lambda: (row.tobytes() for row in full)),
        ("packed", (3, 64), "Q4_1", packed.tobytes),
        ("half", half.shape, "F16", lambda: half.data),
        ("brain", (2,), "BF16", lambda: b"\x80\x3f\x00\xc0"),
    ]
    write_gguf(path, flat_metadata, tensors)
    oracle = gguf.GGUFReader(path)
    data = {tensor.name: tensor.data for tensor in oracle.tensors}
    np.testing.assert_array_equal(data["full"], full)
    np.testing.assert_array_equal(data["packed"], packed)
    np.testing.assert_array_equal(data["half"], half)
    assert data["brain"].tobytes() == b"\x80\x3f\x00\xc0"
    assert {key: one.contents() for key, one in oracle.fields.items() if not key.startswith("GGUF.")} == flat_metadata
    read = read_gguf(path)
    assert read.metadata == flat_metadata
    assert {name: tensor.shape for name, tensor in read.tensors.items()} == {"full": (2, 5), "packed": (3, 64), "half": (7,), "brain": (2,)}
    assert path.stat().st_size % 32 == 0


def test_types_are_inferred_as_llama_cpp_expects_or_obeyed(tmp_path):
    write_gguf(tmp_path / "a.gguf", METADATA, [])
    read = read_gguf(tmp_path / "a.gguf")
    assert read.metadata == METADATA
    assert read.metadata_types == {
        "general.architecture": "string",
        "llama.block_count": "uint32",
        "llama.rope.freq_base": "float32",
        "negative": "int32",
        "wide": "uint64",
        "flag": "bool",
        "tokens": "array[string]",
        "kinds": "array[int32]",
        "scores": "array[float32]",
        "flags": "array[bool]",
        "nested": "array[array]",
    }
    types = {"k": "uint16", "e": "array[string]", "f": "float64"}
    write_gguf(tmp_path / "b.gguf", {"k": 7, "e": [], "f": 0.1}, [], types=types)
    read = read_gguf(tmp_path / "b.gguf")
    assert (read.metadata, read.metadata_types) == ({"k": 7, "e": [], "f": 0.1}, types)
    # what was read can be written again, types and all
    write_gguf(tmp_path / "c.gguf", read.metadata, [], types=read.metadata_types)
    assert (tmp_path / "c.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_alignment_is_obeyed(tmp_path):
    tensors = [("a", (1,), "F32", lambda: struct.pack("<f", 1)), ("b", (1,), "F32", lambda: struct.pack("<f", 2))]
    write_gguf(tmp_path / "a.gguf", {"general.alignment": 256}, tensors)
    read = read_gguf(tmp_path / "a.gguf")
    assert [tensor.offset_bytes % 256 for tensor in read.tensors.values()] == [0, 0]
    assert [tensor.data.tolist() for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors] == [[1], [2]]


def _fails() -> bytes:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("metadata", "tensors", "types", "error"),
    [
        ({}, [("a", (2,), "F32", lambda: bytes(7))], {}, InputError),
        ({}, [("a", (2,), "F32", lambda: [bytes(8), b"x"])], {}, InputError),
        ({}, [("a", (2,), "F32", _fails)], {}, ZeroDivisionError),
        ({}, [("a", (31,), "Q4_0", lambda: b"")], {}, InputError),
        ({}, [("a", (1, 1, 1, 1, 1), "F32", lambda: bytes(4))], {}, InputError),
        ({}, [("a", (2,), "Q9_9", lambda: b"")], {}, UnsupportedError),
        ({}, [("a", (1,), "F32", lambda: bytes(4))] * 2, {}, InputError),
        ({"general.alignment": 3}, [], {}, InputError),
        ({"k": None}, [], {}, InputError),
        ({"k": []}, [], {}, InputError),
        ({"k": [1, "a"]}, [], {}, InputError),
        ({"k": 2**64}, [], {}, InputError),
        ({"k": 256}, [], {"k": "uint8"}, InputError),
        ({"k": "text"}, [], {"k": "uint8"}, InputError),
        ({"k": 1}, [], {"k": "complex"}, InputError),
        ({"k": "\ud800"}, [], {}, InputError),
    ],
)
def test_a_failure_leaves_the_old_file_and_nothing_else(metadata, tensors, types, error, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"old")
    with pytest.raises(error):
        write_gguf(path, metadata, tensors, types=types)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_only_one_tensor_is_held_at_a_time(tmp_path):
    """Each producer runs after the one before it was written, and pieces are written as they come."""
    path, seen = tmp_path / "a.gguf", []

    def pieces(name: str):
        for _ in range(4):
            part = next(tmp_path.glob(".a.gguf.*.part"))
            seen.append((name, part.stat().st_size))
            yield bytes(2**16)

    write_gguf(path, {}, [(name, (2**16,), "F32", lambda name=name: pieces(name)) for name in "ab"])
    assert [name for name, _ in seen] == ["a"] * 4 + ["b"] * 4
    sizes_bytes = [size_bytes for _, size_bytes in seen]
    assert sizes_bytes == sorted(set(sizes_bytes))  # grew with every piece
