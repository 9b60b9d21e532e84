"""How an element of the cache is held: bits, what shares a scale, what stays in full precision, and whether keys and values or the layer's input lie there.

Per token: `group` neighbouring elements of a head share a scale (and a minimum, where `scale_bytes` is 4). Per channel (`group_tokens`, keys only): one
channel of so many neighbouring tokens shares them, which fits keys, whose outliers stay in few channels (KIVI, arXiv:2402.02750); a group can be coded only
once it is full, so at least the last `tail` tokens wait in fp16 beside the blocks, one ring of tail + group_tokens a sequence, for keys and values alike.

of_input: the layer's input is held, and K and V are projected from it when they are read (XQuant, arXiv:2508.10395). What is held is what enters the product
(after the norm where a layer begins with one): K and V are then the same product of the same numbers, and in the activations' dtype exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from tradespace.errors import InputError

TAIL_BYTES = 2  # an element of a tail: fp16


@dataclass(frozen=True, kw_only=True)
class Store:
    """How one element of K or V is held. `group` elements of a token and head share `scale_bytes` (0: the whole head)."""

    name: str
    bits: float
    group: int | None = None
    scale_bytes: float = 0.0
    group_tokens: int = 0
    tail_group: int = 0  # tokens that leave the tail together: group_tokens, or of a per-token store with a tail its step
    tail: int = 0
    of_input: bool = False
    exact: bool = False
    offered: bool = True  # whether the planner tries it unasked
    runs_since: str | None = None
    idea: str = ""

    @property
    def codec(self) -> str:
        """The store that holds the input, for those that do; else its own name."""
        return self.name.removeprefix("x-") if self.of_input else self.name

    @property
    def tail_slots(self) -> int:
        """Tokens of a sequence's ring: those that stay, and a group that fills up."""
        return self.tail + self.tail_group if self.tail else 0

    def nbytes(self, num_vectors: int, width: int) -> int:
        """Bytes of `num_vectors` key or value vectors of `width` elements with their scales, held per token."""
        codes = ceil(width * self.bits / 8)
        groups = 0 if self.group is None else ceil(width / self.group) if self.group else 1
        return num_vectors * codes + ceil(num_vectors * groups * self.scale_bytes)

    def key_bytes(self, heads: int, width: int) -> int:
        """Bytes of one token's keys in its slot; per channel, its share of a group's scales. Whole bytes for any width that is a multiple of 8."""
        if not self.group_tokens:
            return self.nbytes(heads, width)
        return heads * ceil(width * self.bits / 8) + ceil(heads * width * self.scale_bytes / self.group_tokens)

    def coded(self, length: int) -> int:
        """Of a sequence of `length` tokens, how many are coded; the rest is in its tail.

        >>> [STORES["int2"].coded(n) for n in (100, 159, 160, 191, 192)]
        [0, 0, 32, 32, 64]
        """
        return max(0, length - self.tail) // self.tail_group * self.tail_group if self.tail else length


def _store(name: str, bits: float, idea: str, **more) -> Store:
    return Store(name=name, bits=bits, idea=idea, **more)


_TOKEN_GROUPS = {"group": 32, "scale_bytes": 4}
_CHANNELS = _TOKEN_GROUPS | {"group_tokens": 32, "tail_group": 32}

STORES: dict[str, Store] = {
    store.name: store
    for store in (
        _store("fp32", 32, "exact for fp32 activations", exact=True, runs_since="0.1"),
        _store("bf16", 16, "exact for bf16 activations", exact=True, runs_since="0.1"),
        _store("fp16", 16, "exact for fp16 activations", exact=True, runs_since="0.1"),
        _store("fp8", 8, "e4m3, no scale", runs_since="0.3"),
        _store("int8", 8, "one scale per token and head", group=0, scale_bytes=2, runs_since="0.3"),
        _store("int4", 4, "groups of 32 with scale and minimum", **_TOKEN_GROUPS, runs_since="0.3"),
        _store("int4c", 4, "keys per channel, values per token, a tail of 32; arXiv:2402.02750", **_CHANNELS, tail=32, runs_since="0.3"),
        _store("int2", 2, "keys per channel, values per token, a tail of 128; arXiv:2402.02750", **_CHANNELS, tail=128, runs_since="0.3"),
        _store("int2-token", 2, "keys and values per token: what int2 is measured against", **_TOKEN_GROUPS, offered=False, runs_since="0.3"),
        _store("int2-token-tail", 2, "int2-token with int2's tail", **_TOKEN_GROUPS, tail=128, tail_group=32, offered=False, runs_since="0.3"),
        _store("x-fp32", 32, "the layer's input, exact for fp32 activations", of_input=True, exact=True, runs_since="0.3"),
        _store("x-bf16", 16, "the layer's input, exact for bf16 activations; arXiv:2508.10395", of_input=True, exact=True, runs_since="0.3"),
        _store("x-int8", 8, "the layer's input, one scale per token", group=0, scale_bytes=2, of_input=True, runs_since="0.3"),
        _store("x-int4", 4, "the layer's input, groups of 32 with scale and minimum", **_TOKEN_GROUPS, of_input=True, runs_since="0.3"),
    )
}

# what vLLM's and llama.cpp's users type
ALIASES = {"fp8_e4m3": "fp8", "f32": "fp32", "f16": "fp16", "kivi": "int2", "int8_per_token_head": "int8"}


def find_store(name: str) -> Store:
    """The store of this name (or one of its aliases). Raises InputError with the names there are."""
    found = STORES.get(ALIASES.get(name, name))
    if found is None:
        raise InputError(f"unknown KV store '{name}'. Known: {', '.join(STORES)}")
    return found


def parse_stores(text: str) -> tuple[str, str]:
    """(keys, values) of "int8" or "k=int4c,v=int4". Raises InputError for anything else.

    >>> parse_stores("int8"), parse_stores("k=int4c,v=int4")
    (('int8', 'int8'), ('int4c', 'int4'))
    """
    if "=" not in text:
        name = find_store(text).name
        return name, name
    parts = {axis: name for axis, _, name in (part.partition("=") for part in text.split(","))}
    if set(parts) != {"k", "v"}:
        raise InputError(f"KV store '{text}': write one name, or k=NAME,v=NAME")
    return find_store(parts["k"]).name, find_store(parts["v"]).name
