"""The KV cache on three independent axes: what stays (retain), where it lies (layout), how an element is held (store). Bytes, traffic, exactness.

`2 · K · H` elements a token and layer: keys and values. What runs is named by `runs_since`; the rest is priced, so that a plan can say what it would save.
`refusal` says which points of the space make no sense, and why. Implementations: `kv/retain`, `kv/layout`, `kv/store`, composed by `kv/cache.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from tradespace.errors import InputError
from tradespace.spec.kv_retain import FULL, HEAD_STATE_BYTES, Retain, parse_retain
from tradespace.spec.kv_stores import STORES, TAIL_BYTES, Store, find_store, parse_stores
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec

__all__ = ["FULL", "PLAIN", "STORES", "KVPlan", "Retain", "Store", "find_store", "parse_retain", "parse_stores"]


@dataclass(frozen=True, kw_only=True)
class KVPlan:
    """One point on the three axes. `block_size` is the paged layout's tokens per block; the contiguous layout has one block per sequence.

    store            of keys, and of values where `values` is empty; one that holds the layer's input holds both
    prefix_sharing   sequences with equal first tokens share the blocks that hold them: needs blocks (paged) and retention that keeps every token
    """

    retain: Retain = FULL
    layout: str = "paged"  # "paged" | "contiguous"
    block_size: int = 16
    store: str = "bf16"
    values: str = ""
    prefix_sharing: bool = False

    def __post_init__(self):
        if self.layout not in ("paged", "contiguous"):
            raise InputError(f"unknown KV layout '{self.layout}'. Known: paged, contiguous")
        find_store(self.store)
        find_store(self.value_store)
        if not 1 <= self.block_size <= 256:
            raise InputError(f"block size {self.block_size}: choose between 1 and 256 tokens")
        if self.prefix_sharing and (reason := sharing_refusal(self)):
            raise InputError(f"prefix sharing: {reason}")

    @property
    def value_store(self) -> str:
        return self.values or self.store

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # a search looks plans up a million times
        return hash((self.retain, self.layout, self.block_size, self.store, self.values, self.prefix_sharing))

    def __getstate__(self) -> dict[str, object]:  # another process hashes strings otherwise
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    @cached_property
    def held(self) -> KVPlan:
        """The same without its layout: what prices that do not depend on one are remembered under."""
        return replace(self, layout="contiguous", block_size=16, prefix_sharing=False)

    @cached_property
    def stores(self) -> tuple[Store, Store]:
        """Of keys and of values."""
        return find_store(self.store), find_store(self.value_store)

    @cached_property
    def of_input(self) -> bool:
        """Whether the layer's input is held instead of keys and values."""
        return self.stores[0].of_input

    @cached_property
    def has_tail(self) -> bool:
        return any(store.tail for store in self.stores)

    @cached_property
    def is_plain(self) -> bool:
        """Keys and values of every token as floats of one kind: what the native kernels and reading without a copy need."""
        return self.retain.kind == "full" and self.store == self.value_store and self.stores[0].group is None and not self.of_input and self.store != "fp8"

    @property
    def places_tokens(self) -> bool:
        """Whether the cache finds tokens their slots itself; else a step says where they go, position after position."""
        return self.retain.kind != "full" or self.has_tail

    @property
    def runs_since(self) -> str | None:
        key, value = self.stores
        return max(key.runs_since, value.runs_since) if self.retain.runs_since and key.runs_since and value.runs_since else None

    @cached_property
    def min_bits(self) -> float:
        return min(store.bits for store in self.stores)

    def copies(self, dense: str) -> bool:
        """Whether reading a sequence makes a copy of it, with activations in `dtype` dense."""
        return self.layout == "paged" or not self.is_plain or self.store != dense

    def block_slots(self, max_context: int) -> int:
        """Token slots of a block: the page, or where contiguous all that a sequence keeps, in whole groups where tokens are coded together."""
        if self.layout == "paged":
            return self.block_size
        group = max(1, *(store.tail_group for store in self.stores))
        return num_blocks(max(1, self.retain.tokens(max_context)), group) * group

    def describe_store(self) -> str:
        return self.store if self.value_store == self.store else f"k={self.store},v={self.value_store}"

    def describe(self) -> str:
        where = f"paged({self.block_size})" if self.layout == "paged" else "contiguous"
        return f"{self.retain.describe()} × {where} × {self.describe_store()}"


