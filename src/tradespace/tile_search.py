"""Tile sizes of a model's decode products, measured once for a card that none ship for, in a process of its own that ends before a budget is counted.

`python -m tradespace.tile_search` is that process: it reads what to search on standard input, holds a few layers of random weights of the model's shapes on the
card, and prints a line of JSON for each candidate. What it finds is kept (`kernels/linear/triton_rows_tiles.py`) after each product: stopped, it goes on from
there the next time.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from tradespace.errors import EngineError, UnsupportedError
from tradespace.spec import cuda
from tradespace.spec.model import ModelSpec
from tradespace.spec.plan import Plan
from tradespace.spec.weights import WeightPlan
from tradespace.units import GiB

if TYPE_CHECKING:
    from tradespace.kernels.linear.triton_rows_search import Chain, Found

MOST_LAYERS = 8
MOST_BYTES = 2 * GiB  # of the layers that are held for the search: beyond what any cache holds


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the process is asked for: each product of `spec` in these formats, at each of `rows` tokens, on this card. again: also what is already known."""

    spec: ModelSpec
    weights: WeightPlan
    rows: tuple[int, ...]
    index: int
    most_bytes: int = MOST_BYTES
    again: bool = False


def rows_of(max_sequences: int) -> tuple[int, ...]:
    """Numbers of tokens whose tiles a plan with so many sequences uses."""
    from tradespace.kernels.linear.triton_rows_tiles import BUCKETS

    most = min(max_sequences, cuda.CODED_PASS)
    return tuple(1 if bucket == BUCKETS[0] else bucket for before, bucket in zip((0, *BUCKETS), BUCKETS, strict=False) if before < most)


def is_needed(index: int) -> bool:
    """Whether the card is one that no measured tiles ship for."""
    import torch

    from tradespace.kernels.linear.triton_rows_tiles import ships_tiles

    return not ships_tiles(torch.cuda.get_device_capability(index))


