"""Paged attention (Triton) called by itself, over any view: it copies what each sequence sees into pages first. Right, and slow: a CUDA step
(`model/cuda_step.py`) hands the kernels (`paged.py`) the cache's planes as they lie. Here for tests, and for whoever wants the kernel without the step.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from tradespace.kernels.attention.triton_interpreter import interprets
from tradespace.kernels.view import KVView, StepBatch
from tradespace.spec.mixers import Attention
from tradespace.spec.paged import mixer_refusal

PAGE = 16
STORES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def supports(mixer: Attention, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why it cannot compute such a layer; None: it can."""
    if (reason := mixer_refusal(mixer)) is not None:
        return reason
    if dtype not in STORES:
        return f"paged attention takes fp32, bf16 and fp16, not {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "paged attention needs Triton (pip install 'tradespace[gpu]')"
    if device.type != "cuda" and not interprets():
        return f"paged attention runs on CUDA devices, not on {device.type} (except under Triton's interpreter, TRITON_INTERPRET=1, which is for tests)"
    return None


def attend(q_TNH: Tensor, view: KVView, batch: StepBatch, mixer: Attention, sinks_N: Tensor | None = None) -> Tensor:
    """out_TNHv in q's dtype."""
    from tradespace.kernels.attention.paged import Planes, paged_prefill

    out_TNHv = torch.zeros((len(q_TNH), mixer.N, mixer.Hv), dtype=q_TNH.dtype, device=q_TNH.device)
    if not len(q_TNH):
        return out_TNHv
    pages = -(-max(span.length for span in batch.spans) // PAGE)
    count = len(batch.spans)
    keys = q_TNH.new_zeros((count * pages * PAGE, mixer.K, mixer.H))
    values = q_TNH.new_zeros((count * pages * PAGE, mixer.K, mixer.Hv))
    for row, span in enumerate(batch.spans):
        place = slice(row * pages * PAGE, row * pages * PAGE + span.length)
        keys[place], values[place] = view.read(span)
    tables_BM = torch.arange(count * pages, dtype=torch.int32, device=q_TNH.device).view(count, pages)
    planes = Planes(keys=keys, values=values, store=STORES[q_TNH.dtype], block_size=PAGE)
    return paged_prefill(q_TNH.contiguous(), planes, tables_BM, batch.query_starts_B1, batch.lengths_B, mixer, out_TNHv, sinks_N=sinks_N)
