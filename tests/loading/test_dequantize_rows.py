"""Row chunks: the same floats whatever the staging, never more memory than it, and a clear end where the file ends."""

import os
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tradespace.errors import BudgetError, CorruptFileError, InputError, UnsupportedError
from tradespace.loading.dequantize import DEQUANTIZERS, PLAIN_DTYPES, dequantize_into, iter_rows, min_staging_bytes, read_tensor
from tradespace.loading.gguf import GGML_TYPES, GGUFFile, read_gguf, write_gguf
from tradespace.loading.safetensors import read_safetensors_header, read_sharded

READABLE = [*PLAIN_DTYPES, *DEQUANTIZERS]


def random_file(path: Path, type_name: str, shape: tuple[int, ...]) -> tuple[GGUFFile, bytes]:
    _, block_elements, block_bytes = GGML_TYPES[type_name]
    num_elements = int(np.prod(shape))
    rng = np.random.default_rng(0)
    if type_name in PLAIN_DTYPES:
        data = torch.from_numpy(rng.standard_normal(num_elements)).to(PLAIN_DTYPES[type_name]).view(torch.uint8).numpy().tobytes()
    else:  # bytes below 0x70 make finite scales
        data = rng.integers(0, 0x70, num_elements // block_elements * block_bytes, dtype=np.uint8).tobytes()
    write_gguf(path, {}, [("before", (3,), "F32", lambda: bytes(12)), ("w", shape, type_name, lambda: data)])
    return read_gguf(path), data


def whole(type_name: str, data: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(shape, dtype=dtype)
    dequantize_into(torch.frombuffer(bytearray(data), dtype=torch.uint8), type_name, out)
    return out


@settings(max_examples=60, deadline=None)
@given(
    type_name=st.sampled_from(READABLE),
    outer=st.sampled_from([(), (1,), (7,), (3, 5), (2, 1, 4)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    extra=st.integers(0, 20_000),
)
def test_chunks_make_the_whole_tensor(tmp_path_factory, type_name, outer, dtype, extra):
    shape = (*outer, 512)
    file, data = random_file(tmp_path_factory.mktemp("rows") / "a.gguf", type_name, shape)
    want_RC = whole(type_name, data, shape, dtype).view(-1, 512)
    next_row = 0
    for row, rows_RC in iter_rows(file, "w", staging_bytes=min_staging_bytes(file, "w", dtype=dtype) + extra, dtype=dtype):
        assert (row, rows_RC.dtype, rows_RC.shape[1]) == (next_row, dtype, 512)
        assert torch.equal(rows_RC, want_RC[row : row + len(rows_RC)])
        next_row += len(rows_RC)
    assert next_row == len(want_RC)
    assert torch.equal(read_tensor(file, "w", staging_bytes=2**20, dtype=dtype), want_RC.view(shape))


def allocator_peak_bytes(run) -> int:
    """What torch's CPU allocator held at most, temporaries inside operators included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        run()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live_bytes = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])  # type: ignore[attr-defined]
    assert live_bytes[-1] == 0  # all is released at the end
    return int(live_bytes.max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("type_name", READABLE)
def test_a_chunk_stays_within_the_staging(type_name, dtype, tmp_path):
    def read(staging_bytes: int) -> None:
        for _ in iter_rows(file, "w", staging_bytes=staging_bytes, dtype=dtype):
            pass

    for shape in ((2, 256), (24, 8192)):  # the least row, where constants weigh most, and a tensor of several tiles
        file, data = random_file(tmp_path / "a.gguf", type_name, shape)
        least_bytes = min_staging_bytes(file, "w", dtype=dtype)
        for staging_bytes in (least_bytes, 1_000_000):
            peak_bytes = allocator_peak_bytes(lambda staging_bytes=staging_bytes: read(staging_bytes))
            # makes use of it, but for what the tensor does not need
            assert min(staging_bytes, len(data)) / 2 <= peak_bytes <= staging_bytes
        with pytest.raises(BudgetError, match=f"needs .*{least_bytes} bytes.*has .*{least_bytes - 1} bytes") as caught:
            iter_rows(file, "w", staging_bytes=least_bytes - 1, dtype=dtype)
        assert (caught.value.need_bytes, caught.value.have_bytes) == (least_bytes, least_bytes - 1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_file_is_not_mapped_and_is_closed(tmp_path):
    file, _ = random_file(tmp_path / "unmapped.gguf", "Q4_1", (64, 64))
    chunks = iter_rows(file, "w", staging_bytes=8192)
    next(chunks)
    assert "unmapped.gguf" not in Path("/proc/self/maps").read_text()
    chunks.close()  # type: ignore[attr-defined]
    assert not any("unmapped.gguf" in os.readlink(one) for one in Path("/proc/self/fd").iterdir() if one.is_symlink())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_cut_after_its_header_was_read(dtype, tmp_path):
    file, _ = random_file(tmp_path / "a.gguf", "Q8_0", (64, 64))
    tensor = file.tensors["w"]
    for keep_bytes in (tensor.offset_bytes + tensor.nbytes - 1, tensor.offset_bytes, 0):
        os.truncate(file.path, keep_bytes)
        with pytest.raises(CorruptFileError, match=r"a\.gguf: tensor 'w': needs \d+ bytes.*the file ends there"):
            list(iter_rows(file, "w", staging_bytes=8192, dtype=dtype))
    file.path.unlink()
    with pytest.raises(InputError, match="cannot be opened"):
        list(iter_rows(file, "w", staging_bytes=8192, dtype=dtype))


def test_wrong_names_and_dtypes_are_refused_at_the_call(tmp_path):
    file, _ = random_file(tmp_path / "a.gguf", "F32", (4, 4))
    with pytest.raises(InputError, match="no tensor 'v'"):
        iter_rows(file, "v", staging_bytes=1024)
    with pytest.raises(InputError, match=r"torch\.int8"):
        iter_rows(file, "w", staging_bytes=1024, dtype=torch.int8)


@pytest.mark.parametrize("type_name", sorted(set(GGML_TYPES) - set(READABLE)))
def test_types_without_a_dequantizer_are_named_when_read(type_name, tmp_path):
    _, block_elements, block_bytes = GGML_TYPES[type_name]
    write_gguf(tmp_path / "a.gguf", {}, [("w", (block_elements,), type_name, lambda: bytes(block_bytes))])
    file = read_gguf(tmp_path / "a.gguf")
    with pytest.raises(UnsupportedError, match=f"tensor 'w' is stored as {type_name},"):
        iter_rows(file, "w", staging_bytes=2**20)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_rows(stored, dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {"m": torch.randn(17, 9, generator=generator), "v": torch.randn(5, generator=generator), "s": torch.tensor(2.5), "e": torch.zeros(0, 3)}
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    for file in (read_safetensors_header(tmp_path / "model.safetensors"), read_sharded(tmp_path)):
        for name, tensor in tensors.items():
            assert torch.equal(read_tensor(file, name, staging_bytes=300, dtype=dtype), tensor.to(dtype))
        assert [row for row, _ in iter_rows(file, "m", staging_bytes=17 * 9 * 12)] == [0]
        assert [tuple(rows.shape) for _, rows in iter_rows(file, "v", staging_bytes=300)] == [(1, 5)]
        assert list(iter_rows(file, "e", staging_bytes=300)) == []


@pytest.mark.parametrize("stored", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64])
def test_safetensors_of_other_dtypes_are_named(stored, tmp_path):
    save_file({"w": torch.zeros(4, 4).to(stored)}, tmp_path / "model.safetensors")
    file = read_safetensors_header(tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match=f"stored as {file.tensors['w'].dtype},"):
        iter_rows(file, "w", staging_bytes=1024)


def test_the_gguf_package_s_quantized_weights_come_back(tmp_path):
    values = np.random.default_rng(0).standard_normal((8, 256), np.float32)
    packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    write_gguf(tmp_path / "a.gguf", {}, [("w", values.shape, "Q8_0", packed.tobytes)])
    have = read_tensor(read_gguf(tmp_path / "a.gguf"), "w", staging_bytes=4096)
    np.testing.assert_allclose(have.numpy(), values, atol=float(np.abs(values).max()) / 127)
