"""Packing and reading: what a block holds, where the loss is, and errors that name the place of what cannot be learned from."""

from __future__ import annotations

import json
from array import array

import pytest

from cli.tiny_model import TEMPLATE, make_tokenizer, save_folder
from tradespace.errors import InputError
from tradespace.loading.resolve import resolve
from tradespace.loading.tokenizer import Tokenizer
from tradespace.train import reading
from tradespace.train.data import IGNORED, Document, Order, pack
from tradespace.train.reading import MAX_LINE_BYTES, read_documents
from tradespace.tuning_models import parse_shape, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = save_folder(tmp_path_factory.mktemp("tiny"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE.replace("<|assistant|>", "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_files(resolve(str(folder)))


def test_a_stream_is_cut_and_no_target_crosses_a_document():
    data = pack([Document([1, 2, 3, 4, 5]), Document([6, 7, 8, 9, 10, 11, 12])], 4)
    assert data.cuts == [(4,), (1, 3), (4,)]
    assert data.tokens.tolist() == list(range(1, 13))
    assert data.targets.tolist() == [2, 3, 4, IGNORED, IGNORED, 7, 8, IGNORED, 10, 11, 12, IGNORED]
    micro = data.micro_batch([1, 0])
    assert micro.tokens_T.tolist() == [5, 6, 7, 8, 1, 2, 3, 4]
    assert micro.positions_T.tolist() == [0, 0, 1, 2, 0, 1, 2, 3]
    assert micro.num_targets == 2 + 3


def test_conversations_stay_whole():
    data = pack([Document([1, 2, 3]), Document([4, 5, 6]), Document([7, 8, 9, 10, 11, 12, 13, 14, 15]), Document([16, 17])], 8, split=False)
    assert data.cuts == [(3, 3), (8,), (2,)]
    assert data.micro_batch([1]).tokens_T.tolist() == [7, 8, 9, 10, 11, 12, 13, 14]


def test_every_block_once_an_epoch_in_an_order_that_the_seed_decides():
    order = Order(10, micro_batch=2, accumulation=1, seed=3)
    seen = [block for step in range(5) for micro in order.blocks(step) for block in micro]
    assert sorted(seen) == list(range(10)) and seen != list(range(10))
    assert seen == [block for step in range(5) for micro in Order(10, 2, 1, 3).blocks(step) for block in micro]
    assert seen != [block for step in range(5, 10) for micro in order.blocks(step) for block in micro]


def test_the_loss_is_on_answers_alone(tmp_path, tokenizer):
    path = tmp_path / "chats.jsonl"
    messages = [
        {"role": "user", "content": "why is the sky blue?"},
        {"role": "assistant", "content": "light is scattered"},
        {"role": "user", "content": "a plan"},
        {"role": "assistant", "content": "is run"},
    ]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    (document,) = read_documents([path], tokenizer)
    assert document.learned is not None
    learned = [token for token, on in zip(document.ids, document.learned, strict=True) if on]
    assert tokenizer.decode(learned, skip_special_tokens=False) == "light is scattered</s>is run</s>"


BAD = {
    "nothing.txt": (b"", "is empty"),
    "blank.txt": (b" \n \n", "is empty"),
    "binary.txt": (b"abc\0def", "zero byte at 3"),
    "latin.txt": ("é".encode("latin-1") * 3, "byte 0 is 0xe9"),
    "text.jsonl": (b"not json\n", "line 1 is not JSON"),
    "long.jsonl": (b'{"messages": "' + b"x" * (MAX_LINE_BYTES + 1) + b'"}', "in one line"),
    "role.jsonl": (b'\n{"messages": [{"content": "x"}]}', 'line 2, message 1 has no "role"'),
    "content.jsonl": (b'{"messages": [{"role": "user"}]}', 'has no "content"'),
    "unknown.jsonl": (b'{"messages": [{"role": "god", "content": "x"}]}', "unknown role 'god'"),
    "number.jsonl": (b'{"messages": [{"role": "user", "content": 3}]}', '"content" is int'),
    "mute.jsonl": (b'{"messages": [{"role": "user", "content": "x"}]}', "no message has the role assistant"),
    "other.jsonl": (b'{"prompt": "x"}', 'no "messages" and no "text"'),
    "none.jsonl": (b'{"messages": []}', 'no "messages" and no "text"'),
    "null.jsonl": (b'{"messages": [{"role": null, "content": "x"}]}', '"role" is NoneType'),
    "surrogate.jsonl": (b'{"text": "x"}\n{"text": "\\ud800"}', "line 2: the text is not valid Unicode"),
    "array.json": (b'[\n {"messages": []},\n {"messages": []}\n]', "is one JSON array over several lines. Write one conversation a line, for example with jq"),
    "line.json": (b'[{"messages": []}, {"messages": []}]', "is an array of 2 conversations. Write one a line, for example with jq"),
    "wide.txt": ("hello".encode("utf-16"), "is UTF-16. Convert it, for example with iconv -f utf-16"),
    "deep.jsonl": (b"[" * 5000 + b"]" * 5000, "line 1 is not JSON|one JSON array"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_named(name, tmp_path, tokenizer):
    raw, message = BAD[name]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as caught:
        read_documents([tmp_path / name], tokenizer)
    assert name in str(caught.value)


def test_a_mark_at_the_front_is_no_text(tmp_path, tokenizer):
    for name, mark in (("plain.txt", b""), ("marked.txt", b"\xef\xbb\xbf")):
        (tmp_path / name).write_bytes(mark + b"a budget is stated")
    plain, marked = read_documents([tmp_path / "plain.txt", tmp_path / "marked.txt"], tokenizer)
    assert list(plain.ids) == list(marked.ids)


@pytest.mark.parametrize("text", ["x y z " * 500_000, "x" * 10_000_000], ids=["words", "one word"])
def test_a_line_of_megabytes(text, tmp_path, tokenizer):
    """Without a line's end anywhere: read in pieces, 4 bytes a token kept; and a vocabulary is made from it in seconds."""
    path = tmp_path / "line.txt"
    path.write_text(text)
    (document,) = read_documents([path], tokenizer)
    assert tokenizer.decode(list(document.ids)[:2000]).strip() == text[: len(tokenizer.decode(list(document.ids)[:2000]).strip())]
    assert isinstance(document.ids, array) and document.ids.itemsize == 4
    data = pack([document], 512)
    assert data.num_tokens // 512 == len(data)
    made = train_tokenizer([path], 300, tmp_path / "made")
    assert made.decode(made.encode(text[:99], add_special_tokens=False)) == text[:99]


def test_too_little_data(tmp_path, tokenizer):
    (tmp_path / "line.txt").write_text("one line")
    found = read_documents([tmp_path / "line.txt"], tokenizer)
    with pytest.raises(InputError, match=r"has \d+ tokens; one sequence takes 512. Give more text, or --context"):
        pack(found, 512)
    with pytest.raises(InputError, match="the loss is on no token"):
        pack([Document([1, 2, 3], [False] * 3)], 3, split=False)
    with pytest.raises(InputError, match=r"does not exist|No such file"):
        read_documents([tmp_path / "absent.txt"], tokenizer)


def test_a_long_text_is_tokenized_as_a_whole(tmp_path, tokenizer, monkeypatch):
    """In pieces that end with lines: the same tokens."""
    text = "the quick brown fox\njumps over\n" * 40
    (tmp_path / "text.txt").write_text(text)
    monkeypatch.setattr(reading, "PIECE_CHARS", 100)
    (document,) = read_documents([tmp_path / "text.txt"], tokenizer)
    assert list(document.ids) == tokenizer.encode(text)
    assert make_tokenizer().get_vocab_size() > max(document.ids)


def test_a_shape_says_each_thing_once():
    with pytest.raises(InputError, match="says layers twice"):
        parse_shape("layers=2,width=64,heads=4,layers=3")
