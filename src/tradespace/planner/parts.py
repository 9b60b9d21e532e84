"""What prices are remembered under: one device's weights, one way to hold the past, the bytes of a step, the room that a budget leaves."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from tradespace.cost import memory
from tradespace.cost.summary import Product, WeightShare
from tradespace.spec.kv import KVPlan
from tradespace.spec.weights import WeightPlan


@dataclass(frozen=True)
class Room:
    """How much the cache gets: sequences, token slots, and whether that fits."""

    max_sequences: int
    kv_tokens: int
    bytes_each: float
    fits: bool


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Of the largest step: what stands beside the cache (matrices widened, products compiled), the worst moment of a layer, and that of the head."""

    beside: float
    layers: float
    head: float


class Placements:
    """For one share of weights: resident bytes by the number of streamed layers, and the fewest layers for a given room."""

    def __init__(self, share: WeightShare):
        layers = len(share.layers)
        self.resident = [share.total_bytes - share.streamed_bytes[k] + memory.stream_buffer_bytes(share, k) for k in range(layers + 1)]
        self._least = list(self.resident)  # of up to k streamed layers: a larger layer's buffers may outweigh what it frees
        for k in range(1, layers + 1):
            self._least[k] = min(self._least[k - 1], self.resident[k])

    def fewest(self, room_bytes: float) -> int:
        """The least number of streamed layers (at least one) with which the weights fit `room_bytes`; all layers where none does."""
        k = bisect_left(self._least, True, lo=1, key=lambda size: size <= room_bytes)
        return min(k, len(self.resident) - 1)


@dataclass(frozen=True, eq=False)
class Part:
    """The weights of one device: a plan for them at a degree of parallelism. What depends on them alone is remembered under `number`.

    `body` is the same for all that hold the layers alike, whatever embedding and head are held in.
    """

    weights: WeightPlan
    degree: int
    share: WeightShare
    placed: Placements
    widened: int  # elements of the workspace that quantized matrices are dequantized into
    products: tuple[frozenset[Product], frozenset[Product]]
    number: int
    body: int
    dense: str
    requantized: bool  # the checkpoint is quantized, and this holds it in other formats
    waiting: tuple[str, ...]  # of its formats those that nothing implements yet


@dataclass(frozen=True, eq=False)
class Cache:
    """One way to hold the past; `number` is the same for all that differ in their layout alone, `index` is its own.

    `copied` are the dtypes of activations for which reading it makes a copy. `kept` and `kept_on_average` are the tokens that stay of a sequence of the full
    context and of the mean length; `block` the slots of a block, `sequence_slots` those of a sequence of the full context.
    """

    kv: KVPlan
    held: KVPlan
    number: int
    index: int
    copied: frozenset[str]
    paged: bool
    kept: int
    kept_on_average: int
    block: int
    sequence_slots: int
    refused: bool
