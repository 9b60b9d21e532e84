"""llama.cpp opens what `quantize --to gguf` writes, and computes what we compute: every family from a folder, and real weights in every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch

import tradespace as ts
from loading.gguf_models import TEXTS, family_folder, hugging_face_folder, sentence_piece_tokenizer, tokens_of
from loading.quantized_models import build_fp32
from loading.test_gguf_export import reread
from model.family_configs import FAMILIES
from oracles.test_gguf_export import LEAST_CONTEXT, divergence
from tradespace.lab.agreement import KL_BAR, require_llama_cpp, token_window
from tradespace.lab.common import read_text
from tradespace.loading.gguf import read_gguf
from tradespace.loading.pull import pull
from tradespace.loading.resolve import resolve
from tradespace.loading.tokenizer import Tokenizer
from tradespace.loading.weights import load_weights
from tradespace.quantize.rtn import fill_rtn
from tradespace.spec.gguf_config import model_spec_from_gguf
from tradespace.spec.weights import WeightPlan


def write(model: str, out: Path, fmt: str) -> None:
    ts.quantize(model, out, format=fmt, to="gguf", method="rtn", memory="8GiB")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("skip", range(4))
def test_every_family_from_a_folder(family, skip, tmp_path):
    family_folder(tmp_path / "hub", family, skip=skip)
    write(str(tmp_path / "hub"), tmp_path / "out.gguf", "fp32")
    # longrope's factors are those of the context that room was made for, there as here: it must be the same
    ours = reread(tmp_path / "out.gguf", max_context=LEAST_CONTEXT)
    found = divergence(tmp_path / "out.gguf", ours, tokens_of(60).tolist())
    # Gemma's and GPT-2's GELU comes out of a table in half precision there
    assert found.mean_kl <= KL_BAR["F32"] * (1 if "gelu" not in family else 10), found


@pytest.mark.parametrize("trained", [64, 512])
def test_longrope_has_the_factors_of_its_context(trained, tmp_path):
    """Room for 256 tokens is beyond a trained context of 64 (long factors) and within one of 512 (short ones), on both sides; the others would be seen."""
    family_folder(tmp_path / "hub", "phi3", skip=2)  # the first with longrope
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "longrope"
    config["rope_parameters"]["original_max_position_embeddings"] = config["original_max_position_embeddings"] = trained
    config["max_position_embeddings"] = 1024
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    path, tokens = tmp_path / "out.gguf", tokens_of(60).tolist()
    write(str(tmp_path / "hub"), path, "fp32")
    found = {context: divergence(path, reread(path, max_context=context), tokens) for context in (64, 256, 1024)}
    same, other = (64, 1024) if trained == 512 else (1024, 64)
    assert max(found[256].mean_kl, found[same].mean_kl) <= KL_BAR["F32"] < 100 * KL_BAR["F32"] < found[other].mean_kl


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_tokens(prefix, tmp_path):
    files = hugging_face_folder(tmp_path / "hub")
    sentence_piece_tokenizer(tmp_path / "hub", prefix=prefix)
    write(str(tmp_path / "hub"), tmp_path / "out.gguf", "q8_0")
    model = require_llama_cpp().Llama(str(tmp_path / "out.gguf"), vocab_only=True, verbose=False)
    theirs = tokenizers.Tokenizer.from_file(str(files.tokenizer_json))
    for text in (*TEXTS, "a   b<turn>c  ", "the 日本 dog"):
        assert model.tokenize(text.encode(), add_bos=True, special=True) == theirs.encode(text).ids, text
    model.close()


@pytest.mark.weights
@pytest.mark.parametrize(
    ("model", "fmt"), [("smollm2-135m", fmt) for fmt in ("fp32", "q8_0", "q4_0", "q4_1")] + [("gemma3-270m", fmt) for fmt in ("fp32", "q8_0", "q4_0")]
)
def test_real_weights(model, fmt, tmp_path):
    """Widths of 576 and 640 hold no whole blocks of 256: Q4_K is compared on tiny models."""
    pull(model, progress=False)
    write(model, tmp_path / "out.gguf", fmt)
    written = read_gguf(tmp_path / "out.gguf")
    spec = model_spec_from_gguf(written.metadata, {name: tensor.shape for name, tensor in written.tensors.items()}, model)
    ours = build_fp32(spec, WeightPlan(default="fp32"))
    load_weights(ours, written, spec, fill=fill_rtn, staging_bytes=4 << 20)
    tokenizer = Tokenizer.from_files(resolve(model, offline=True))
    found = divergence(tmp_path / "out.gguf", ours.requires_grad_(False), token_window(tokenizer, read_text("wikitext2", "wiki.test.raw"), 60)[:64])
    assert found.mean_kl <= (KL_BAR["F32"] if fmt == "fp32" else KL_BAR["as stored"]), found
    torch.testing.assert_close(found.perplexity, found.reference_perplexity, rtol=0.1, atol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_k_quants(family, tmp_path):
    hugging_face_folder(tmp_path / "hub", family)
    write(str(tmp_path / "hub"), tmp_path / "out.gguf", "q4_k")
    assert divergence(tmp_path / "out.gguf", reread(tmp_path / "out.gguf"), tokens_of(60).tolist()).mean_kl <= KL_BAR["as stored"]
