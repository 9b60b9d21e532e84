"""Tokenizers from GGUF metadata against llama.cpp's recorded answers, and from tokenizer.json against the tokenizers library and transformers."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer

from tradespace.errors import CorruptFileError, DownloadError, InputError, UnsupportedError
from tradespace.loading.gguf import write_gguf
from tradespace.loading.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_from_gguf
from tradespace.loading.pull import pull
from tradespace.loading.resolve import resolve
from tradespace.loading.tokenizer import LONG_TEXT_CHARS, Tokenizer

RECORD = json.loads((Path(__file__).parent / "data" / "tokenizer_reference.json").read_text())
TEXTS: list[str] = RECORD["texts"]
CASES = [(case["vocabulary"], case["changes"], case["ids"]) for case in RECORD["cases"]]
BYTE_LEVEL, SENTENCE_PIECE = RECORD["vocabularies"]["byte_level"], RECORD["vocabularies"]["sentence_piece"]


def from_metadata(metadata: dict) -> Tokenizer:
    found = tokenizer_from_gguf(metadata, "test.gguf")
    return Tokenizer(found.tokenizer, bos_id=found.bos_id, eos_ids=found.eos_ids, special_tokens=found.special_tokens, chat_template=found.chat_template)


def hub_folder(folder: Path, tokenizer: RustTokenizer, **configs: dict) -> Path:
    """A model's folder around a tokenizer; only the tokenizer in it is real."""
    (folder / "config.json").write_text(json.dumps(configs.get("config", {})))
    (folder / "model.safetensors").write_bytes(b"")
    for name in ("tokenizer_config", "generation_config"):
        if name in configs:
            (folder / f"{name}.json").write_text(json.dumps(configs[name]))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def trained(kind: str) -> RustTokenizer:
    """A tokenizer as the Hub has them, trained on our texts: "byte_level" (GPT-2, Llama 3, Qwen), "llama" (Llama 2), "metaspace" (Mistral)."""
    tokenizer = RustTokenizer(models.BPE(byte_fallback=kind != "byte_level", unk_token=None if kind == "byte_level" else "<unk>"))
    alphabet: list[str] = []
    special = [AddedToken("<unk>", special=True), AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
    if kind == "byte_level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    bytes_too = [] if kind == "byte_level" else [AddedToken(f"<0x{byte:02X}>", special=False) for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=16)
    tokenizer.train_from_iterator(TEXTS[:8] * 2, trainer)
    if kind == "llama":  # byte tokens belong to the model's vocabulary, not to the added ones
        state = json.loads(tokenizer.to_str())
        for token in bytes_too:
            state["model"]["vocab"][token.content] = len(state["model"]["vocab"])
        tokenizer = RustTokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


# --- GGUF against llama.cpp


@pytest.mark.parametrize(("vocabulary", "changes", "expected"), CASES, ids=[f"{name}-{list(changes.values())}" for name, changes, _ in CASES])
def test_gguf_tokens_are_those_of_llama_cpp(vocabulary, changes, expected):
    tokenizer = from_metadata(RECORD["vocabularies"][vocabulary] | changes)
    for text, ids in zip(TEXTS, expected, strict=True):
        assert tokenizer.encode(text) == ids, repr(text)


def test_the_record_can_tell_the_ways_to_split_apart():
    recorded = {case["changes"]["tokenizer.ggml.pre"]: case["ids"] for case in RECORD["cases"] if case["changes"].keys() == {"tokenizer.ggml.pre"}}
    assert recorded.keys() == PRE_TOKENIZERS.keys()
    splits = {(*PRE_TOKENIZERS[name].splits, PRE_TOKENIZERS[name].add_bos): ids for name, ids in recorded.items()}
    distinct = {json.dumps(ids) for ids in splits.values()}
    assert len(distinct) == len(splits)


@pytest.mark.weights
@pytest.mark.parametrize("alias", ["smollm2-135m", "gemma3-270m"])
def test_real_vocabularies_give_the_tokens_of_llama_cpp(alias):
    try:
        pull(alias, progress=False)
    except DownloadError as error:
        pytest.skip(f"the weights cannot be fetched: {error}")
    tokenizer = Tokenizer.from_files(resolve(alias, offline=True))
    for text, ids in zip(TEXTS, RECORD["real"][alias], strict=True):
        assert tokenizer.encode(text) == ids, repr(text)
        back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False)
        assert back == (text.replace("▁", " ") if alias == "gemma3-270m" else text)  # SentencePiece writes its spaces so
    ends = {tokenizer.token_text(end) for end in tokenizer.eos_ids}
    assert ends == ({"<|im_end|>", "<|endoftext|>"} if alias == "smollm2-135m" else {"<eos>", "<end_of_turn>"})
    assert (tokenizer.chat_template is None) == (alias == "gemma3-270m")


