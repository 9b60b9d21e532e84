"""What of lab/agreement.py needs no llama.cpp: the F32 copy, the rule for greedy ties, and the error where the library is missing."""

from __future__ import annotations

import sys

import pytest
import torch

from tradespace.errors import InputError
from tradespace.lab.agreement import Greedy, compare_greedy, require_llama_cpp, run, write_f32_copy
from tradespace.loading.dequantize import read_tensor
from tradespace.loading.gguf import read_gguf, write_gguf


def test_f32_copy(tmp_path):
    """Q8_0 blocks of scale 0.5: half of the codes; everything else as it was."""
    scale = torch.tensor([0.5], dtype=torch.float16).view(torch.uint8)
    codes = torch.arange(-32, 32, dtype=torch.int8)
    blocks = torch.cat([torch.cat([scale, part.view(torch.uint8)]) for part in codes.split(32)])
    metadata = {"general.architecture": "llama", "general.file_type": 7, "tokenizer.ggml.tokens": ["a", "b"], "llama.rope.freq_base": 1e5}
    norm = torch.tensor([0.1, 0.2, 0.3])
    tensors = [("w", (2, 32), "Q8_0", lambda: bytes(blocks.numpy())), ("norm", (3,), "F32", lambda: bytes(norm.numpy()))]
    write_gguf(tmp_path / "q8.gguf", metadata, tensors)
    write_f32_copy(tmp_path / "q8.gguf", tmp_path / "f32.gguf")
    copy = read_gguf(tmp_path / "f32.gguf")
    assert copy.metadata == metadata | {"general.file_type": 0}
    assert copy.metadata_types == read_gguf(tmp_path / "q8.gguf").metadata_types
    assert {name: (tensor.shape, tensor.type_name) for name, tensor in copy.tensors.items()} == {"w": ((2, 32), "F32"), "norm": ((3,), "F32")}
    torch.testing.assert_close(read_tensor(copy, "w", staging_bytes=1024), codes.float().view(2, 32) / 2, rtol=0, atol=0)
    torch.testing.assert_close(read_tensor(copy, "norm", staging_bytes=1024), norm, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("ours", "gaps", "expected", "holds"),
    [
        ([1, 2, 3], [1.0, 1.0, 1.0], Greedy(3, 3, 3), True),
        ([1, 2, 4], [1.0, 1.0, 1e-4], Greedy(3, 2, 2), True),
        ([1, 5, 3], [1.0, 1.0, 1e-4], Greedy(3, 1, 2), False),
        ([9, 9, 9], [1e-3, 1.0, 1.0], Greedy(3, 0, 0), True),
    ],
)
def test_greedy_tokens_may_differ_from_the_first_tie_on(ours, gaps, expected, holds):
    found = compare_greedy(ours, [1, 2, 3], gaps)
    assert (found, found.holds) == (expected, holds)


def test_without_llama_cpp_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    for attempt in (require_llama_cpp, lambda: run(quick=True, say=print)):
        with pytest.raises(InputError, match="make oracles"):
            attempt()
