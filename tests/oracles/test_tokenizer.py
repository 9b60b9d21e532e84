"""Runs loading/record_tokenizer_reference.py, holds our tokenizers against what llama.cpp says today, and puts the record in its place."""

from __future__ import annotations

import json
import sys

import pytest

from loading import record_tokenizer_reference as recorder
from tradespace.loading.gguf_tokenizer import tokenizer_from_gguf
from tradespace.loading.pull import pull
from tradespace.loading.resolve import resolve
from tradespace.loading.tokenizer import Tokenizer

ALIASES = ("smollm2-135m", "gemma3-270m")  # in the order in which the recorder takes them


@pytest.mark.weights
def test_tokens_are_those_of_llama_cpp(tmp_path, monkeypatch):
    fresh, committed = tmp_path / "tokenizer_reference.json", recorder.RECORD
    before = json.loads(committed.read_text(encoding="utf-8"))
    if before["texts"] == recorder.TEXTS:  # training breaks ties as it likes: new vocabularies would only be noise in the record
        for kind, vocabulary in before["vocabularies"].items():
            monkeypatch.setattr(recorder, f"{kind}_vocabulary", lambda vocabulary=vocabulary: vocabulary)
    for alias in ALIASES:
        pull(alias, progress=False)
    monkeypatch.setattr(recorder, "RECORD", fresh)
    monkeypatch.setattr(sys, "argv", [recorder.__file__, *(str(resolve(alias, offline=True).weights[0]) for alias in ALIASES)])
    recorder.main()
    said = json.loads(fresh.read_text(encoding="utf-8"))
    assert said["texts"] == recorder.TEXTS
    assert said["real"].keys() == set(ALIASES)
    for case in said["cases"]:
        found = tokenizer_from_gguf(said["vocabularies"][case["vocabulary"]] | case["changes"], "recorded.gguf")
        tokenizer = Tokenizer(
            found.tokenizer, bos_id=found.bos_id, eos_ids=found.eos_ids, special_tokens=found.special_tokens, chat_template=found.chat_template
        )
        for text, ids in zip(said["texts"], case["ids"], strict=True):
            assert tokenizer.encode(text) == ids, f"{case['changes']}: {text!r}"
    for alias, expected in said["real"].items():
        tokenizer = Tokenizer.from_files(resolve(alias, offline=True))
        for text, ids in zip(said["texts"], expected, strict=True):
            assert tokenizer.encode(text) == ids, f"{alias}: {text!r}"
    committed.write_text(fresh.read_text(encoding="utf-8"), encoding="utf-8")
