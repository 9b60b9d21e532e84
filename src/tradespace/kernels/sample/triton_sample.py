"""Tokens from logits on the device, without a transfer: greedy, or temperature, top-k, top-p, min-p and a draw by the counter's noise (`noise.py`) (Triton).

What stays after top-k and top-p is a threshold on the bit pattern of the tempered logit. Eight passes find it, four bits each, over all of a row's chunks at
once: nothing is sorted, and ties stay together, as the reference has it. Sums are in fp32: a token whose share of the nucleus lies within rounding of the
limit may be kept or not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tradespace.kernels.triton_launch import ceil_div, launch, padded
from tradespace.spec.cuda import SAMPLE_CHUNK

CHUNK = SAMPLE_CHUNK
LANES = 256
SHIFTS = (27, 23, 19, 15, 11, 7, 3, 0)  # of the passes: 31 bits, from the top
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
SECOND = tl.constexpr(0x94D049BB133111EB)
FINITE = tl.constexpr(0x7F7FFFFF)  # the largest pattern of a number


@triton.jit
def mixed(state):
    """SplitMix64's output function, uint64."""
    state = (state ^ (state >> 30)) * FIRST
    state = (state ^ (state >> 27)) * SECOND
    return state ^ (state >> 31)


@triton.jit
def gumbel_of(key, token):
    """Standard Gumbel noise in fp64 of each token."""
    state = mixed((token + 1).to(tl.uint64) * GOLDEN + key)
    uniform = ((state >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16
    return -tl.log(-tl.log(uniform))


@triton.jit
def tempered(logits, place, inside, largest, temperature):
    """(logit - largest) / temperature, at most 0."""
    found = tl.load(logits + place, mask=inside, other=float("-inf"))
    return tl.div_rn(found - largest, temperature)


@triton.jit
def leave_best(values, place, found_max, found_at, row, chunk, chunks, V):
    """A chunk's largest value and the first place that holds it, where the last chunk to finish finds them."""
    most = tl.max(values, 0)
    tl.store(found_max + row * chunks + chunk, most)
    tl.store(found_at + row * chunks + chunk, tl.min(tl.where(values == most, place, V), 0))
    tl.debug_barrier()


@triton.jit
def best_chunk(found_max, found_at, row, chunks, V, CHUNKS: tl.constexpr):
    """(largest value, the first place that holds it) of what all chunks left."""
    index = tl.arange(0, CHUNKS)
    every = tl.load(found_max + row * chunks + index, mask=index < chunks, other=float("-inf"), cache_modifier=".cg")
    at = tl.load(found_at + row * chunks + index, mask=index < chunks, other=V, cache_modifier=".cg")
    most = tl.max(every, 0)
    return most, tl.min(tl.where(every == most, at, V), 0)


@triton.jit
def best_kernel(logits, found_max, found_at, counters, largest, limits, tokens, V, row_stride, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The first index of each row's largest logit, by chunks; a NaN counts as infinite. -1 where that is not finite."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * row_stride + place, mask=place < V, other=float("-inf"))
    x = tl.where(x == x, x, float("inf"))
    leave_best(x, place, found_max, found_at, row, chunk, chunks, V)
    if tl.atomic_add(counters + row, 1, sem="acq_rel") == chunks - 1:
        most, token = best_chunk(found_max, found_at, row, chunks, V, CHUNKS)
        finite = (most < float("inf")) & (most > float("-inf"))
        tl.store(largest + row, most)
        tl.store(limits + row, FINITE)
        tl.store(tokens + row, tl.where(finite, token, -1).to(tl.int64))
        tl.store(counters + row, 0)


@triton.jit
def narrow_kernel(logits, largest, limits, lows, targets, part, counters, temperatures, top_ks, top_ps, V, row_stride, chunks,
                  MASS: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """One pass: 15 patterns a step of 2^SHIFT apart, and the tokens (MASS: their weight) up to each. The last chunk to finish takes the step that reaches the
    target: top_k tokens, or top_p of the weight of those that top-k left.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    has_k = (top_k > 0) & (top_k < V)
    if (temperature > 0.0) & ((top_p < 1.0) if MASS else has_k):
        most = tl.load(largest + row)
        limit = tl.load(limits + row)
        low = -1
        if SHIFT < 27:
            low = tl.load(lows + row)
        j = tl.arange(0, 16)
        patterns = tl.where(j == 15, limit, low + ((j + 1) << SHIFT))  # the sixteenth counts all
        held = tl.zeros([LANES, 16], tl.float32)
        count = tl.zeros([LANES], tl.float32)
        for start in tl.range(0, CHUNK, LANES):
            place = chunk * CHUNK + start + tl.arange(0, LANES)
            z = tempered(logits + row * row_stride, place, place < V, most, temperature)
            pattern = tl.abs(z).to(tl.int32, bitcast=True)
            weight = tl.exp(z) if MASS else tl.full([LANES], 1.0, tl.float32)
            held += tl.where((pattern[:, None] <= patterns[None, :]) & (place < V)[:, None], weight[:, None], 0.0)
            count += tl.where((pattern <= limit) & (place < V), 1.0, 0.0)
        own = part + (row * chunks + chunk) * 17
        tl.store(own + j, tl.sum(held, 0))
        tl.store(own + 16, tl.sum(count, 0))
        tl.debug_barrier()
        if tl.atomic_add(counters + row, 1, sem="acq_rel") == chunks - 1:
            index = tl.arange(0, CHUNKS)
            every = part + (row * chunks + index) * 17
            totals = tl.sum(tl.load(every[:, None] + j[None, :], mask=(index < chunks)[:, None], other=0.0, cache_modifier=".cg"), 0)
            target = top_k.to(tl.float32)
            if MASS:
                if SHIFT == 27:
                    tokens = tl.sum(tl.load(every + 16, mask=index < chunks, other=0.0, cache_modifier=".cg"), 0)
                    mass = tl.sum(tl.where(j == 15, totals, 0.0), 0)
                    if has_k:  # of those that tie with the k-th, only as many as k allows are summed
                        mass -= (tokens - target) * tl.exp(-limit.to(tl.float32, bitcast=True))
                    target = mass * top_p
                    tl.store(targets + row, target)
                else:
                    target = tl.load(targets + row)
            step = tl.min(tl.where((totals >= target) & (j < 15), j, 15), 0)
            low = low + (step << SHIFT)
            tl.store(lows + row, low)
            if SHIFT == 0:
                tl.store(limits + row, tl.minimum(limit, low + 1))
            tl.store(counters + row, 0)


@triton.jit
def draw_kernel(logits, largest, limits, temperatures, min_ps, keys, found_max, found_at, counters, tokens, V, row_stride, chunks,
                CHUNK: tl.constexpr, CHUNKS: tl.constexpr):  # fmt: skip
    """argmax of tempered logit + noise over what the limit leaves. Rows of temperature 0 keep their best token."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        place = chunk * CHUNK + tl.arange(0, CHUNK)
        z = tempered(logits + row * row_stride, place, place < V, tl.load(largest + row), temperature)
        limit = tl.load(limits + row)
        min_p = tl.load(min_ps + row)
        if min_p > 0.0:
            limit = tl.minimum(limit, tl.abs(tl.log(min_p)).to(tl.int32, bitcast=True))
        kept = (place < V) & (tl.abs(z).to(tl.int32, bitcast=True) <= limit)
        key = tl.load(keys + row).to(tl.uint64, bitcast=True)
        score = tl.where(kept, gumbel_of(key, place.to(tl.int64)) + z.to(tl.float64), float("-inf"))
        leave_best(score, place, found_max, found_at, row, chunk, chunks, V)
        if tl.atomic_add(counters + row, 1, sem="acq_rel") == chunks - 1:
            _, token = best_chunk(found_max, found_at, row, chunks, V, CHUNKS)
            if tl.load(tokens + row) >= 0:
                tl.store(tokens + row, token.to(tl.int64))
            tl.store(counters + row, 0)


class DeviceSampling:
    """Sampling of at most `max_rows` rows of at most `vocab_size` logits. All parameters are device tensors: a captured step draws with whatever they hold."""

    def __init__(self, device: torch.device | str, max_rows: int, vocab_size: int):
        self.max_rows, self.vocab_size = max_rows, vocab_size
        chunks = ceil_div(vocab_size, CHUNK)
        self.found_max = torch.zeros((max_rows, chunks), device=device)
        self.found_score = torch.zeros((max_rows, chunks), dtype=torch.float64, device=device)
        self.found_at = torch.zeros((max_rows, chunks), dtype=torch.int32, device=device)
        self.largest = torch.zeros(max_rows, device=device)
        self.limits, self.lows = (torch.zeros(max_rows, dtype=torch.int32, device=device) for _ in range(2))
        self.targets = torch.zeros(max_rows, device=device)
        self.part = torch.zeros((max_rows, chunks, 17), device=device)
        self.counters = torch.zeros(max_rows, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        held = (self.found_max, self.found_score, self.found_at, self.largest, self.limits, self.lows, self.targets, self.part, self.counters)
        return sum(x.nbytes for x in held)

    def greedy(self, logits_RV: Tensor, tokens_R: Tensor) -> Tensor:
        """tokens_R (int64): the first index of each row's largest logit (fp32); -1 where that is not a finite number."""
        R, V = logits_RV.shape
        if R == 0:
            return tokens_R
        self._check(logits_RV)
        chunks = ceil_div(V, CHUNK)
        launch(
            best_kernel, (R, chunks), logits_RV,
            logits_RV, self.found_max, self.found_at, self.counters, self.largest, self.limits, tokens_R, V, logits_RV.stride(0), chunks,
            CHUNK=CHUNK, CHUNKS=padded(chunks), num_warps=4,
        )  # fmt: skip
        return tokens_R

    def draw(
        self,
        logits_RV: Tensor,
        tokens_R: Tensor,
        *,
        temperature_R: Tensor,
        top_k_R: Tensor,
        top_p_R: Tensor,
        min_p_R: Tensor,
        key_R: Tensor,
        with_top_k: bool = True,
        with_top_p: bool = True,
    ) -> Tensor:
        """tokens_R: a draw from what each row's parameters leave (fp32; top_k int32; keys, those of `noise.noise_key`, int64 bit patterns); the best where
        temperature is 0.

        `with_top_k` and `with_top_p` False promise that no row has such: known to the host, so that a captured step need not look for limits.
        """
        R, V = logits_RV.shape
        if R == 0:
            return tokens_R
        self.greedy(logits_RV, tokens_R)
        chunks = ceil_div(V, CHUNK)
        block = padded(chunks)
        for mass in (False, True):
            for shift in SHIFTS if (with_top_p if mass else with_top_k) else ():
                launch(
                    narrow_kernel, (R, chunks), logits_RV,
                    logits_RV, self.largest, self.limits, self.lows, self.targets, self.part, self.counters, temperature_R, top_k_R, top_p_R,
                    V, logits_RV.stride(0), chunks, MASS=mass, SHIFT=shift, CHUNK=CHUNK, CHUNKS=block, LANES=LANES, num_warps=4,
                )  # fmt: skip
        launch(
            draw_kernel, (R, chunks), logits_RV,
            logits_RV, self.largest, self.limits, temperature_R, min_p_R, key_R, self.found_score, self.found_at, self.counters,
            tokens_R, V, logits_RV.stride(0), chunks, CHUNK=CHUNK, CHUNKS=block, num_warps=8,
        )  # fmt: skip
        return tokens_R

    def _check(self, logits_RV: Tensor) -> None:
        R, V = logits_RV.shape
        assert self.max_rows >= R and self.vocab_size >= V, f"{R} rows of {V} logits; made for {self.max_rows} of {self.vocab_size}"
        assert logits_RV.dtype == torch.float32 and logits_RV.stride(1) == 1, "rows of fp32 logits, each in one piece"
