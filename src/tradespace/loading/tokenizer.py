"""Text ↔ tokens, for a Hub folder (tokenizer.json) and for a GGUF file alike, over the `tokenizers` library.

Encoding is the library's. Decoding goes through bytes: each token stands for some bytes (which the model's own decoder says), and text is those bytes
read as UTF-8. So a stream can give text as soon as its bytes are whole, in constant time per token, and its pieces together are exactly `decode` of all.
Bytes that are no UTF-8 become U+FFFD, one for each longest part that begins a character, as the Unicode standard recommends (chapter 3.9).
"""

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from tradespace.errors import CorruptFileError, InputError, UnsupportedError
from tradespace.loading.chat_template import render_chat
from tradespace.loading.gguf import read_gguf
from tradespace.loading.gguf_tokenizer import tokenizer_from_gguf
from tradespace.loading.resolve import ModelFiles
from tradespace.units import MiB

MAX_TOKENIZER_BYTES = 256 * MiB
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

LONG_TEXT_CHARS = 4096


class Tokenizer:
    """One model's tokenizer and chat template. Immutable after construction; safe to share between threads."""

    def __init__(
        self,
        tokenizer: RustTokenizer,
        *,
        bos_id: int | None,
        eos_ids: frozenset[int],
        special_tokens: Mapping[str, str],
        chat_template: str | None,
        tool_template: str | None = None,
    ):
        self._tokenizer = tokenizer
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self.tool_template = tool_template  # for conversations with tools, where the model has one of its own for them
        self._token_bytes = _TokenBytes(tokenizer)

    @classmethod
    def from_files(cls, files: ModelFiles) -> "Tokenizer":
        """The tokenizer of resolved files. Raises InputError (no tokenizer), CorruptFileError, UnsupportedError."""
        if files.kind == "gguf":
            path = files.weights[0]
            found = tokenizer_from_gguf(read_gguf(path).metadata, str(path))
            return cls(
                found.tokenizer,
                bos_id=found.bos_id,
                eos_ids=found.eos_ids,
                special_tokens=found.special_tokens,
                chat_template=found.chat_template,
                tool_template=found.tool_template,
            )
        tokenizer = _read_tokenizer_json(files)
        config = files.tokenizer_config or {}
        texts = {name: _token_text(config.get(name)) for name in _SPECIAL_NAMES}
        special_tokens = {name: text for name, text in texts.items() if text is not None}
        bos_id = tokenizer.token_to_id(special_tokens["bos_token"]) if "bos_token" in special_tokens else _first_int(files, "bos_token_id")
        return cls(
            tokenizer,
            bos_id=bos_id,
            eos_ids=_end_ids(files, tokenizer, special_tokens.get("eos_token")),
            special_tokens=special_tokens,
            chat_template=files.chat_template,
            tool_template=files.tool_template,
        )

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added ones included; a model's embedding may have more rows."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str | bytes, add_special_tokens: bool = True) -> list[int]:
        """Token ids. `add_special_tokens`: with the begin (and end) token where the model wants one; special tokens written in the text count as such.

        Raises InputError for what is not text: another type, bytes that are not UTF-8, lone surrogates, nothing at all.
        """
        checked = checked_text(text)
        if len(checked) > LONG_TEXT_CHARS:  # other threads go on meanwhile: `encode` would hold the interpreter's lock
            ids = self._tokenizer.encode_batch_fast([checked], add_special_tokens=add_special_tokens)[0].ids
        else:
            ids = self._tokenizer.encode(checked, add_special_tokens=add_special_tokens).ids if checked else []
        if not ids:
            raise InputError("the prompt is empty. Give at least one character")
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Raises InputError for an id outside the vocabulary."""
        stream = StreamDecoder(self._token_bytes, skip_special_tokens)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    def stream_decoder(self, skip_special_tokens: bool = True) -> "StreamDecoder":
        """A decoder that takes one token at a time."""
        return StreamDecoder(self._token_bytes, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text; those of a special token are its name's. Raises InputError for an id outside the vocabulary."""
        return self._token_bytes.of(token_id, skip_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        """A token as the vocabulary writes it, for display. Raises InputError for an id outside the vocabulary."""
        token = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None:
            raise InputError(f"token {token_id} is not in the vocabulary of {self.vocab_size}")
        return token

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that the model's template makes of `messages`; encode it with `add_special_tokens=False`. Raises InputError."""
        template = self.tool_template if tools and self.tool_template is not None else self.chat_template
        if template is None:
            raise InputError("this model has no chat template: it is a base model, or its files lack one. Give plain text (tradespace run), or a chat model")
        return render_chat(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=documents,
            special_tokens=self.special_tokens,
            variables=variables,
        )


class StreamDecoder:
    """Text from tokens, one at a time: `push` returns what has become whole, `flush` the rest. Its pieces joined equal `Tokenizer.decode`."""

    def __init__(self, token_bytes: "_TokenBytes", skip_special_tokens: bool):
        self._token_bytes = token_bytes
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = token_bytes.strips_first_space

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character still lacks bytes."""
        return self._without_first_space(self._utf8.decode(self._token_bytes.of(token_id, self._skip_special_tokens)))

    def flush(self) -> str:
        """What is left at the end: an unfinished character becomes U+FFFD. The decoder is then as new."""
        text = self._without_first_space(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        self._at_start = self._token_bytes.strips_first_space
        return text

    def _without_first_space(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")  # the space that encoding put before the first word
        return text


class _TokenBytes:
    """Which bytes a token stands for, by the decoder that the tokenizer declares. Looked up once per token that occurs."""

    def __init__(self, tokenizer: RustTokenizer):
        self._tokenizer = tokenizer
        self._special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._cache: dict[int, bytes] = {}
        self._replacements: list[tuple[str, str]] = []
        self._byte_level = self._byte_fallback = self.strips_first_space = False
        for step in _decoder_steps(tokenizer):
            self._declare(step)
        self._of_char = _byte_level_alphabet() if self._byte_level else {}

    def of(self, token_id: int, skip_special_tokens: bool) -> bytes:
        if skip_special_tokens and token_id in self._special:
            return b""
        known = self._cache.get(token_id)
        if known is None:
            known = self._cache[token_id] = self._look_up(token_id)
        return known

    def _declare(self, step: dict[str, Any]) -> None:
        match step:
            case {"type": "ByteLevel"}:
                self._byte_level = True
            case {"type": "ByteFallback"}:
                self._byte_fallback = True
            case {"type": "Fuse"}:
                pass  # joins the pieces: so do we
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                self._replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(mark), **rest}:
                self._replacements.append((mark, " "))
                self.strips_first_space = rest.get("prepend_scheme", "always") != "never"
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                self.strips_first_space = True
            case _:
                raise UnsupportedError(f"the tokenizer's decoder has a step that is not supported: {json.dumps(step)[:200]}")

    def _look_up(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None:
            raise InputError(f"token {token_id} is not in the vocabulary of {self._tokenizer.get_vocab_size()}")
        if self._byte_level:
            try:
                return bytes(self._of_char[char] for char in token)
            except KeyError:
                return token.encode()  # an added token is written as plain text
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass  # not a number: then it is text that only looks like a byte
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode()


def _decoder_steps(tokenizer: RustTokenizer) -> list[dict[str, Any]]:
    if tokenizer.decoder is None:
        return []
    state = json.loads(tokenizer.decoder.__getstate__())  # the library's own JSON; small, unlike that of the whole tokenizer
    return state["decoders"] if state["type"] == "Sequence" else [state]


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 onwards in their order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def checked_text(text: object) -> str:
    """`text` as a string that has a UTF-8 form. Raises InputError that says what is wrong and where."""
    if isinstance(text, bytes):
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            bad = text[error.start : error.start + 1].hex()
            raise InputError(f"the prompt is not UTF-8: byte 0x{bad} at offset {error.start} ({error.reason}). Convert it to UTF-8 first") from error
    if not isinstance(text, str):
        raise InputError(f"a prompt is text; got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # a terminal or a file name with bytes that are no UTF-8 reaches Python as such surrogates
        raise InputError(f"the prompt is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}") from error
    return text


def _read_tokenizer_json(files: ModelFiles) -> RustTokenizer:
    path = files.tokenizer_json
    if path is None:
        others = [name for name in ("tokenizer.model", "vocab.json", "merges.txt") if (files.folder / name).is_file()]
        have = f" It has {', '.join(others)}, which is not read: save it with transformers as a fast tokenizer." if others else ""
        raise InputError(f"{files.folder} has no tokenizer.json.{have} Fetch tokenizer.json of the same model into that folder")
    size_bytes = path.stat().st_size
    if size_bytes > MAX_TOKENIZER_BYTES:
        raise CorruptFileError(f"{path} is {size_bytes} bytes; a tokenizer has at most {MAX_TOKENIZER_BYTES}")
    try:
        tokenizer = RustTokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CorruptFileError(f"{path} is not a tokenizer that can be read ({str(error)[:300]}). Fetch it again") from error
    tokenizer.no_truncation()  # a prompt must never be cut in silence, whatever the file was trained with
    tokenizer.no_padding()
    return tokenizer


def _token_text(value: object) -> str | None:
    """A special token as tokenizer_config.json writes it: text, or a map with its text."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _ids(config: Mapping[str, Any] | None, key: str) -> list[int]:
    value = (config or {}).get(key)
    return [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)]


def _first_int(files: ModelFiles, key: str) -> int | None:
    return next(iter(_ids(files.generation_config, key) or _ids(files.config, key)), None)


def _end_ids(files: ModelFiles, tokenizer: RustTokenizer, eos_token: str | None) -> frozenset[int]:
    """All tokens that end an answer, from every file that names some: they disagree in published models, and each names true ends."""
    found = {*_ids(files.generation_config, "eos_token_id"), *_ids(files.config, "eos_token_id")}
    from_text = tokenizer.token_to_id(eos_token) if eos_token is not None else None
    return frozenset(found | ({from_text} if from_text is not None else set()))