PLAIN = KVPlan()

# ---------------------------------------------------------------------------------------------------------------- what makes no sense


def refusal(kv: KVPlan) -> str | None:
    """Why this combination of retention, layout and store cannot work, whatever the model; None: it can."""
    key, value = kv.stores
    if key.of_input != value.of_input or (key.of_input and key != value):
        return f"store {kv.describe_store()}: a layer's input gives keys and values alike, so it cannot be held for one of them"
    if kv.retain.budget_bytes:
        return f"{kv.retain.describe()} retention: its budget is in bytes still; a model turns it into tokens"
    if kv.retain.evicts and kv.of_input:
        return f"{kv.retain.kind} keeps other tokens in every head, and a layer's input ({kv.store}) serves all heads: choose a store of keys and values"
    grouped = next((store for store in (key, value) if store.tail), None)
    if grouped is not None and kv.retain.kind != "full":
        return (
            f"store {grouped.name} codes {grouped.tail_group} neighbouring tokens together, and {kv.retain.kind} retention drops single ones: "
            "choose int4 or int8"
        )
    if grouped is not None and kv.layout == "paged" and kv.block_size % grouped.tail_group:
        return f"store {grouped.name} codes {grouped.tail_group} tokens together: the block size must be a multiple of that, not {kv.block_size}"
    return None


def sharing_refusal(kv: KVPlan) -> str | None:
    """Why sequences cannot share the blocks of a common prefix; None: they can."""
    if kv.layout != "paged":
        return f"the {kv.layout} layout has one region per sequence, and nothing smaller that two could share. Choose the paged layout"
    if kv.retain.evicts:
        return f"{kv.retain.kind} retention drops tokens by what each request attends to: a prefix that is shared would be evicted for all"
    if kv.retain.kind != "full":
        return f"{kv.retain.kind} retention writes over a sequence's first blocks: a prefix cannot be shared"
    grouped = next((store for store in kv.stores if store.tail), None)
    return f"store {grouped.name} keeps a sequence's last tokens outside of its blocks: a prefix cannot be shared" if grouped else None


def drafting_refusal(kv: KVPlan) -> str | None:
    """Why drafted tokens could not be taken back; None: they can."""
    if kv.retain.kind != "full" or kv.has_tail:
        return f"speculation with {kv.retain.describe()} × {kv.describe_store()}: rejected drafts have written over what was kept"
    return None


def model_refusal(model: ModelSpec, kv: KVPlan) -> str | None:
    """Why `model` cannot have such a cache; None: it can."""
    if (reason := refusal(kv)) is not None:
        return reason
    if kv.is_plain:
        return None
    for index in model.attention_layers:
        mixer = model.layers[index].mixer
        if not isinstance(mixer, Attention):
            what = f"retention {kv.retain.kind} and store {kv.describe_store()} are for softmax attention"
            return f"layer {index} of {model.name} caches a {type(mixer).__name__}: {what}"
        widths = {mixer.H, mixer.Hv} if kv.stores[0].group_tokens else {8}
        if any(width % 8 for width in widths):
            return f"store {kv.store} packs channels in whole bytes: a head of {mixer.H} elements is no multiple of 8"
    return None


def pointless(model: ModelSpec, kv: KVPlan) -> str | None:
    """Why holding the layer's input saves nothing for `model`: it is at least as large as keys and values in 16 bits, as where heads are shared. None: it
    does.
    """
    if not kv.of_input:
        return None
    own, pair = token_bytes(model, kv), token_bytes(model, replace(kv, store="bf16", values=""))
    if own < pair:
        return None
    return (
        f"{kv.store} takes {own:,} B a token, keys and values in bf16 {pair:,} B: with shared heads the input ({model.D} elements a layer) "
        "is wider than K and V. Choose an input store of fewer bits, or a store of keys and values"
    )


