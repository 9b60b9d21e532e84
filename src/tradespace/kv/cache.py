"""The KV cache: retention, layout and store composed, one by one from the plan, into the KVView that kernels see. All of it is allocated at construction.

Planes per attention layer, slots = num_blocks · block_size rows each: of keys (slots, K, …) and of values, or of the layer's input; of positions and scores
where retention evicts. Which blocks belong to whom is the business of the engine's allocator: the cache reads block tables from the step. Beside them lies
what is no block's: one row a sequence of its tail, or of its token ids. Forgetting tokens (a rejected draft, an end) needs nothing here: what lies beyond a
sequence's length is never read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tradespace.errors import EngineError, InputError, UnsupportedError
from tradespace.kernels.view import Immediate, KVView, Span, StepBatch
from tradespace.kv.coded import CodedView, InputView
from tradespace.kv.held import Held, Input, Pair
from tradespace.kv.layout.contiguous import Contiguous
from tradespace.kv.layout.paged import Paged
from tradespace.kv.retain.evict import EvictingView
from tradespace.kv.retain.full import Full
from tradespace.kv.retain.h2o import H2O
from tradespace.kv.retain.recent import Recent, RecentView
from tradespace.kv.retain.sliding import Sliding, SlidingView
from tradespace.kv.retain.snapkv import SnapKV
from tradespace.kv.store.channels import Channels
from tradespace.kv.store.codec import Codec, zeros
from tradespace.kv.store.dense import Dense
from tradespace.kv.store.fp8 import Fp8
from tradespace.kv.store.grouped import Grouped
from tradespace.kv.store.int8 import Int8
from tradespace.kv.tails import Part, TailView
from tradespace.spec.kv import KVPlan, model_refusal
from tradespace.spec.kv_stores import STORES as STORE_SPECS
from tradespace.spec.kv_stores import Store
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec
from tradespace.spec.native import LANES, tiles_refusal

RETAIN = {"full": Full, "sliding": Sliding, "h2o": H2O, "snapkv": SnapKV, "recent": Recent}
LAYOUTS = {"contiguous": Contiguous, "paged": Paged}
# how vectors are held; a store of keys per channel holds its values by the codec here, and its keys by `Channels`
STORES: dict[str, Codec] = {
    "fp32": Dense(torch.float32),
    "bf16": Dense(torch.bfloat16),
    "fp16": Dense(torch.float16),
    "fp8": Fp8(),
    "int8": Int8(),
    "int4": Grouped(4, 32),
    "int4c": Grouped(4, 32),
    "int2": Grouped(2, 32),
    "int2-token": Grouped(2, 32),
    "int2-token-tail": Grouped(2, 32),
}
STORES |= {name: STORES[store.codec] for name, store in STORE_SPECS.items() if store.of_input}
TILED = "this cache lies in the native kernels' tiles: only a recorded step reads and writes it"


@dataclass(frozen=True, slots=True)
class Tiled:
    """One layer's planes in tiles, shaped as by slots: within a block of P tokens keys lie as (K, P/16, H, 16), values as (K, P, Hv), scales as (K, P).

    int8 alone has scales. bf16 lies in pairs: keys as (K, P/16, H/2, 16, 2), values as (K, P/2, Hv, 2).
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None


