"""A model's step for the CUDA kernels: fused Triton kernels over buffers that are allocated here once, ready to be captured as graphs.

Few tokens (up to 64) meet packed weights in registers, with norms, residuals and gated activations inside the products (`kernels/linear/triton_rows.py`):
five kernels a layer beside attention. Many tokens go to tensor cores through torch's own products, norms and activations being kernels of their own; up to 384
of them meet codes in registers, too, 128 at a time.
Offers nothing of its own about scheduling: `engine/device_runner.py` fills the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tradespace.errors import EngineError, UnsupportedError
from tradespace.formats.cuda import CudaWeight
from tradespace.kernels.activation import ACTIVATIONS, SOFTCAPS
from tradespace.kernels.activation.triton_gated import gated
from tradespace.kernels.attention.one_query import one_query
from tradespace.kernels.attention.one_query import takes as one_query_takes
from tradespace.kernels.attention.paged import DecodeScratch, Planes, paged_decode, paged_prefill
from tradespace.kernels.attention.whole_prompts import fused_prefill, prefill
from tradespace.kernels.linear.large import large_linear, quantized_linear
from tradespace.kernels.linear.packed import PackedWeight
from tradespace.kernels.linear.stream_row import fits as streams
from tradespace.kernels.linear.triton_codes import quantize_rows
from tradespace.kernels.linear.triton_rows import NextNorm, rows_linear
from tradespace.kernels.norm.triton_add_norm import add_norm
from tradespace.kernels.rope.triton_write import rope_write
from tradespace.kv.cache import KVCache
from tradespace.model.feed_forward import FeedForward
from tradespace.model.layer import AttentionMixer, Layer
from tradespace.model.parts import Norm
from tradespace.model.transformer import Transformer
from tradespace.spec import cuda
from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN

Last = tuple[Tensor, Tensor | None]  # the stream under the last norm, and the sums of squares that complete it where the norm is in the head's product
EIGHT_BIT = ("w8a8", "f8a8")  # kinds whose products take 8-bit activations


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a step of T tokens of B sequences reads on the device: ids, positions and slots int64 (slot -1: a row of padding), the rest int32; `rows_R` int64,
    the rows that logits are wanted of. The first `singles` sequences bring one token each. `fresh`: the lengths of the others where the step holds all of
    their tokens and a library knows their shapes; else empty. `within`: no sequence is longer than that (0: than the plan says).
    """

    tokens_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    starts_B1: Tensor
    lengths_B: Tensor
    tables_BM: Tensor
    rows_R: Tensor
    singles: int = 0
    fresh: tuple[int, ...] = ()
    within: int = 0


@dataclass(frozen=True, slots=True)
class Half:
    """One layer's matrices and norms as the step uses them; `next_norm` follows the feed-forward: the next layer's, or the last."""

    mixer: Attention
    ffn: DenseFFN
    attn: AttentionMixer
    qkv: CudaWeight
    out: CudaWeight
    wide: CudaWeight
    down: CudaWeight
    attn_post: Norm | None
    ffn_norm: Norm
    ffn_post: Norm | None
    next_norm: Norm
    scale: float


