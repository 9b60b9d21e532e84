"""llama.cpp opens the GGUF files that we write and computes what we compute: tiny random models in every type, and a real one from file to file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from loading.gguf_models import TEXTS, export, hugging_face_folder, source_of, spec_of, tokens_of
from loading.quantized_models import build_fp32
from loading.test_gguf_export import LLAMA3, YARN, reread
from tradespace.lab.agreement import KL_BAR, LlamaCpp, require_llama_cpp, token_window
from tradespace.lab.common import read_text
from tradespace.loading.gguf import read_gguf
from tradespace.loading.pull import pull
from tradespace.loading.resolve import resolve
from tradespace.loading.tokenizer import Tokenizer as OurTokenizer
from tradespace.loading.weights import load_weights
from tradespace.quality.divergence import compare, next_token_logprobs
from tradespace.quantize.rtn import fill_rtn
from tradespace.spec.gguf_config import model_spec_from_gguf
from tradespace.spec.weights import WeightPlan

QUANTIZED = ("q8_0", "q4_0", "q4_1", "q4_k")
CASES = {
    "llama": ("llama", "llama-bpe", True, {"rope_parameters": LLAMA3}),
    "tied": ("llama", "smollm", False, {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen2": ("qwen2", "qwen2", False, {}),
    "qwen3": ("qwen3", "qwen2", False, {}),
}


# the least context that llama.cpp makes: it rounds up to whole 256s
LEAST_CONTEXT = 256


def divergence(path: Path, model, window: list[int]):
    """Mean KL in nats of our model to llama.cpp's reading of the file."""
    with LlamaCpp(path, context=len(window)) as oracle:
        assert oracle.context == LEAST_CONTEXT
        heard = list(oracle.logprobs(window))
    return compare(lambda _: iter(heard), lambda tokens: next_token_logprobs(model, tokens), [window])


@pytest.mark.parametrize("fmt", ["fp32", "fp16", "bf16", *QUANTIZED])
@pytest.mark.parametrize("case", CASES)
def test_tiny_models(case, fmt, tmp_path):
    family, pre, bos, changes = CASES[case]
    files = hugging_face_folder(tmp_path / "hf", family, pre=pre, bos=bos, **changes)
    path = tmp_path / "out.gguf"
    export(path, files, spec_of(files), source_of(files), fmt)
    # the file's own weights, dequantized: what remains is arithmetic, and llama.cpp's 8-bit activations
    found = divergence(path, reread(path), tokens_of(60).tolist())
    assert found.mean_kl <= (KL_BAR["F32"] if fmt == "fp32" else KL_BAR["as stored"]), found
    if fmt == "fp32":
        assert found.top1_agreement >= 0.98


@pytest.mark.parametrize("case", CASES)
def test_tokens(case, tmp_path):
    family, pre, bos, changes = CASES[case]
    files = hugging_face_folder(tmp_path / "hf", family, pre=pre, bos=bos, **changes)
    export(tmp_path / "out.gguf", files, spec_of(files), source_of(files), "q8_0")
    model = require_llama_cpp().Llama(str(tmp_path / "out.gguf"), vocab_only=True, verbose=False)
    theirs = Tokenizer.from_file(str(files.tokenizer_json))
    for text in TEXTS:
        assert model.tokenize(text.encode(), add_bos=True, special=True) == theirs.encode(text).ids
    model.close()


@pytest.mark.weights
@pytest.mark.parametrize("fmt", ["fp32", "q8_0", "q4_0", "q4_1"])
def test_a_real_model_from_file_to_file(fmt, tmp_path):
    """SmolLM2-135M (577 wide: no whole blocks of 256, so no K-quants): rounded anew from the stored file's values."""
    pull("smollm2-135m", progress=False)
    files = resolve("smollm2-135m", offline=True)
    stored = read_gguf(files.weights[0])
    spec = model_spec_from_gguf(stored.metadata, {name: tensor.shape for name, tensor in stored.tensors.items()}, "smollm2-135m")
    path = tmp_path / "out.gguf"
    export(path, files, spec, stored, fmt)
    written = read_gguf(path)
    assert {key for key in written.metadata if written.metadata[key] != stored.metadata.get(key)} <= {"general.file_type", "general.quantization_version"}
    model = build_fp32(spec, WeightPlan(default="fp32"))
    load_weights(model, written, spec, fill=fill_rtn, staging_bytes=4 << 20)
    model = model.requires_grad_(False)
    window = token_window(OurTokenizer.from_files(files), read_text("wikitext2", "wiki.test.raw"), 60)[:64]
    found = divergence(path, model, window)
    assert found.mean_kl <= (KL_BAR["F32"] if fmt == "fp32" else KL_BAR["as stored"]), found
    assert torch.isfinite(torch.tensor(found.mean_kl))
