"""Causal attention over whole documents that lie one after the other, for training: the library's fused kernel, document by document.

Kept for the backward pass: q, k, v and the output as the layer has them anyway, and one fp32 number per query and head. On the CPU the fused operators are
called directly, so that nothing is copied into another order and kept twice. arXiv:2205.14135
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tradespace.errors import UnsupportedError
from tradespace.kernels.view import KVView, PackedView, Span, StepBatch
from tradespace.spec.mixers import Attention


def fits(mixer: Attention, batch: StepBatch) -> bool:
    """Whether every token sees all before it in its document, and nothing else asks for the blocks of `sdpa`."""
    longest = max((span.length for span in batch.spans), default=0)
    whole = all(span.num_queries == span.length for span in batch.spans)
    return whole and mixer.Hv == mixer.H and mixer.pattern is None and (mixer.window is None or longest <= mixer.window)


def trains(mixer: Attention) -> bool:
    """Whether `attend` computes such a layer, whatever its documents' lengths."""
    plain = mixer.Hv == mixer.H and mixer.pattern is None and mixer.window is None
    return plain and not mixer.sinks and not mixer.alibi and mixer.logit_softcap is None


def attend(q_TNH: Tensor, view: KVView, batch: StepBatch, mixer: Attention, sinks_N: Tensor | None = None) -> Tensor:
    """As every kernel, over whole documents without a cache. Raises UnsupportedError for what is none."""
    assert sinks_N is None and trains(mixer), "asked before it was put in place"
    if not isinstance(view, PackedView) or not fits(mixer, batch):
        raise UnsupportedError("this kernel takes whole documents without a cache: it trains. Build the model by another one to generate")
    return attend_packed(q_TNH, view.k_TKH, view.v_TKH, batch, mixer)


def attend_packed(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, batch: StepBatch, mixer: Attention) -> Tensor:
    """out_TNH (contiguous) of documents that lie one after the other; differentiable."""
    if q_TNH.device.type == "cpu":
        return _PackedOnCPU.apply(q_TNH, k_TKH, v_TKH, batch.spans, mixer)  # pyright: ignore[reportReturnType]
    return attend_runs(q_TNH, k_TKH, v_TKH, batch.spans, mixer)


def attend_runs(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, spans: tuple[Span, ...], mixer: Attention) -> Tensor:
    """The same on a device: a call for each run of documents of the same length."""
    runs = _equal_runs(spans)
    sizes = [count * length for count, length in runs]
    if not runs:
        return q_TNH.contiguous()
    found = []
    # split, not slices: those leave for each part a gradient of the whole, zero elsewhere, and a sum over all of these
    for (count, length), q, k, v in zip(runs, *(x.split(sizes) for x in (q_TNH, k_TKH, v_TKH)), strict=True):
        q_BNTH, k_BKTH, v_BKTH = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(q_BNTH, k_BKTH, v_BKTH, is_causal=True, scale=mixer.softmax_scale, enable_gqa=mixer.G > 1)
        found.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(found) if len(found) > 1 else found[0].contiguous()


def _equal_runs(spans: tuple[Span, ...]) -> list[tuple[int, int]]:
    """(how many, of what length) of documents that lie one after the other, neighbours of the same length together; empty ones left out."""
    found: list[tuple[int, int]] = []
    for span in spans:
        if span.num_queries and found and found[-1][1] == span.num_queries:
            found[-1] = (found[-1][0] + 1, span.num_queries)
        elif span.num_queries:
            found.append((1, span.num_queries))
    return found


def _rows(x_TXH: Tensor, span: Span) -> Tensor:
    return x_TXH[span.query_start : span.query_start + span.num_queries]


def _grouped(x_TXH: Tensor, K: int, G: int) -> Tensor:
    """[K, G, T, H] of queries (T, K·G, H), or of keys (T, K, H) expanded over G with stride 0."""
    if x_TXH.shape[1] == K:
        return x_TXH.transpose(0, 1)[:, None].expand(-1, G, -1, -1)
    return x_TXH.unflatten(1, (K, G)).permute(1, 2, 0, 3)


class _PackedOnCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, spans: tuple[Span, ...], mixer: Attention) -> Tensor:
        out_TNH = q_TNH.new_empty(q_TNH.shape)
        sums = []
        for span in spans:
            if not span.num_queries:
                sums.append(q_TNH.new_empty(0, dtype=torch.float32))
                continue
            q, k, v = (_grouped(_rows(x, span), mixer.K, mixer.G) for x in (q_TNH, k_TKH, v_TKH))
            part_KGTH, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=mixer.softmax_scale)
            _rows(out_TNH, span).unflatten(1, (mixer.K, mixer.G)).copy_(part_KGTH.permute(2, 0, 1, 3))
            sums.append(lse)
        ctx.save_for_backward(q_TNH, k_TKH, v_TKH, out_TNH, *sums)
        ctx.spans, ctx.mixer = spans, mixer
        return out_TNH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_TNH, k_TKH, v_TKH, out_TNH, *sums = ctx.saved_tensors
        mixer: Attention = ctx.mixer
        dq_TNH, dk_TKH, dv_TKH = (torch.empty(x.shape, dtype=x.dtype) for x in (q_TNH, k_TKH, v_TKH))
        for span, lse in zip(ctx.spans, sums, strict=True):
            if not span.num_queries:
                continue
            dout, q, k, v, out = (_grouped(_rows(x, span), mixer.K, mixer.G) for x in (gradients[0], q_TNH, k_TKH, v_TKH, out_TNH))
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, True, scale=mixer.softmax_scale)
            _rows(dq_TNH, span).unflatten(1, (mixer.K, mixer.G)).copy_(dq.permute(2, 0, 1, 3))
            for target, found in ((dk_TKH, dk), (dv_TKH, dv)):  # a key serves G heads
                _rows(target, span).copy_(found.sum(dim=1).transpose(0, 1))
        return dq_TNH, dk_TKH, dv_TKH, None, None
