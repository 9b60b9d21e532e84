"""Keys and values that are not kept, rebuilt at every step: exact, and as dear as a prefill of all that is older than what the cache keeps.

One sequence at a time, layer by layer: a layer's keys and values of the older tokens go into scratch planes, block of rows after block of rows, each
attending to those before it, and the residual stream of the same rows is overwritten with the layer's output. Then the step's own tokens pass the layer, over
scratch, ring and themselves. What is there at most beside a step's own: `spec.kv_workspace.rebuild_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tradespace.errors import EngineError
from tradespace.kernels.view import Immediate, Span, StepBatch
from tradespace.kv.cache import KVCache
from tradespace.kv.retain.recent import Recent, RecentView
from tradespace.model.transformer import Transformer
from tradespace.spec.kv_workspace import REBUILD_ROWS
from tradespace.spec.mixers import Attention


@dataclass(frozen=True, slots=True)
class Scratch(Immediate):
    """One layer's keys and values of one sequence's older tokens: a KVView that is thrown away."""

    k_SKH: Tensor
    v_SKH: Tensor

    def write(self, k_TKH: Tensor, v_TKH: Tensor, batch: StepBatch) -> None:
        (span,) = batch.spans
        self.k_SKH[span.first_position : span.length], self.v_SKH[span.first_position : span.length] = k_TKH, v_TKH

    def read(self, span: Span) -> tuple[Tensor, Tensor]:
        return self.k_SKH[: span.length], self.v_SKH[: span.length]


class Rebuilding:
    """`transformer` over a cache whose retention rebuilds. Offers what the engine's runner asks of a model."""

    def __init__(self, transformer: Transformer):
        self.transformer, self.spec = transformer, transformer.spec

    def logits(self, hidden_TD: Tensor, rows: Tensor | None = None) -> Tensor:
        return self.transformer.logits(hidden_TD, rows)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, batch: StepBatch, cache: KVCache) -> Tensor:
        """hidden_TD of the step's tokens; see `Transformer.forward`."""
        retain, ids_BS = cache.retain, cache.ids_BS
        if not isinstance(retain, Recent) or ids_BS is None:
            raise EngineError(f"this cache keeps {cache.plan.retain.describe()}: there is nothing to rebuild")
        cache.check_rows(batch.spans)
        hidden = []
        for span in batch.spans:
            rows = slice(span.query_start, span.query_start + span.num_queries)
            if not span.num_queries:
                continue
            ids_BS[span.row, span.first_position : span.length] = tokens_T[rows].to(ids_BS.dtype)
            old_T = ids_BS[span.row, : retain.old(span.first_position)].long()
            hidden.append(self._sequence(old_T, tokens_T[rows], positions_T[rows], span, cache))
        return torch.cat(hidden) if hidden else self.transformer.embedded(tokens_T, positions_T)

    def _sequence(self, old_S: Tensor, tokens_T: Tensor, positions_T: Tensor, span: Span, cache: KVCache) -> Tensor:
        """One sequence's own tokens through all layers, its older ones `old_S` beside them."""
        model, S = self.transformer, len(old_S)
        own = StepBatch.from_spans([Span(0, span.num_queries, span.length, span.blocks, span.row)])
        h_TD, ropes_T = model.embedded(tokens_T, positions_T), model.rope_rows(positions_T)
        places_S = torch.arange(S, device=tokens_T.device)
        h_SD = model.embedded(old_S, places_S)
        last = max((index for index in range(model.spec.L) if isinstance(model.spec.layers[index].mixer, Attention)), default=-1)
        for index, layer in enumerate(model.layers):
            mixer, rope = model.spec.layers[index].mixer, model.layer_ropes[index]
            scratch = None
            if S and index <= last:  # beyond the last attention nobody asks for older tokens
                if isinstance(mixer, Attention):
                    scratch = Scratch(h_SD.new_empty((S, mixer.K, mixer.H)), h_SD.new_empty((S, mixer.K, mixer.Hv)))
                for start in range(0, S, REBUILD_ROWS):
                    part = slice(start, min(start + REBUILD_ROWS, S))
                    block = StepBatch.from_spans([Span(0, part.stop - start, part.stop)])
                    h_SD[part] = layer(h_SD[part], None if rope is None else model.rope_rows(places_S[part])[rope], block, scratch)
            view = None
            if isinstance(mixer, Attention):
                view = cache.view(index)
                assert isinstance(view, RecentView)
                if scratch is not None:
                    view.rebuilt(scratch.k_SKH, scratch.v_SKH)
            h_TD = layer(h_TD, None if rope is None else ropes_T[rope], own, view)
        return h_TD
