"""Good small files of the `gguf` and `safetensors` packages, damaged at random: only our errors come out, soon, and in little memory."""

import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from tradespace.errors import BudgetError, InputError
from tradespace.loading.dequantize import iter_rows
from tradespace.loading.gguf import GGUFFile, read_gguf
from tradespace.loading.safetensors import SafetensorsFile, read_safetensors_header, read_sharded

LIMIT_S, LIMIT_BYTES = 2.0, 64 * 2**20  # seconds of this thread's CPU: a busy machine must not fail the test
STAGING_BYTES = 2**16


def _good_gguf(folder: Path) -> bytes:
    writer = gguf.GGUFWriter(folder / "good.gguf", "llama")
    writer.add_block_count(2)
    writer.add_name("fuzzed")
    writer.add_custom_alignment(32)
    writer.add_token_list(["a", "bé", "<s>"])
    writer.add_token_scores([0.0, -1.5, 2.0])
    writer.add_token_types([1, 1, 3])
    writer.add_array("llama.flags", [True, False])
    rng = np.random.default_rng(0)
    for name, kind in (("q4", "Q4_1"), ("q8", "Q8_0"), ("half", "F16"), ("full", "F32")):
        data = gguf.quantize(rng.standard_normal((2, 64), np.float32), gguf.GGMLQuantizationType[kind])
        writer.add_tensor(f"blk.0.{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (folder / "good.gguf").read_bytes()


@pytest.fixture(scope="module")
def good_gguf(tmp_path_factory) -> bytes:
    return _good_gguf(tmp_path_factory.mktemp("good"))


GOOD_SAFETENSORS = save({"a.weight": np.ones((3, 4), np.float32), "é": np.ones(5, np.float16), "s": np.array(1.0)}, {"format": "pt"})
GOOD_INDEX = json.dumps({"metadata": {"total_size": 4}, "weight_map": {"a.weight": "one.safetensors", "é": "one.safetensors"}}).encode()

# numbers at which a careless reader multiplies, wraps around or allocates
WILD = [0, 1, 2, 31, 2**8 - 1, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]
JSON_WILD = [
    *(b"-1", b"1e400", b"1.5", b"true", b"null", b"NaN", b"[]", b"{}", b'""', b'"\\ud800"', b"\x00", b"\xff"),
    *(b"9" * 30, b"9" * 5000, b"[" * 5000, b'{"a":' * 5000),
]

steps = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 7)),
    st.tuples(st.just("byte"), st.floats(0, 1), st.integers(0, 255)),
    st.tuples(st.just("wild"), st.floats(0, 1), st.sampled_from(WILD), st.sampled_from([1, 4, 8])),
    st.tuples(st.just("insert"), st.floats(0, 1), st.one_of(st.binary(max_size=40), st.sampled_from(JSON_WILD))),
    st.tuples(st.just("delete"), st.floats(0, 1), st.integers(1, 40)),
    st.tuples(st.just("copy"), st.floats(0, 1), st.floats(0, 1), st.integers(1, 64)),
)


def damaged(data: bytes, step: tuple, reach: int) -> bytes:
    """One step of damage, most likely among the first `reach` bytes: the header is where lies pay."""
    kind, where, *rest = step
    at = min(int(where * reach), len(data))
    if kind == "cut":
        return data[: int(where * len(data))]
    if kind == "flip":
        return data[:at] + bytes([byte ^ 1 << rest[0] for byte in data[at : at + 1]]) + data[at + 1 :]
    if kind == "byte":
        return data[:at] + bytes([rest[0]]) + data[at + 1 :]
    if kind == "wild":
        value, size = rest
        return data[:at] + (value % 256**size).to_bytes(size, "little") + data[at + size :]
    if kind == "insert":
        return data[:at] + rest[0] + data[at:]
    if kind == "delete":
        return data[:at] + data[at + rest[0] :]
    source = int(rest[0] * reach)
    piece = data[source : source + rest[1]]
    return data[:at] + piece + data[at + len(piece) :]


