"""Reading a file's pieces ahead: the same bytes, in order, and the same errors as reading them one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tradespace.errors import CorruptFileError, InputError
from tradespace.formats.cuda import CudaWeight
from tradespace.loading import read_ahead as reading
from tradespace.loading.dequantize import iter_rows
from tradespace.loading.read_ahead import read_ahead
from tradespace.loading.safetensors import read_sharded
from tradespace.quantize.rtn import fill_rtn


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 5000), max_size=9), least=st.sampled_from([1, 700, 1 << 20]), first=st.integers(0, 40))
def test_pieces_come_whole_and_in_order(tmp_path_factory, sizes, least, first):
    path = tmp_path_factory.mktemp("ahead") / "file"
    data = torch.randint(0, 256, (first + sum(sizes),), dtype=torch.uint8)
    path.write_bytes(data.numpy().tobytes())
    starts = [first + sum(sizes[:index]) for index in range(len(sizes))]
    before, reading.LEAST_BYTES = reading.LEAST_BYTES, least
    try:
        found = [raw.clone() for raw in read_ahead(path, list(zip(starts, sizes, strict=True)), "it")]
    finally:
        reading.LEAST_BYTES = before
    assert [len(raw) for raw in found] == sizes
    assert torch.equal(torch.cat([*found, data[:0]]), data[first:])


def test_a_file_that_ends_before_is_said_to(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(bytes(100))
    pieces = read_ahead(path, [(0, 60), (60, 60)], "tensor 'w'")
    assert len(next(pieces)) == 60
    with pytest.raises(CorruptFileError, match="tensor 'w': needs 60 bytes from byte 60 on, has 40"):
        next(pieces)
    with pytest.raises(InputError, match="cannot be opened"):
        list(read_ahead(tmp_path / "none", [(0, 1)], "it"))


def test_one_who_stops_early_leaves_nothing_open(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    pieces = read_ahead(path, [(at, 100) for at in range(0, 1000, 100)], "it")
    next(pieces)
    pieces.close()
    path.unlink()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("format_name", ["bf16", "int8", "int4-g64", "nf4", "fp8"])
def test_weights_for_a_device_are_the_same_read_either_way(tmp_path, dtype, format_name):
    """Floats as they are stored, read ahead, against fp32 rows from one buffer: the packed weight is the same to the bit."""
    values = torch.randn(70, 192, generator=torch.Generator().manual_seed(3)).to(dtype)
    save_file({"w": values}, tmp_path / "model.safetensors")
    source = read_sharded(Path(tmp_path))
    weights = []
    for ahead, wanted in ((False, torch.float32), (True, dtype)):
        weight = CudaWeight(format_name, (70, 192), device="cpu")
        chunks = 0
        for row, rows_RC in iter_rows(source, "w", staging_bytes=192 * 4 * 40, dtype=wanted, ahead=ahead):
            fill_rtn(weight, row, rows_RC, name="w")
            chunks += 1
        assert chunks > 1
        weights.append(weight)
    for name, part in weights[0].named_buffers():
        assert torch.equal(part.view(torch.uint8), weights[1].get_buffer(name).view(torch.uint8)), name
