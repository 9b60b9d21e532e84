"""The safetensors header reader against the `safetensors` package on good files, and against hand-made bad ones."""

import json
import struct
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tradespace.errors import CorruptFileError, InputError
from tradespace.loading.safetensors import DTYPE_BITS, read_safetensors_header, read_sharded


def file_bytes(header: object, data: bytes = b"", *, claim: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if claim is None else claim) + raw + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


NUMPY_DTYPES = {
    "F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda name: name != "__metadata__")


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.dictionaries(names, st.tuples(st.sampled_from(sorted(NUMPY_DTYPES)), st.lists(st.integers(0, 4), max_size=3).map(tuple)), max_size=5),
    metadata=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)),
)
def test_reads_what_the_safetensors_package_writes(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.mktemp("safetensors") / "model.safetensors"
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 2, shape).astype(NUMPY_DTYPES[dtype]) for name, (dtype, shape) in tensors.items()}
    if not arrays and not metadata:
        metadata = {"k": "v"}  # for nothing at all the package (0.8.0) writes a header that it refuses itself
    save_file(arrays, path, metadata)
    read, raw = read_safetensors_header(path), path.read_bytes()
    with safe_open(path, "np") as oracle:
        assert set(read.tensors) == set(oracle.keys())
        assert read.metadata == (oracle.metadata() or {})
        for name, tensor in read.tensors.items():
            assert (tensor.dtype, list(tensor.shape)) == (oracle.get_slice(name).get_dtype(), oracle.get_slice(name).get_shape())
            data = raw[tensor.offset_bytes : tensor.offset_bytes + tensor.nbytes]
            np.testing.assert_array_equal(np.frombuffer(data, NUMPY_DTYPES[tensor.dtype]).reshape(tensor.shape), arrays[name])


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_of_the_format_has_the_package_s_size(dtype, tmp_path):
    path = tmp_path / "one.safetensors"
    path.write_bytes(file_bytes({"w": entry(dtype, [4, 2], [0, DTYPE_BITS[dtype]])}, bytes(DTYPE_BITS[dtype])))
    with safe_open(path, "np") as oracle:
        assert oracle.get_slice("w").get_dtype() == dtype
    assert read_safetensors_header(path).tensors["w"].nbytes == DTYPE_BITS[dtype]


def test_spaces_scalars_and_an_empty_file_are_fine(tmp_path):
    header = ' \n{ "__metadata__" : { } , "s" : {"data_offsets":[0,4], "shape" : [ ] , "dtype":"F32"} }   '
    (tmp_path / "a.safetensors").write_bytes(file_bytes(header, bytes(4)))
    assert read_safetensors_header(tmp_path / "a.safetensors").tensors["s"].shape == ()
    (tmp_path / "b.safetensors").write_bytes(file_bytes({}))
    assert read_safetensors_header(tmp_path / "b.safetensors").tensors == {}


