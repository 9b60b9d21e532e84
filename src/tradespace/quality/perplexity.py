"""Perplexity of a text in sliding windows, per token and per byte, with a standard error and the protocol that it was measured by.

Windows of `context` tokens (the model's BOS included, where it begins its texts with one) start every `stride` tokens of the text. Each scores the tokens
that no window before has scored, so every token counts once and has at least context - stride tokens before it, except in the first window. The default
stride leaves no overlap. Without a BOS the first token of a window has nothing before it: with overlap only the text's own first token goes unscored, without
it each window's first.

Perplexities by different tokenizers cannot be compared; bits per byte can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tradespace.errors import EngineError, InputError
from tradespace.quality.forward import Passage


class SlidingWindows:
    """The passages of a text, made one at a time as they are read (iterate as often as you like)."""

    def __init__(self, ids: Sequence[int], *, context: int, stride: int | None = None, bos_id: int | None = None):
        """Raises InputError for a context or stride that predicts nothing, and for a text that does not fill one window."""
        body = context - (bos_id is not None)
        if context < 2:
            raise InputError(f"--context {context} predicts nothing. Ask for at least 2 tokens")
        stride = body if stride is None else stride
        if not 1 <= stride <= body:
            had = " after the BOS" if bos_id is not None else ""
            raise InputError(f"--stride {stride} must lie in 1 … {body}, the tokens of a window{had}: a larger one would leave text unread")
        if len(ids) < body:
            remedy = f"--context {len(ids) + context - body}" if len(ids) > 1 else "a longer text"
            raise InputError(f"the text has {len(ids)} tokens; one window of {context} needs {body}. Fits with {remedy}")
        self.ids, self.context, self.stride, self.bos_id, self._body = ids, context, stride, bos_id, body

    def __iter__(self) -> Iterator[Passage]:
        lead = [] if self.bos_id is None else [self.bos_id]
        scored_to = 0  # tokens of the text that are done
        for start in range(0, len(self.ids), self.stride):
            stop = min(start + self._body, len(self.ids))
            first = max(len(lead) + scored_to - start, 1)
            if len(lead) + stop - start > first:
                yield Passage([*lead, *self.ids[start:stop]], first)
            scored_to = stop
            if stop == len(self.ids):
                return

    def __len__(self) -> int:
        return sum(1 for _ in self._scored())

    @property
    def num_scored(self) -> int:
        """Tokens that are predicted, over all windows."""
        return len(self.ids) - len(self.unscored)

    @property
    def unscored(self) -> list[int]:
        """Indices of the tokens that have nothing before them."""
        if self.bos_id is not None:
            return []
        overlap = self.stride < self._body
        return [0] if overlap else list(range(0, len(self.ids), self.stride))

    def _scored(self) -> Iterator[int]:
        """How many tokens each window scores, as `__iter__` would have it."""
        scored_to = 0
        for start in range(0, len(self.ids), self.stride):
            stop = min(start + self._body, len(self.ids))
            lead = int(self.bos_id is not None)
            count = lead + stop - start - max(lead + scored_to - start, 1)
            if count > 0:
                yield count
            scored_to = stop
            if stop == len(self.ids):
                return

    def describe(self) -> str:
        """The protocol in one sentence: what a figure needs beside it to be compared."""
        begin = "each begun with the model's BOS" if self.bos_id is not None else "no BOS"
        if self.stride == self._body:
            how = "without overlap" + (
                "; all tokens scored, the last window may be shorter" if self.bos_id is not None else "; each window's first token unscored"
            )
        else:
            how = f"one every {self.stride:,}; the first scores all" + ("" if self.bos_id is not None else " but its first token")
            how += ", the others what is new in them"
        return f"{self.num_scored:,} tokens scored in {len(self):,} windows of {self.context:,} tokens, {how}; {begin}"


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Of `num_tokens` scored tokens that stand for `num_bytes` bytes of the text. `error`: standard error of the perplexity, tokens taken as independent."""

    num_tokens: int
    num_bytes: int
    nats_per_token: float
    perplexity: float
    error: float
    bits_per_byte: float
    byte_perplexity: float
    protocol: str


def summarize(*, num_tokens: int, mean_nats: float, mean_error: float, num_bytes: int, protocol: str) -> Perplexity:
    """The figures that follow from the mean of the scored tokens' nats and its standard error."""
    total = mean_nats * num_tokens
    return Perplexity(
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        nats_per_token=mean_nats,
        perplexity=math.exp(mean_nats),
        error=math.exp(mean_nats) * mean_error,
        bits_per_byte=total / math.log(2) / num_bytes,
        byte_perplexity=math.exp(total / num_bytes),
        protocol=protocol,
    )


def token_nats(logprobs: Callable[[Passage], Iterator[Tensor]], passages: Iterable[Passage], *, on_token: Callable[[int], None] | None = None) -> Tensor:
    """-ln p of every scored token in order (fp64), read by `Forward.logprobs` or its like. Raises InputError where nothing is scored, EngineError for NaN."""
    found: list[Tensor] = []
    count = 0
    for passage in passages:
        at = passage.first
        for piece_RV in logprobs(passage):
            targets_R = torch.tensor(passage.ids[at : at + len(piece_RV)], dtype=torch.int64)
            found.append(-piece_RV.gather(1, targets_R[:, None])[:, 0].double())
            at += len(piece_RV)
            count += len(piece_RV)
            if on_token is not None:
                on_token(count)
    if not found:
        raise InputError("no token of the text is scored. Give a longer text")
    nats = torch.cat(found)
    if not bool(nats.isfinite().all()):
        raise EngineError("the model predicted NaN, or gave no probability at all to a token that came: its weights are damaged, or its activations overflow")
    return nats
