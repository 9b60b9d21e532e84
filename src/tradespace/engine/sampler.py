"""Logits → tokens, batched over rows with each request's own parameters. Every row is computed from itself alone.

Order of work, as in transformers: bias, min_tokens, penalties, constraint (here, in torch, on a copy of a row that has more than a constraint), then
temperature, top-k, top-p, min-p and the draw (`kernels/sample`). Plain greedy rows cost one argmax.

Rows are copied in groups of about `chunk_elements` logits, so the workspace does not grow with the batch: `workspace_bytes`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from tradespace.engine.request import Request, SamplingParams, TokenLogprobs
from tradespace.kernels.sample import SampleKernel
from tradespace.kernels.sample.noise import noise_key
from tradespace.kernels.sample.reference import CHUNK_ELEMENTS, TorchSampling


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of logits: the token after all of a request's tokens and `drafts`."""

    request: Request
    drafts: tuple[int, ...] = ()

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def position(self) -> int:
        """Where in the sequence the sampled token will stand."""
        return self.request.num_tokens + len(self.drafts)

    @property
    def num_outputs(self) -> int:
        return self.request.num_outputs + len(self.drafts)

    @property
    def below_min_tokens(self) -> bool:
        return self.num_outputs < self.params.min_tokens

    @property
    def is_adjusted(self) -> bool:
        """Whether logits are changed before anything is chosen."""
        return self._is_bent or self.request.constraint is not None

    @property
    def is_only_constrained(self) -> bool:
        """Whether a constraint alone changes them, and nobody asks what they were."""
        return self.request.constraint is not None and not self._is_bent and self.params.logprobs is None

    @property
    def _is_bent(self) -> bool:
        params = self.params
        return bool(params.logit_bias) or params.penalizes or self.below_min_tokens

    @property
    def noise_key(self) -> int:
        """Where the draw's noise comes from; 0 where the best is asked for."""
        return 0 if self.params.greedy else noise_key(self.request.seed, self.request.sample, self.position)


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token; None where the logits are not numbers, or none is left that may be chosen."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None


class Sampler:
    """Stateless but for its settings: noise is a function of (seed, sample, position).

    num_tokens   only the first so many tokens may be chosen: models pad their embeddings beyond what the tokenizer knows. None: all
    kernel       what chooses once logits are adjusted; None: torch
    """

    def __init__(self, *, num_tokens: int | None = None, kernel: SampleKernel | None = None, chunk_elements: int = CHUNK_ELEMENTS):
        self.num_tokens = num_tokens
        self.kernel: SampleKernel = kernel or TorchSampling(chunk_elements=chunk_elements)
        self.chunk_elements = chunk_elements

    def workspace_bytes(self, vocab_size: int) -> int:
        """Most bytes that `sample` holds beside the logits, whatever the number of rows: adjusted copies (or one row's log-probabilities), and the kernel's."""
        return 4 * max(self.chunk_elements, vocab_size) + self.kernel.workspace_bytes(vocab_size)

    def sample(self, logits_RV: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        """One token for each row; `rows[i]` says whose row i is.

        `logits_RV` fp32, left unchanged but for rows that only a constraint adjusts and whose log-probabilities nobody asks for: a copy of each would cost a
        step more than the constraint does.
        """
        assert logits_RV.shape[0] == len(rows), f"{logits_RV.shape[0]} rows of logits for {len(rows)} samples"
        whole = self.num_tokens is None or self.num_tokens == logits_RV.shape[1]
        tokens = self._choose(logits_RV if whole else logits_RV[:, : self.num_tokens], rows) if rows else []
        found = []
        for index, (token, row) in enumerate(zip(tokens, rows, strict=True)):
            count = row.params.logprobs
            found.append(Sampled(token, None if token is None or count is None else token_logprobs(logits_RV[index], token, count)))
        return found

    def _choose(self, logits_RV: Tensor, rows: Sequence[SampleRow]) -> list[int | None]:
        constrained = {i for i, row in enumerate(rows) if row.is_only_constrained}
        for i in constrained:
            constrain_(logits_RV[i], rows[i])
        adjusted = [i for i, row in enumerate(rows) if row.is_adjusted and i not in constrained]
        if not adjusted:
            if all(row.params.greedy for row in rows):
                return self.kernel.best(logits_RV)
            return self._draw(logits_RV, range(len(rows)), rows)
        found: list[int | None] = [None] * len(rows)
        others = set(adjusted)
        plain = [i for i in range(len(rows)) if i not in others]
        for i, token in zip(plain, self._draw(logits_RV, plain, [rows[i] for i in plain]), strict=True):
            found[i] = token
        step = max(1, self.chunk_elements // logits_RV.shape[-1])
        for start in range(0, len(adjusted), step):
            group = adjusted[start : start + step]
            group_rows = [rows[i] for i in group]
            work_RV = logits_RV[group]  # indexing with a list copies
            adjust_(work_RV, group_rows)
            for i, token in zip(group, self._draw(work_RV, range(len(group)), group_rows), strict=True):
                found[i] = token
        return found

    def _draw(self, logits_RV: Tensor, at: Sequence[int], rows: Sequence[SampleRow]) -> list[int | None]:
        """A token for each of `rows`, whose logits are the rows `at` of the matrix."""
        return self.kernel.draw(logits_RV, at, [row.params for row in rows], [row.noise_key for row in rows])


def token_logprobs(logits_V: Tensor, token: int, count: int) -> TokenLogprobs:
    """Log-probability of `token` and of the `count` best ones under the unmodified logits."""
    logprobs_V = torch.log_softmax(logits_V.float(), dim=-1)
    best = torch.topk(logprobs_V, min(count, logprobs_V.shape[0]))
    return TokenLogprobs(token, logprobs_V[token].item(), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))


def adjust_(logits_RV: Tensor, rows: Sequence[SampleRow]) -> None:
    """Logit bias, min_tokens, penalties and what a constraint forbids, in place."""
    for logits_V, row in zip(logits_RV, rows, strict=True):
        params = row.params
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits_V.device)
            logits_V[ids] += torch.tensor(list(params.logit_bias.values()), dtype=logits_V.dtype, device=logits_V.device)
        if row.below_min_tokens:
            logits_V[torch.tensor(sorted(row.request.stop_ids()), dtype=torch.int64, device=logits_V.device)] = -inf
        if params.penalizes:
            penalize_(logits_V, row)
        if row.request.constraint is not None:
            constrain_(logits_V, row)


def constrain_(logits_V: Tensor, row: SampleRow) -> None:
    """-inf for what the request's constraint forbids, in place."""
    assert row.request.constraint is not None and not row.drafts, "a constrained request has no drafts"
    row.request.constraint.allow_(logits_V)


def penalize_(logits_V: Tensor, row: SampleRow) -> None:
    """Repetition penalty over prompt and output, then presence and frequency penalties over the output, in place."""
    params, device = row.params, logits_V.device
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.request.token_ids, *row.drafts}), device=device)
        values = logits_V[seen]
        logits_V[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = Counter(row.request.output_ids)
        counts.update(row.drafts)
        if counts:
            ids = torch.tensor(list(counts), device=device)
            times = torch.tensor(list(counts.values()), dtype=logits_V.dtype, device=device)
            logits_V[ids] -= params.frequency_penalty * times + params.presence_penalty
