"""A driver of ragged steps for recorded models, as `model.family_models.Stepper` is for modules."""

from __future__ import annotations

import torch
from torch import Tensor

from tradespace.kernels.view import Span, StepBatch, positions_of
from tradespace.kv.cache import KVCache
from tradespace.model.recorded import Recorded
from tradespace.model.transformer import Transformer
from tradespace.spec.kv import KVPlan
from tradespace.spec.native import block_slots

# what values hold that nobody wrote: no number, where there is such a code
NOISE = {torch.float32: torch.nan, torch.float16: torch.nan, torch.bfloat16: torch.nan, torch.int8: -9, torch.uint8: 249}


class RecordedStepper:
    """Sequences in a tiled cache, advanced by ragged steps of any number of tokens each."""

    def __init__(
        self, model: Transformer, count: int, layout: str = "paged", *, block_size: int = 16, store: str = "fp32", threads: int = 2, step_tokens: int = 256
    ):
        self.lengths = [0] * count
        context = model.max_context
        plan = KVPlan(layout=layout, block_size=block_size, store=store)
        self.block_size = block_slots(plan, context)
        per_sequence = -(-context // self.block_size)
        self.cache = KVCache(model.spec, plan, num_blocks=count * per_sequence, block_size=self.block_size, dtype=model.dtype, order="tiles")
        # what lies in blocks that nobody wrote must not matter
        for index in model.spec.attention_layers:
            held = self.cache.tiled_planes(index)
            held.keys.fill_(7)
            held.values.fill_(NOISE[held.values.dtype])
            for scales in (held.key_scales, held.value_scales):
                if scales is not None:
                    scales.fill_(torch.nan)
        self.blocks = [tuple(range(i, count * per_sequence, count)) for i in range(count)]
        self.model = Recorded(model, step_tokens=step_tokens, logit_rows=step_tokens, threads=threads)
        self.model.record(self.cache)

    @torch.inference_mode()
    def step(self, chunks: dict[int, Tensor]) -> dict[int, Tensor]:
        """Feeds each named sequence its next tokens; returns the logits of all of them."""
        spans, start = [], 0
        for sequence, tokens_T in chunks.items():
            self.lengths[sequence] += len(tokens_T)
            used = -(-self.lengths[sequence] // self.block_size)
            spans.append(Span(start, len(tokens_T), self.lengths[sequence], self.blocks[sequence][:used]))
            start += len(tokens_T)
        batch = StepBatch.from_spans(spans, block_size=self.block_size)
        hidden_TD = self.model.forward(torch.cat(list(chunks.values())), positions_of(spans), batch)
        parts = self.model.logits(hidden_TD).clone().split([len(tokens_T) for tokens_T in chunks.values()])
        return dict(zip(chunks, parts, strict=True))
