"""The caches that the experiment compares at a length of n tokens: one full, windows that forget, ways to rebuild exactly, stores of fewer bits.

Everything is fp32 but what a store rounds, and contiguous: reading the full cache then copies nothing, which is the fastest that it can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

from tradespace.spec.kv import KVPlan, Retain
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec

DTYPE = "fp32"
MINIMAL = 8  # tokens of the published O(1) cache
SINKS = 4
FULL, ROOT, MINIMAL_NAME, SINKS_NAME = "full", "window √n", f"window {MINIMAL}", "sinks + window √n"
RECENT, IDS, INPUT, INPUT8 = "recent √n, rebuilt", "token ids, rebuilt", "layer input", "layer input, int8"
NOTHING = "nothing remembered"  # the full cache of a sequence of MINIMAL tokens: no window can be faster


@dataclass(frozen=True, kw_only=True)
class Cache:
    """group: full, window (what is dropped is lost), exact (what is dropped is computed again), store. grows: tokens that stay, as people write them."""

    name: str
    kv: KVPlan
    group: str
    grows: str


def root_of(n: int) -> int:
    """√n, rounded up.

    >>> root_of(2048), root_of(2025)
    (46, 45)
    """
    return isqrt(n - 1) + 1


def caches(n: int, *, quick: bool) -> tuple[Cache, ...]:
    """Every cache for n tokens; without the window in between where it is to be quick."""
    root = root_of(n)
    sinks = min(SINKS, root // 2)

    def sliding(name: str, window: int, grows: str, sinks: int = 0) -> Cache:
        retain = Retain(kind="sliding", window=window - sinks, sinks=sinks)
        return Cache(name=name, kv=KVPlan(retain=retain, layout="contiguous", store=DTYPE), group="window", grows=grows)

    def stored(name: str, store: str, group: str = "store") -> Cache:
        return Cache(name=name, kv=KVPlan(layout="contiguous", store=store), group=group, grows="n")

    def rebuilt(name: str, recent: int, grows: str) -> Cache:
        return Cache(name=name, kv=KVPlan(retain=Retain(kind="recent", recent=recent), layout="contiguous", store=DTYPE), group="exact", grows=grows)

    between = () if quick else (sliding("window n/4", max(MINIMAL, n // 4), "n/4"),)
    return (
        stored(FULL, DTYPE, "full"),
        sliding(ROOT, root, "√n"),
        sliding(MINIMAL_NAME, min(MINIMAL, n), "1"),
        sliding(SINKS_NAME, root, "√n", sinks),
        *between,
        rebuilt(RECENT, root, "√n"),
        rebuilt(IDS, 0, "ids"),
        stored(INPUT, "x-fp32", "exact"),
        stored(INPUT8, "x-int8"),
        stored("int8", "int8"),
        stored("int4", "int4"),
        stored("int2", "int2"),
    )


def is_exact(model: ModelSpec, kv: KVPlan) -> bool:
    """Whether the cache is declared exact for this model in fp32: nothing is rounded, and what a layer looks at is there or rebuilt."""
    mixers = [model.layers[index].mixer for index in model.attention_layers]
    kept = all(kv.retain.exact_for(mixer.window if isinstance(mixer, Attention) else None) for mixer in mixers)
    return kept and all(store.codec == DTYPE for store in kv.stores)
