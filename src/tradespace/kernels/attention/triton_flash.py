"""Flash attention in Triton, forward and backward, for every pattern, window, cap, sink and ratio of heads. arXiv:2205.14135, 2307.08691

Held beside q, k, v, the output and their gradients: fp32 per query and head, one number forward (the log-sum), two backward. Patterns of blocks add their
lists; of a cache that pages, so many sequences as hold GATHER_BYTES are copied together at a time. Runs on CUDA, and under Triton's interpreter
(TRITON_INTERPRET=1, set before triton is first imported).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from tradespace.kernels.attention.triton_flash_layout import Layout, Lists, groups, lay_out, pack
from tradespace.kernels.attention.triton_flash_tiles import Tiles, find_tiles
from tradespace.kernels.attention.triton_interpreter import prepare
from tradespace.kernels.triton_device import device_refusal
from tradespace.kernels.view import KVView, Span, StepBatch
from tradespace.spec.attention import refusal
from tradespace.spec.attention_pattern import Prefix, Sliding
from tradespace.spec.mixers import Attention


def supports(mixer: Attention, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this kernel cannot take such a layer; None: it can."""
    if (reason := refusal("flash", mixer)) is not None:
        return reason
    return device_refusal("flash", dtype, device)


def attend(q_TNH: Tensor, view: KVView, batch: StepBatch, mixer: Attention, sinks_N: Tensor | None = None) -> Tensor:
    """out_TNHv in q's dtype: each of the step's T queries over the keys and values that `view` holds of its sequence. Differentiable."""
    together = groups(view, batch, mixer, q_TNH.element_size())
    if len(together) == 1:  # rows and positions as they are
        return _attend(q_TNH, view, together[0], mixer, sinks_N)
    outs = []
    for spans in together:
        start, stop = spans[0].query_start, spans[-1].query_start + spans[-1].num_queries
        outs.append(_attend(q_TNH[start:stop], view, spans, mixer, sinks_N))
    return torch.cat(outs) if outs else q_TNH.new_zeros((q_TNH.shape[0], mixer.N, mixer.Hv))


def _attend(q_TNH: Tensor, view: KVView, spans: list[Span], mixer: Attention, sinks_N: Tensor | None) -> Tensor:
    """The same for sequences that are computed together, whose queries are all that `q_TNH` has."""
    k_SKH, v_SKH, rows = pack(view, spans)
    first = spans[0].query_start
    own = spans if first == 0 else [replace(span, query_start=span.query_start - first) for span in spans]
    layout = lay_out(q_TNH, k_SKH, rows, own, mixer)
    return flash(q_TNH, k_SKH, v_SKH, layout, mixer, sinks_N)


