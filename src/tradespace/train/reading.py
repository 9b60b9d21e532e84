"""Files → documents: plain text, and JSONL of conversations with the loss on answers. What cannot be learned from is an error that names its place.

A JSONL line is {"messages": [{"role": "user", "content": …}, {"role": "assistant", …}]}, a bare list of messages, or {"text": …}.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tradespace.errors import InputError
from tradespace.train.data import Document
from tradespace.units import MiB, format_bytes

JQ = "jq -c '.[]'"
ROLES = ("system", "user", "assistant", "tool")
MAX_LINE_BYTES = 4 * MiB  # of a JSONL file: one conversation
PIECE_CHARS = 1 << 18  # of a text that are tokenized at once: a tokenizer takes some 100 bytes for each
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class TextTokenizer(Protocol):
    """What `loading.tokenizer.Tokenizer` offers."""

    @property
    def chat_template(self) -> str | None: ...
    @property
    def eos_ids(self) -> Any: ...
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str: ...


def read_documents(
    paths: Sequence[Path], tokenizer: TextTokenizer, *, end: int | None = None, say: Callable[[str], None] = lambda line: None
) -> list[Document]:
    """All documents of these files, in order. `end` is the token that ends a text. Raises InputError (file, line, what is wrong, what would do)."""
    found: list[Document] = []
    for path in paths:
        text = read_text(path)
        found += _conversations(path, text, tokenizer, end) if path.suffix in (".jsonl", ".json") else [_text(path, text, tokenizer, end)]
    say(f"data: {sum(len(document.ids) for document in found):,} tokens in {len(found):,} documents")
    return found


def is_chat(paths: Sequence[Path]) -> bool:
    """Whether all files are JSONL, whose documents stay whole."""
    return all(path.suffix in (".jsonl", ".json") for path in paths)


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises InputError for what is none."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"--data {path}: {error.strerror}. Give a UTF-8 text or a .jsonl file") from error
    if not raw.strip():
        raise InputError(f"--data {path} is empty. Give a UTF-8 text, or a .jsonl file of conversations")
    if raw.startswith(UTF16_MARKS):
        raise InputError(f"--data {path} is UTF-16. Convert it, for example with iconv -f utf-16 -t utf-8")
    if (place := raw.find(b"\0")) >= 0:
        raise InputError(f"--data {path} is binary: a zero byte at {place}. Give a UTF-8 text, or a .jsonl file of conversations")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")  # the mark that some editors put first is no text
    except UnicodeDecodeError as error:
        raise InputError(f"--data {path} is not UTF-8: byte {error.start} is {raw[error.start]:#04x}. Convert it, for example with iconv -t utf-8") from None


def _text(path: Path, text: str, tokenizer: TextTokenizer, end: int | None) -> Document:
    ids = array("i")
    start = 0
    while start < len(text):  # pieces end at a line's end, or before a space, where no token of the usual tokenizers goes on
        stop = min(len(text), start + PIECE_CHARS)
        if stop < len(text):
            line, space = text.rfind("\n", start, stop), text.rfind(" ", start, stop)
            stop = line + 1 if line > start else space if space > start else stop
        ids.extend(_encoded(tokenizer, text[start:stop], str(path), special=not start))
        start = stop
    if end is not None:
        ids.append(end)
    return Document(ids, None, str(path))


def _encoded(tokenizer: TextTokenizer, text: str, where: str, *, special: bool = True) -> list[int]:
    """Token ids. Raises InputError that names the place of what is no text."""
    try:
        return tokenizer.encode(text, add_special_tokens=special)
    except InputError as error:
        raise InputError(f"{where}: {str(error).replace('the prompt', 'the text')}") from None


def _conversations(path: Path, text: str, tokenizer: TextTokenizer, end: int | None) -> list[Document]:
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"--data {path}, line {number}"
        if len(line) > MAX_LINE_BYTES:
            size = format_bytes(len(line))
            raise InputError(
                f"{where}: {size} in one line; a conversation has at most {format_bytes(MAX_LINE_BYTES)}. Is it one JSON document? Write one a line"
            )
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            if text.lstrip().startswith("["):
                raise InputError(f"--data {path} is one JSON array over several lines. Write one conversation a line, for example with {JQ}") from None
            raise InputError(f"{where} is not JSON: {str(error)[:80]}. Write one conversation a line") from None
        found.append(_document(value, where, tokenizer, end))
    return found


def _document(value: Any, where: str, tokenizer: TextTokenizer, end: int | None) -> Document:
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return Document([*_encoded(tokenizer, value["text"], where), *([] if end is None else [end])], None, where)
    if isinstance(value, list) and value and all(isinstance(each, dict) and ("messages" in each or "text" in each) for each in value):
        raise InputError(f"{where} is an array of {len(value)} conversations. Write one a line, for example with {JQ}")
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        raise InputError(
            f'{where}: no "messages" and no "text". Write {{"messages": [{{"role": "user", "content": "…"}}, {{"role": "assistant", "content": "…"}}]}}'
        )
    return learn_answers([_message(message, f"{where}, message {number}") for number, message in enumerate(messages, start=1)], where, tokenizer)


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise InputError(f"{where} is {type(message).__name__}, not an object with role and content")
    for key in ("role", "content"):
        if key not in message:
            raise InputError(f'{where} has no "{key}". It has {", ".join(map(str, message)) or "nothing"}')
        if not isinstance(message[key], str):
            raise InputError(f'{where}: "{key}" is {type(message[key]).__name__}, not text')
    if message["role"] not in ROLES:
        raise InputError(f"{where}: unknown role '{message['role'][:40]}'. Known: {', '.join(ROLES)}")
    return {"role": message["role"], "content": message["content"]}


def learn_answers(messages: list[dict[str, str]], where: str, tokenizer: TextTokenizer) -> Document:
    """The conversation through the model's template, the loss on what it writes for each assistant's message, its end included."""
    if tokenizer.chat_template is None:
        raise InputError(f'{where}: the model has no chat template. Give {{"text": …}} lines, or an instruction-tuned model')
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{where}: no message has the role assistant, and the loss is on answers alone")
    ids = _encoded(tokenizer, tokenizer.apply_chat_template(messages, add_generation_prompt=False), where, special=False)
    learned = [False] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # rendered up to the answer, and up to its end: what lies between is the answer
        before = _common(tokenizer, messages[:number], ids, prompt=True)
        after = _common(tokenizer, messages[: number + 1], ids, prompt=False)
        learned[before:after] = [True] * (after - before)
    return Document(ids, learned, where)


def _common(tokenizer: TextTokenizer, messages: list[dict[str, str]], whole: list[int], *, prompt: bool) -> int:
    """Tokens that the rendering of a beginning shares with that of the whole conversation."""
    if not messages:
        return 0
    part = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=prompt), add_special_tokens=False)
    shared = 0
    for one, other in zip(part, whole, strict=False):
        if one != other:
            break
        shared += 1
    return shared
