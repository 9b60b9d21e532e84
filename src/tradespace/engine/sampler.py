"""Logits → tokens, batched over rows with each request's own parameters. Every row is computed from itself alone.

Order of work, as transformers has it: logit bias, min_tokens, penalties, temperature, top-k, top-p, min-p; then a draw by Gumbel-max (`noise.py`). Top-k and
top-p become a threshold on the logit, and tokens that tie with the last one kept are kept too, so no result hangs on how a sort breaks ties. Nothing sorts
the vocabulary: the largest `PROBE` logits nearly always hold the nucleus, and only a row where they do not is searched further. Plain greedy rows cost one
argmax.

Rows are processed in groups of about `chunk_elements` logits, so the workspace does not grow with the batch: `workspace_bytes`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log

import torch
from torch import Tensor

from tradespace.engine.noise import gumbel, noise_key
from tradespace.engine.request import Request, SamplingParams, TokenLogprobs

PROBE = 1024
CHUNK_ELEMENTS = 2**18
NOISE_ELEMENTS = 2**15
# the group's two fp32 copies, and the most that follows: a whole row's sort with its weights and their sums in fp64
WORKSPACE_BYTES_PER_ELEMENT = 2 * 4 + 40


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
    def is_plain(self) -> bool:
        """Whether the most likely token is all that is asked for."""
        params = self.params
        return params.greedy and not params.penalizes and not params.logit_bias and not self.below_min_tokens


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token; None where the logits are not numbers, or none is left that may be chosen."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None


class Sampler:
    """Stateless but for its settings: noise is a function of (seed, sample, position).

    num_tokens   only the first so many tokens may be chosen: models pad their embeddings beyond what the tokenizer knows. None: all
    """

    def __init__(self, *, num_tokens: int | None = None, chunk_elements: int = CHUNK_ELEMENTS):
        self.num_tokens = num_tokens
        self.chunk_elements = chunk_elements

    def workspace_bytes(self, vocab_size: int) -> int:
        """Most bytes that `sample` holds beside the logits, whatever the number of rows."""
        return max(self.chunk_elements, vocab_size) * WORKSPACE_BYTES_PER_ELEMENT

    def sample(self, logits_RV: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        """One token for each row. `logits_RV` fp32, left unchanged; `rows[i]` says whose row i is."""
        assert logits_RV.shape[0] == len(rows), f"{logits_RV.shape[0]} rows of logits for {len(rows)} samples"
        step = max(1, self.chunk_elements // logits_RV.shape[-1])
        tokens: list[int | None] = []
        for start in range(0, len(rows), step):
            tokens += _choose(logits_RV[start : start + step, : self.num_tokens], rows[start : start + step])
        return [
            Sampled(token, None if token is None or row.params.logprobs is None else token_logprobs(logits_V, token, row.params.logprobs))
            for token, row, logits_V in zip(tokens, rows, logits_RV, strict=True)
        ]


def token_logprobs(logits_V: Tensor, token: int, count: int) -> TokenLogprobs:
    """Log-probability of `token` and of the `count` best ones under the unmodified logits."""
    logprobs_V = torch.log_softmax(logits_V.float(), dim=-1)
    best = torch.topk(logprobs_V, min(count, logprobs_V.shape[0]))
    return TokenLogprobs(token, logprobs_V[token].item(), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))


def _choose(logits_RV: Tensor, rows: Sequence[SampleRow]) -> list[int | None]:
    plain = [i for i, row in enumerate(rows) if row.is_plain]
    shaped = [i for i, row in enumerate(rows) if not row.is_plain]
    found: list[int | None] = [None] * len(rows)
    if len(plain) == len(rows):
        return _best(logits_RV)
    if plain:
        for i, token in zip(plain, _best(logits_RV[plain]), strict=True):
            found[i] = token
    work_RV = logits_RV[shaped].float()  # indexing with a list copies
    shaped_rows = [rows[i] for i in shaped]
    adjust_(work_RV, shaped_rows)
    for i, token in zip(shaped, _draw(work_RV, shaped_rows), strict=True):
        found[i] = token
    return found


def _best(logits_RV: Tensor) -> list[int | None]:
    """The first index of each row's largest logit; None where that is not a finite number."""
    largest = logits_RV.max(dim=-1)
    return [token if ok else None for token, ok in zip(largest.indices.tolist(), largest.values.isfinite().tolist(), strict=True)]


def adjust_(logits_RV: Tensor, rows: Sequence[SampleRow]) -> None:
    """Logit bias, min_tokens and penalties, in place."""
    for logits_V, row in zip(logits_RV, rows, strict=True):
        params = row.params
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits_V.device)
            logits_V[ids] += torch.tensor(list(params.logit_bias.values()), dtype=logits_V.dtype, device=logits_V.device)
        if row.below_min_tokens:
            logits_V[torch.tensor(sorted(row.request.stop_ids()), dtype=torch.int64, device=logits_V.device)] = -inf
        if params.penalizes:
            penalize_(logits_V, row)


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


def _draw(logits_RV: Tensor, rows: Sequence[SampleRow]) -> list[int | None]:
    """Tokens from adjusted logits (overwritten): the best where greedy, else a draw from what top-k, top-p and min-p leave."""
    found = _best(logits_RV)
    # rows that can be drawn from few tokens, and rows that can be drawn from all, pay for noise differently
    for truncated in (True, False):
        chosen = [i for i, row in enumerate(rows) if not row.params.greedy and row.params.truncates == truncated and found[i] is not None]
        if not chosen:
            continue
        picked = [rows[i] for i in chosen]
        part_RV = logits_RV[chosen]
        temper_(part_RV, [row.params.temperature for row in picked])
        if truncated:
            truncate_(part_RV, [row.params for row in picked])
        keys = [noise_key(row.request.seed, row.request.sample, row.position) for row in picked]
        tokens = _gumbel_argmax(part_RV, torch.tensor(keys, dtype=torch.int64, device=part_RV.device), sparse=truncated)
        for i, token in zip(chosen, tokens, strict=True):
            found[i] = token
    return found


