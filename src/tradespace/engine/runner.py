"""A step's requests → tensors → logits. What the engine knows of models: tokens in, one row of logits out for each token to be sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tradespace.engine.request import Request
from tradespace.engine.sampler import token_logprobs
from tradespace.engine.step import Step
from tradespace.kernels.view import Span, StepBatch, as_tensor, positions_of
from tradespace.spec.model import ModelSpec
from tradespace.spec.plan import Plan


class TokenModel(Protocol):
    """What `model.transformer.Transformer` offers. `cache` is whatever that model reads and writes."""

    @property
    def spec(self) -> ModelSpec: ...

    def forward(self, tokens_T: Tensor, positions_T: Tensor, batch: StepBatch, cache: Any) -> Tensor: ...

    def logits(self, hidden_TD: Tensor, rows: Tensor) -> Tensor: ...


class DecodeFrame(Protocol):
    """What `model.decode_frame.DecodeFrame` offers: inputs of a decode step that are filled in place."""

    sequences: int

    def fill(self, row: int, token: int, position: int, blocks: tuple[int, ...]) -> None: ...

    def run(self, count: int) -> Tensor: ...


class Rows:
    """Which running request has which row of what the cache keeps beside its blocks (tails, token ids). Those that have ended or were preempted give theirs
    back.
    """

    def __init__(self, count: int):
        self._free = list(range(count - 1, -1, -1))
        self._held: dict[str, tuple[Request, int]] = {}

    def release(self) -> None:
        for id, (request, row) in tuple(self._held.items()):
            if request.state != "running":
                del self._held[id]
                self._free.append(row)

    def of(self, request: Request) -> int:
        """Its row; a free one where it has none yet. The scheduler runs no more requests at once than there are rows."""
        if request.id not in self._held:
            self._held[request.id] = (request, self._free.pop())
        return self._held[request.id][1]


class Runner:
    """Runs steps of one model over one cache, laid out as the plan says."""

    def __init__(self, transformer: TokenModel, cache: Any, plan: Plan, *, device: torch.device | str = "cpu", adapters: Sequence[str] = ()):
        """`adapters`: the names of the model's, by number."""
        self.adapters = tuple(adapters)
        self.transformer = transformer
        self.cache = cache
        self.device = torch.device(device)
        self.block_size = plan.kv.block_slots(plan.max_context)
        self._slot_blocks = 0 if plan.kv.places_tokens else self.block_size  # 0: the cache finds tokens their slots itself
        self._rows = Rows(plan.max_sequences)
        self._logit_rows = plan.logit_rows
        make = getattr(transformer, "decode_frame", None)
        self._frame: DecodeFrame | None = None
        if make is not None and self._slot_blocks:
            self._frame = make(plan.max_sequences, -(-plan.max_context // self.block_size))

    @property
    def vocab_size(self) -> int:
        return self.transformer.spec.V

    def execute(self, step: Step) -> Tensor:
        """Compute a step: all its keys and values are in the cache afterwards. Returns logits (R, V) in fp32, R = step.num_logits, in its sequences' order.

        A sequence with drafts has a row for its last known token and one for each draft; one whose prompt is not through has none.
        """
        if step.copies:
            with torch.inference_mode():
                self.cache.copy_blocks(step.copies)
        if self._fills_frame(step):
            assert self._frame is not None
            return self._frame.run(len(step.sequences))
        return self._execute(step)

    def _fills_frame(self, step: Step) -> bool:
        """Fills the frame where every sequence brings its newest token and wants one row of logits; False where one does not, or there is no frame."""
        frame, sequences = self._frame, step.sequences
        if frame is None or len(sequences) > frame.sequences:
            return False
        for row, item in enumerate(sequences):
            request, start = item.request, item.start
            if item.num_tokens != 1 or item.draft_tokens or start + 1 != len(request.token_ids):
                return False
            if request.params.adapter is not None or request.params.prompt_logprobs is not None:
                return False
            frame.fill(row, request.token_ids[start], start, request.blocks)
        return True

    @torch.inference_mode()
    def _execute(self, step: Step) -> Tensor:
        tokens: list[int] = []
        spans: list[Span] = []
        rows: list[int] = []
        self._rows.release()
        for item in step.sequences:
            request, name = item.request, item.request.params.adapter
            number = -1 if name is None else self.adapters.index(name)
            spans.append(Span(len(tokens), item.num_tokens, item.start + item.num_tokens, request.blocks, self._rows.of(request), number))
            tokens += item.tokens()
            rows += range(len(tokens) - item.num_logits, len(tokens))
        batch = StepBatch.from_spans(spans, block_size=self._slot_blocks, device=self.device)
        tokens_T = as_tensor(np.array(tokens, np.int64), self.device)
        hidden_TD = self.transformer.forward(tokens_T, positions_of(spans, device=self.device), batch, self.cache)
        self._score_prompts(step, spans, hidden_TD)
        if not rows:
            return torch.empty(0, self.vocab_size, dtype=torch.float32, device=self.device)
        return self.transformer.logits(hidden_TD, as_tensor(np.array(rows, np.int64), self.device))

    def _score_prompts(self, step: Step, spans: list[Span], hidden_TD: Tensor) -> None:
        """Log-probabilities of the prompt tokens that a step's rows foretell, for those who asked; as many rows of logits at once as the plan has room for."""
        for item, span in zip(step.sequences, spans, strict=True):
            request, count = item.request, item.request.params.prompt_logprobs
            if count is None:
                continue
            # position p's row foretells token p + 1
            stop = min(item.start + item.num_tokens, request.num_prompt - 1)
            for start in range(item.start, stop, self._logit_rows):
                positions = range(start, min(stop, start + self._logit_rows))
                rows = np.array(positions, np.int64) - item.start + span.query_start
                for position, logits_V in zip(positions, self.transformer.logits(hidden_TD, as_tensor(rows, self.device)), strict=True):
                    request.prompt_logprobs[position + 1] = token_logprobs(logits_V, request.prompt_ids[position + 1], count)
