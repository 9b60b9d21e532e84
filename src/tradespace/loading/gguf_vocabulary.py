"""tokenizer.json → the metadata keys that a GGUF file keeps its tokenizer under: byte-level BPE whose way of cutting text llama.cpp knows by a name, or
SentencePiece's BPE (`loading/gguf_sentencepiece`).

Which name is found by comparing the expressions that cut, never guessed from the model's. At last the tokenizer is made again out of the metadata, and both
must cut PROBES alike. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tradespace.errors import CorruptFileError, UnsupportedError
from tradespace.loading.gguf_sentencepiece import ELSEWHERE, is_sentence_piece, sentence_piece_metadata
from tradespace.loading.gguf_tokenizer import CONTROL, END_TOKENS, NORMAL, PRE_TOKENIZERS, UNUSED, USER_DEFINED, tokenizer_from_gguf
from tradespace.loading.resolve import ModelFiles, read_json_object
from tradespace.loading.tokenizer import Tokenizer

_DIGIT = r"\p{N}"
# what tokenizers stumble over: spaces in runs and at either end, line ends, digits, capitals, signs, other scripts, what has no piece of its own
PROBES = (
    "The quick brown fox doesn't jump 1234567 times over  two   lazy dogs.",
    " a leading space, and two at the end  ",
    "\n\nlines\r\n\tof text\n\n\n",
    "naïve Ünïcödé — 日本語, русский, عربى, 🙂👍🏽",
    "def f(x):\n    return {'a': [x+1, -2.5e-3]} // 0xFF",
)


def vocabulary_metadata(files: ModelFiles, num_rows: int) -> tuple[dict[str, Any], dict[str, str]]:
    """(metadata, their GGUF types) of the tokenizer of `files`, a Hugging Face folder; `num_rows` of the embedding: a row without a token gets a name.

    Raises UnsupportedError for a tokenizer that GGUF or llama.cpp has no name for, CorruptFileError for one that contradicts itself.
    """
    if files.tokenizer_json is None:
        raise UnsupportedError(f"{files.folder} has no tokenizer.json, from which a GGUF file's vocabulary is made. Fetch it, or start from a GGUF file")
    values = read_json_object(files.tokenizer_json)
    assert values is not None, f"{files.tokenizer_json} has just been found"
    where = str(files.tokenizer_json)
    model = _bpe_model(values, where)
    tokens, types = _tokens(values, model, num_rows, where)
    if is_sentence_piece(model):
        kind = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"} | sentence_piece_metadata(values, tokens, types, where)
    else:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        pre = _pre_tokenizer(values, bool(model.get("ignore_merges")), where)
        kind = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}
    tokenizer = Tokenizer.from_files(files)
    plain, dressed = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    metadata: dict[str, Any] = kind | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": dressed != plain and dressed[-len(plain) - 1 :] != plain and dressed[1 : 1 + len(plain)] == plain,
        "tokenizer.ggml.add_eos_token": dressed != plain and dressed[-1:] != plain[-1:],
    }
    special = _special_ids(files, ids)
    if metadata["tokenizer.ggml.add_bos_token"] and special.get("bos") != dressed[0]:
        raise UnsupportedError(f"{where} puts {tokens[dressed[0]]!r} before a text, which is not its begin token: GGUF has no key for that")
    metadata |= {f"tokenizer.ggml.{name}_token_id": token_id for name, token_id in (special | _more_ends(tokenizer, special, tokens, where)).items()}
    if files.chat_template:
        metadata["tokenizer.chat_template"] = files.chat_template
    if files.tool_template:
        metadata["tokenizer.chat_template.tool_use"] = files.tool_template
    again = tokenizer_from_gguf(metadata, where).tokenizer
    for text in PROBES:
        if again.encode(text).ids != tokenizer.encode(text):
            raise UnsupportedError(f"{where} cuts {text!r} in another way than a GGUF file's tokenizer would. {ELSEWHERE}")
    return metadata, {"tokenizer.ggml.token_type": "array[int32]"} | ({"tokenizer.ggml.merges": "array[string]"} if "tokenizer.ggml.merges" in metadata else {})


def _more_ends(tokenizer: Tokenizer, special: Mapping[str, int], tokens: Sequence[str], where: str) -> dict[str, int]:
    """End tokens besides "eos" (of a turn, of a message), which GGUF has two more keys for; those that readers know by their text need none."""
    others = sorted(token_id for token_id in tokenizer.eos_ids if token_id != special.get("eos") and tokens[token_id] not in END_TOKENS)
    if len(others) > 2:
        raise UnsupportedError(f"{where}: {len(others) + 1} tokens end a text; GGUF has keys for three. Name fewer in generation_config.json")
    return dict(zip(("eot", "eom"), others, strict=False))


def _bpe_model(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    model = values.get("model")
    if isinstance(model, dict) and model.get("type", "BPE") != "BPE":
        raise UnsupportedError(f"{where}: a {model['type']} vocabulary is not written to GGUF; byte-level BPE and SentencePiece's BPE are. {ELSEWHERE}")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise CorruptFileError(f"{where}: 'model' with a 'vocab' is missing. Fetch it again")
    if not isinstance(model.get("merges"), list):
        raise CorruptFileError(f"{where}: 'model.merges' is missing. Fetch it again")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "unk_token"):
        if model.get(key) and key != "unk_token":
            raise UnsupportedError(f"{where}: 'model.{key}' has no counterpart in GGUF. {ELSEWHERE}")
    return model


def _tokens(values: Mapping[str, Any], model: Mapping[str, Any], num_rows: int, where: str) -> tuple[list[str], list[int]]:
    """Texts and types by id, as many as the embedding has rows."""
    tokens: dict[int, tuple[str, int]] = {token_id: (token, NORMAL) for token, token_id in model["vocab"].items()}
    for added in values.get("added_tokens") or []:
        tokens[added["id"]] = (added["content"], CONTROL if added.get("special") else USER_DEFINED)
    if not all(isinstance(token_id, int) and 0 <= token_id < num_rows for token_id in tokens):
        raise CorruptFileError(f"{where}: its ids go beyond the {num_rows} rows of the model's embedding")
    full = [tokens.get(token_id, (f"[PAD{token_id}]", UNUSED)) for token_id in range(num_rows)]
    return [token for token, _ in full], [kind for _, kind in full]


def _pre_tokenizer(values: Mapping[str, Any], ignore_merges: bool, where: str) -> str:
    """The name under which llama.cpp cuts text by the same expressions."""
    splits = _splits(values.get("pre_tokenizer"), where)
    # of several names with the same expressions the first is taken: they differ in nothing but the model that brought them
    for name, known in PRE_TOKENIZERS.items():
        if known.splits == splits and known.ignore_merges == ignore_merges:
            normalizer = (values.get("normalizer") or {}).get("type")
            # Qwen's texts are composed (NFC) first, which llama.cpp leaves out; others that change text are refused
            if normalizer is None or (normalizer == "NFC" and name == "qwen2"):
                return name
            raise UnsupportedError(f"{where}: its normalizer {normalizer!r} has no counterpart in GGUF. {ELSEWHERE}")
    raise UnsupportedError(
        f"{where} cuts text in a way that has no name in GGUF's tokenizer.ggml.pre, so its tokens would differ there. Known: GPT-2's and kin"
    )


def _splits(value: Any, where: str) -> tuple[str, ...]:
    steps = value.get("pretokenizers", []) if isinstance(value, dict) and value.get("type") == "Sequence" else [value]
    found: list[str] = []
    for step in steps:
        kind = step.get("type") if isinstance(step, dict) else None
        if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert") and "Regex" in step.get("pattern", {}):
            found.append(step["pattern"]["Regex"])
        elif kind == "Digits" and step.get("individual_digits"):
            found.append(_DIGIT)
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            if step.get("use_regex", True):
                found.append(PRE_TOKENIZERS["gpt-2"].splits[0])
        else:
            raise UnsupportedError(f"{where}: its pre-tokenizer has the step {kind!r}, which GGUF has no name for. {ELSEWHERE}")
    return tuple(found)


def _special_ids(files: ModelFiles, ids: Mapping[str, int]) -> dict[str, int]:
    """Ids of bos, eos, unknown and padding, by the texts in tokenizer_config.json, else by the ids in config.json."""
    found: dict[str, int] = {}
    for name, key in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        text = (files.tokenizer_config or {}).get(key)
        text = text.get("content") if isinstance(text, dict) else text
        stated = (files.config or {}).get(f"{key}_id")
        stated = stated[0] if isinstance(stated, list) and stated else stated
        if isinstance(text, str) and text in ids:
            found[name] = ids[text]
        elif isinstance(stated, int) and 0 <= stated < len(ids):
            found[name] = stated
    return found
