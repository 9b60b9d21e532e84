"""A `tokenizers.Tokenizer` from the vocabulary that a GGUF file carries in its metadata.

Two kinds, by `tokenizer.ggml.model`: "gpt2" is byte-level BPE with explicit merges, whose text is first split by the regular expressions
that `tokenizer.ggml.pre` names; "llama" is SentencePiece's BPE (Llama 1 and 2, Mistral, Gemma), which merges the neighbours whose
concatenation is the vocabulary's best-scored piece. The second has no merges in the file: every way to cut a piece in two known pieces is
one, ranked by the piece's score (`piece_merges.py`).

Formats: the GGUF specification; Kudo and Richardson, arXiv:1808.06226 (SentencePiece); Sennrich et al., arXiv:1508.07909 (BPE).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tradespace.errors import CorruptFileError, UnsupportedError
from tradespace.loading.piece_merges import find_merges

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MAX_PIECE_CHARS = 1024  # of one piece that merges are looked for in: the search is quadratic in it

# the vocabulary's own expressions, as the published tokenizer.json files of these models have them
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD_START = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_WORD_START}{_UPPER}*{_LOWER}+|{_WORD_START}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """How text is cut before BPE: by each expression in turn, within the pieces that the one before left."""

    splits: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token as a whole is taken whole, whatever the merges would make of it
    add_bos: bool = False  # where the file does not say


_SPLIT_GPT2 = PreTokenizer(splits=(_GPT2,))
_SPLIT_DIGITS = PreTokenizer(splits=(r"\p{N}", _GPT2))
_SPLIT_LLAMA3 = PreTokenizer(splits=(_LLAMA3,), ignore_merges=True, add_bos=True)
_SPLIT_LLAMA3_MERGED = PreTokenizer(splits=(_LLAMA3,))
_SPLIT_QWEN2 = PreTokenizer(splits=(_QWEN2,))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer(splits=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _SPLIT_GPT2,
    "phi-2": _SPLIT_GPT2,
    "mpt": _SPLIT_GPT2,
    "olmo": _SPLIT_GPT2,
    "jais": _SPLIT_GPT2,
    "smollm": _SPLIT_DIGITS,
    "starcoder": _SPLIT_DIGITS,
    "refact": _SPLIT_DIGITS,
    "command-r": _SPLIT_DIGITS,
    "codeshell": _SPLIT_DIGITS,
    "exaone": _SPLIT_DIGITS,
    "minerva-7b": _SPLIT_DIGITS,
    "falcon": PreTokenizer(splits=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "llama-bpe": _SPLIT_LLAMA3,
    "llama3": _SPLIT_LLAMA3,
    "llama-v3": _SPLIT_LLAMA3,
    "falcon3": _SPLIT_LLAMA3,
    "dbrx": _SPLIT_LLAMA3_MERGED,
    "smaug-bpe": _SPLIT_LLAMA3_MERGED,
    "qwen2": _SPLIT_QWEN2,
    "stablelm2": _SPLIT_QWEN2,
    "megrez": _SPLIT_QWEN2,
    "tekken": PreTokenizer(splits=(_TEKKEN,), ignore_merges=True, add_bos=True),
}

OTHER_MODELS = {"t5": "a Unigram vocabulary", "bert": "WordPiece", "rwkv": "RWKV's greedy search", "plamo2": "PLaMo's own", "none": "no tokenizer at all"}
# tokens that end a turn or a text in the published chat formats, for files that name only one end token of several
END_TOKENS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>")


@dataclass(frozen=True, kw_only=True)
class GGUFTokenizer:
    """The tokenizer, and what the file says about its special tokens."""

    tokenizer: "Tokenizer"
    bos_id: int | None
    eos_ids: frozenset[int]
    special_tokens: dict[str, str]  # bos_token, eos_token, …: what a chat template may ask for
    chat_template: str | None
    tool_template: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    tokens: list[str]
    types: Sequence[int]
    ids: dict[str, int]


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str) -> GGUFTokenizer:
    """Build the tokenizer that `metadata` (keys `tokenizer.*`) describes; `where` names the file in errors.

    Raises UnsupportedError for a tokenizer model or `pre` that tradespace does not know, CorruptFileError for one that contradicts itself.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        raise CorruptFileError(f"{where} carries no tokenizer (tokenizer.ggml.model is missing). Use a GGUF file that was converted with its tokenizer")
    vocabulary = _vocabulary(metadata, where)
    if model == "gpt2":
        tokenizer, add_bos = _byte_level(metadata, vocabulary, where)
    elif model == "llama":
        tokenizer, add_bos = _sentence_piece(metadata, vocabulary, where)
    else:
        kind = f" ({OTHER_MODELS[model]})" if model in OTHER_MODELS else ""
        raise UnsupportedError(f"{where}: tokenizer.ggml.model '{model}'{kind} is not supported; known: gpt2, llama. Use the model's Hugging Face folder")
    _add_special_tokens(tokenizer, vocabulary)
    bos_id = _token_id(metadata, "bos", vocabulary, where)
    eos_id = _token_id(metadata, "eos", vocabulary, where)
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    _add_template(tokenizer, vocabulary, bos_id if add_bos else None, eos_id if add_eos else None)
    ends = {_token_id(metadata, name, vocabulary, where) for name in ("eos", "eot", "eom")}
    ends |= {vocabulary.ids[text] for text in END_TOKENS if text in vocabulary.ids and vocabulary.types[vocabulary.ids[text]] in (CONTROL, USER_DEFINED)}
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {name: _token_id(metadata, key, vocabulary, where) for name, key in names.items()}
    template, for_tools = (metadata.get(f"tokenizer.chat_template{name}") for name in ("", ".tool_use"))
    return GGUFTokenizer(
        tokenizer=tokenizer,
        bos_id=bos_id,
        eos_ids=frozenset(token_id for token_id in ends if token_id is not None),
        special_tokens={name: vocabulary.tokens[token_id] for name, token_id in found.items() if token_id is not None},
        chat_template=template if isinstance(template, str) else None,
        tool_template=for_tools if isinstance(for_tools, str) else None,
    )


