"""llama.cpp beside us on real weights: dequantized weights, logits and greedy text within the bars; then the references for `make test` are rewritten."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from oracles.record_references import record, write
from tradespace.lab import agreement
from tradespace.loading.dequantize import iter_rows
from tradespace.loading.gguf import read_gguf
from tradespace.loading.pull import pull
from tradespace.loading.rawfile import open_weight_file
from tradespace.loading.resolve import resolve
from tradespace.loading.tokenizer import Tokenizer

pytestmark = pytest.mark.weights
STAGING_BYTES = 4 << 20


@pytest.fixture(scope="module", params=agreement.MODELS)
def model(request) -> str:
    pull(request.param, progress=False)
    return request.param


@pytest.fixture(scope="module")
def f32(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("f32") / f"{model}.gguf"
    agreement.write_f32_copy(resolve(model, offline=True).weights[0], path)
    return path


def test_f32_copy_has_everything_else_unchanged(model, f32):
    stored, copy = read_gguf(resolve(model, offline=True).weights[0]), read_gguf(f32)
    assert copy.metadata.pop("general.file_type") == 0
    assert {name: value for name, value in stored.metadata.items() if name != "general.file_type"} == copy.metadata
    assert {name: tensor.shape for name, tensor in stored.tensors.items()} == {name: tensor.shape for name, tensor in copy.tensors.items()}
    assert {tensor.type_name for tensor in copy.tensors.values()} == {"F32"}


def test_dequantized_weights_are_those_of_ggml(model):
    """Every tensor of the file through ggml's own C function and through ours. A compiler may fuse a multiplication with an addition there: one rounding."""
    library = _ggml()
    stored = read_gguf(resolve(model, offline=True).weights[0])
    types = set()
    for tensor in stored.tensors.values():
        if tensor.type_name in ("F32", "F16", "BF16"):
            continue
        types.add(tensor.type_name)
        function = getattr(library, f"dequantize_row_{tensor.type_name.lower().replace('_k', '_K')}")
        with open_weight_file(tensor.path) as (file, _):
            file.seek(tensor.offset_bytes)
            row_bytes = tensor.nbytes // tensor.shape[0]
            for row, ours_RC in iter_rows(stored, tensor.name, staging_bytes=STAGING_BYTES):
                raw = file.read(row_bytes * len(ours_RC))
                theirs_RC = torch.empty(ours_RC.shape)
                function(raw, ctypes.c_void_p(theirs_RC.data_ptr()), ctypes.c_int64(ours_RC.numel()))
                largest = float(ours_RC.abs().max())
                torch.testing.assert_close(ours_RC, theirs_RC, rtol=2e-7, atol=2e-7 * largest, msg=lambda text, at=(tensor.name, row): f"{at}: {text}")
    assert types == ({"Q4_1", "Q8_0"} if model == "smollm2-135m" else {"Q4_K", "Q5_0", "Q6_K", "Q8_0"})


def test_references_are_recorded(model, f32):
    path = write(model, record(f32, Tokenizer.from_files(resolve(model, offline=True))))
    assert path.stat().st_size < 64 << 10


def test_agreement_holds():
    found = agreement.run(quick=False, say=print)
    both = sum(kernel in ("sdpa", "native") for kernel, *_ in agreement.OURS)  # these meet both of llama.cpp's files
    assert len(found.rows) == len(agreement.MODELS) * len(agreement.TEXTS) * (len(agreement.OURS) + both)
    missed = [row for row in found.rows if not row["holds"]]
    assert not missed
    assert "they hold everywhere" in agreement.markdown(found)


def _ggml() -> ctypes.CDLL:
    """The library that llama-cpp-python brings."""
    folder = Path(agreement.require_llama_cpp().__file__).parent / "lib"
    return ctypes.CDLL(str(next(path for path in sorted(folder.iterdir()) if "ggml-base" in path.name)))
