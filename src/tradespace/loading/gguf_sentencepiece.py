"""A SentencePiece vocabulary in a tokenizer.json → pieces, types and scores as a GGUF file keeps them (tokenizer.ggml.model "llama").

tokenizer.json has merges where SentencePiece has scores: a piece's score becomes minus the place of its first merge, since the neighbours whose piece has the
best score are joined first. That is the same tokenizer only if its merges are exactly the ways to cut each piece into two known ones, piece after piece; it
is checked, and a vocabulary whose merges say more or less than scores can is refused. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tradespace.errors import CorruptFileError, UnsupportedError
from tradespace.loading.gguf_tokenizer import BYTE, MAX_PIECE_CHARS, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

SPACE = "▁"
ELSEWHERE = "Start from a GGUF file of the model"


def is_sentence_piece(model: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json's model is SentencePiece's BPE: characters without a piece fall back to bytes."""
    return model.get("type", "BPE") == "BPE" and bool(model.get("byte_fallback"))


def sentence_piece_metadata(values: Mapping[str, Any], tokens: Sequence[str], types: list[int], where: str) -> dict[str, Any]:
    """tokenizer.ggml.* of scores and of how spaces are treated; `types` (by id) are refined in place. Raises UnsupportedError or CorruptFileError."""
    model = values["model"]
    prefix = _adds_space(values, where)
    ids = model["vocab"]
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in ids]
    if missing:
        raise CorruptFileError(f"{where}: 'byte_fallback' without a piece for byte {missing[0]}. Fetch it again")
    for byte in range(256):
        types[ids[f"<0x{byte:02X}>"]] = BYTE
    if isinstance(model.get("unk_token"), str) and model["unk_token"] in ids:
        types[ids[model["unk_token"]]] = UNKNOWN
    for token_id, token in enumerate(tokens):
        # runs of spaces are found in text by merging, not by their looks: text has spaces where pieces have this mark
        if types[token_id] == USER_DEFINED and token and not token.strip(SPACE):
            types[token_id] = NORMAL
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    return {"tokenizer.ggml.scores": _scores(merges, tokens, types, where), "tokenizer.ggml.add_space_prefix": prefix}


def _scores(merges: Sequence[tuple[str, ...]], tokens: Sequence[str], types: Sequence[int], where: str) -> list[float]:
    """Minus the place of each piece's first merge; what no merge makes comes after all of those."""
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    first: dict[str, int] = {}
    given: dict[str, set[tuple[str, ...]]] = {}
    last = ""
    for place, merge in enumerate(merges):
        piece = "".join(merge)
        if len(merge) != 2 or piece not in ids:
            raise CorruptFileError(f"{where}: the merge {merge} is not of two pieces into a third. Fetch it again")
        if types[ids[piece]] not in (NORMAL, UNUSED):
            continue  # found in text as a whole, before anything is merged
        if piece in first and piece != last:
            raise UnsupportedError(f"{where}: merges of the piece {piece!r} lie apart, so no score says when it is made. {ELSEWHERE}")
        first.setdefault(piece, place)
        given.setdefault(piece, set()).add(merge)
        last = piece
    for token_id, piece in enumerate(tokens):
        if types[token_id] not in (NORMAL, UNUSED) or len(piece) > MAX_PIECE_CHARS:
            continue
        cuts = {(piece[:at], piece[at:]) for at in range(1, len(piece)) if piece[:at] in ids and piece[at:] in ids}
        if cuts != given.get(piece, set()):
            raise UnsupportedError(
                f"{where}: the merges of the piece {piece!r} are not all its cuts into two pieces, and scores would make of it all. {ELSEWHERE}"
            )
    return [-float(first.get(token, len(merges))) if types[token_id] in (NORMAL, UNUSED) else 0.0 for token_id, token in enumerate(tokens)]


def _adds_space(values: Mapping[str, Any], where: str) -> bool:
    """Whether a space is put before the text. Raises UnsupportedError for a step that SentencePiece in llama.cpp does not have."""
    prefix, marked = False, False
    for step in _steps(values.get("normalizer"), "normalizers"):
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                marked = True
            case _:
                raise UnsupportedError(f"{where}: its normalizer {step.get('type')!r} has no counterpart in GGUF. {ELSEWHERE}")
    for step in _steps(values.get("pre_tokenizer"), "pretokenizers"):
        match step:
            case {"type": "Metaspace", "replacement": "▁", "split": False, **rest}:
                prefix, marked = rest.get("prepend_scheme", "always") != "never", True
            case {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"} if marked:
                pass  # there are no spaces left to cut at
            case _:
                raise UnsupportedError(f"{where}: its pre-tokenizer has the step {step.get('type')!r}, which SentencePiece in GGUF does not have. {ELSEWHERE}")
    if not marked:
        raise UnsupportedError(f"{where}: it does not write spaces as {SPACE}, as SentencePiece in GGUF does. {ELSEWHERE}")
    return prefix


def _steps(value: Any, key: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    steps = value.get(key, []) if isinstance(value, dict) and value.get("type") == "Sequence" else [value]
    if not all(isinstance(step, dict) for step in steps):
        raise CorruptFileError(f"tokenizer.json: {key} is not a list of steps. Fetch it again")
    return steps
