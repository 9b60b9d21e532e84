"""A model's step for the native CPU kernels, recorded once: a list of operations over buffers that are allocated here, and no Python between layers.

Built from a filled `Transformer` whose weights are packed (`formats.native`) and from its cache. Offers what the engine's runner asks of a model. All
arithmetic between products is fp32, and a token's result does not depend on what else is in the step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tradespace.errors import EngineError, UnsupportedError
from tradespace.formats.native import FORMS, NativeWeight, OperandBuffers
from tradespace.kernels.native import load
from tradespace.kernels.native import program as ops
from tradespace.kernels.native.library import Cache, Matrix, Step
from tradespace.kernels.native.program import Buffer, Program
from tradespace.kernels.view import StepBatch
from tradespace.kv.cache import KVCache
from tradespace.model.decode_frame import DecodeFrame
from tradespace.model.feed_forward import FeedForward
from tradespace.model.layer import AttentionMixer, Layer
from tradespace.model.parts import Norm
from tradespace.model.transformer import Transformer
from tradespace.spec import native
from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN
from tradespace.spec.native import LANES, SECTION


def _padded(vector: Tensor | None) -> Tensor | None:
    """fp32, up to whole registers with zeros; the tensor itself where it is so already."""
    if vector is None:
        return None
    return pad(vector.detach().float(), (0, -len(vector) % LANES)).contiguous()


class Recorded:
    """The step of `transformer` for at most `step_tokens` tokens, `logit_rows` of which get logits. `record` a cache before the first step."""

    def __init__(self, transformer: Transformer, *, step_tokens: int, logit_rows: int, threads: int):
        spec = transformer.spec
        self.spec, self.transformer, self.threads = spec, transformer, threads
        self.step_tokens, self.logit_rows = step_tokens, logit_rows
        self.library = load()
        self.widths = native.buffers(spec)
        formats = {name: module.form for name, module in transformer.named_modules() if isinstance(module, NativeWeight)}
        self._operand = OperandBuffers(max(step_tokens, logit_rows), self.widths.operand, set(formats.values()))
        # the last row is looked up in whole sections
        self.h = self._buffer(step_tokens, self.widths.stream, extra=SECTION)
        self.wide = self._buffer(step_tokens, self.widths.wide)
        self.mixed = self._buffer(step_tokens, self.widths.mixed)
        self.out = self._buffer(logit_rows, self.widths.logits)
        self.partials = torch.zeros(threads * native.SLOTS_PER_THREAD * native.partial_floats(native.value_width(spec)))
        self.scratch = torch.zeros(threads, self.widths.scratch)
        self.forget()

    def forget(self) -> None:
        """Lets go of the recorded operations, and with them of the cache that they point into."""
        self.body, self.head = Program(self.library), Program(self.library)

    def record(self, cache: KVCache) -> None:
        """Writes down the operations of a step over `cache`. Raises UnsupportedError for a cache or a model that the native kernels cannot compute."""
        if reason := native.refusal(self.spec, cache.plan):
            raise UnsupportedError(reason)
        self.forget()
        self._record_embedding()
        for index, layer in enumerate(self.transformer.layers):
            assert isinstance(layer, Layer), f"layer {index} is wrapped: the native step records plain layers"
            self._record_layer(layer, index, cache)
        self._record_logits()
        for op in (*self.body.ops, *self.head.ops):
            op.operand_rows = self._operand.tokens

    @staticmethod
    def _buffer(rows: int, width: int, extra: int = 0) -> Buffer:
        return Buffer(torch.zeros(rows * width + extra), width)

    @property
    def _buffers(self) -> tuple[Tensor, ...]:
        return (self.h.tensor, self.wide.tensor, self.mixed.tensor, self.out.tensor, self.partials, self.scratch, *self._operand.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers: `spec.native.Buffers.nbytes`."""
        return sum(tensor.nbytes for tensor in self._buffers)

    def touch(self) -> None:
        """Writes to every page of the buffers: the memory is then the process's, and counted."""
        for tensor in self._buffers:
            tensor.zero_()

    # ------------------------------------------------------------------------------------------------ recording

    def _norm_fields(self, norm: Norm | None, width: int) -> dict:
        if norm is None:
            return {"choice": ops.NORMS["none"], "width": width}
        weight, bias = _padded(norm.weight), _padded(norm.bias)
        return {"choice": ops.NORMS[norm.kind], "width": width, "weight": weight, "bias": bias, "eps": norm.eps}

    def _record_embedding(self) -> None:
        model, spec = self.transformer, self.spec
        embed = model.embed
        assert isinstance(embed, NativeWeight)
        fields = {"out": self.h, "width": spec.D, "matrix": embed.matrix(), "scale": model.embed_scale, "dims": spec.position_offset}
        if model.embed_norm is not None:
            fields |= self._norm_fields(model.embed_norm, spec.D) | {"flags": ops.NORM_FULL}
        if model.positions is not None:
            table = model.positions.dense_rows(0, model.positions.shape[0]).float().contiguous()
            self.body.keep.append(table)
            fields["positions"] = Matrix(table.data_ptr(), table.shape[0], table.shape[1], 0, 1, 0)
        self.body.keep.append(embed)
        self.body.add(ops.EMBED, **fields)

    def _norm_to_operand(self, norm: Norm | None, form: str, program: Program, flags: int = 0) -> None:
        program.add(ops.NORM, in_=self.h, form=FORMS[form], flags=flags, operand=self._operand.operand(), **self._norm_fields(norm, self.spec.D))

    def _product(self, weight: nn.Module, out: Buffer, program: Program, *, accumulate: bool = False, scale: float = 1.0, flags: int = 0) -> None:
        assert isinstance(weight, NativeWeight)
        program.keep.append(weight)
        flags |= ops.ACCUMULATE if accumulate else 0
        operand = self._operand.operand()
        program.add(
            ops.PRODUCT,
            matrix=weight.matrix(),
            operand=operand,
            form=FORMS[weight.form],
            out=out,
            bias=_padded(weight.bias),
            flags=flags,
            scale=scale,
        )

    def _record_mixer(self, mixer: AttentionMixer, index: int, cache: KVCache) -> None:
        """From the qkv product's result in `wide` to the heads' outputs in `mixed`."""
        a, transformer = mixer.mixer, self.transformer
        rope = transformer.layer_ropes[index]
        held = cache.tiled_planes(index)
        keys, values, *scales = (None if plane is None else plane.data_ptr() for plane in (held.keys, held.values, held.key_scales, held.value_scales))
        planes = Cache(keys, values, cache.block_size, ops.STORES[cache.plan.store], a.K, a.H, a.Hv, *scales)
        # a bf16 cache is multiplied as it lies where the machine can, unless activations are to be exact
        form = FORMS["fp32" if mixer.qkv.form == "fp32" else "bf16"]
        heads = {"in_": self.wide, "form": form, "heads": a.N, "kv_heads": a.K, "head_width": a.H, "value_width": a.Hv, "cache": planes}
        heads["scale"] = a.softmax_scale
        flags = 0
        if mixer.q_norm is not None and mixer.k_norm is not None:
            heads |= {"weight": _padded(mixer.q_norm.weight), "second": _padded(mixer.k_norm.weight), "eps": mixer.q_norm.eps}
            flags |= ops.NORM_FULL if len(mixer.q_norm.weight) != a.H else 0
        if rope is not None:
            heads |= {"table": transformer.rope_tables[rope].table_SH2, "dims": rope.dims}
            flags |= ops.INTERLEAVED if rope.interleaved else 0
        self.body.keep.append(held)
        self.body.add(ops.HEADS, **heads, flags=flags)
        self.body.add(
            ops.ATTEND,
            in_=self.wide,
            form=form,
            out=self.mixed,
            heads=a.N,
            cache=planes,
            weight=_padded(mixer.sinks),
            window=a.window or 0,
            chunked=int(a.chunked),
            softcap=a.logit_softcap or 0.0,
            partials=self.partials,
            slots=self.threads * native.SLOTS_PER_THREAD,
        )

    def _prepare(self, source: Buffer, width: int, form: str, activation: str = "identity", gated: bool = False) -> None:
        kind = ops.PREPARE if activation == "identity" else ops.ACTIVATE
        flags = ops.GATED if gated else 0
        self.body.add(kind, in_=source, width=width, form=FORMS[form], choice=ops.ACTIVATIONS[activation], flags=flags, operand=self._operand.operand())

    def _record_layer(self, layer: Layer, index: int, cache: KVCache) -> None:
        spec, ffn = self.spec.layers[index], layer.ffn
        mixer = layer.attn
        assert mixer is not None and isinstance(spec.mixer, Attention) and isinstance(ffn, FeedForward) and isinstance(spec.ffn, DenseFFN)
        wide, down, qkv, out = getattr(ffn, ffn.wide), ffn.down, mixer.qkv, mixer.out
        assert isinstance(wide, NativeWeight) and isinstance(down, NativeWeight), "native plans hold every matrix packed"
        assert isinstance(qkv, NativeWeight) and isinstance(out, NativeWeight), "native plans hold every matrix packed"
        parallel = layer.arrangement in ("parallel", "parallel2")
        heads_width = spec.mixer.N * spec.mixer.Hv

        self._norm_to_operand(layer.attn_norm, qkv.form, self.body)
        self._product(qkv, self.wide, self.body)
        self._record_mixer(mixer, index, cache)
        if parallel:
            # the feed-forward starts from the stream before attention is added: its wide product comes first, and takes the place that q, k and v had
            self._norm_to_operand(layer.attn_norm if layer.ffn_norm is None else layer.ffn_norm, wide.form, self.body)
            self._product(wide, self.wide, self.body)
        self._prepare(self.mixed, heads_width, out.form)
        self._add_product(out, layer.attn_post_norm, layer.residual_scale)
        if not parallel:
            self._norm_to_operand(layer.ffn_norm, wide.form, self.body)
            self._product(wide, self.wide, self.body)
        self._prepare(self.wide, spec.ffn.F, down.form, spec.ffn.activation, spec.ffn.gated)
        self._add_product(down, layer.ffn_post_norm, layer.residual_scale)

    def _add_product(self, weight: nn.Module, post_norm: Norm | None, scale: float) -> None:
        """h += scale · norm(operand @ W.T); without a norm in the product itself."""
        if post_norm is None:
            self._product(weight, self.h, self.body, accumulate=True, scale=scale)
            return
        self._product(weight, self.mixed, self.body)
        self.body.add(ops.NORM, in_=self.mixed, out=self.h, flags=ops.ADD, scale=scale, **self._norm_fields(post_norm, self.spec.D))

    def _record_logits(self) -> None:
        model, spec = self.transformer, self.spec
        head = model.embed if model.lm_head is None else model.lm_head
        assert isinstance(head, NativeWeight)
        self._norm_to_operand(model.final_norm, head.form, self.head, ops.ROWS)
        self._product(head, self.out, self.head, flags=ops.ROWS)
        if spec.logit_scale != 1.0 or spec.logit_softcap is not None:
            self.head.add(ops.FINISH_LOGITS, out=self.out, width=spec.V, scale=spec.logit_scale, softcap=spec.logit_softcap or 0.0, flags=ops.ROWS)

    # ------------------------------------------------------------------------------------------------ running

    def decode_frame(self, sequences: int, width: int) -> DecodeFrame:
        """For decode steps of at most `sequences` sequences of `width` blocks over the recorded cache; good until another is recorded."""
        return DecodeFrame(self, sequences, width)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, batch: StepBatch, cache: KVCache | None = None) -> Tensor:
        """hidden_TD in the step's own buffer: valid until the next call. The cache is the one that `record` was given."""
        T = len(tokens_T)
        if self.step_tokens < T:
            raise EngineError(f"a step of {T} tokens; it was recorded for at most {self.step_tokens}")
        if T:
            assert max(span.length for span in batch.spans) <= self.transformer.max_context, "a sequence longer than the context that the plan allows"
            step = Step(
                tokens_T.data_ptr(),
                positions_T.data_ptr(),
                batch.query_starts_B1.data_ptr(),
                batch.lengths_B.data_ptr(),
                batch.block_tables_BM.data_ptr(),
                None,
                T,
                len(batch.lengths_B),
                batch.block_tables_BM.shape[1],
                0,
            )
            self.body.run(step, self.scratch, self.threads)
        stride = self.h.stride
        return self.h.tensor[: T * stride].view(T, stride)[:, : self.spec.D]

    def logits(self, hidden_TD: Tensor, rows: Tensor | None = None) -> Tensor:
        """logits_RV in fp32 of these rows of the last step, in the step's own buffer: valid until the next call."""
        rows = torch.arange(len(hidden_TD)) if rows is None else rows.to(torch.int64).contiguous()
        R = len(rows)
        if self.logit_rows < R:
            raise EngineError(f"logits of {R} tokens; the step was recorded for at most {self.logit_rows}")
        if R:
            self.head.run(Step(rows=rows.data_ptr(), num_tokens=len(hidden_TD), num_rows=R), self.scratch, self.threads)
        return self.out.tensor[: R * self.out.stride].view(R, self.out.stride)[:, : self.spec.V]
