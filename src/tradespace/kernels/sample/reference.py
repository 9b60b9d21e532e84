"""Tokens from logits with torch's operators: the specification of sampling.

Temperature, top-k, top-p and min-p as transformers has them, then a draw by Gumbel-max (`noise.py`). Top-k and top-p become a threshold on the logit, and
tokens that tie with the last one kept are kept too, so no result hangs on how a sort breaks ties. Nothing sorts the vocabulary: the largest `PROBE` logits
nearly always hold the nucleus, and only a row where they do not is searched further.

Rows are processed in groups of about `chunk_elements` logits, so the workspace does not grow with the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log

import torch
from torch import Tensor

from tradespace.kernels.sample import Shape
from tradespace.kernels.sample.noise import gumbel

PROBE = 1024
CHUNK_ELEMENTS = 2**18
NOISE_ELEMENTS = 2**15
# the group's fp32 copy, and the most that follows: a whole row's sort with its weights and their sums in fp64
WORKSPACE_BYTES_PER_ELEMENT = 4 + 40


class TorchSampling:
    """Sampling by torch, on any device."""

    name = "torch"

    def __init__(self, *, chunk_elements: int = CHUNK_ELEMENTS):
        self.chunk_elements = chunk_elements

    def workspace_bytes(self, vocab_size: int) -> int:
        """Most bytes that it holds beside the logits, whatever the number of rows."""
        return max(self.chunk_elements, vocab_size) * WORKSPACE_BYTES_PER_ELEMENT

    def best(self, logits_RV: Tensor) -> list[int | None]:
        """The first index of each row's largest logit; None where that is not a finite number."""
        largest = logits_RV.max(dim=-1)
        return [token if ok else None for token, ok in zip(largest.indices.tolist(), largest.values.isfinite().tolist(), strict=True)]

    def draw(self, logits_RV: Tensor, rows: Sequence[int], shapes: Sequence[Shape], keys: Sequence[int]) -> list[int | None]:
        """A token from each of these rows: the best where the temperature is 0, else a draw from what its shape leaves."""
        found: list[int | None] = []
        step = max(1, self.chunk_elements // logits_RV.shape[-1])
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            found += self._draw_group(logits_RV, rows[part], shapes[part], keys[part])
        return found

    def _draw_group(self, logits_RV: Tensor, rows: Sequence[int], shapes: Sequence[Shape], keys: Sequence[int]) -> list[int | None]:
        found = self.best(_select(logits_RV, rows))
        # rows that can be drawn from few tokens, and rows that can be drawn from all, pay for noise differently
        for truncated in (True, False):
            chosen = [i for i, shape in enumerate(shapes) if shape.temperature > 0 and truncates(shape) == truncated and found[i] is not None]
            if not chosen:
                continue
            part_RV = logits_RV[[rows[i] for i in chosen]].float()  # indexing with a list copies
            temper_(part_RV, [shapes[i].temperature for i in chosen])
            if truncated:
                truncate_(part_RV, [shapes[i] for i in chosen])
            keys_R = torch.tensor([keys[i] for i in chosen], dtype=torch.int64, device=part_RV.device)
            for i, token in zip(chosen, _gumbel_argmax(part_RV, keys_R, sparse=truncated), strict=True):
                found[i] = token
        return found


def _select(logits_RV: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows, as a view where they lie together."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return logits_RV[rows[0] : rows[0] + len(rows)]
    return logits_RV[list(rows)]


def truncates(shape: Shape) -> bool:
    """Whether some tokens cannot be drawn at all."""
    return shape.top_k > 0 or shape.top_p < 1 or shape.min_p > 0


def temper_(logits_RV: Tensor, temperatures: Sequence[float]) -> None:
    """Divide by each row's temperature; the largest logit becomes 0, so that nothing overflows."""
    logits_RV -= logits_RV.amax(dim=-1, keepdim=True)
    logits_RV /= torch.tensor(temperatures, dtype=logits_RV.dtype, device=logits_RV.device)[:, None]


def truncate_(logits_RV: Tensor, shapes: Sequence[Shape]) -> None:
    """-inf for every token that top-k, then top-p among those, then min-p leave out. In place; the most likely token always stays."""
    V = logits_RV.shape[-1]
    limits = [-inf] * len(shapes)
    sorting = [i for i, p in enumerate(shapes) if 0 < p.top_k < V or p.top_p < 1]
    if sorting:
        part_RV = logits_RV if len(sorting) == len(shapes) else logits_RV[sorting]
        for i, limit in zip(sorting, _thresholds(part_RV, [shapes[i] for i in sorting]), strict=True):
            limits[i] = limit
    largest_R = logits_RV.amax(dim=-1)
    min_p_R = torch.tensor([log(p.min_p) if p.min_p else -inf for p in shapes], dtype=logits_RV.dtype, device=logits_RV.device)
    limit_R = torch.maximum(torch.tensor(limits, dtype=logits_RV.dtype, device=logits_RV.device), largest_R + min_p_R)
    logits_RV.masked_fill_(logits_RV < limit_R[:, None], -inf)


def _thresholds(logits_RV: Tensor, shapes: Sequence[Shape]) -> list[float]:
    """The smallest logit that top-k and top-p keep in each row."""
    V = logits_RV.shape[-1]
    has_k = [0 < p.top_k < V for p in shapes]
    width = min(V, max(p.top_k if k else PROBE for p, k in zip(shapes, has_k, strict=True)))
    limits, narrow = _thresholds_within(logits_RV, shapes, width)
    while narrow:
        width = min(V, 16 * width)
        wider, still = _thresholds_within(logits_RV[narrow], [shapes[i] for i in narrow], width)
        for i, limit in zip(narrow, wider, strict=True):
            limits[i] = limit
        narrow = [narrow[i] for i in still]
    return limits


def _thresholds_within(logits_RV: Tensor, shapes: Sequence[Shape], width: int) -> tuple[list[float], list[int]]:
    """Thresholds by way of the `width` largest logits, and the rows whose nucleus reaches further than that."""
    R, V = logits_RV.shape
    device = logits_RV.device
    values_RW = torch.topk(logits_RV, width, dim=-1).values
    kept_k = [p.top_k if 0 < p.top_k < V else V for p in shapes]
    k_R = torch.tensor(kept_k, device=device)
    inside_RW = torch.arange(width, device=device)[None, :] < k_R[:, None]
    weights_RW = (values_RW.double() - values_RW[:, :1].double()).exp() * inside_RW
    sums_RW = weights_RW.cumsum(dim=-1)
    # the probabilities that top-p sums are those among the top k, or among all tokens
    total_R = sums_RW[:, -1].clone()
    whole = [i for i in range(R) if kept_k[i] > width]
    for i in whole:
        total_R[i] = (logits_RV[i] - values_RW[i, 0]).exp_().sum(dtype=torch.float64)
    share_R = torch.tensor([p.top_p if p.top_p < 1 else inf for p in shapes], dtype=torch.float64, device=device)
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
