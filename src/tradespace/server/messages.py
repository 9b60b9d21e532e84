"""What the two processes say to each other: small frozen values, pickled over a socket pair that nobody else holds. No torch.

front → engine   Submit, Abort, Watch
engine → front   Ready once; then Progress after each step, Refused and Snapshot in between
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tradespace.engine.request import FinishReason, SamplingParams, TokenLogprobs
from tradespace.spec.kv import Retain
from tradespace.spec.kv import num_blocks as blocks_for
from tradespace.units import MiB

# Beside the engine: the grammar library with the vocabulary in it (40 MiB), one grammar that is compiled in a fork (96) or read back (56), those kept (24).
GRAMMAR_BYTES = 176 * MiB


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an output must obey: JSON as such (text empty), a JSON schema, a regular expression, an EBNF grammar, or calls of tools (a structural tag)."""

    kind: Literal["json_object", "json_schema", "regex", "grammar", "tool_calls"]
    text: str = ""

    @property
    def what(self) -> str:
        """Its kind as errors name it."""
        return "tools' schema" if self.kind == "tool_calls" else self.kind


@dataclass(frozen=True, slots=True)
class Submit:
    """A request. stream: its pieces are wanted as they come; else everything is said at its end."""

    id: int
    prompt_ids: tuple[int, ...]
    params: Mapping[str, Any]  # of SamplingParams, which cannot be pickled
    priority: int = 0
    stream: bool = False
    grammar: Grammar | None = None

    def sampling(self) -> SamplingParams:
        return SamplingParams(**self.params)


@dataclass(frozen=True, slots=True)
class Abort:
    id: int


@dataclass(frozen=True, slots=True)
class Watch:
    """Asks for a Snapshot."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine can take, so that the front refuses at once what can never fit."""

    max_context: int
    max_sequences: int
    num_blocks: int
    block_size: int
    vocab_size: int
    retain: Retain

    def room(self, num_prompt: int) -> int:
        """Most tokens that an answer to a prompt of so many can have; below 1: none."""
        by_context = self.max_context - num_prompt
        by_cache = by_context
        # the last token is never fed back; a cache that forgets may hold more tokens than slots
        while by_cache > 0 and blocks_for(self.retain.tokens(num_prompt + by_cache - 1), self.block_size) > self.num_blocks:
            by_cache = min(by_cache - 1, self.num_blocks * self.block_size + 1 - num_prompt)
        return by_cache


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine is built. defaults: the model's own sampling settings."""

    limits: Limits
    plan: str
    model: str
    defaults: Mapping[str, Any]
    eos_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class Piece:
    """News of one output. A finish_reason comes with the last of them; `error` says why where that is "error"."""

    id: int
    sample: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_cached: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """The engine's queues and cache, and sums since its start."""

    running: int = 0
    waiting: int = 0
    used_blocks: int = 0
    num_blocks: int = 0
    preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    step_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """One step: news of those who wanted to hear it, and how many tokens were generated for whom (the others' pieces come at their end)."""

    pieces: tuple[Piece, ...]
    load: Load
    first: tuple[int, ...] = ()  # ids of requests whose first token this step made


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that cannot be run as it was asked."""

    id: int
    message: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The ledger (name, predicted, measured bytes), memory now and at its peak, and each block's owners: 0 free, -1 cached without an owner, n > 1 shared."""

    ledger: tuple[tuple[str, float | None, float | None], ...]
    now_bytes: int
    peak_bytes: int
    budget_bytes: int
    owners: tuple[int, ...] = ()
    blocks: tuple[int, ...] = field(default=())  # references
    load: Load = field(default_factory=Load)


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine could not be built, or can go on no longer."""

    message: str
    kind: str
    need_bytes: int | None = None
    have_bytes: int | None = None
