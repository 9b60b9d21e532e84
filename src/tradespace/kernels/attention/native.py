"""Paged attention in C++ (`kernels/native/source/attention.cpp`): decode and prefill over the cache's own tiles, split over keys for long contexts.

A recorded step (`model/recorded.py`) hands it the cache's planes as they lie. Called by itself, as here, it first copies what each sequence sees into tiles:
right for any view, and slow; it is there for tests and for whoever wants the kernel without the step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tradespace.kernels.native import load
from tradespace.kernels.native import program as ops
from tradespace.kernels.native.library import Cache, Step
from tradespace.kernels.native.program import Buffer, Program
from tradespace.kernels.view import KVView, Span, StepBatch
from tradespace.spec.attention import refusal
from tradespace.spec.mixers import Attention
from tradespace.spec.native import LANES, SLOTS_PER_THREAD, partial_floats, round_up


def supports(mixer: Attention, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why it cannot compute such a layer; None: it can."""
    if device.type != "cpu":
        return f"native attention runs on the CPU, not on {device.type}"
    return refusal("native", mixer)


def attend(q_TNH: Tensor, view: KVView, batch: StepBatch, mixer: Attention, sinks_N: Tensor | None = None) -> Tensor:
    """out_TNHv in q's dtype, computed in fp32. Takes a copy of all keys and values of the step's sequences."""
    T = len(q_TNH)
    out_TR = torch.zeros(T, mixer.N * mixer.Hv)
    if T:
        size = round_up(max(span.length for span in batch.spans), LANES)
        keys, values = zip(*(_tiles(view, span, size) for span in batch.spans), strict=True)
        planes = torch.cat(keys), torch.cat(values)
        q_TR = (q_TNH.float() * mixer.softmax_scale).flatten(1).contiguous()
        threads = torch.get_num_threads()
        program = Program(load())
        program.add(
            ops.ATTEND,
            in_=Buffer(q_TR, q_TR.shape[1]),
            out=Buffer(out_TR, out_TR.shape[1]),
            heads=mixer.N,
            cache=Cache(planes[0].data_ptr(), planes[1].data_ptr(), size, ops.STORES["fp32"], mixer.K, mixer.H, mixer.Hv),
            weight=None if sinks_N is None or not mixer.sinks else sinks_N.float().contiguous(),
            window=mixer.window or 0,
            chunked=int(mixer.chunked),
            softcap=mixer.logit_softcap or 0.0,
            partials=torch.zeros(threads * SLOTS_PER_THREAD * partial_floats(mixer.Hv)),
            slots=threads * SLOTS_PER_THREAD,
        )
        tables = torch.arange(len(batch.spans), dtype=torch.int32)
        starts, lengths = batch.query_starts_B1.contiguous(), batch.lengths_B.contiguous()
        step = Step(starts=starts.data_ptr(), lengths=lengths.data_ptr(), tables=tables.data_ptr(), table_width=1, num_tokens=T, num_sequences=len(tables))
        program.run(step, torch.zeros(threads, LANES), threads)
    return out_TR.view(T, mixer.N, mixer.Hv).to(q_TNH.dtype)


def _tiles(view: KVView, span: Span, size: int) -> tuple[Tensor, Tensor]:
    """One sequence's keys as (K, tiles, H, 16) and values as (K, positions, Hv), flat, padded with zeros to `size` positions."""
    k_SKH, v_SKH = view.read(span)
    k_KSH, v_KSH = (pad(x.float().transpose(0, 1), (0, 0, 0, size - len(x))) for x in (k_SKH, v_SKH))
    return k_KSH.unflatten(1, (-1, LANES)).transpose(2, 3).flatten(), v_KSH.flatten()
