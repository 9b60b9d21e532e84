"""Whole models written as GGUF: the gguf package reads them, our reader loads the same logits, the tokenizer gives the same tokens. llama.cpp: oracles."""

from __future__ import annotations

import json

import gguf
import pytest
import tokenizers
import torch

from loading.gguf_models import TEXTS, export, hugging_face_folder, source_of, spec_of, tokens_of, train_tokenizer
from loading.quantized_models import build_fp32, logits
from tradespace.errors import CorruptFileError, UnsupportedError
from tradespace.formats import decode
from tradespace.loading.gguf import read_floats, read_gguf
from tradespace.loading.gguf_export import write_model
from tradespace.loading.gguf_tokenizer import tokenizer_from_gguf
from tradespace.loading.resolve import resolve
from tradespace.loading.tokenizer import Tokenizer
from tradespace.loading.weights import load_weights
from tradespace.quantize.hf_config import write_tokenizer
from tradespace.quantize.rtn import fill_rtn
from tradespace.spec.gguf_config import model_spec_from_gguf
from tradespace.spec.weights import WeightPlan

FP32 = WeightPlan(default="fp32")
FORMATS = ("fp32", "bf16", "fp16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k")
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


def reread(path, *, max_context=64):
    """The model that a GGUF file holds, through our own reader, in fp32; for at most so many tokens, or as many as have learned positions."""
    file = read_gguf(path)
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    spec = model_spec_from_gguf(file.metadata, shapes, path.stem, read_factors=lambda name: read_floats(file, name))
    model = build_fp32(spec, FP32, max_context=min(max_context, spec.learned_positions - spec.position_offset) if spec.learned_positions else max_context)
    load_weights(model, file, spec, fill=fill_rtn, staging_bytes=1 << 20)
    return model


def ours(files, spec):
    model = build_fp32(spec, FP32)
    load_weights(model, source_of(files), spec, fill=fill_rtn, staging_bytes=1 << 20)
    return model


CASES = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biased": ("llama", {"attention_bias": True}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_model_comes_back(case, tmp_path):
    family, changes = CASES[case]
    files = hugging_face_folder(tmp_path / "hf", family, **changes)
    spec = spec_of(files)
    export(tmp_path / "out.gguf", files, spec, source_of(files), "fp32")
    need, have = (logits(model, tokens_of()) for model in (ours(files, spec), reread(tmp_path / "out.gguf")))
    assert need.abs().max() > 1
    torch.testing.assert_close(have, need, rtol=0, atol=2e-5)


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_type_as_the_gguf_package_reads_it(fmt, tmp_path):
    files = hugging_face_folder(tmp_path / "hf")
    spec = spec_of(files)
    codes = export(tmp_path / "out.gguf", files, spec, source_of(files), fmt)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    down = found["blk.1.ffn_down.weight"]
    values = decode(fmt, codes["layers.1.ffn.down.weight"])
    if fmt in ("bf16", "fp16"):
        values = values.to({"bf16": torch.bfloat16, "fp16": torch.float16}[fmt]).float()
    assert torch.equal(torch.from_numpy(gguf.quants.dequantize(down.data, down.tensor_type)), values)
    # queries are put in pairs: row 2i + 1 of a head was row i + 32
    query = found["blk.0.attn_q.weight"]
    rows = torch.from_numpy(gguf.quants.dequantize(query.data, query.tensor_type).copy())
    need = decode(fmt, codes["layers.0.attn.qkv.weight"])
    if fmt in ("bf16", "fp16"):
        need = need.to({"bf16": torch.bfloat16, "fp16": torch.float16}[fmt]).float()
    assert torch.equal(rows[64 + 7], need[64 + 3 + 32]) and torch.equal(rows[6], need[3])
    assert found["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_a_template_for_tools_goes_with_the_others(tmp_path):
    files = hugging_face_folder(tmp_path / "hf")
    settings = json.loads((files.folder / "tokenizer_config.json").read_text())
    templates = {"default": "D", "tool_use": "T"}
    settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    (files.folder / "tokenizer_config.json").write_text(json.dumps(settings))
    files = resolve(str(files.folder))
    assert (files.chat_template, files.tool_template) == ("D", "T")
    export(tmp_path / "out.gguf", files, spec_of(files), source_of(files), "q8_0")
    found = tokenizer_from_gguf(read_gguf(tmp_path / "out.gguf").metadata, "out")
    assert (found.chat_template, found.tool_template) == ("D", "T")
    (tmp_path / "back").mkdir()
    write_tokenizer(read_gguf(tmp_path / "out.gguf"), tmp_path / "back")
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())["chat_template"] == settings["chat_template"]


