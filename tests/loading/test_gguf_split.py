"""Split GGUF models: written by the gguf package in several files, read as one; parts that are missing, renamed or of another model."""

from __future__ import annotations

import shutil

import gguf
import numpy as np
import pytest

from tradespace.errors import CorruptFileError, InputError
from tradespace.loading.dequantize import read_tensor
from tradespace.loading.gguf import read_gguf
from tradespace.loading.gguf_split import part_paths
from tradespace.loading.gguf_writer import write_gguf

VALUES = {f"blk.{i}.w": np.random.default_rng(i).normal(size=(4, 32)).astype(np.float32) for i in range(5)}


def split(folder, stem: str = "model", tensors: int = 2):
    writer = gguf.GGUFWriter(folder / f"{stem}.gguf", "llama", split_max_tensors=tensors)
    writer.add_block_count(5)
    for name, values in VALUES.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob(f"{stem}-*.gguf"))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_any_part_stands_for_the_whole(which, tmp_path):
    paths = split(tmp_path)
    assert [path.name for path in paths] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    found = read_gguf(paths[which])
    assert found.path == paths[0]
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {name: values.shape for name, values in VALUES.items()}
    assert found.metadata["llama.block_count"] == 5
    assert not any(key.startswith("split.") for key in (*found.metadata, *found.metadata_types))
    for name, values in VALUES.items():
        assert np.array_equal(read_tensor(found, name, staging_bytes=4096).numpy(), values)


def test_a_missing_part_is_named(tmp_path):
    paths = split(tmp_path)
    paths[1].unlink()
    with pytest.raises(InputError, match=r"lacks 1 of 3 parts: model-00002-of-00003\.gguf"):
        read_gguf(paths[0])


def test_a_renamed_part_says_what_it_must_be_called(tmp_path):
    paths = split(tmp_path)
    paths[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(InputError, match=r"one of 3 parts \(split\.count\).*NAME-00001-of-00003\.gguf"):
        read_gguf(tmp_path / "renamed.gguf")


def test_parts_in_the_wrong_order_are_refused(tmp_path):
    paths = split(tmp_path)
    shutil.copy(paths[1], tmp_path / "spare")
    shutil.copy(paths[2], paths[1])
    shutil.copy(tmp_path / "spare", paths[2])
    with pytest.raises(CorruptFileError, match=r"split\.no.*must be 1, has 2"):
        read_gguf(paths[0])


def test_a_part_of_another_model_is_refused(tmp_path):
    paths = split(tmp_path)
    (tmp_path / "other").mkdir()
    shutil.copy(split(tmp_path / "other", tensors=4)[-1], paths[-1])
    with pytest.raises(CorruptFileError, match=r"split\.(no|count)"):
        read_gguf(paths[0])


def _write_part(path, number: int, names: list[str], *, total: int, count: int = 2) -> None:
    metadata = {"general.architecture": "llama", "split.no": number, "split.count": count, "split.tensors.count": total}
    types = {"split.no": "uint16", "split.count": "uint16", "split.tensors.count": "int32"}
    write_gguf(path, metadata, [(name, (4,), "F32", lambda: bytes(16)) for name in names], types=types)


@pytest.mark.parametrize(
    ("first", "second", "total", "message"),
    [
        (["a"], ["a"], 2, "'a' is in another part"),
        (["a"], ["b"], 3, r"split\.tensors\.count is 3; the parts hold 2"),
        (["a"], [], 1, None),
        ([], ["a"], 1, None),
    ],
)
def test_tensors_are_counted(first, second, total, message, tmp_path):
    _write_part(tmp_path / "m-00001-of-00002.gguf", 0, first, total=total)
    _write_part(tmp_path / "m-00002-of-00002.gguf", 1, second, total=total)
    if message is None:
        assert list(read_gguf(tmp_path / "m-00002-of-00002.gguf").tensors) == ["a"]
        return
    with pytest.raises(CorruptFileError, match=message):
        read_gguf(tmp_path / "m-00001-of-00002.gguf")


@pytest.mark.parametrize("count", [1025, 2**31])
def test_a_claim_of_very_many_parts_opens_none(count, tmp_path):
    path = tmp_path / "m-00001-of-00002.gguf"
    write_gguf(path, {"split.count": count, "split.no": 0, "split.tensors.count": 0}, [])
    with pytest.raises(InputError, match=f"one of {count} parts"):
        read_gguf(path)


def test_names_that_are_no_parts(tmp_path):
    for name in ("m.gguf", "m-00000-of-00002.gguf", "m-00003-of-00002.gguf", "m-1-of-2.gguf", "m-00001-of-99999.gguf"):
        assert part_paths(tmp_path / name) == (tmp_path / name,)