def flash(q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, layout: Layout, mixer: Attention, sinks_N: Tensor | None = None, tiles: dict[str, Tiles] | None = None):
    """The same for keys that lie together as `layout` says. `tiles` replaces the measured sizes phase by phase (the search for better ones)."""
    q_TNH, k_SKH, v_SKH = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_TNH, k_SKH, v_SKH))
    prepare()
    call = Call(layout=layout, mixer=mixer, tiles=tiles or {})
    with torch.cuda.device(q_TNH.device) if q_TNH.is_cuda else nullcontext():
        return _Flash.apply(q_TNH, k_SKH, v_SKH, sinks_N, call)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What forward and backward share: the step's layout, the mixer, and tile sizes that replace the measured ones."""

    layout: Layout
    mixer: Attention
    tiles: dict[str, Tiles]

    def tiles_for(self, phase: str, like: Tensor) -> Tiles:
        width = padded(max(self.mixer.H, self.mixer.Hv))
        return self.tiles.get(phase) or find_tiles(phase, width, like.dtype, like.device, block=self.layout.block)

    def numbers(self, tokens: int) -> tuple:
        """scale, cap, tokens, window, prefix, block: what every kernel takes as numbers."""
        mixer, pattern = self.mixer, self.mixer.pattern
        windows = [w for w in (mixer.window, pattern.window if isinstance(pattern, Sliding) else None) if w is not None]
        assert not (mixer.chunked and len(windows) > 1), "chunks under a sliding pattern are refused by spec.attention"
        prefix = pattern.length if isinstance(pattern, Prefix) else 0
        return mixer.softmax_scale, mixer.logit_softcap or 0.0, tokens, min(windows, default=0), prefix, self.layout.block

    def flags(self, tiles: Tiles, like: Tensor, *, tma: bool) -> dict[str, Any]:
        """What every kernel is compiled for."""
        mixer = self.mixer
        has_window = mixer.window is not None or isinstance(mixer.pattern, Sliding)
        return {
            "G": mixer.G,
            "H": mixer.H,
            "HV": mixer.Hv,
            "HP": padded(mixer.H),
            "HVP": padded(mixer.Hv),
            "M": tiles.M,
            "N": tiles.N,
            "WINDOW": 0 if not has_window else 2 if mixer.chunked else 1,
            "PREFIX": isinstance(mixer.pattern, Prefix),
            "LISTED": self.layout.block > 0,
            "SOFTCAP": mixer.logit_softcap is not None,
            "TMA": tma,
            "PRECISION": "ieee" if like.dtype == torch.float32 else "tf32",
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }

    def lists(self, found: Lists | None) -> tuple[Tensor, Tensor]:
        """Rows and items of a list; where there is none, something to point at."""
        return (self.layout.segments_B8, self.layout.segments_B8) if found is None else (found.starts, found.items)

    def query_tiles(self, M: int) -> int:
        """Tiles of M positions that the longest segment has: the first ones of a segment with a past hold no query and end at once."""
        return -(-self.layout.most_keys // M)


def padded(width: int) -> int:
    """The power of two that a head is padded to in registers."""
    return max(16, 1 << (width - 1).bit_length())


def boxed(x: Tensor, rows: int, use: bool) -> Any:
    """x as the kernels take it: a pointer, or a descriptor of its rows whose box is a tile."""
    if not use:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    flat = x.as_strided((x.shape[0], x.shape[1] * x.shape[2]), (x.stride(0), 1))
    return TensorDescriptor.from_tensor(flat, [rows, x.shape[2]])


def can_box(*tensors: Tensor) -> bool:
    """Whether descriptors can hold them: heads side by side and of a padded width, rows at multiples of 16 bytes."""
    return all(x.stride(1) == x.shape[2] == padded(x.shape[2]) and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 for x in tensors)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, sinks_N: Tensor | None, call: Call) -> Tensor:
        from tradespace.kernels.attention.triton_flash_forward import flash_forward

        mixer, layout, T = call.mixer, call.layout, q_TNH.shape[0]
        out_TNV = q_TNH.new_empty((T, mixer.N, mixer.Hv))
        lse_NT = torch.empty((mixer.N, T), dtype=torch.float32, device=q_TNH.device)
        tiles = call.tiles_for("forward", q_TNH)
        tma = tiles.tma and can_box(k_SKH, v_SKH)
        flash_forward[(call.query_tiles(tiles.M), mixer.N, layout.num_segments)](
            q_TNH,
            boxed(k_SKH, tiles.N, tma),
            boxed(v_SKH, tiles.N, tma),
            out_TNV,
            lse_NT,
            lse_NT if sinks_N is None else sinks_N,
            layout.segments_B8,
            *call.lists(layout.keys_of_queries),
            *call.numbers(T),
            *(stride for x in (q_TNH, k_SKH, v_SKH, out_TNV) for stride in x.stride()[:2]),
            **call.flags(tiles, q_TNH, tma=tma),
            **cast(dict[str, Any], {"SINKS": sinks_N is not None}),
        )
        ctx.save_for_backward(q_TNH, k_SKH, v_SKH, sinks_N, out_TNV, lse_NT)
        ctx.call = call
        return out_TNV

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from tradespace.kernels.attention.triton_flash_backward import flash_delta, flash_keys, flash_queries

        q_TNH, k_SKH, v_SKH, sinks_N, out_TNV, lse_NT = ctx.saved_tensors
        call: Call = ctx.call
        mixer, layout, T = call.mixer, call.layout, q_TNH.shape[0]
        dout_TNV = gradients[0] if gradients[0].stride(-1) == 1 else gradients[0].contiguous()
        delta_NT = torch.empty_like(lse_NT)
        with torch.cuda.device(q_TNH.device) if q_TNH.is_cuda else nullcontext():
            strides: list[Any] = [stride for x in (out_TNV, dout_TNV) for stride in x.stride()[:2]]
            rows: dict[str, Any] = {"HV": mixer.Hv, "HVP": padded(mixer.Hv), "M": 64}
            flash_delta[(-(-T // 64), mixer.N)](out_TNV, dout_TNV, delta_NT, T, *strides, **rows)
            held = [stride for x in (q_TNH, k_SKH, v_SKH, dout_TNV) for stride in x.stride()[:2]]

            # keys that no query of the step belongs to (another sequence's, in a packed view) get no gradient
            dk_SKH, dv_SKH = torch.zeros_like(k_SKH, memory_format=torch.contiguous_format), torch.zeros_like(v_SKH, memory_format=torch.contiguous_format)
            tiles = call.tiles_for("keys", q_TNH)
            tma = tiles.tma and can_box(q_TNH, dout_TNV)
            flash_keys[(-(-layout.most_keys // tiles.N), mixer.K, layout.num_segments)](
                boxed(q_TNH, tiles.M, tma),
                k_SKH,
                v_SKH,
                boxed(dout_TNV, tiles.M, tma),
                lse_NT,
                delta_NT,
                dk_SKH,
                dv_SKH,
                layout.segments_B8,
                *call.lists(layout.queries_of_keys),
                *call.numbers(T),
                *held,
                *dk_SKH.stride()[:2],
                *dv_SKH.stride()[:2],
                **call.flags(tiles, q_TNH, tma=tma),
            )
            dq_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
            tiles = call.tiles_for("queries", q_TNH)
            tma = tiles.tma and can_box(k_SKH, v_SKH)
            flash_queries[(call.query_tiles(tiles.M), mixer.N, layout.num_segments)](
                q_TNH,
                boxed(k_SKH, tiles.N, tma),
                boxed(v_SKH, tiles.N, tma),
                dout_TNV,
                lse_NT,
                delta_NT,
                dq_TNH,
                layout.segments_B8,
                *call.lists(layout.keys_of_queries),
                *call.numbers(T),
                *held,
                *dq_TNH.stride()[:2],
                **call.flags(tiles, q_TNH, tma=tma),
            )
        return dq_TNH, dk_SKH, dv_SKH, _sinks_gradient(sinks_N, lse_NT, delta_NT), None


def _sinks_gradient(sinks_N: Tensor | None, lse_NT: Tensor, delta_NT: Tensor) -> Tensor | None:
    """A sink's weight pulls on nothing: its gradient is minus its share of every row's delta."""
    if sinks_N is None:
        return None
    weights_NT = torch.exp2(sinks_N.float()[:, None] * 1.4426950408889634 - lse_NT)
    return -(weights_NT * delta_NT).sum(dim=-1).to(sinks_N.dtype)