@pytest.mark.parametrize(("pre", "bos"), [("smollm", False), ("gpt-2", True), ("llama-bpe", True), ("qwen2", False), ("tekken", True)])
def test_the_tokenizer_gives_the_same_tokens(pre, bos, tmp_path):
    files = hugging_face_folder(tmp_path / "hf", pre=pre, bos=bos)
    spec = spec_of(files)
    export(tmp_path / "out.gguf", files, spec, source_of(files), "q8_0")
    metadata = read_gguf(tmp_path / "out.gguf").metadata
    assert metadata["tokenizer.ggml.pre"] == pre
    assert (metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.add_eos_token"]) == (bos, False)
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert metadata["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert len(metadata["tokenizer.ggml.tokens"]) == 330
    theirs = tokenizers.Tokenizer.from_file(str(files.tokenizer_json))
    again = tokenizer_from_gguf(metadata, "out")
    for text in TEXTS:
        assert again.tokenizer.encode(text).ids == theirs.encode(text).ids


def test_a_gguf_source_keeps_its_metadata(tmp_path):
    """From a file to a file: everything but the type of its weights is as it was, and no rows move twice."""
    files = hugging_face_folder(tmp_path / "hf", rope_parameters=LLAMA3)
    export(tmp_path / "first.gguf", files, spec_of(files), source_of(files), "fp32")
    again = resolve(str(tmp_path / "first.gguf"), download=False)
    file = read_gguf(tmp_path / "first.gguf")
    spec = model_spec_from_gguf(file.metadata, {n: t.shape for n, t in file.tensors.items()}, "x", read_factors=lambda name: read_floats(file, name))
    export(tmp_path / "second.gguf", again, spec, file, "fp32")
    assert (tmp_path / "first.gguf").read_bytes() == (tmp_path / "second.gguf").read_bytes()


def test_halves_out_of_a_gguf_source_are_paired_again(tmp_path):
    """A pipeline may turn the pairs of a GGUF file into halves on the way; what it writes must be pairs again."""
    files = hugging_face_folder(tmp_path / "hf")
    spec = spec_of(files)
    export(tmp_path / "first.gguf", files, spec, source_of(files), "fp32")
    again = resolve(str(tmp_path / "first.gguf"), download=False)
    export(tmp_path / "second.gguf", again, spec, source_of(files), "fp32")
    assert (tmp_path / "first.gguf").read_bytes() == (tmp_path / "second.gguf").read_bytes()


REFUSED = {
    "window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1, "layer_types": ["full_attention", "sliding_attention"]},
        "sliding windows|layers that differ",
    ),
    "scaling": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary scaling dynamic"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_cannot_say_is_refused(case, tmp_path):
    family, changes, message = REFUSED[case]
    files = hugging_face_folder(tmp_path / "hf", family, **changes)
    with pytest.raises(UnsupportedError, match=message):
        export(tmp_path / "out.gguf", files, spec_of(files), source_of(files), "fp32")
    assert not list(tmp_path.glob("*.gguf*"))


def test_formats_and_widths_that_gguf_lacks_are_refused(tmp_path):
    files = hugging_face_folder(tmp_path / "hf")
    spec = spec_of(files)
    for fmt, message in (("int4-g64", "no type for int4-g64"), ("e8", "no type for e8")):
        with pytest.raises(UnsupportedError, match=message):
            write_model(tmp_path / "out.gguf", spec, files, format_of=lambda _, fmt=fmt: fmt, rows=lambda *_: torch.zeros(1))
    narrow = hugging_face_folder(tmp_path / "narrow", hidden_size=288, num_attention_heads=4)
    with pytest.raises(UnsupportedError, match="q4_k needs rows that are a multiple of 256"):
        write_model(tmp_path / "out.gguf", spec_of(narrow), narrow, format_of=lambda _: "q4_k", rows=lambda *_: torch.zeros(1))


def test_floats_where_codes_are_due_are_refused(tmp_path):
    files = hugging_face_folder(tmp_path / "hf")
    with pytest.raises(UnsupportedError, match="written from codes"):
        write_model(tmp_path / "out.gguf", spec_of(files), files, format_of=lambda _: "q8_0", rows=lambda name, start, stop: torch.zeros(stop - start, 256))


def _changed(folder, change):
    train_tokenizer(folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    change(values)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return resolve(str(folder), download=False)


TOKENIZERS = {
    "sentencepiece": (lambda v: v["model"].update(byte_fallback=True), UnsupportedError, "SentencePiece in GGUF does not have"),
    "unigram": (lambda v: v["model"].update(type="Unigram"), UnsupportedError, "Unigram"),
    "suffix": (lambda v: v["model"].update(end_of_word_suffix="</w>"), UnsupportedError, "end_of_word_suffix"),
    "metaspace": (lambda v: v.update(pre_tokenizer={"type": "Metaspace"}), UnsupportedError, "step 'Metaspace'"),
    "other split": (lambda v: v["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="x+"), UnsupportedError, "no name in GGUF"),
    "ignore_merges": (lambda v: v["model"].update(ignore_merges=True), UnsupportedError, "no name in GGUF"),
    "lower case": (lambda v: v.update(normalizer={"type": "Lowercase"}), UnsupportedError, "normalizer 'Lowercase'"),
    "ids beyond": (lambda v: v["added_tokens"].append({"id": 5000, "content": "x"}), CorruptFileError, "beyond the 330 rows"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers_that_gguf_cannot_say_are_refused(case, tmp_path):
    change, error, message = TOKENIZERS[case]
    hugging_face_folder(tmp_path)
    files = _changed(tmp_path, change)
    with pytest.raises(error, match=message):
        write_model(tmp_path / "out.gguf", spec_of(files), files, format_of=lambda _: "fp32", rows=lambda *_: torch.zeros(1))


def test_a_tokenizer_without_merges_goes_there_and_back(tmp_path):
    """A vocabulary of bytes has an empty list of merges, which is no list of anything: its type is stated in the file."""
    hugging_face_folder(tmp_path)

    def bytes_alone(values: dict) -> None:
        special = {token["content"] for token in values["added_tokens"]}
        values["model"]["vocab"] = {token: token_id for token, token_id in values["model"]["vocab"].items() if len(token) == 1 or token in special}
        values["model"]["merges"] = []

    files = _changed(tmp_path, bytes_alone)
    path = tmp_path / "out.gguf"
    export(path, files, spec_of(files), source_of(files), "fp32")
    assert read_gguf(path).metadata["tokenizer.ggml.merges"] == []
    written = Tokenizer.from_files(resolve(str(path)))
    for text in TEXTS:
        assert written.encode(text, add_special_tokens=False) == Tokenizer.from_files(files).encode(text, add_special_tokens=False)
    assert len(written.encode("naïve", add_special_tokens=False)) == len("naïve".encode())
