"""A text to evaluate on: read, checked, encoded once, and cut into windows, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tradespace.errors import InputError
from tradespace.loading.tokenizer import Tokenizer
from tradespace.quality.perplexity import SlidingWindows
from tradespace.units import MiB

BYTES_PER_TOKEN = 64  # more than any running text has: what is read of a file of which few tokens are wanted
LEAST_READ_BYTES = MiB


@dataclass(frozen=True)
class Text:
    """`ids` without BOS, the windows over them, and how many bytes of text the scored tokens stand for. `text` holds at least what `ids` encode."""

    text: str
    ids: Sequence[int]
    windows: SlidingWindows
    scored_bytes: int


def begins_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether the model's own tokenizer puts a BOS in front of a text."""
    return tokenizer.bos_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_id


def encode_text(tokenizer: Tokenizer, text: str | Path, *, context: int, stride: int | None = None, tokens: int | None = None) -> Text:
    """`text` (a Path: the file's) as windows over its tokens, or over its first `tokens` ones.

    Raises InputError for a file that is missing, empty or not UTF-8, and for a text that does not fill one window.
    """
    if tokens is not None and tokens < 2:
        raise InputError(f"--tokens {tokens} predicts nothing. Ask for at least 2")
    most = None if tokens is None else max(LEAST_READ_BYTES, tokens * BYTES_PER_TOKEN)
    whole = read_text(text, most) if isinstance(text, Path) else text
    if not whole:
        raise InputError("the text is empty. Give at least one window of tokens")
    ids = tokenizer.encode(whole, add_special_tokens=False)
    if tokens is not None and len(ids) < tokens and isinstance(text, Path):
        whole = read_text(text, None)
        ids = tokenizer.encode(whole, add_special_tokens=False)
    cut = tokens is not None and len(ids) > tokens
    if tokens is not None and len(ids) < tokens:
        raise InputError(f"the text has {len(ids):,} tokens; --tokens {tokens} asks for more. Leave --tokens away, or give a longer text")
    ids = ids[:tokens]
    windows = SlidingWindows(ids, context=context, stride=stride, bos_id=tokenizer.bos_id if begins_with_bos(tokenizer) else None)
    covered = _num_bytes(tokenizer, ids) if cut else len(whole.encode())
    unscored = sum(_num_bytes(tokenizer, [ids[index]]) for index in windows.unscored)
    return Text(whole, ids, windows, max(1, covered - unscored))


def _num_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """Bytes of text that tokens stand for; part of a character at either end counts three, the bytes of the mark that replaces it."""
    return len(tokenizer.decode(ids, skip_special_tokens=False).encode())


def read_text(path: Path, most_bytes: int | None) -> str:
    """The file's text, or its first whole characters up to `most_bytes`. Raises InputError naming the file."""
    try:
        with path.open("rb") as file:
            raw = file.read() if most_bytes is None else file.read(most_bytes + 4)
    except OSError as error:
        raise InputError(f"cannot read the text {path}: {error.strerror}. Give a UTF-8 text file") from error
    if not raw:
        raise InputError(f"the text {path} is empty (0 bytes). Give at least one window of tokens")
    if most_bytes is not None and len(raw) > most_bytes:
        end = most_bytes
        while end > most_bytes - 4 and raw[end] & 0xC0 == 0x80:  # inside of a character
            end -= 1
        raw = raw[:end]
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the text {path} is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}. Convert it first, e.g. with iconv -t utf-8"
        ) from error


def first_difference(ids: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token in which two encodings of one text differ; None: they are equal."""
    for index, (a, b) in enumerate(zip(ids, other, strict=False)):
        if a != b:
            return index
    return None if len(ids) == len(other) else min(len(ids), len(other))