def survives(read: Callable[[], GGUFFile | SafetensorsFile]) -> bool:
    """Whether the file was read to the last row; anything but our own errors, much time or much memory fails the test."""
    tracemalloc.start()
    begin_s, message = time.thread_time(), ""
    try:
        file = read()
        for name in file.tensors:
            try:
                for _ in iter_rows(file, name, staging_bytes=STAGING_BYTES):
                    pass
            except BudgetError:
                assert file.tensors[name].nbytes > STAGING_BYTES / 16  # only a row so wide may not fit
        return True
    except InputError as error:  # CorruptFileError and UnsupportedError are kinds of it
        message = str(error)
        return False
    finally:
        took_s, (_, peak_bytes) = time.thread_time() - begin_s, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(message) < 1500
        assert took_s < LIMIT_S
        assert peak_bytes < LIMIT_BYTES


fuzz = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def test_the_good_files_survive(good_gguf, tmp_path):
    (tmp_path / "good.gguf").write_bytes(good_gguf)
    (tmp_path / "one.safetensors").write_bytes(GOOD_SAFETENSORS)
    (tmp_path / "model.safetensors.index.json").write_bytes(GOOD_INDEX)
    assert survives(lambda: read_gguf(tmp_path / "good.gguf"))
    assert survives(lambda: read_safetensors_header(tmp_path / "one.safetensors"))
    assert survives(lambda: read_sharded(tmp_path))


@fuzz
@given(damage=st.lists(steps, min_size=1, max_size=3))
def test_damaged_gguf(good_gguf, tmp_path, damage):
    data, reach = good_gguf, good_gguf.rindex(b"weight") + 40
    for step in damage:
        data = damaged(data, step, reach)
    (tmp_path / "fuzzed.gguf").write_bytes(data)
    survives(lambda: read_gguf(tmp_path / "fuzzed.gguf"))


def test_every_field_of_a_gguf_header_made_wild(good_gguf, tmp_path):
    """Exhaustive where random is thin: at each byte of the header, the numbers that hurt most."""
    reach = good_gguf.rindex(b"weight") + 40
    path = tmp_path / "wild.gguf"
    outcomes = set()
    for at in range(reach):
        for value in (2**63 - 1, 2**64 - 1, 2**31):
            path.write_bytes(good_gguf[:at] + struct.pack("<Q", value) + good_gguf[at + 8 :])
            try:
                outcomes.add(type(read_gguf(path)).__name__)
            except InputError as error:
                outcomes.add(type(error).__name__)
    assert outcomes == {"GGUFFile", "CorruptFileError", "UnsupportedError"}


@fuzz
@given(damage=st.lists(steps, min_size=1, max_size=3), mend=st.booleans())
def test_damaged_safetensors(tmp_path, damage, mend):
    header_bytes = int.from_bytes(GOOD_SAFETENSORS[:8], "little")
    if mend:  # damage the JSON alone and state its length truthfully, so that the parser sees it all
        header, rest = GOOD_SAFETENSORS[8 : 8 + header_bytes], GOOD_SAFETENSORS[8 + header_bytes :]
        for step in damage:
            header = damaged(header, step, header_bytes)
        data = struct.pack("<Q", len(header)) + header + rest
    else:
        data = GOOD_SAFETENSORS
        for step in damage:
            data = damaged(data, step, 8 + header_bytes)
    (tmp_path / "fuzzed.safetensors").write_bytes(data)
    survives(lambda: read_safetensors_header(tmp_path / "fuzzed.safetensors"))


@fuzz
@given(damage=st.lists(steps, min_size=1, max_size=3))
def test_damaged_index(tmp_path, damage):
    data = GOOD_INDEX
    for step in damage:
        data = damaged(data, step, len(GOOD_INDEX))
    (tmp_path / "one.safetensors").write_bytes(GOOD_SAFETENSORS)
    (tmp_path / "model.safetensors.index.json").write_bytes(data)
    survives(lambda: read_sharded(tmp_path))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda rest: b"GGUF\x03\0\0\0" + rest)))
def test_noise(tmp_path, data):
    (tmp_path / "noise").write_bytes(data)
    survives(lambda: read_gguf(tmp_path / "noise"))
    survives(lambda: read_safetensors_header(tmp_path / "noise"))
