"""A model read for what it predicts: log-probabilities of each next token, a bounded number of rows at a time.

With a cache the text goes through in steps of at most `step_tokens`, as a prompt does in the engine: what is evaluated is what would run, its cache included,
and nothing grows with the length of the text. Without one a passage is a single packed step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tradespace.errors import InputError
from tradespace.kernels.view import Span, StepBatch, positions_of
from tradespace.kv.cache import KVCache
from tradespace.spec.kv import sharing_refusal
from tradespace.spec.model import ModelSpec

ROWS = 64  # rows of logits held at a time: 64 × 262k × fp32 = 64 MiB for the largest vocabulary in use
# bytes an element of these rows costs in the comparison of two models: logits in bf16 and fp32, log-probabilities of both, doubles of a few rows
BYTES_PER_LOGIT = 24
PACKED_TOKENS = 2048  # of a step without a cache, unless a single passage is longer


class Predicts(Protocol):
    """What is read: a Transformer, or what else offers its two calls. Logits and hidden states may lie in buffers that the next call overwrites."""

    @property
    def spec(self) -> ModelSpec: ...

    def forward(self, tokens_T: Tensor, positions_T: Tensor, batch: StepBatch, cache: Any) -> Tensor: ...

    def logits(self, hidden_TD: Tensor, rows: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Passage:
    """Token ids that are read from the start and predicted from index `first` (at least 1) on.

    shared  leading tokens that are the same as the passage's before: where the cache pages, they are not computed again
    """

    ids: Sequence[int]
    first: int = 1
    shared: int = 0

    @property
    def num_scored(self) -> int:
        return len(self.ids) - self.first


def rows_within(work_bytes: int, vocabulary: int) -> int:
    """Rows of logits that two models may be compared by at a time within `work_bytes`: 1 … ROWS."""
    return max(1, min(ROWS, work_bytes // (BYTES_PER_LOGIT * vocabulary)))


class Forward:
    """One model, ready to read passages. `cache` with the layout's `block_size` (paged: the plan's; contiguous: its max_context) and `step_tokens` are the
    engine's; without a cache whole passages go in one step.
    """

    def __init__(
        self,
        transformer: Predicts,
        *,
        cache: KVCache | None = None,
        block_size: int = 0,
        step_tokens: int = 0,
        rows: int = ROWS,
        vocabulary: int | None = None,
    ):
        """`vocabulary`: leading columns of the logits that count; default all. Two models whose embeddings are padded unlike are compared on what both have."""
        assert cache is None or (block_size > 0 and step_tokens > 0), "a cache comes with its block size and the most tokens of a step"
        self.transformer, self.cache, self.block_size, self.step_tokens, self.rows = transformer, cache, block_size, step_tokens, rows
        self.vocabulary = vocabulary or transformer.spec.V

    @torch.inference_mode()
    def logprobs(self, passage: Passage) -> Iterator[Tensor]:
        """Log-probabilities (rows, V) in fp32 of the tokens at index passage.first, first + 1, … given all before: as many rows as tokens are scored.

        How the rows fall into pieces depends on the passage, step_tokens and rows alone: two models with equal settings can be read side by side.
        """
        for start, stop, rows in self._steps(passage):
            hidden_TD = self._step([Span(0, stop - start, stop, self._table(stop))], list(passage.ids[start:stop]))
            for row, end in rows:
                yield self.transformer.logits(hidden_TD, torch.arange(row - start, end - start))[:, : self.vocabulary].log_softmax(-1)

    def pieces(self, passage: Passage) -> Iterator[int]:
        """How many rows each piece of `logprobs` will have."""
        for _, _, rows in self._steps(passage):
            for row, end in rows:
                yield end - row

    def _steps(self, passage: Passage) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        """(start, stop, pieces) of each step; a piece is (first position, end) of rows whose logits are held together."""
        if not 1 <= passage.first < len(passage.ids):
            raise InputError(f"a passage of {len(passage.ids)} tokens has nothing to predict from token {passage.first} on")
        last = len(passage.ids) - 1  # the last token is predicted, and predicts nothing that could be checked
        step = self.step_tokens or last
        for start in range(0, last, step):
            stop = min(start + step, last)
            yield start, stop, [(row, min(row + self.rows, stop)) for row in range(max(start, passage.first - 1), stop, self.rows)]

    def scores(self, passages: Sequence[Passage]) -> Iterator[tuple[float, bool]]:
        """For each passage, in order: the log-probability of its scored tokens in nats, and whether each of them was the likeliest.

        Ragged: as many passages as a step and the cache hold are read together, without padding.
        """
        at = 0
        while at < len(passages):
            spans, tokens = self._pack(passages, at)
            if spans:
                yield from self._score_step(spans, tokens, passages[at : at + len(spans)])
            else:
                yield self._score_alone(passages[at])
            at += max(1, len(spans))

    def _pack(self, passages: Sequence[Passage], at: int) -> tuple[list[Span], list[int]]:
        """Spans and tokens of as many passages from index `at` on as one step takes; none where the first alone is too long.

        Keys and values of a step are written before any of it attends, so a passage may point at blocks that the one before it fills in the same step.
        """
        spans: list[Span] = []
        tokens: list[int] = []
        used_blocks, before = 0, ()
        while at < len(passages):
            passage = passages[at]
            length = len(passage.ids) - 1
            skipped = self._shared_blocks(passage, written=spans[-1].length) if spans else 0
            fresh = self._num_blocks(length) - skipped
            too_long = self.cache is not None and (len(tokens) + length - skipped * self.block_size > self.step_tokens or self._over(used_blocks + fresh))
            too_long = too_long or (self.cache is not None and len(spans) == self.cache.max_sequences and self.cache.plan.places_tokens)
            if too_long or (self.cache is None and tokens and len(tokens) + length > PACKED_TOKENS):
                break
            table = (*before[:skipped], *range(used_blocks, used_blocks + fresh))
            start = skipped * self.block_size
            spans.append(Span(len(tokens), length - start, length, table if self.cache is not None else (), len(spans)))
            tokens += passage.ids[start:length]
            used_blocks, before, at = used_blocks + fresh, table, at + 1
        return spans, tokens

    def _shared_blocks(self, passage: Passage, *, written: int) -> int:
        """Whole blocks of keys and values that the passage before has `written` already: what is scored is computed, and at least one token."""
        if self.cache is None or self.cache.plan.layout != "paged" or self.cache.plan.of_input or sharing_refusal(self.cache.plan):
            return 0
        return min(passage.shared, passage.first - 1, len(passage.ids) - 2, written) // self.block_size

    def _score_step(self, spans: Sequence[Span], tokens: list[int], passages: Sequence[Passage]) -> Iterator[tuple[float, bool]]:
        hidden_TD = self._step(spans, tokens)
        rows, targets = [], []
        for span, passage in zip(spans, passages, strict=True):
            first_row = span.query_start + passage.first - 1 - span.first_position
            rows += range(first_row, first_row + passage.num_scored)
            targets += passage.ids[passage.first :]
        nats, best = [], []
        for start in range(0, len(rows), self.rows):
            chunk = targets[start : start + self.rows]
            found = self._target_scores(hidden_TD, torch.tensor(rows[start : start + self.rows]), torch.tensor(chunk))
            nats += found[0]
            best += found[1]
        start = 0
        for passage in passages:
            stop = start + passage.num_scored
            yield sum(nats[start:stop]), all(best[start:stop])
            start = stop

    @torch.inference_mode()
    def _target_scores(self, hidden_TD: Tensor, rows: Tensor, targets_R: Tensor) -> tuple[list[float], list[bool]]:
        logprobs_RV = self.transformer.logits(hidden_TD, rows)[:, : self.vocabulary].log_softmax(-1)
        return logprobs_RV.gather(1, targets_R[:, None])[:, 0].tolist(), (logprobs_RV.argmax(-1) == targets_R).tolist()

    def _score_alone(self, passage: Passage) -> tuple[float, bool]:
        """A passage longer than a step, step by step."""
        nats, best, at = 0.0, True, passage.first
        for piece_RV in self.logprobs(passage):
            targets_R = torch.tensor(passage.ids[at : at + len(piece_RV)])
            nats += float(piece_RV.gather(1, targets_R[:, None]).double().sum())
            best = best and bool((piece_RV.argmax(-1) == targets_R).all())
            at += len(piece_RV)
        return nats, best

    @torch.inference_mode()
    def _step(self, spans: Sequence[Span], tokens: list[int]) -> Tensor:
        placed = self.cache is not None and self.cache.plan.places_tokens  # such a cache finds tokens their slots itself
        batch = StepBatch.from_spans(spans, block_size=0 if placed else self.block_size)
        return self.transformer.forward(torch.tensor(tokens, dtype=torch.int64), positions_of(spans), batch, self.cache)

    def _num_blocks(self, tokens: int) -> int:
        return -(-self.cache.plan.retain.tokens(tokens) // self.block_size) if self.cache is not None else 0

    def _over(self, num_blocks: int) -> bool:
        return self.cache is not None and num_blocks > self.cache.num_blocks

    def _table(self, tokens: int) -> tuple[int, ...]:
        if self.cache is None:
            return ()
        if self._over(self._num_blocks(tokens)):
            raise InputError(f"a passage of {tokens} tokens does not fit a cache of {self.cache.num_blocks * self.block_size}. Ask for a smaller context")
        return tuple(range(self._num_blocks(tokens)))