def _vocabulary(metadata: Mapping[str, Any], where: str) -> _Vocabulary:
    raw = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(raw, list) or not raw or not all(isinstance(token, str) for token in raw):
        raise CorruptFileError(f"{where}: tokenizer.ggml.tokens is not a list of strings")
    tokens = [token or f"[EMPTY_{token_id}]" for token_id, token in enumerate(raw)]  # a gap in the ids still needs a name of its own
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for token_id, token in enumerate(tokens) if ids[token] != token_id)
        raise CorruptFileError(f"{where}: {len(tokens) - len(ids)} tokens occur twice, for example {twice!r}")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CorruptFileError(f"{where}: tokenizer.ggml.token_type does not have one entry for each of the {len(tokens)} tokens")
    return _Vocabulary(tokens=tokens, types=types, ids=ids)


def _token_id(metadata: Mapping[str, Any], name: str, vocabulary: _Vocabulary, where: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = metadata.get(key)
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < len(vocabulary.tokens):
        raise CorruptFileError(f"{where}: {key} is {token_id!r}; the vocabulary has {len(vocabulary.tokens)} tokens")
    return token_id


def _byte_level(metadata: Mapping[str, Any], vocabulary: _Vocabulary, where: str) -> tuple["Tokenizer", bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = metadata.get("tokenizer.ggml.pre")
    if name is None:
        raise UnsupportedError(f"{where} does not say how text is split before BPE (tokenizer.ggml.pre is missing): convert it again with a later converter")
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        raise UnsupportedError(f"{where}: tokenizer.ggml.pre '{name}' is not known, so its tokens would be wrong. Known: {', '.join(sorted(PRE_TOKENIZERS))}")
    listed = metadata.get("tokenizer.ggml.merges")
    if not isinstance(listed, list) or not all(isinstance(merge, str) for merge in listed):
        raise CorruptFileError(f"{where}: tokenizer.ggml.merges is {'missing' if listed is None else 'no list of strings'}; without it no text is cut right")
    joined = [token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == NORMAL and len(token) > 1]
    if not listed and joined and not pre.ignore_merges:  # an empty list is right where every token is a byte, or whole words are looked up
        raise CorruptFileError(
            f"{where}: its list of merges is empty, so {len(joined)} tokens, for example {joined[0]!r}, would never be found. Convert it again"
        )
    merges = []
    for merge in listed:
        left, _, right = merge.partition(" ")
        if left not in vocabulary.ids or right not in vocabulary.ids or left + right not in vocabulary.ids:
            raise CorruptFileError(f"{where}: the merge {merge!r} is not of two tokens into a third")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=pre.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre.splits]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentence_piece(metadata: Mapping[str, Any], vocabulary: _Vocabulary, where: str) -> tuple["Tokenizer", bool]:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        raise CorruptFileError(f"{where}: tokenizer.ggml.scores does not have one entry for each of the {len(vocabulary.tokens)} tokens")
    unknown_id = _token_id(metadata, "unknown", vocabulary, where)
    if unknown_id is None and UNKNOWN in vocabulary.types:
        unknown_id = list(vocabulary.types).index(UNKNOWN)
    unknown = vocabulary.tokens[unknown_id] if unknown_id is not None else None
    merges = _merges_by_score(vocabulary, scores)
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    add_space_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    to_metaspace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), to_metaspace]) if add_space_prefix else to_metaspace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if add_space_prefix else steps)
    return tokenizer, True