@pytest.mark.parametrize("vocabulary", [BYTE_LEVEL, SENTENCE_PIECE, SENTENCE_PIECE | {"tokenizer.ggml.add_space_prefix": False}])
@given(text=st.text(min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_decode_undoes_encode(vocabulary, text):
    tokenizer = from_metadata(vocabulary)
    if vocabulary["tokenizer.ggml.model"] == "llama":
        text = text.replace("▁", "_")  # in such a vocabulary this character is a space
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False) == text


@pytest.mark.parametrize("vocabulary", [BYTE_LEVEL, SENTENCE_PIECE])
def test_a_long_text_has_the_tokens_that_it_has_otherwise(vocabulary, monkeypatch):
    """Long texts are encoded without the interpreter's lock, by another call."""
    long = "".join(TEXTS) * (1 + LONG_TEXT_CHARS // len("".join(TEXTS)))
    tokenizer = from_metadata(vocabulary)
    found = [tokenizer.encode(long, add_special_tokens=special) for special in (False, True)]
    monkeypatch.setattr("tradespace.loading.tokenizer.LONG_TEXT_CHARS", 2 * len(long))
    assert found == [tokenizer.encode(long, add_special_tokens=special) for special in (False, True)]


@given(text=st.text(min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_no_merges_where_every_token_is_a_byte(text):
    """As the tokenizers library cuts with the same vocabulary and no merges: byte for byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": alphabet, "tokenizer.ggml.merges": []}
    library = RustTokenizer(models.BPE({token: token_id for token_id, token in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = from_metadata(bytes_alone)
    assert ours.encode(text) == library.encode(text).ids and len(ours.encode(text)) == len(text.encode())
    assert ours.decode(ours.encode(text)) == text


def test_a_gguf_file_end_to_end(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, BYTE_LEVEL | {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}"}, [])
    tokenizer = Tokenizer.from_files(resolve(str(path)))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (len(BYTE_LEVEL["tokenizer.ggml.tokens"]), 1, frozenset({2}))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "<|begin|>hi"
    assert tokenizer.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}


@pytest.mark.parametrize(
    ("vocabulary", "changes", "error", "message"),
    [
        (BYTE_LEVEL, {"tokenizer.ggml.pre": "from-the-future"}, UnsupportedError, "'from-the-future' is not known"),
        (BYTE_LEVEL, {"tokenizer.ggml.pre": None}, UnsupportedError, "tokenizer.ggml.pre is missing"),
        (BYTE_LEVEL, {"tokenizer.ggml.model": "t5"}, UnsupportedError, r"'t5' \(a Unigram vocabulary\) is not supported.*Use the model's Hugging Face folder"),
        (BYTE_LEVEL, {"tokenizer.ggml.model": "bert"}, UnsupportedError, r"'bert' \(WordPiece\) is not supported"),
        (BYTE_LEVEL, {"tokenizer.ggml.merges": None}, CorruptFileError, "merges is missing"),
        (BYTE_LEVEL, {"tokenizer.ggml.merges": [1]}, CorruptFileError, "merges is no list of strings"),
        (BYTE_LEVEL, {"tokenizer.ggml.merges": []}, CorruptFileError, "its list of merges is empty, so [0-9]+ tokens"),
        (BYTE_LEVEL, {"tokenizer.ggml.model": None}, CorruptFileError, "carries no tokenizer"),
        (BYTE_LEVEL, {"tokenizer.ggml.tokens": []}, CorruptFileError, "not a list of strings"),
        (BYTE_LEVEL, {"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, CorruptFileError, "occur twice, for example 'a'"),
        (BYTE_LEVEL, {"tokenizer.ggml.token_type": [1]}, CorruptFileError, "token_type does not have one entry"),
        (BYTE_LEVEL, {"tokenizer.ggml.merges": ["q zzzz"]}, CorruptFileError, "'q zzzz' is not of two tokens"),
        (BYTE_LEVEL, {"tokenizer.ggml.bos_token_id": 10**6}, CorruptFileError, "bos_token_id is 1000000"),
        (SENTENCE_PIECE, {"tokenizer.ggml.scores": [0.0]}, CorruptFileError, "scores does not have one entry"),
        (SENTENCE_PIECE, {"tokenizer.ggml.scores": None}, CorruptFileError, "scores does not have one entry"),
    ],
)
def test_metadata_that_cannot_be_honoured(vocabulary, changes, error, message):
    metadata = {key: value for key, value in (vocabulary | changes).items() if value is not None}
    with pytest.raises(error, match=message):
        tokenizer_from_gguf(metadata, "test.gguf")


# --- tokenizer.json


@pytest.mark.parametrize("kind", ["byte_level", "llama", "metaspace"])
def test_hub_tokens_and_text_are_those_of_the_library(tmp_path, kind):
    library = trained(kind)
    tokenizer = Tokenizer.from_files(resolve(str(hub_folder(tmp_path, library, tokenizer_config={"bos_token": "<s>", "eos_token": {"content": "</s>"}}))))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, frozenset({2}), library.get_vocab_size())
    for text in TEXTS:
        ids = library.encode(text).ids
        assert tokenizer.encode(text) == ids
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == library.decode(ids, skip_special_tokens=skip)


@given(ids=st.lists(st.integers(0, 600), max_size=40), skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_byte_level_ids_decode_as_the_library_does(ids, skip):
    tokenizer = from_metadata(BYTE_LEVEL)
    assert tokenizer.decode(ids, skip_special_tokens=skip) == tokenizer._tokenizer.decode(ids, skip_special_tokens=skip)


def test_transformers_gives_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    template = "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
    folder = hub_folder(tmp_path, trained("byte_level"), tokenizer_config=config)
    tokenizer = Tokenizer.from_files(resolve(str(folder)))
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    messages = [{"role": "user", "content": "naïve 🙂"}, {"role": "assistant", "content": "<b>&</b>"}]
    prompt = tokenizer.apply_chat_template(messages)
    assert prompt == oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.encode(prompt, add_special_tokens=False) == oracle(prompt, add_special_tokens=False)["input_ids"]
    for text in TEXTS:
        assert tokenizer.encode(text) == oracle(text)["input_ids"]


def test_a_template_for_tools_is_taken_where_there_are_tools(tmp_path):
    transformers = pytest.importorskip("transformers")
    templates = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools[0].function.name }}: {{ messages[0].content }}"}
    config = {"chat_template": [{"name": name, "template": text} for name, text in templates.items()], "tokenizer_class": "PreTrainedTokenizerFast"}
    folder = hub_folder(tmp_path, trained("byte_level"), tokenizer_config=config)
    tokenizer = Tokenizer.from_files(resolve(str(folder)))
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    messages, tools = [{"role": "user", "content": "a"}], [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    for some in (None, tools):
        assert tokenizer.apply_chat_template(messages, tools=some) == oracle.apply_chat_template(messages, tools=some, tokenize=False)
    assert tokenizer.apply_chat_template(messages, tools=tools) == "add: a"


def test_ends_come_from_every_file(tmp_path):
    configs = {"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": [8, 9]}, "tokenizer_config": {"eos_token": "</s>"}}
    assert Tokenizer.from_files(resolve(str(hub_folder(tmp_path, trained("byte_level"), **configs)))).eos_ids == {2, 7, 8, 9}


def test_a_prompt_is_never_cut_in_silence(tmp_path):
    library = trained("byte_level")
    library.enable_truncation(4)
    tokenizer = Tokenizer.from_files(resolve(str(hub_folder(tmp_path, library))))
    assert len(tokenizer.encode("one two three four five six seven eight")) > 4


def test_missing_and_broken_tokenizer_files(tmp_path):
    folder = hub_folder(tmp_path, trained("byte_level"))
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(CorruptFileError, match="not a tokenizer that can be read"):
        Tokenizer.from_files(resolve(str(folder)))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(InputError, match=r"no tokenizer\.json\. It has tokenizer\.model"):
        Tokenizer.from_files(resolve(str(folder)))


def test_a_decoder_that_is_not_known(tmp_path):
    library = trained("byte_level")
    library.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedError, match="WordPiece"):
        Tokenizer.from_files(resolve(str(hub_folder(tmp_path, library))))


# --- streams


@pytest.mark.parametrize("vocabulary", [BYTE_LEVEL, SENTENCE_PIECE])
@given(text=st.text(alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\ufffd"), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_a_stream_gives_whole_characters_that_make_up_the_text(vocabulary, text):
    tokenizer = from_metadata(vocabulary)
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = tokenizer.stream_decoder()
    pieces = [stream.push(token_id) for token_id in ids]
    assert "\ufffd" not in "".join(pieces)
    assert stream.flush() == ""
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("vocabulary", [BYTE_LEVEL, SENTENCE_PIECE])
@given(ids=st.lists(st.integers(0, 400), max_size=40))
@settings(max_examples=100, deadline=None)
def test_a_stream_of_any_tokens_is_decode_of_them_all(vocabulary, ids):
    tokenizer = from_metadata(vocabulary)
    stream = tokenizer.stream_decoder()
    assert "".join([stream.push(token_id) for token_id in ids]) + stream.flush() == tokenizer.decode(ids)
    assert "".join([stream.push(token_id) for token_id in ids]) + stream.flush() == tokenizer.decode(ids)  # flushed: as new


def test_a_character_in_four_tokens_comes_with_the_fourth():
    tokenizer = from_metadata(SENTENCE_PIECE)
    rocket = [3 + byte for byte in "🚀".encode()]  # <0x00> is token 3
    stream = tokenizer.stream_decoder()
    assert [stream.push(token_id) for token_id in rocket] == ["", "", "", "🚀"]
    assert [stream.push(token_id) for token_id in rocket[:2]] == ["", ""]
    assert stream.flush() == "\ufffd"


def test_a_long_stream_takes_linear_time():
    """Counted, not timed: each token is looked up once however long the stream has become."""
    tokenizer = from_metadata(BYTE_LEVEL)
    ids = tokenizer.encode("memory is a budget ", add_special_tokens=False)
    stream = tokenizer.stream_decoder()
    lengths = {sum(len(stream.push(token_id)) for token_id in ids) for _ in range(2000)}
    assert lengths == {len("memory is a budget ")}
    assert len(tokenizer._token_bytes._cache) == len(set(ids))


# --- what is not text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (b"", "empty"),
        (b"abc\xff", r"byte 0xff at offset 3"),
        (b"\xe2\x82", "not UTF-8"),
        ("a\ud800", r"lone surrogate U\+D800 at character 1"),
        (None, "got NoneType"),
        (["a"], "got list"),
        (7, "got int"),
    ],
)
def test_what_is_no_prompt(text, message):
    for vocabulary in (BYTE_LEVEL, SENTENCE_PIECE):
        with pytest.raises(InputError, match=message):
            from_metadata(vocabulary).encode(text)


def test_bytes_that_are_text():
    tokenizer = from_metadata(BYTE_LEVEL)
    assert tokenizer.encode("naïve".encode()) == tokenizer.encode("naïve")


@pytest.mark.parametrize("token_id", [-1, 10**6, 2**40])
def test_ids_outside_the_vocabulary(token_id):
    with pytest.raises(InputError, match="not in the vocabulary"):
        from_metadata(BYTE_LEVEL).decode([token_id])
    with pytest.raises(InputError, match="not in the vocabulary"):
        from_metadata(BYTE_LEVEL).token_text(token_id)


def test_a_base_model_has_no_template():
    with pytest.raises(InputError, match="no chat template"):
        from_metadata(BYTE_LEVEL).apply_chat_template([{"role": "user", "content": "hi"}])