# ---------------------------------------------------------------------------------------------------------------- bytes


def mixer_token_bytes(mixer: Attention, D: int, kv: KVPlan, K: int | None = None) -> int:
    """Cache bytes of one token's slot in one layer; `K`: key-value heads at hand, where a device holds not all of them."""
    heads = mixer.K if K is None else K
    if kv.retain.capacity == 0:
        return 0
    key, value = kv.stores
    if key.of_input:
        return key.nbytes(1, D)
    state = HEAD_STATE_BYTES * heads if kv.retain.evicts else 0
    return key.key_bytes(heads, mixer.H) + value.nbytes(heads, mixer.Hv) + state


def layer_token_bytes(model: ModelSpec, layer: int, kv: KVPlan) -> int:
    """Cache bytes of one token in one layer: K·H key and K·Hv value elements (a latent has one vector), or its input."""
    mixer = model.layers[layer].mixer
    if mixer is None or mixer.cache_elements_per_token == 0:
        return 0
    if isinstance(mixer, Attention):
        return mixer_token_bytes(mixer, model.D, kv)
    return kv.stores[0].nbytes(1, mixer.cache_elements_per_token)


def token_bytes(model: ModelSpec, kv: KVPlan | str) -> int:
    """Cache bytes of one token over all layers; a name stands for that store of everything."""
    plan = KVPlan(store=kv) if isinstance(kv, str) else kv
    return sum(layer_token_bytes(model, layer, plan) for layer in range(model.L))


def mixer_state_bytes(mixer: Attention, kv: KVPlan, K: int | None = None) -> int:
    """Bytes of one sequence's tail in one layer, whatever its length."""
    heads = mixer.K if K is None else K
    key, value = kv.stores
    return heads * TAIL_BYTES * (key.tail_slots * mixer.H + value.tail_slots * mixer.Hv)


def state_bytes(model: ModelSpec, kv: KVPlan, max_context: int) -> int:
    """Bytes that the cache holds for one sequence beside its slots: tails, and the token ids that older keys are rebuilt from."""
    mixers = (model.layers[index].mixer for index in model.attention_layers)
    tails = sum(mixer_state_bytes(mixer, kv) for mixer in mixers if isinstance(mixer, Attention))
    return tails + id_bytes(kv, max_context)


def id_bytes(kv: KVPlan, max_context: int) -> int:
    return 4 * max_context if kv.retain.rebuilds else 0


def sequence_bytes(model: ModelSpec, plan: KVPlan, length: int) -> int:
    """Bytes that one sequence of `length` tokens needs: per layer the tokens retained, in whole blocks where paged, plus states of fixed size."""
    total = sum(layer.mixer.state_bytes_per_sequence for layer in model.layers if layer.mixer is not None)
    tokens = plan.retain.tokens(length)
    if plan.layout == "paged":
        tokens = num_blocks(tokens, plan.block_size) * plan.block_size
    return total + tokens * token_bytes(model, plan) + state_bytes(model, plan, length)


def block_bytes(model: ModelSpec, plan: KVPlan) -> int:
    """Bytes of one block over all layers."""
    return plan.block_size * token_bytes(model, plan)


def resolve_budget(model: ModelSpec, kv: KVPlan) -> KVPlan:
    """`kv` with a budget of bytes a sequence turned into tokens, rounded down. Raises InputError where it holds none beside those that always stay."""
    if not kv.retain.budget_bytes:
        return kv
    each = token_bytes(model, replace(kv, retain=Retain(kind=kv.retain.kind, budget=1 << 30)))
    return replace(kv, retain=replace(kv.retain, budget=max(1, kv.retain.budget_bytes // each), budget_bytes=0))


def num_blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def expected_waste(mean_length: float, block_size: int) -> float:
    """Share of the blocks' slots that hold nothing, for lengths spread evenly over a block: (P - 1) / 2 slots of the last block.

    >>> round(expected_waste(136, 16), 4)
    0.0523
    """
    empty = (block_size - 1) / 2
    return empty / (mean_length + empty)