def search(
    plan: Plan, spec: ModelSpec, *, index: int, tell: Callable[[str, int, int], None], again: bool = False, rows: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Measures what is not known yet of `plan`'s products, within a quarter of its bytes beside one layer. `tell` gets (product, candidates timed, of how
    many).

    Returns a row for each product and number of tokens: name, rows, kind, size, seconds and before_s of one product (None: those did not fit),
    read_bytes, tiles and those before.
    Raises UnsupportedError for a model that the CUDA step does not compute, EngineError with the reason where the process fails.
    """
    if reason := cuda.refusal(spec, plan.kv):
        raise UnsupportedError(f"{spec.name}: {reason}")
    most_bytes = min(MOST_BYTES, plan.memory_bytes // 4) if plan.memory_bytes else MOST_BYTES
    request = Request(spec=spec, weights=plan.weights, rows=tuple(rows) or rows_of(plan.max_sequences), index=index, most_bytes=most_bytes, again=again)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([sys.executable, "-m", "tradespace.tile_search"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdin and process.stdout
        try:
            process.stdin.write(pickle.dumps(request))
            process.stdin.close()
            for line in process.stdout:
                said = json.loads(line)
                if "found" in said:
                    found.append(said["found"])
                else:
                    tell(said["what"], said["done"], said["of"])
            status = process.wait()
        finally:
            process.kill()
            process.wait()
        if status:
            errors.seek(0)
            why = errors.read().decode(errors="replace").strip().splitlines()
            raise EngineError(f"the search for tile sizes ended with {status}: {why[-1] if why else 'no reason given'}")
    return found


def chains_of(request: Request) -> Iterator[Chain]:
    """The products of a few random layers, and of the head, on the card."""
    import torch

    from tradespace.kernels.attention.dispatch import Choice
    from tradespace.kernels.linear.triton_rows_search import Chain
    from tradespace.loading.random_weights import fill_random
    from tradespace.model.cuda_step import halves_of
    from tradespace.model.transformer import Transformer

    device = torch.device("cuda", request.index) if torch.cuda.is_available() else torch.device("cpu")
    spec = request.spec
    one = replace(spec, layers=spec.layers[:1])
    shapes = Transformer(one, request.weights, attention=(Choice("paged"),), linear="cuda", max_context=16, device=device)
    layer_bytes = sum(weight.nbytes for half in halves_of(shapes) for weight in (half.qkv, half.out, half.wide, half.down))
    del shapes
    count = max(1, min(spec.L, MOST_LAYERS, request.most_bytes // max(1, layer_bytes)))
    few = replace(spec, layers=spec.layers[:count])
    model = Transformer(few, request.weights, attention=(Choice("paged"),) * count, linear="cuda", max_context=16, device=device)
    fill_random(model)
    halves = halves_of(model)
    pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    head = model.embed if model.lm_head is None else model.lm_head
    scratch = next(half.qkv.scratch for half in halves if half.qkv.scratch is not None)
    first = halves[0].ffn
    parts = {
        "qkv": ([half.qkv.packed for half in halves], None),
        "out": ([half.out.packed for half in halves], None),
        "gate and up" if first.gated else "up": ([half.wide.packed for half in halves], first.activation if first.gated else None),
        "down": ([half.down.packed for half in halves], None),
        "head": ([head.packed], None),  # pyright: ignore[reportAttributeAccessIssue]
    }
    for rows in request.rows:
        for name, (weights, gated) in parts.items():
            same = [weight for weight in weights if weight.layout == weights[0].layout and weight.codes.shape == weights[0].codes.shape]
            if rows <= cuda.FEW_ROWS:
                yield Chain(name=name, weights=same, rows=rows, scratch=scratch, gated=gated, pdl=pdl)
            elif not same[0].layout.plain:  # then activations are kernels of their own, and rows that lie as they are a library's
                yield Chain(name=name, weights=same, rows=rows, scratch=scratch, pdl=pdl)


def answer(request: Request, say: Callable[[dict[str, Any]], None], seconds: Callable[..., float] | None = None) -> None:
    """The process's work: searches each product whose tiles are not known, keeps what it found, and says so."""
    import torch

    from tradespace.kernels.linear.triton_rows_search import search_tiles
    from tradespace.kernels.linear.triton_rows_tiles import keep_measured, measured_file, measured_tiles

    path = measured_file(torch.cuda.get_device_name(request.index) if torch.cuda.is_available() else "interpreter")
    known: dict[tuple[str, int, int], Found] = {}
    for chain in chains_of(request):
        kind, M, size = chain.key
        if chain.key not in known:
            if not request.again and measured_tiles(path, kind, M, size) is not None:
                continue
            what = f"{chain.name}, {chain.rows} tokens"
            known[chain.key] = search_tiles(chain, tell=lambda done, of, what=what: say({"what": what, "done": done, "of": of}), seconds=seconds)
            if known[chain.key].seconds == float("inf"):
                raise UnsupportedError(f"{what}: no tile size of {chain.key[0]} fits this card")
            keep_measured(path, {chain.key: known[chain.key].tiles})
        found, nbytes = known[chain.key], chain.nbytes / len(chain.weights)
        row = {"name": chain.name, "rows": chain.rows, "kind": kind, "size": size, "seconds": found.seconds}
        row["before_s"] = found.before_s if found.before_s < float("inf") else None
        say({"found": row | {"read_bytes": nbytes, "tiles": asdict(found.tiles), "before": asdict(found.before)}})


def main() -> None:
    request = pickle.loads(sys.stdin.buffer.read())
    if not isinstance(request, Request):
        raise UnsupportedError("tile_search takes its question from tradespace itself, on standard input")

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)

    answer(request, say)


if __name__ == "__main__":
    from tradespace import tile_search

    tile_search.main()  # the module that the question's class belongs to, not this second copy of it