W8 = bytes(8)
BAD = {
    "empty": (b"", "needs 8 bytes.*has 0"),
    "no header": (struct.pack("<Q", 0), "claims 0 bytes"),
    "header longer than the file": (file_bytes({}, claim=3), "claims 3 bytes; 2 bytes follow"),
    "header bomb": (file_bytes({}, claim=2**63), "claims 9223372036854775808 bytes"),
    "not JSON": (file_bytes("hello"), "needs {"),
    "a list": (file_bytes("[1, 2]"), "needs {"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'), "not UTF-8"),
    "half a surrogate pair": (file_bytes('{"\\ud800": ' + json.dumps(entry()) + "}", W8), "surrogate"),
    "cut JSON": (file_bytes('{"w": {"dtype":"F32","shape":[2],"data_offsets":[0,8]'), "needs"),
    "more after the end": (file_bytes(json.dumps({"w": entry()}) + "{}", W8), "needs nothing more"),
    "trailing comma": (file_bytes(json.dumps({"w": entry()})[:-1] + ",}", W8), "needs a string"),
    "duplicate name": (file_bytes('{"w": %s, "w": %s}' % ((json.dumps(entry()),) * 2), W8), "'w': appears twice"),
    "duplicate field": (file_bytes('{"w": {"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', W8), "not valid JSON"),
    "duplicate metadata": (file_bytes('{"__metadata__": {"a":"b","a":"c"}}'), "'a': appears twice"),
    "metadata of numbers": (file_bytes({"__metadata__": {"a": 1}}), "needs a string"),
    "no entry": (file_bytes({"w": 7}), "needs an object"),
    "nested object": (file_bytes({"w": {"dtype": {}}}), "needs an object of plain values"),
    "missing field": (file_bytes({"w": {"dtype": "F32", "shape": [2]}}, W8), "needs dtype, shape and data_offsets"),
    "unread field": (file_bytes({"w": {**entry(), "stride": 1}}, W8), "needs dtype, shape and data_offsets"),
    "unknown dtype": (file_bytes({"w": entry("F31")}, W8), "dtype must be one of.*'F31'"),
    "dtype no string": (file_bytes({"w": entry([])}, W8), "dtype must be one of"),
    "negative size": (file_bytes({"w": entry(shape=[-2])}, W8), "shape must be"),
    "float size": (file_bytes({"w": entry(shape=[2.0])}, W8), "shape must be"),
    "bool size": (file_bytes({"w": entry(shape=[2, True])}, W8), "shape must be"),
    "shape no list": (file_bytes({"w": entry(shape="2")}, W8), "shape must be"),
    "huge size": (file_bytes({"w": entry(shape=[2**62, 2**62])}, W8), r"needs about 2\*\*12\d bytes"),
    "endless size": (file_bytes({"w": entry(shape=[2**62] * 100)}, W8), r"needs about 2\*\*\d+ bytes"),
    "overflow to the right size": (file_bytes({"w": entry(shape=[2**62, 4, 2])}, W8), "needs"),
    "wrong size": (file_bytes({"w": entry(shape=[3])}, W8), "needs 12 bytes, has 8"),
    "negative offset": (file_bytes({"w": entry(offsets=[-8, 0])}, W8), "data_offsets must be"),
    "float offset": (file_bytes({"w": entry(offsets=[0, 8.0])}, W8), "data_offsets must be"),
    "NaN offset": (file_bytes('{"w": {"dtype":"F32","shape":[2],"data_offsets":[0,NaN]}}', W8), "data_offsets must be"),
    "falling offsets": (file_bytes({"w": entry(offsets=[8, 0])}, W8), "data_offsets must be"),
    "three offsets": (file_bytes({"w": entry(offsets=[0, 4, 8])}, W8), "data_offsets must be"),
    "wild offsets": (file_bytes({"w": entry(offsets=[2**62, 2**62 + 8])}, W8), "leaves a gap"),
    "gap": (file_bytes({"v": entry(), "w": entry(offsets=[12, 20])}, bytes(20)), "leaves a gap"),
    "overlap": (file_bytes({"v": entry(), "w": entry(offsets=[4, 12])}, bytes(12)), "overlaps"),
    "same bytes": (file_bytes({"v": entry(), "w": entry()}, W8), "overlaps"),
    "cut data": (file_bytes({"w": entry()}, bytes(7)), "data: needs"),
    "more data": (file_bytes({"w": entry()}, bytes(9)), "data: needs"),
    "deep lists": (file_bytes('{"w": {"dtype":"F32","shape":%s,"data_offsets":[0,8]}}' % ("[" * 3900 + "]" * 100), W8), "JSON"),
    "long lists": (file_bytes('{"w": {"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % ("1," * 5000 + "2"), W8), "at most 4096 characters"),
    "endless number": (file_bytes('{"w": {"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % ("9" * 4000), W8), "shape must be"),
}


# the package lets these pass: of two names the last wins there, and a list may be as long as it likes
STRICTER = {"duplicate name", "duplicate metadata", "unread field", "long lists"}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name, tmp_path):
    data, message = BAD[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=message) as caught:
        read_safetensors_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 800
    if name not in STRICTER:
        with pytest.raises(SafetensorError), safe_open(path, "np"):  # the format's own reader agrees
            pass


def test_every_truncation_is_refused(tmp_path):
    data = file_bytes({"__metadata__": {"k": "v"}, "w": entry(), "v": entry("F16", [1], [8, 10])}, bytes(10))
    path = tmp_path / "cut.safetensors"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CorruptFileError):
            read_safetensors_header(path)
    path.write_bytes(data)
    read_safetensors_header(path)


@pytest.mark.parametrize("filler", ['"a":{},', "[],", '{"a":', '"\\u0041', '{"dtype":[[[[', '"w":{"shape":['])
def test_a_header_of_nothing_but_brackets_takes_little_memory(filler, tmp_path):
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(file_bytes("{" + filler * (2**20 // len(filler))))
    tracemalloc.start()
    begin_s = time.thread_time()
    with pytest.raises(CorruptFileError):
        read_safetensors_header(path)
    took_s, peak_bytes = time.thread_time() - begin_s, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took_s < 2
    assert peak_bytes < 8 * 2**20


def test_only_the_first_100_mb_may_be_header(tmp_path):
    path = tmp_path / "sparse.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)
    with pytest.raises(CorruptFileError, match="100 MB are allowed"):
        read_safetensors_header(path)


@pytest.fixture
def shards(tmp_path):
    save_file({"a": np.zeros(2, np.float32), "extra": np.zeros(1, np.float32)}, tmp_path / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file({"b": np.ones((2, 2), np.float16)}, tmp_path / "model-00002-of-00002.safetensors")

    def index(weight_map: object, text: str | None = None):
        text = text or json.dumps({"metadata": {"total_size": 16}, "weight_map": weight_map})
        (tmp_path / "model.safetensors.index.json").write_text(text)
        return tmp_path

    return index


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_shards_and_single_file(shards, tmp_path):
    read = read_sharded(shards({"a": ONE, "b": TWO}))
    assert {name: (tensor.path.name, tensor.shape) for name, tensor in read.tensors.items()} == {"a": (ONE, (2,)), "b": (TWO, (2, 2))}
    assert (read.path, read.metadata) == (tmp_path, {"format": "pt"})
    save_file({"only": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    assert list(read_sharded(tmp_path).tensors) == ["only"]


@pytest.mark.parametrize("name", [f"{start}x.safetensors" for start in ("../", "/etc/", "a/", "..\\", "C:", ".")] + ["x.bin", ""])
def test_an_index_does_not_reach_outside_its_folder(name, shards):
    with pytest.raises(CorruptFileError, match="same folder"):
        read_sharded(shards({"a": name}))


def test_a_bad_index_is_refused_by_name(shards, tmp_path):
    with pytest.raises(InputError, match=r"'b' lies in 'model-00003\.safetensors', which is not in the folder"):
        read_sharded(shards({"a": ONE, "b": "model-00003.safetensors"}))
    with pytest.raises(InputError, match="which is not in the folder"):
        read_sharded(shards({"a": "9" * 5000 + ".safetensors"}))  # longer than any file name
    with pytest.raises(CorruptFileError, match=rf"tensor 'b': should be in '{ONE}', which does not hold it"):
        read_sharded(shards({"b": ONE}))
    twice = f'{{"weight_map": {{"a": "{ONE}", "a": "{ONE}"}}}}'
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a":', "[" * 10**5, twice):
        with pytest.raises(CorruptFileError, match=r"index\.json"):
            read_sharded(shards(None, text))
    (tmp_path / "model.safetensors.index.json").unlink()
    for folder in (tmp_path, tmp_path / "missing", tmp_path / ("x" * 5000)):
        with pytest.raises(InputError, match="holds neither"):
            read_sharded(folder)
