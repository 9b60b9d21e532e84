"""The KV cache: retention, layout and store composed, one by one from the plan, into the KVView that kernels see. All of it is allocated at construction.

One plane of keys (slots, K, H) and one of values (slots, K, Hv) per attention layer, slots = num_blocks · block_size. Which blocks belong to whom is the
business of the engine's allocator: the cache reads block tables and slots from the step. Forgetting tokens (a rejected draft, an end) needs nothing here:
what lies beyond a sequence's length is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tradespace.errors import EngineError, InputError, UnsupportedError
from tradespace.kernels.view import Span, StepBatch
from tradespace.kv.layout.contiguous import Contiguous
from tradespace.kv.layout.paged import Paged
from tradespace.kv.retain.full import Full
from tradespace.kv.store.dense import Dense
from tradespace.spec.kv import KVPlan
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec
from tradespace.spec.native import LANES

RETAIN = {"full": Full}
LAYOUTS = {"contiguous": Contiguous, "paged": Paged}
STORES = {"fp32": Dense(torch.float32), "bf16": Dense(torch.bfloat16), "fp16": Dense(torch.float16)}


class KVCache:
    """`num_blocks` blocks of `block_size` token slots in every attention layer; `dtype` is the activations', in which keys and values are read.

    Paged: block_size is the plan's. Contiguous: block_size is the longest sequence, num_blocks the number of sequences.
    order "slots": token after token, (slots, K, H), as torch's kernels read it. "tiles": the same bytes, within a block by head, keys in tiles of 16 tokens,
    as the native kernels read it; they read and write the planes themselves.
    """

    def __init__(
        self,
        model: ModelSpec,
        plan: KVPlan,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        order: Literal["slots", "tiles"] = "slots",
    ):
        if plan.runs_since is None:
            raise UnsupportedError(
                f"KV cache {plan.describe()} is priced but has no implementation yet. Runs: {', '.join(RETAIN)} × {', '.join(LAYOUTS)} × {', '.join(STORES)}"
            )
        if num_blocks < 1 or block_size < 1:
            raise InputError(f"a KV cache needs at least one block of one token; got {num_blocks} blocks of {block_size}")
        if plan.layout == "paged" and block_size != plan.block_size:
            raise InputError(f"the plan pages by {plan.block_size} tokens, the cache was asked for blocks of {block_size}")
        if order == "tiles" and block_size % LANES:
            raise UnsupportedError(f"native kernels read keys in tiles of {LANES}: a block of {block_size} tokens is no multiple of that")
        self.order = order
        self.plan, self.num_blocks, self.block_size, self.dtype, self.device = plan, num_blocks, block_size, dtype, torch.device(device)
        self._retain, self._layout, self._store = RETAIN[plan.retain.kind](), LAYOUTS[plan.layout](), STORES[plan.store]
        self._planes: dict[int, tuple[Tensor, Tensor]] = {}
        for index in model.attention_layers:
            mixer = model.layers[index].mixer
            if not isinstance(mixer, Attention):
                raise UnsupportedError(f"layer {index} of {model.name} caches a {type(mixer).__name__}, which the KV cache cannot hold")
            slots = num_blocks * block_size
            k_SKH = self._store.allocate(slots, mixer.K, mixer.H, device)
            v_SKH = self._store.allocate(slots, mixer.K, mixer.Hv, device)
            self._planes[index] = (k_SKH, v_SKH)

    @property
    def nbytes(self) -> int:
        """Bytes of all planes: slots · spec.kv.token_bytes."""
        return sum(plane.nbytes for planes in self._planes.values() for plane in planes)

    def view(self, layer: int) -> LayerView:
        """Layer `layer`'s KVView; KeyError for a layer without attention."""
        # made anew each time: views that the cache kept would make a cycle, and the planes would live on until some collection finds it
        return LayerView(self, *self._planes[layer])

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies block src to block dst for every (src, dst), in every layer, as if all at once: what copy-on-write needs."""
        if not pairs:
            return
        sources, targets = (torch.tensor(ids, device=self.device) for ids in zip(*pairs, strict=True))
        for planes in self._planes.values():
            for plane in planes:
                blocks = plane.view(self.num_blocks, -1)
                blocks.index_copy_(0, targets, blocks.index_select(0, sources))

    def locate(self, spans: Sequence[Span], starts: Sequence[int], width: int) -> Tensor | slice:
        """Plane rows of positions starts[i] … starts[i] + width - 1 of each span, one after the other; past a sequence's end its last row repeats."""
        ends = [self._retain.kept(span.length) for span in spans]
        if len(spans) == 1 and starts[0] + width <= ends[0]:
            rows = self._layout.rows(spans[0].blocks, starts[0], starts[0] + width, self.block_size)
        else:
            tables = [span.blocks for span in spans]
            rows = self._layout.rows_of_many(tables, starts, [end - 1 for end in ends], width, self.block_size)
        return rows if isinstance(rows, slice) else rows.to(self.device)


@dataclass(frozen=True, slots=True)
class LayerView:
    """One layer of the cache (a KVView, and a GatherView for kernels that take many sequences at once)."""

    cache: KVCache
    k_SKH: Tensor
    v_SKH: Tensor

    def write(self, k_TKH: Tensor, v_TKH: Tensor, batch: StepBatch) -> None:
        """Puts the step's T keys and values into `batch.slots_T`."""
        self._by_slots()
        store = self.cache._store
        store.write(self.k_SKH, batch.slots_T, k_TKH)
        store.write(self.v_SKH, batch.slots_T, v_TKH)

    def read(self, span: Span) -> tuple[Tensor, Tensor]:
        """The sequence's keys (S, K, H) and values (S, K, Hv): views where it lies in one piece and needs no cast."""
        return self.gather(self.cache.locate((span,), (0,), self.cache._retain.kept(span.length)))

    def locate(self, spans: Sequence[Span], starts: Sequence[int], width: int) -> Tensor | slice:
        return self.cache.locate(spans, starts, width)

    def gather(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Keys and values of the plane rows that `locate` named."""
        self._by_slots()
        store, dtype = self.cache._store, self.cache.dtype
        return store.read(self.k_SKH, rows, dtype), store.read(self.v_SKH, rows, dtype)

    def _by_slots(self) -> None:
        if self.cache.order != "slots":
            raise EngineError("this cache lies in the native kernels' tiles: only a recorded step reads and writes it")
