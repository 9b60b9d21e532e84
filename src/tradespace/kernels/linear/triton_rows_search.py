"""The search for tile sizes of the products of few rows on a card: one size after the other is changed, and kept where the products became faster.

What is timed is a chain of products of the same shape with a matrix each, so that no cache holds what is read, as one captured graph: as in a decode step, the
next product is set up while the one before drains.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tradespace.kernels.linear.packed import PackedWeight
from tradespace.kernels.linear.scratch import Scratch
from tradespace.kernels.linear.triton_codes import quantize_rows
from tradespace.kernels.linear.triton_rows import rows_linear
from tradespace.kernels.linear.triton_rows_tiles import RowTiles, find_tiles, key_of
from tradespace.kernels.triton_launch import padded

CHOICES: dict[str, tuple[int, ...]] = {
    "N": (32, 64, 128),
    "warps": (2, 4, 8),
    "stages": (2, 3, 4, 6),
    "K": (64, 128, 256),
    "programs": (1, 132, 264, 528, 1056),
}
GAIN = 0.01  # of the time, below which a change is not one
REPEATS, REPLAYS = 5, 4


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Products of `rows` tokens with each of `weights`, which are of one format and shape; `gated`: the activation of those whose rows are gate and up."""

    name: str
    weights: Sequence[PackedWeight]
    rows: int
    scratch: Scratch
    gated: str | None = None
    pdl: bool = False

    @property
    def key(self) -> tuple[str, int, int]:
        """How the tiles are kept: kind and group, padded tokens, weights of a matrix."""
        first = self.weights[0]
        return key_of(first.layout.kind, first.layout.group or 0), max(8, padded(self.rows)), first.rows * first.columns

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices: what a pass reads, but for the activations."""
        return sum(weight.nbytes for weight in self.weights)

    def start(self) -> RowTiles:
        """The tiles that would be taken without a search."""
        first, (_, M, _) = self.weights[0], self.key
        R = first.rows // 2 if self.gated else first.rows
        return find_tiles(first.layout.kind, first.layout.group or 0, M, R, first.columns, gated=self.gated is not None, device=first.codes.device)

    def candidates(self, tiles: RowTiles, name: str) -> Iterator[RowTiles]:
        """The other values of one size. Columns of a step are free only where rows lie as they are."""
        if name != "K" or self.weights[0].layout.plain:
            yield from (replace(tiles, **{name: value}) for value in CHOICES[name] if value != getattr(tiles, name))

    def activations(self) -> tuple[Tensor, Tensor | None]:
        """Drawn at random, as 8-bit codes with scales where the format takes those."""
        weight, device = self.weights[0], self.weights[0].codes.device
        x_TC = torch.randn(self.rows, weight.columns, device=device).bfloat16()
        if weight.layout.kind not in ("w8a8", "f8a8"):
            return x_TC, None
        codes_TC, scale_T = torch.empty_like(x_TC, dtype=weight.codes.dtype), torch.empty(self.rows, dtype=torch.float32, device=device)
        quantize_rows(x_TC, codes_TC, scale_T)
        return codes_TC, scale_T

    def seconds(self, tiles: RowTiles) -> float:
        """Seconds of one product, over all matrices; infinite for tiles that the card cannot hold."""
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        x_TC, scale_T = self.activations()
        R = self.weights[0].rows // (2 if self.gated else 1)
        out_TR = torch.empty(self.rows, R, dtype=torch.bfloat16, device=x_TC.device)

        def run() -> None:
            for weight in self.weights:
                rows_linear(x_TC, weight, self.scratch, x_scale_T=scale_T, out_TR=out_TR, gated=self.gated, tiles=tiles, pdl=self.pdl)

        try:
            run()  # compiles
        except (CompilationError, OutOfResources, PTXASError):
            return float("inf")
        return (graph_seconds(run) if x_TC.is_cuda else wall_seconds(run)) / len(self.weights)


def graph_seconds(run: Callable[[], None]) -> float:
    """Seconds of the calls as one captured graph, replayed: the median of some passes."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(REPEATS + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / REPLAYS)
    return statistics.median(times[1:])


def wall_seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@dataclass(frozen=True, kw_only=True)
class Found:
    """The outcome of one search: tiles and seconds of one product before and after."""

    tiles: RowTiles
    seconds: float
    before: RowTiles
    before_s: float


def search_tiles(chain: Chain, *, tell: Callable[[int, int], None] = lambda done, total: None, seconds: Callable[[RowTiles], float] | None = None) -> Found:
    """Changes one size at a time, keeping what is faster by more than `GAIN`. `tell` is called with (candidates timed, of how many); `seconds` stands in for
    the chain's own clock in tests. Tiles that the card cannot hold are passed over.
    """
    seconds = seconds or chain.seconds
    best = before = chain.start()
    best_s = before_s = seconds(best)
    total, done = 1 + sum(len(list(chain.candidates(best, name))) for name in CHOICES), 1
    tell(done, total)
    for name in CHOICES:
        for tiles in list(chain.candidates(best, name)):
            if (taken := seconds(tiles)) < best_s * (1 - GAIN):
                best, best_s = tiles, taken
            done += 1
            tell(min(done, total), total)
    return Found(tiles=best, seconds=best_s, before=before, before_s=before_s)