def temper_(logits_RV: Tensor, temperatures: Sequence[float]) -> None:
    """Divide by each row's temperature; the largest logit becomes 0, so that nothing overflows."""
    logits_RV -= logits_RV.amax(dim=-1, keepdim=True)
    logits_RV /= torch.tensor(temperatures, dtype=logits_RV.dtype, device=logits_RV.device)[:, None]


def truncate_(logits_RV: Tensor, params: Sequence[SamplingParams]) -> None:
    """-inf for every token that top-k, then top-p among those, then min-p leave out. In place; the most likely token always stays."""
    V = logits_RV.shape[-1]
    limits = [-inf] * len(params)
    sorting = [i for i, p in enumerate(params) if 0 < p.top_k < V or p.top_p < 1]
    if sorting:
        part_RV = logits_RV if len(sorting) == len(params) else logits_RV[sorting]
        for i, limit in zip(sorting, _thresholds(part_RV, [params[i] for i in sorting]), strict=True):
            limits[i] = limit
    largest_R = logits_RV.amax(dim=-1)
    min_p_R = torch.tensor([log(p.min_p) if p.min_p else -inf for p in params], dtype=logits_RV.dtype, device=logits_RV.device)
    limit_R = torch.maximum(torch.tensor(limits, dtype=logits_RV.dtype, device=logits_RV.device), largest_R + min_p_R)
    logits_RV.masked_fill_(logits_RV < limit_R[:, None], -inf)


def _thresholds(logits_RV: Tensor, params: Sequence[SamplingParams]) -> list[float]:
    """The smallest logit that top-k and top-p keep in each row."""
    V = logits_RV.shape[-1]
    has_k = [0 < p.top_k < V for p in params]
    width = min(V, max(p.top_k if k else PROBE for p, k in zip(params, has_k, strict=True)))
    limits, narrow = _thresholds_within(logits_RV, params, width)
    while narrow:
        width = min(V, 16 * width)
        wider, still = _thresholds_within(logits_RV[narrow], [params[i] for i in narrow], width)
        for i, limit in zip(narrow, wider, strict=True):
            limits[i] = limit
        narrow = [narrow[i] for i in still]
    return limits


def _thresholds_within(logits_RV: Tensor, params: Sequence[SamplingParams], width: int) -> tuple[list[float], list[int]]:
    """Thresholds by way of the `width` largest logits, and the rows whose nucleus reaches further than that."""
    R, V = logits_RV.shape
    device = logits_RV.device
    values_RW = torch.topk(logits_RV, width, dim=-1).values
    kept_k = [p.top_k if 0 < p.top_k < V else V for p in params]
    k_R = torch.tensor(kept_k, device=device)
    inside_RW = torch.arange(width, device=device)[None, :] < k_R[:, None]
    weights_RW = (values_RW.double() - values_RW[:, :1].double()).exp() * inside_RW
    sums_RW = weights_RW.cumsum(dim=-1)
    # the probabilities that top-p sums are those among the top k, or among all tokens
    total_R = sums_RW[:, -1].clone()
    whole = [i for i in range(R) if kept_k[i] > width]
    for i in whole:
        total_R[i] = (logits_RV[i] - values_RW[i, 0]).exp_().sum(dtype=torch.float64)
    share_R = torch.tensor([p.top_p if p.top_p < 1 else inf for p in params], dtype=torch.float64, device=device)
    # a token stays while those before it hold less than the share; rounding may not drop the first
    before_RW = sums_RW - weights_RW
    keep_RW = inside_RW & (before_RW < (share_R * total_R)[:, None])
    last_R = keep_RW.sum(dim=-1).clamp_(min=1) - 1
    limits = values_RW.gather(1, last_R[:, None])[:, 0].tolist()
    reached = (sums_RW[:, -1] >= share_R * total_R).tolist()
    return limits, [i for i in whole if not reached[i]]


def _gumbel_argmax(logits_RV: Tensor, keys_R: Tensor, *, sparse: bool) -> list[int]:
    """The token with the largest logit + noise. `sparse`: draw noise for finite logits only, which changes no result."""
    R, V = logits_RV.shape
    if not sparse:
        best_R = torch.full((R,), -inf, dtype=torch.float64, device=logits_RV.device)
        token_R = torch.zeros(R, dtype=torch.int64, device=logits_RV.device)
        # slices small enough for a core's cache: fresh memory costs more than the arithmetic
        width = max(1, NOISE_ELEMENTS // R)
        for start in range(0, V, width):
            stop = min(V, start + width)
            scores_RW = gumbel(keys_R[:, None], torch.arange(start, stop, device=logits_RV.device)[None, :])
            scores_RW += logits_RV[:, start:stop]
            top = scores_RW.max(dim=-1)
            token_R = torch.where(top.values > best_R, top.indices + start, token_R)
            best_R = torch.maximum(best_R, top.values)
        return token_R.tolist()
    found = []
    for row in range(R):
        ids = (logits_RV[row] > -inf).nonzero()[:, 0]
        scores = gumbel(keys_R[row], ids) + logits_RV[row, ids]
        found.append(int(ids[scores.argmax()]))
    return found
