"""The KV cache on three independent axes: what stays (retain), where it lies (layout), how an element is held (store). Bytes, traffic, exactness.

`2 · K · H` elements a token and layer: keys and values. What runs is named by `runs_since`; the rest is priced, so that a plan can say what it would save.
Implementations: `kv/retain`, `kv/layout`, `kv/store`, composed by `kv/cache.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from tradespace.errors import InputError
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Store:
    """How one element of K or V is held. `group` elements of a token and head share `scale_bytes` (0: the whole head)."""

    name: str
    bits: float
    group: int | None = None
    scale_bytes: float = 0.0
    exact: bool = False
    runs_since: str | None = None
    idea: str = ""

    def nbytes(self, num_vectors: int, width: int) -> int:
        """Bytes of `num_vectors` key or value vectors of `width` elements, scales included."""
        codes = ceil(width * self.bits / 8)
        groups = 0 if self.group is None else ceil(width / self.group) if self.group else 1
        return num_vectors * codes + ceil(num_vectors * groups * self.scale_bytes)


STORES: dict[str, Store] = {
    store.name: store
    for store in (
        Store(name="fp32", bits=32, exact=True, runs_since="0.1", idea="exact for fp32 activations"),
        Store(name="bf16", bits=16, exact=True, runs_since="0.1", idea="exact for bf16 activations"),
        Store(name="fp16", bits=16, exact=True, runs_since="0.1", idea="exact for fp16 activations"),
        Store(name="fp8", bits=8, idea="e4m3, no scale"),
        Store(name="int8", bits=8, group=0, scale_bytes=2, idea="one scale per token and head"),
        Store(name="int4", bits=4, group=32, scale_bytes=4, idea="groups of 32 with scale and minimum"),
        Store(name="int2", bits=2, group=32, scale_bytes=4, idea="keys per channel, values per token; arXiv:2402.02750"),
    )
}


@dataclass(frozen=True, kw_only=True)
class Retain:
    """What stays resident. kind "full", or "sliding": the last `window` tokens and the first `sinks` (arXiv:2309.17453)."""

    kind: str = "full"
    window: int = 0
    sinks: int = 0

    RUNS_SINCE: ClassVar[dict[str, str | None]] = {"full": "0.1", "sliding": None}

    def __post_init__(self):
        if self.kind not in self.RUNS_SINCE:
            raise InputError(f"unknown KV retention '{self.kind}'. Known: {', '.join(self.RUNS_SINCE)}")
        if self.kind == "sliding" and self.window < 1:
            raise InputError(f"sliding retention needs a window of at least 1 token; got {self.window}")
        if not 0 <= self.sinks <= max(self.window, 0):
            raise InputError(f"sinks ({self.sinks}) must lie between 0 and the window ({self.window})")

    @property
    def runs_since(self) -> str | None:
        return self.RUNS_SINCE[self.kind]

    def tokens(self, length: int, mixer: Attention | None = None) -> int:
        """Tokens that one layer keeps of a sequence of `length`."""
        return length if self.kind == "full" else min(length, self.window + self.sinks)

    def exact_for(self, window: int | None) -> bool:
        """Full keeps everything; sliding is exact only where the pattern itself looks no further back."""
        return self.kind == "full" or (window is not None and window <= self.window)


@dataclass(frozen=True, kw_only=True)
class KVPlan:
    """One point on the three axes. `block_size` is the paged layout's tokens per block; the contiguous layout has one block per sequence.

    prefix_sharing   sequences with equal first tokens share the blocks that hold them: needs blocks (paged) and retention that keeps every token
    """

    retain: Retain = Retain()
    layout: str = "paged"  # "paged" | "contiguous"
    block_size: int = 16
    store: str = "bf16"
    prefix_sharing: bool = False

    def __post_init__(self):
        if self.layout not in ("paged", "contiguous"):
            raise InputError(f"unknown KV layout '{self.layout}'. Known: paged, contiguous")
        if self.store not in STORES:
            raise InputError(f"unknown KV store '{self.store}'. Known: {', '.join(STORES)}")
        if not 1 <= self.block_size <= 256:
            raise InputError(f"block size {self.block_size}: choose between 1 and 256 tokens")
        if self.prefix_sharing and (reason := sharing_refusal(self.layout, self.retain)):
            raise InputError(f"prefix sharing: {reason}")

    @property
    def runs_since(self) -> str | None:
        return STORES[self.store].runs_since if self.retain.runs_since else None

    def describe(self) -> str:
        where = f"paged({self.block_size})" if self.layout == "paged" else "contiguous"
        kept = "full" if self.retain.kind == "full" else f"sliding({self.retain.window}, {self.retain.sinks})"
        return f"{kept} × {where} × {self.store}"


def sharing_refusal(layout: str, retain: Retain) -> str | None:
    """Why sequences cannot share the blocks of their prefixes, or None."""
    if layout != "paged":
        return f"the {layout} layout has one region per sequence, and nothing smaller that two could share. Choose the paged layout"
    if retain.kind != "full":
        return f"{retain.kind} retention forgets tokens, each sequence its own, so equal tokens do not mean equal blocks. Choose full retention"
    return None


def layer_token_bytes(model: ModelSpec, layer: int, store: str) -> int:
    """Cache bytes of one token in one layer: K·H key and K·Hv value elements (a latent has one vector)."""
    mixer = model.layers[layer].mixer
    if mixer is None or mixer.cache_elements_per_token == 0:
        return 0
    if isinstance(mixer, Attention):
        return STORES[store].nbytes(mixer.K, mixer.H) + STORES[store].nbytes(mixer.K, mixer.Hv)
    return STORES[store].nbytes(1, mixer.cache_elements_per_token)


def token_bytes(model: ModelSpec, store: str) -> int:
    """Cache bytes of one token over all layers."""
    return sum(layer_token_bytes(model, layer, store) for layer in range(model.L))


def sequence_bytes(model: ModelSpec, plan: KVPlan, length: int) -> int:
    """Bytes that one sequence of `length` tokens needs: per layer the tokens retained, in whole blocks where paged, plus states of fixed size."""
    total = sum(layer.mixer.state_bytes_per_sequence for layer in model.layers if layer.mixer is not None)
    for index in model.attention_layers:
        tokens = plan.retain.tokens(length)
        if plan.layout == "paged":
            tokens = num_blocks(tokens, plan.block_size) * plan.block_size
        total += tokens * layer_token_bytes(model, index, plan.store)
    return total


def block_bytes(model: ModelSpec, plan: KVPlan) -> int:
    """Bytes of one block over all layers."""
    return plan.block_size * token_bytes(model, plan.store)


def num_blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def expected_waste(mean_length: float, block_size: int) -> float:
    """Share of the blocks' slots that hold nothing, for lengths spread evenly over a block: (P - 1) / 2 slots of the last block.

    >>> round(expected_waste(136, 16), 4)
    0.0523
    """
    empty = (block_size - 1) / 2
    return empty / (mean_length + empty)
