"""`quantize --to gguf` from a Hugging Face folder: every family that runs, byte-level and SentencePiece vocabularies, special tokens, chat template; read back
by our reader and by the gguf package. llama.cpp itself reads them in tests/oracles."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import tokenizers
import torch

import tradespace as ts
from cli.tiny_model import make_home
from loading.gguf_models import TEXTS, family_folder, hugging_face_folder, sentence_piece_tokenizer, tokens_of
from loading.quantized_models import logits
from loading.test_gguf_export import reread
from model.family_configs import FAMILIES
from tradespace.errors import InputError, UnsupportedError
from tradespace.loading.gguf import read_gguf
from tradespace.loading.gguf_tokenizer import tokenizer_from_gguf


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRADESPACE_HOME", str(make_home(tmp_path / "home")))


def write(folder: Path, out: Path, fmt: str, **how) -> ts.Quantized:
    return ts.quantize(str(folder), out, format=fmt, to="gguf", memory="8GiB", **{"method": "rtn", **how})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("skip", [0, 1])
def test_every_family_comes_back_with_its_logits(family, skip, tmp_path):
    _, oracle = family_folder(tmp_path / "hub", family, skip=skip)
    write(tmp_path / "hub", tmp_path / "out.gguf", "fp32")
    tokens_T = tokens_of(60)
    with torch.inference_mode():
        theirs = oracle(tokens_T[None]).logits[0]
    assert theirs.std() > 0.5
    torch.testing.assert_close(logits(reread(tmp_path / "out.gguf"), tokens_T), theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("fmt", ["q8_0", "q4_0", "q4_1", "q4_k"])
def test_blocks_from_a_folder_are_those_from_a_file(fmt, tmp_path):
    """From a folder, and from the F32 file that was written from it: the same blocks, the same tokenizer, the same file but for what names it."""
    hugging_face_folder(tmp_path / "hub")
    write(tmp_path / "hub", tmp_path / "full.gguf", "fp32")
    found = write(tmp_path / "hub", tmp_path / "a.gguf", fmt)
    write(tmp_path / "full.gguf", tmp_path / "b.gguf", fmt)
    first, second = read_gguf(tmp_path / "a.gguf"), read_gguf(tmp_path / "b.gguf")
    assert first.metadata == second.metadata and first.metadata["general.quantization_version"] == 2
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.1.ffn_down.weight"] == fmt.upper()
    assert kinds["token_embd.weight"] == "BF16" and kinds["output_norm.weight"] == "F32"
    assert found.formats.startswith(fmt)


def test_a_rotated_model_has_a_head_of_its_own(tmp_path):
    files = hugging_face_folder(tmp_path / "hub", tie_word_embeddings=True)
    need = logits(reread_of(tmp_path, files.folder, "rtn"), tokens_of())
    have = logits(reread_of(tmp_path, files.folder, "hadamard"), tokens_of())
    assert "output.weight" in read_gguf(tmp_path / "hadamard.gguf").tensors and "output.weight" not in read_gguf(tmp_path / "rtn.gguf").tensors
    torch.testing.assert_close(have, need, rtol=0, atol=1e-3 * float(need.abs().max()))
    write(tmp_path / "rtn.gguf", tmp_path / "again.gguf", "fp32", method="hadamard")
    torch.testing.assert_close(logits(reread(tmp_path / "again.gguf"), tokens_of()), need, rtol=0, atol=1e-3 * float(need.abs().max()))


def reread_of(folder: Path, model: Path, method: str):
    write(model, folder / f"{method}.gguf", "fp32", method=method)
    return reread(folder / f"{method}.gguf")


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentence_piece_vocabulary(prefix, tmp_path):
    files = hugging_face_folder(tmp_path / "hub")
    sentence_piece_tokenizer(tmp_path / "hub", prefix=prefix)
    write(tmp_path / "hub", tmp_path / "out.gguf", "q8_0")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    assert fields["tokenizer.ggml.model"].contents() == "llama" and metadata["tokenizer.ggml.add_space_prefix"] is prefix
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(metadata["tokenizer.ggml.scores"]) == 330
    kinds = dict(zip(tokens, types, strict=True))
    assert (kinds["<unk>"], kinds["<s>"], kinds["<0x0A>"], kinds["<turn>"], kinds["▁▁▁"]) == (2, 3, 6, 4, 1)
    assert any(len(token) > 3 and kind == 1 for token, kind in kinds.items())
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"], metadata["tokenizer.ggml.unknown_token_id"]) == (1, 2, 0)
    assert metadata["tokenizer.ggml.add_bos_token"] and metadata["tokenizer.chat_template"] == "{{ messages[0].content }}"
    theirs, again = tokenizers.Tokenizer.from_file(str(files.tokenizer_json)), tokenizer_from_gguf(metadata, "out").tokenizer
    for text in (*TEXTS, "a   b<turn>c  ", "the 日本 dog"):
        assert again.encode(text).ids == theirs.encode(text).ids, text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v["model"]["merges"].pop(), "are not all its cuts into two pieces"),
        (lambda v: v["model"]["merges"].append(v["model"]["merges"][0]), "lie apart"),
        (lambda v: v.update(normalizer={"type": "NFKC"}), "its normalizer 'NFKC' has no counterpart"),
        (lambda v: v.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer has the step 'Whitespace'"),
        (lambda v: v.update(normalizer=None), "does not write spaces as ▁"),
        (lambda v: v["model"].update(type="Unigram"), "a Unigram vocabulary is not written to GGUF"),
    ],
)
def test_a_vocabulary_that_scores_cannot_say_is_refused(change, words, tmp_path):
    hugging_face_folder(tmp_path / "hub")
    sentence_piece_tokenizer(tmp_path / "hub")
    values = json.loads((tmp_path / "hub" / "tokenizer.json").read_text())
    change(values)
    (tmp_path / "hub" / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UnsupportedError, match=words):
        write(tmp_path / "hub", tmp_path / "out.gguf", "q8_0")
    assert not list(tmp_path.glob("out*"))


def test_what_gguf_has_no_word_for_is_told_before_anything_is_written(tmp_path):
    family_folder(tmp_path / "hub", "llama")
    with pytest.raises(InputError, match=r"--to gguf has no int4-g32\. It has q8_0"):
        write(tmp_path / "hub", tmp_path / "out.gguf", "int4-g32")
    hugging_face_folder(tmp_path / "slides", "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0, layer_types=["sliding_attention"] * 2)
    with pytest.raises(UnsupportedError, match="sliding windows have no key in GGUF's qwen2"):
        write(tmp_path / "slides", tmp_path / "out.gguf", "q8_0")
    assert not list(tmp_path.glob("out*"))