class KVCache:
    """`num_blocks` blocks of `block_size` token slots in every attention layer; `dtype` is the activations', in which keys and values are read.

    Paged: block_size is the plan's. Contiguous: block_size is the most that a sequence keeps, num_blocks the number of sequences.
    max_sequences, max_context: rows for what a sequence keeps beside its blocks (tails, token ids), and the length of its ids.
    order "slots": token after token, (slots, K, H), as torch's kernels read it. "tiles": the same bytes, within a block by head, keys in tiles of 16 tokens,
    scales as [head][token], as the native kernels read it; they read and write the planes themselves.
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
        max_sequences: int = 1,
        max_context: int | None = None,
    ):
        if plan.runs_since is None:
            raise UnsupportedError(
                f"KV cache {plan.describe()} is priced but has no implementation yet. Runs: {', '.join(RETAIN)} × {', '.join(LAYOUTS)} × {', '.join(STORES)}"
            )
        if reason := model_refusal(model, plan) or (tiles_refusal(model, plan) if order == "tiles" else None):
            raise UnsupportedError(reason)
        if num_blocks < 1 or block_size < 1:
            raise InputError(f"a KV cache needs at least one block of one token; got {num_blocks} blocks of {block_size}")
        if plan.layout == "paged" and block_size != plan.block_size:
            raise InputError(f"the plan pages by {plan.block_size} tokens, the cache was asked for blocks of {block_size}")
        if order == "tiles" and block_size % LANES:
            raise UnsupportedError(f"native kernels read keys in tiles of {LANES}: a block of {block_size} tokens is no multiple of that")
        tail = next((store for store in plan.stores if store.tail), None)
        if tail is not None and block_size % tail.tail_group:
            raise UnsupportedError(f"store {tail.name} codes {tail.tail_group} tokens together: a block of {block_size} is no multiple of that")
        self.order = order
        self.plan, self.num_blocks, self.block_size, self.dtype, self.device = plan, num_blocks, block_size, dtype, torch.device(device)
        self.max_sequences = max_sequences
        self.retain, self._layout = RETAIN[plan.retain.kind](plan.retain), LAYOUTS[plan.layout]()
        self._planes: dict[int, tuple[Tensor, ...]] = {}  # what blocks hold, per layer
        self._tails: dict[int, tuple[Tensor, ...]] = {}  # what sequences hold beside it
        self._mixers: dict[int, Attention] = {}
        self._held: dict[int, Held | tuple[Part, Part] | None] = {}
        for index in model.attention_layers:
            mixer = model.layers[index].mixer
            if not isinstance(mixer, Attention):
                raise UnsupportedError(f"layer {index} of {model.name} caches a {type(mixer).__name__}, which the KV cache cannot hold")
            self._mixers[index] = mixer
            self._allocate(index, mixer, model.D)
        # ids that older keys are rebuilt from
        self.ids_BS = zeros((max_sequences, max_context or num_blocks * block_size), torch.int32, device) if plan.retain.rebuilds else None

    def _allocate(self, index: int, mixer: Attention, D: int) -> None:
        slots, plan = self.num_blocks * self.block_size, self.plan
        key, value = plan.stores
        if plan.is_plain:
            dense = STORES[plan.store]
            self._planes[index] = *dense.allocate(slots, mixer.K, mixer.H, self.device), *dense.allocate(slots, mixer.K, mixer.Hv, self.device)
            return
        self._tails[index] = ()
        if plan.retain.capacity == 0:
            self._planes[index], self._held[index] = (), None
        elif key.of_input:
            planes = STORES[key.name].allocate(slots, 1, D, self.device)
            self._planes[index], self._held[index] = planes, Input(STORES[key.name], planes)
        elif plan.has_tail:
            parts = self._part(key, slots, mixer.K, mixer.H, of_keys=True), self._part(value, slots, mixer.K, mixer.Hv, of_keys=False)
            self._planes[index] = (*parts[0].planes, *parts[1].planes)
            self._tails[index] = parts[0].rings, parts[1].rings
            self._held[index] = parts
        else:
            keys, values = STORES[key.name], STORES[value.name]
            pair = Pair(keys, values, keys.allocate(slots, mixer.K, mixer.H, self.device), values.allocate(slots, mixer.K, mixer.Hv, self.device))
            self._planes[index], self._held[index] = (*pair.key_planes, *pair.value_planes), pair
            if plan.retain.evicts:
                state = zeros((slots, mixer.K), torch.int32, self.device), zeros((slots, mixer.K), torch.float32, self.device)
                self._planes[index] = (*self._planes[index], *state)

    def _part(self, store: Store, slots: int, heads: int, width: int, *, of_keys: bool) -> Part:
        rings = zeros((self.max_sequences, store.tail_slots, heads, width), torch.float16, self.device)
        if of_keys and store.group_tokens:
            channels = Channels(int(store.bits), store.group_tokens)
            return Part(store, channels, channels.allocate(slots, heads, width, self.device), rings)
        return Part(store, STORES[store.name], STORES[store.name].allocate(slots, heads, width, self.device), rings)

    @property
    def nbytes(self) -> int:
        """Bytes of all planes, slots · spec.kv.token_bytes, and of what is no block's, max_sequences · spec.kv.state_bytes."""
        held = sum(plane.nbytes for planes in (*self._planes.values(), *self._tails.values()) for plane in planes)
        return held + (0 if self.ids_BS is None else self.ids_BS.nbytes)

    def view(self, layer: int) -> KVView:
        """Layer `layer`'s KVView for one step; KeyError for a layer without attention."""
        # made anew each time: views that the cache kept would make a cycle, and the planes would live on until some collection finds it
        plan, mixer = self.plan, self._mixers[layer]
        if plan.is_plain:
            return LayerView(self, *self._planes[layer])
        if self.order != "slots":
            raise EngineError(TILED)
        held = self._held[layer]
        if isinstance(held, tuple):
            return TailView(self, mixer, *held)
        if plan.retain.evicts:
            assert isinstance(held, Pair)
            return EvictingView(self, mixer, held, *self._planes[layer][-2:])
        if plan.retain.kind != "full":
            return (RecentView if plan.retain.rebuilds else SlidingView)(self, mixer, held)
        return InputView(self, mixer, held) if isinstance(held, Input) else CodedView(self, mixer, held)

    def tiled_planes(self, layer: int) -> Tiled:
        """A layer's planes as they lie, for kernels that read and write them themselves; EngineError where the cache has another order."""
        if self.order != "tiles":
            raise EngineError(f"a cache of {self.plan.describe()} by slots has no tiles")
        planes, half = self._planes[layer], len(self._planes[layer]) // 2
        return Tiled(planes[0], planes[half], *((planes[1], planes[3]) if half == 2 else (None, None)))

    def slot_planes(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """A layer's keys (slots, K, H) and values (slots, K, Hv), and int8's scales of both (slots, K), as they lie by slots: for kernels that read and write
        them themselves (`spec.cuda.cache_refusal` says which caches those take).
        """
        if self.order != "slots":
            raise EngineError(TILED)
        planes, half = self._planes[layer], len(self._planes[layer]) // 2
        return (planes[0], planes[2], planes[1][..., 0], planes[3][..., 0]) if half == 2 else (planes[0], planes[1], None, None)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies block src to block dst for every (src, dst), in every layer, as if all at once: what copy-on-write needs. Holds nothing beside the planes."""
        ordered, turning = in_order(pairs)
        for planes in self._planes.values():
            for plane in planes:
                blocks = plane.view(self.num_blocks, -1)
                for source, target in ordered:
                    blocks[target].copy_(blocks[source])
                if turning:
                    sources, targets = (torch.tensor(ids, device=self.device) for ids in zip(*turning, strict=True))
                    blocks.index_copy_(0, targets, blocks.index_select(0, sources))

    def locate(self, spans: Sequence[Span], starts: Sequence[int], width: int) -> Tensor | slice:
        """Plane rows of positions starts[i] … starts[i] + width - 1 of each span, one after the other; past a sequence's end its last row repeats."""
        ends = [self.retain.kept(span.length) for span in spans]
        if len(spans) == 1 and starts[0] + width <= ends[0]:
            rows = self._layout.rows(spans[0].blocks, starts[0], starts[0] + width, self.block_size)
        else:
            tables = [span.blocks for span in spans]
            rows = self._layout.rows_of_many(tables, starts, [end - 1 for end in ends], width, self.block_size)
        return rows if isinstance(rows, slice) else rows.to(self.device)

    def slots(self, span: Span, start: int, stop: int) -> Tensor:
        """Plane rows of the sequence's slots start … stop - 1, as indices."""
        rows = self._layout.rows(span.blocks, start, stop, self.block_size) if stop > start else slice(0, 0)
        return torch.arange(rows.start, rows.stop, device=self.device) if isinstance(rows, slice) else rows.to(self.device)

    def check_rows(self, spans: Sequence[Span]) -> None:
        """Raises EngineError where two sequences of a step would share what each must have of its own."""
        if (self.plan.has_tail or self.plan.retain.rebuilds) and (
            len({span.row for span in spans}) < len(spans) or any(not 0 <= span.row < self.max_sequences for span in spans)
        ):
            raise EngineError(f"{len(spans)} sequences in rows {[span.row for span in spans]}; each needs one of its own, below {self.max_sequences}")


def in_order(pairs: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(source, target) pairs in an order in which nothing is written before it has been read; and those for which there is none, because they turn in a
    circle. A scheduler's targets are fresh blocks, so that it asks for no circle.

    >>> in_order([(0, 1), (1, 3)]), in_order([(1, 0), (0, 1), (0, 5)])
    (([(1, 3), (0, 1)], []), ([(0, 5)], [(1, 0), (0, 1)]))
    """
    ordered, waiting = [], list(pairs)
    while waiting:
        readers = Counter(source for source, _ in waiting)
        ready = [(source, target) for source, target in waiting if readers[target] == (source == target)]
        if not ready:
            break
        ordered += ready
        waiting = [pair for pair in waiting if pair not in ready]
    return ordered, waiting


@dataclass(frozen=True, slots=True)
class LayerView(Immediate):
    """One layer of a cache of plain floats (a KVView, and a GatherView for kernels that take many sequences at once)."""

    cache: KVCache
    k_SKH: Tensor
    v_SKH: Tensor

    def write(self, k_TKH: Tensor, v_TKH: Tensor, batch: StepBatch) -> None:
        """Puts the step's T keys and values into `batch.slots_T`."""
        store = self._by_slots()
        store.write(self.k_SKH, batch.slots_T, k_TKH)
        store.write(self.v_SKH, batch.slots_T, v_TKH)

    def read(self, span: Span) -> tuple[Tensor, Tensor]:
        """The sequence's keys (S, K, H) and values (S, K, Hv): views where it lies in one piece and needs no cast."""
        return self.gather(self.cache.locate((span,), (0,), self.cache.retain.kept(span.length)))

    def locate(self, spans: Sequence[Span], starts: Sequence[int], width: int) -> Tensor | slice:
        return self.cache.locate(spans, starts, width)

    def gather(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Keys and values of the plane rows that `locate` named."""
        store, dtype = self._by_slots(), self.cache.dtype
        return store.read(self.k_SKH, rows, dtype), store.read(self.v_SKH, rows, dtype)

    def _by_slots(self) -> Dense:
        if self.cache.order != "slots":
            raise EngineError(TILED)
        store = STORES[self.cache.plan.store]
        assert isinstance(store, Dense)
        return store