class DeviceStep:
    """The step of `transformer` for at most `step_tokens` tokens of `max_sequences` sequences, `logit_rows` of which get logits. `bind` a cache first."""

    def __init__(self, transformer: Transformer, *, step_tokens: int, logit_rows: int, max_sequences: int, max_context: int):
        spec = transformer.spec
        self.spec, self.transformer = spec, transformer
        assert isinstance(transformer.embed, CudaWeight), "a CUDA plan holds every matrix packed"
        self.device, self.dtype = transformer.embed.packed.codes.device, transformer.dtype
        self.step_tokens, self.logit_rows, self.max_sequences, self.max_context = step_tokens, logit_rows, max_sequences, max_context
        self.halves = halves_of(transformer)
        head = transformer.embed if transformer.lm_head is None else transformer.lm_head
        assert isinstance(head, CudaWeight), "a CUDA plan holds every matrix packed"
        self.head = head
        weights = [module for module in transformer.modules() if isinstance(module, CudaWeight)]
        widths = cuda.buffers(spec, {weight.format_name for weight in weights})
        self.scratch = next(weight.scratch for weight in weights if weight.scratch is not None)
        self.room = transformer.workspace.flat if transformer.workspace is not None else self.scratch.partial
        # fused: norms inside the products of few rows, which an RMS norm without bias before plain gated halves allows
        self.fused = spec.norm == "rms" and all(
            half.ffn.gated and half.attn_post is half.ffn_post is None and half.scale == 1.0 and half.ffn_norm.bias is None for half in self.halves
        )
        self.pdl = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (9, 0)
        # all of a step of one row as streams or none: among others they lie unevenly over the processors, and the step takes longer than with none
        self.streamed = self.pdl and self.fused and self.dtype == torch.bfloat16 and all(map(_streams, self.halves))
        D = spec.D

        def room(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.h_TD, self.x_TD, self.y_TD = (room(step_tokens, D) for _ in range(3))
        self.wide, self.mixed = room(step_tokens * widths.wide), room(step_tokens * widths.mixed)
        self.codes = room(step_tokens * widths.codes, dtype=torch.uint8)
        self.code_scales_T = room(step_tokens if widths.codes else 0, dtype=torch.float32)
        self.k_TKH = room(step_tokens * max(half.mixer.K * half.mixer.H for half in self.halves))
        self.squares = room(cuda.FEW_ROWS, cuda.squares_tiles(D), dtype=torch.float32)
        self.rows_RD, self.logits_RV = room(logit_rows, D), room(logit_rows, spec.V, dtype=torch.float32)
        self.splits = {rows: self._splits(rows) for rows in cuda.graph_rows(max_sequences)}
        most = max(rows * splits for rows, splits in self.splits.items())
        mixers = [half.mixer for half in self.halves]
        self.attention = DecodeScratch(self.device, most, max(m.N for m in mixers), max(m.Hv for m in mixers), 1)
        self.planes: tuple[Planes, ...] = ()
        self.last: Last = (self.x_TD[:0], None)  # of the last step, for `logits_of`: who replays a captured one sets it to what that leaves
        self._cap = SOFTCAPS["torch"]

    def _splits(self, rows: int) -> int:
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count if self.device.type == "cuda" else 4
        return cuda.decode_splits(rows, min(half.mixer.K for half in self.halves), self.max_context, processors)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers: `spec.cuda.Buffers.nbytes` and `spec.cuda.attention_scratch_bytes`; the weights' scratch and workspace are theirs."""
        held = (self.h_TD, self.x_TD, self.y_TD, self.k_TKH, self.wide, self.mixed, self.codes, self.code_scales_T, self.squares, self.rows_RD, self.logits_RV)
        return sum(tensor.nbytes for tensor in held) + self.attention.nbytes

    def bind(self, cache: KVCache) -> None:
        """The planes that steps read and write from now on. Raises UnsupportedError for a cache or a model that the kernels cannot compute."""
        if reason := cuda.refusal(self.spec, cache.plan):
            raise UnsupportedError(reason)
        found = []
        for index in range(self.spec.L):
            keys, values, key_scales, value_scales = cache.slot_planes(index)
            found.append(
                Planes(keys=keys, values=values, key_scales=key_scales, value_scales=value_scales, store=cache.plan.store, block_size=cache.block_size)
            )
        self.planes = tuple(found)

    # ------------------------------------------------------------------------------------------------ a step

    def run(self, inputs: Inputs, *, decodes: bool) -> Tensor:
        """logits_RV in fp32 of `inputs.rows_R` (all rows where `decodes`: every sequence brings one token), valid until the next step."""
        T, R = len(inputs.tokens_T), len(inputs.rows_R)
        if self.step_tokens < T or self.logit_rows < R:
            raise EngineError(f"a step of {T} tokens and {R} rows of logits; the buffers hold {self.step_tokens} and {self.logit_rows}")
        h_TD, x_TD = self._embed(inputs), self.x_TD[:T]
        few = self.fused and T <= cuda.FEW_ROWS
        squares = self._few(h_TD, x_TD, inputs, decodes=decodes) if few else None
        if not few:
            self._many(h_TD, x_TD, inputs, decodes=decodes)
        self.last = x_TD, squares
        return self._head(x_TD, squares) if decodes else self.logits_of(inputs.rows_R)

    def logits_of(self, rows_R: Tensor) -> Tensor:
        """logits_RV in fp32 of these rows (int64 indices) of the last step, in the step's own buffer: valid until the next call."""
        (x_TD, squares), R = self.last, len(rows_R)
        if R == 0:
            return self.logits_RV[:0]
        torch.index_select(x_TD, 0, rows_R, out=self.rows_RD[:R])
        return self._head(self.rows_RD[:R], None if squares is None else squares.index_select(0, rows_R))

    def _takes_one_query(self, index: int, half: Half, context: int) -> bool:
        attn = half.attn
        return (
            self.pdl
            and self.dtype == torch.bfloat16
            and one_query_takes(half.mixer, self.planes[index], context, norms=attn.q_norm is not None, sinks=attn.sinks is not None)
        )

    @property
    def short_context(self) -> int:
        """Tokens up to which a step of one sequence alone is worth a graph of its own; 0: none is."""
        short = cuda.one_query_context(self.spec)
        if self.max_context <= short or not any(self._takes_one_query(index, half, short) for index, half in enumerate(self.halves)):
            return 0
        return short

    def _embed(self, inputs: Inputs) -> Tensor:
        model, h_TD = self.transformer, self.h_TD[: len(inputs.tokens_T)]
        h_TD.copy_(model.embed.rows(inputs.tokens_T))
        if model.embed_scale != 1.0:
            h_TD.mul_(model.embed_scale)
        if model.positions is not None:
            h_TD.add_(model.positions.rows(inputs.positions_T + self.spec.position_offset))
        first = self.transformer.layers[0].attn_norm
        assert isinstance(first, Norm), "refusal() comes first"
        self._norm(first, h_TD, self.x_TD[: len(h_TD)])
        return h_TD

    def _norm(self, norm: Norm, x_TD: Tensor, out_TD: Tensor, residual_TD: Tensor | None = None) -> None:
        kind = "layer" if norm.kind == "layer" else "rms"
        add_norm(x_TD, norm.weight, norm.bias, norm.eps, kind, out_TD=out_TD, residual_TD=residual_TD, pdl=self.pdl)

    def _few(self, h_TD: Tensor, x_TD: Tensor, inputs: Inputs, *, decodes: bool) -> Tensor:
        """All layers for up to 64 tokens. x_TD becomes the last norm's weight times the stream; returns the sums of squares that complete the norm."""
        T, squares = len(h_TD), None
        own = self.squares[:T] if T > 1 else self.squares[:2].view(1, -1)  # of one row two sums a block
        for index, half in enumerate(self.halves):
            qkv_TR = self._view(self.wide, T, half.qkv.shape[0])
            self._few_product(half.qkv, x_TD, qkv_TR, squares=squares)
            mixed_TR = self._mix(index, half, qkv_TR, inputs, decodes=decodes)
            after = NextNorm(weight_R=half.ffn_norm.weight, x_TR=x_TD, squares_TS=own)
            self._few_product(half.out, mixed_TR, h_TD, residual=h_TD, next_norm=after)
            act_TF = self._view(self.mixed, T, half.ffn.F)
            self._few_product(half.wide, x_TD, act_TF, squares=own, activation=half.ffn.activation)
            after = NextNorm(weight_R=half.next_norm.weight, x_TR=x_TD, squares_TS=own)
            self._few_product(half.down, act_TF, h_TD, residual=h_TD, next_norm=after)
            squares = own
        return own

    def _many(self, h_TD: Tensor, x_TD: Tensor, inputs: Inputs, *, decodes: bool) -> None:
        """All layers; x_TD becomes the stream under the last norm."""
        T = len(h_TD)
        for index, half in enumerate(self.halves):
            qkv_TR = self._view(self.wide, T, half.qkv.shape[0])
            self._product(half.qkv, x_TD, qkv_TR)
            mixed_TR = self._mix(index, half, qkv_TR, inputs, decodes=decodes)
            self._join(half, half.out, mixed_TR, half.attn_post, half.ffn_norm, h_TD, x_TD)
            wide_TR, act_TF = self._view(self.wide, T, half.wide.shape[0]), self._view(self.mixed, T, half.ffn.F)
            self._product(half.wide, x_TD, wide_TR)
            if half.ffn.gated:
                gated(wide_TR, half.ffn.activation, act_TF)
            else:
                act_TF.copy_(ACTIVATIONS["torch"](wide_TR, half.ffn.activation, False))
            self._join(half, half.down, act_TF, half.ffn_post, half.next_norm, h_TD, x_TD)

    def _join(self, half: Half, weight: CudaWeight, from_TC: Tensor, post: Norm | None, following: Norm, h_TD: Tensor, x_TD: Tensor) -> None:
        """h += scale · post(from @ W.T); x = following(h)."""
        if post is None and half.scale == 1.0 and weight.bias is None and weight.packed.layout.kind == "bf16" and len(h_TD) > cuda.FEW_ROWS:
            h_TD.addmm_(from_TC, weight.packed.codes.T)  # the sum in the product's own end: h is read and written once less
            self._norm(following, h_TD, x_TD)
            return
        y_TD = self.y_TD[: len(h_TD)]
        self._product(weight, from_TC, y_TD)
        if post is not None:
            self._norm(post, y_TD, y_TD)
        if half.scale != 1.0:
            y_TD.mul_(half.scale)
        self._norm(following, y_TD, x_TD, h_TD)

    def _mix(self, index: int, half: Half, qkv_TR: Tensor, inputs: Inputs, *, decodes: bool) -> Tensor:
        """Queries rotated, keys and values into the cache, attention: (T, N · Hv)."""
        T, a, attn = len(qkv_TR), half.mixer, half.attn
        q_TNH = self.mixed[: T * a.N * a.H].view(T, a.N, a.H)
        out_TNH = self.mixed[T * a.N * a.H : T * a.N * (a.H + a.Hv)].view(T, a.N, a.Hv)
        table = None if attn.rope_table is None else attn.rope_table.table_SH2
        norms = {}
        if attn.q_norm is not None and attn.k_norm is not None:
            norms = {"q_norm_H": attn.q_norm.weight, "k_norm_H": attn.k_norm.weight, "eps": attn.q_norm.eps}
        planes = self.planes[index]
        context = min(self.max_context, inputs.within or self.max_context)
        if decodes and T == 1 and self._takes_one_query(index, half, context):
            rotated = qkv_TR, table, inputs.positions_T, inputs.slots_T
            one_query(*rotated, planes, inputs.tables_BM, inputs.lengths_B, a, out_TNH, context=context, early=self.streamed)
            return out_TNH.view(T, a.N * a.Hv)
        whole = self.device.type == "cuda" and fused_prefill(a, inputs.fresh, attn.sinks)
        k_TKH = self.k_TKH[: T * a.K * a.H].view(T, a.K, a.H) if whole else None
        rope_write(qkv_TR, table, inputs.positions_T, inputs.slots_T, planes, q_TNH, a, k_out_TKH=k_TKH, **norms, pdl=self.pdl)
        first = T if decodes else inputs.singles
        if first:
            splits = self.splits[next(rows for rows in self.splits if rows >= first)]
            paged_decode(
                *(q_TNH[:first], planes, inputs.tables_BM[:first], inputs.lengths_B[:first], a, self.attention, out_TNH[:first]),
                splits=splits,
                sinks_N=attn.sinks,
                pdl=self.pdl,
            )
        if k_TKH is not None:
            v_TKH = qkv_TR[:, (a.N + a.K) * a.H :].view(T, a.K, a.Hv)
            found_TNHv = prefill(q_TNH[first:], k_TKH[first:], v_TKH[first:], inputs.fresh, a, out_TNH[first:])
            if first == 0:
                return found_TNHv.view(T, a.N * a.Hv)
        elif first < T:
            rest = inputs.tables_BM[first:], inputs.starts_B1[first:], inputs.lengths_B[first:]
            paged_prefill(q_TNH, planes, *rest, a, out_TNH, sinks_N=attn.sinks)
        return out_TNH.view(T, a.N * a.Hv)

    # ------------------------------------------------------------------------------------------------ products

    @staticmethod
    def _view(buffer: Tensor, rows: int, width: int) -> Tensor:
        return buffer[: rows * width].view(rows, width)

    def _coded(self, packed: PackedWeight, x_TC: Tensor) -> tuple[Tensor, Tensor | None]:
        """The activations as the weight's products take them: 8-bit codes and a scale per token, or as they are."""
        if packed.layout.kind not in EIGHT_BIT:
            return x_TC, None
        T, C = x_TC.shape
        codes_TC, scale_T = self.codes[: T * C].view(T, C).view(packed.codes.dtype), self.code_scales_T[:T]
        quantize_rows(x_TC, codes_TC, scale_T, pdl=self.pdl)
        return codes_TC, scale_T

    def _few_product(
        self,
        weight: CudaWeight,
        x_TC: Tensor,
        out_TR: Tensor,
        *,
        squares: Tensor | None = None,
        residual: Tensor | None = None,
        next_norm: NextNorm | None = None,
        activation: str | None = None,
    ) -> None:
        codes_TC, scale_T = self._coded(weight.packed, x_TC)
        rows_linear(
            codes_TC,
            weight.packed,
            self.scratch,
            x_scale_T=scale_T,
            out_TR=out_TR,
            bias_R=weight.bias,
            residual_TR=residual,
            gated=activation,
            squares_TS=squares,
            eps=self.spec.norm_eps,
            next_norm=next_norm,
            streamed=self.streamed,
            pdl=self.pdl,
        )

    def _product(self, weight: CudaWeight, x_TC: Tensor, out_TR: Tensor) -> None:
        if len(x_TC) <= (cuda.FEW_ROWS if weight.packed.layout.plain else cuda.CODED_ROWS):
            for start in range(0, len(x_TC), cuda.CODED_PASS):
                part = slice(start, start + cuda.CODED_PASS)
                self._few_product(weight, x_TC[part], out_TR[part])
            return
        codes_TC, scale_T = self._coded(weight.packed, x_TC)
        if scale_T is None:
            large_linear(x_TC, weight.packed, self.room, weight.bias, out_TR)
        else:
            quantized_linear(codes_TC, scale_T, weight.packed, out_TR, weight.bias)

    def _head(self, x_RD: Tensor, squares: Tensor | None) -> Tensor:
        head, R, logits_RV = self.head, len(x_RD), self.logits_RV[: len(x_RD)]
        if R > cuda.FEW_ROWS and head.packed.layout.kind == "bf16" and self.device.type == "cuda":
            torch.ops.aten.mm.dtype_out(x_RD, head.packed.codes.T, torch.float32, out=logits_RV)
        else:
            most = cuda.FEW_ROWS if head.packed.layout.plain else cuda.CODED_PASS
            for start in range(0, R, most):
                part = slice(start, min(start + most, R))
                self._few_product(head, x_RD[part], logits_RV[part], squares=None if squares is None else squares[part])
        if self.spec.logit_scale != 1.0:
            logits_RV.mul_(self.spec.logit_scale)
        if self.spec.logit_softcap is not None:
            logits_RV.copy_(self._cap(logits_RV, self.spec.logit_softcap))
        return logits_RV


def _streams(half: Half) -> bool:
    matrices = ((half.qkv, None), (half.out, None), (half.wide, half.ffn.activation), (half.down, None))
    return all(streams(weight.packed, gated=gated) and (weight.bias is None or weight.bias.dtype == torch.bfloat16) for weight, gated in matrices)


def halves_of(transformer: Transformer) -> tuple[Half, ...]:
    """The layers as the step uses them. `spec.cuda.refusal` comes first."""
    found, layers = [], list(transformer.layers)
    for index, layer in enumerate(layers):
        spec = transformer.spec.layers[index]
        following = layers[index + 1].attn_norm if index + 1 < len(layers) else transformer.final_norm
        assert isinstance(layer, Layer), f"layer {index} is wrapped: the CUDA step takes plain layers"
        attn, ffn = layer.attn, layer.ffn
        assert attn is not None and isinstance(ffn, FeedForward) and isinstance(spec.mixer, Attention) and isinstance(spec.ffn, DenseFFN)
        matrices = (attn.qkv, attn.out, getattr(ffn, ffn.wide), ffn.down)
        assert all(isinstance(matrix, CudaWeight) for matrix in matrices), "a CUDA plan holds every matrix packed"
        if not isinstance(layer.ffn_norm, Norm) or not isinstance(following, Norm):
            raise UnsupportedError(f"{transformer.spec.name}: the CUDA step needs a norm before each half and after the last layer")
        qkv, out, wide, down = matrices
        found.append(
            Half(
                mixer=spec.mixer,
                ffn=spec.ffn,
                attn=attn,
                qkv=qkv,  # pyright: ignore[reportArgumentType]
                out=out,  # pyright: ignore[reportArgumentType]
                wide=wide,
                down=down,  # pyright: ignore[reportArgumentType]
                attn_post=layer.attn_post_norm,
                ffn_norm=layer.ffn_norm,
                ffn_post=layer.ffn_post_norm,
                next_norm=following,
                scale=layer.residual_scale,
            )
        )
    return tuple(found)