def _merges_by_score(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every cut of a piece into two pieces, best-scored piece first; the cuts of one piece in the order of their ids."""
    tokens, types = vocabulary.tokens, vocabulary.types
    # Bytes, control and user-defined tokens are found in other ways, never by merging text
    pieces = [token_id for token_id in range(len(tokens)) if types[token_id] in (NORMAL, UNUSED) and len(tokens[token_id]) <= MAX_PIECE_CHARS]
    pieces.sort(key=lambda token_id: -scores[token_id])  # stable: of equal scores the smaller id first
    _, left, right = find_merges(tokens, pieces)
    return list(zip(map(tokens.__getitem__, left.tolist()), map(tokens.__getitem__, right.tolist()), strict=True))


def _add_special_tokens(tokenizer: "Tokenizer", vocabulary: _Vocabulary) -> None:
    """Control tokens are found in text before anything else and left out when decoding; user-defined ones are found, and are text."""
    from tokenizers import AddedToken

    by_type: dict[int, list[AddedToken]] = {CONTROL: [], UNKNOWN: [], USER_DEFINED: []}
    for token, token_type in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if token_type in by_type:
            by_type[token_type].append(AddedToken(token, normalized=False, special=token_type != USER_DEFINED))
    tokenizer.add_special_tokens(by_type[CONTROL] + by_type[UNKNOWN])
    tokenizer.add_tokens(by_type[USER_DEFINED])


def _add_template(tokenizer: "Tokenizer", vocabulary: _Vocabulary, bos_id: int | None, eos_id: int | None) -> None:
    """Let `encode` put the begin token before and the end token after a text, where the file asks for it."""
    from tokenizers import processors

    around = [token_id for token_id in (bos_id, eos_id) if token_id is not None]
    if not around:
        return
    # by number, since a token's text may hold the template's own marks; $A is the text
    names = {token_id: f"token{token_id}" for token_id in around}
    template = [*([names[bos_id]] if bos_id is not None else []), "$A", *([names[eos_id]] if eos_id is not None else [])]
    special: Any = [{"id": name, "ids": [token_id], "tokens": [vocabulary.tokens[token_id]]} for token_id, name in names.items()]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
