"""The engine's pieces → what OpenAI's clients read: choices, log-probabilities, usage. No HTTP here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from tradespace.engine.request import TokenLogprobs
from tradespace.loading.tokenizer import Tokenizer
from tradespace.server.messages import Piece

FLOOR = -9999.0  # JSON has no infinity


def finite(value: float) -> float:
    return value if isfinite(value) else FLOOR


@dataclass
class Output:
    """One output as far as it has come."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    reason: str | None = None
    num_cached: int = 0

    def take(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.prompt_logprobs = piece.prompt_logprobs or self.prompt_logprobs
        self.reason = piece.finish_reason
        self.num_cached = piece.num_cached


def usage(num_prompt: int, num_outputs: int, num_cached: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_outputs,
        "total_tokens": num_prompt + num_outputs,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; one that is no whole character, as OpenAI writes it: bytes:\\xe2\\x82."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def completion_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs | None], ids: Sequence[int], start: int = 0) -> dict[str, Any]:
    """The old form: four lists. An entry that is None (a prompt's first token) has neither."""
    names = [token_name(tokenizer, token) for token in ids]
    offsets, at = [], start
    for name in names:
        offsets.append(at)
        at += len(name)
    return {
        "tokens": names,
        "token_logprobs": [None if entry is None else finite(entry.logprob) for entry in entries],
        "top_logprobs": [None if entry is None else {token_name(tokenizer, token): finite(value) for token, value in reversed(entry.top)} for entry in entries],
        "text_offset": offsets,
    }


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": token_name(tokenizer, token), "logprob": finite(logprob), "bytes": list(tokenizer.token_bytes(token))}

    return {"content": [{**one(entry.token_id, entry.logprob), "top_logprobs": [one(*best) for best in entry.top]} for entry in entries], "refusal": None}
