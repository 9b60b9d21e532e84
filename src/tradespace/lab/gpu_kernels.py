"""The kernels of a decode step on a CUDA device, each alone: at which share of the memory's bandwidth they read what they must.

products    1, 16 and 64 rows with each matrix of the Llama-3-8B shape, in the formats that a step decodes in registers
attention   sequences that decode over pages of each store, at the tiles that a step takes
tiles       the same at other tiles: what `kernels/attention/paged.py` could take instead

As in a step no cache holds what is read: a matrix or a cache for each of some layers, one after the other, captured as one graph in which a kernel is set up
while the one before drains. The bandwidth is measured in the same run, by torch's largest number of 4 GiB.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tradespace.errors import UnsupportedError
from tradespace.lab.common import command_line, markdown_table
from tradespace.measure.record import Figure, Record, new_record
from tradespace.spec import cuda
from tradespace.spec.mixers import Attention
from tradespace.spec.weights import WeightPlan
from tradespace.spec.zoo import find_model
from tradespace.units import GiB

if TYPE_CHECKING:
    from tradespace.kernels.attention.paged import PagedTiles
    from tradespace.kernels.linear.triton_rows_search import Chain

MODEL = "llama-3-8b"
FORMATS = ("bf16", "int8", "fp8", "int4-g128", "nf4")
ROWS = (1, 16, 64)
BLOCK = 32
CELLS = ((1, 2048), (1, 32_768), (16, 2048), (64, 1024), (256, 512))  # sequences, tokens of each
CONTEXT = 32_768  # that the plan allows: tables are so wide, and who is alone is split so far
READ_BYTES = GiB  # of all layers' caches in a pass, at least: beyond what the device's own cache holds
MOST_LAYERS = 32
STORES = {"bf16": 2, "fp8": 1, "int8": 1}  # and the bytes of a number
# other tiles: (keys, warps), stages, and least keys of a split. As keys are found through tables, Triton 3.6 keeps one tile under way for 2 stages (and 4), two
# for 5, and three for 7
TILES, STAGES, LEAST = ((32, 1), (32, 2), (64, 2), (64, 4), (128, 4)), (2, 5, 7), (128, 512)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Attention of `sequences` that decode with `length` tokens each, in a plan of `context` tokens."""

    store: str
    sequences: int
    length: int
    context: int = CONTEXT
    mixer: Attention

    @property
    def nbytes(self) -> int:
        """Keys and values of one layer, with their scales."""
        scale = 2 if self.store == "int8" else 0
        return self.sequences * self.length * self.mixer.K * sum(width * STORES[self.store] + scale for width in (self.mixer.H, self.mixer.Hv))

    @property
    def layers(self) -> int:
        return max(1, min(MOST_LAYERS, -(-READ_BYTES // self.nbytes)))


def attention_call(cell: Cell, device: Any, layers: int) -> Callable[[PagedTiles | None], None]:
    """A pass at some tiles (None: those that a step takes) over `layers` caches of random numbers, whose blocks lie in any order."""
    import torch

    from tradespace.kernels.attention.paged import DecodeScratch, Planes, paged_decode
    from tradespace.kv.cache import KVCache
    from tradespace.spec.kv import KVPlan
    from tradespace.spec.model import DenseFFN, LayerSpec, ModelSpec

    mixer, B = cell.mixer, cell.sequences
    blocks = -(-cell.length // BLOCK)
    layer = LayerSpec(mixer=mixer, ffn=DenseFFN(F=64))
    spec = ModelSpec(name="one", family="llama", D=mixer.N * mixer.H, V=64, layers=(layer,) * layers, max_context=cell.context)
    kv = KVPlan(store=cell.store, block_size=BLOCK)
    cache = KVCache(
        spec, kv, num_blocks=B * blocks, block_size=BLOCK, dtype=torch.bfloat16, device=device, max_sequences=B, max_context=cell.context
    )  # fmt: skip
    planes = []
    for index in range(layers):
        keys, values, key_scales, value_scales = cache.slot_planes(index)
        for plane in (keys, values):
            plane.copy_(torch.randn(plane.shape, device=device).mul_(20 if cell.store == "int8" else 1).to(plane.dtype))
        for plane in (key_scales, value_scales):
            if plane is not None:
                plane.fill_(0.01)
        planes.append(Planes(keys=keys, values=values, key_scales=key_scales, value_scales=value_scales, store=cell.store, block_size=BLOCK))
    on_card = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_card else 4
    splits = cuda.decode_splits(B, mixer.K, cell.context, processors)
    tables_BM = torch.zeros(B, -(-cell.context // BLOCK), dtype=torch.int32, device=device)
    tables_BM[:, :blocks] = torch.randperm(B * blocks, device=device).view(B, blocks)
    lengths_B = torch.full((B,), cell.length, dtype=torch.int32, device=device)
    q_BNH = torch.randn(B, mixer.N, mixer.H, device=device).bfloat16()
    out_BNHv = torch.empty(B, mixer.N, mixer.Hv, dtype=torch.bfloat16, device=device)
    scratch = DecodeScratch(device, B, mixer.N, mixer.Hv, splits)
    pdl = on_card and torch.cuda.get_device_capability(device) >= (9, 0)

    def attend(tiles: PagedTiles | None) -> None:
        for each in planes:
            paged_decode(q_BNH, each, tables_BM, lengths_B, mixer, scratch, out_BNHv, splits=splits, tiles=tiles, pdl=pdl)

    return attend


def seconds_of(run: Callable[[], None], device: Any) -> float:
    """Of a pass; infinite for tiles that the device cannot hold."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    from tradespace.kernels.linear.triton_rows_search import graph_seconds, wall_seconds

    try:
        run()  # compiles
    except (CompilationError, OutOfResources, PTXASError):
        return float("inf")
    return graph_seconds(run) if device.type == "cuda" else wall_seconds(run)


def candidates(*, split: bool) -> Iterator[PagedTiles]:
    """Other tiles of decode attention. split: over programs, whose results a kernel of its own combines."""
    from tradespace.kernels.attention.paged import PagedTiles

    for (N, warps), stages, least in itertools.product(TILES, STAGES, LEAST if split else LEAST[-1:]):
        yield PagedTiles(N=N, warps=warps, stages=stages, least=least, gather=split)


def attention_rows(cell: Cell, device: Any, read: float, tiles: Sequence[PagedTiles] = ()) -> list[dict[str, Any]]:
    """The tiles that a step takes, or each of `tiles`."""
    call = attention_call(cell, device, cell.layers)
    rows = []
    for each in tiles or (None,):
        seconds = seconds_of(partial(call, each), device) / cell.layers
        if seconds == float("inf"):
            continue
        what = f"{cell.sequences} × {cell.length:,} tokens"
        row = {"part": "tiles" if each else "attention", "what": what, "format": cell.store, "us": seconds * 1e6, "share": cell.nbytes / seconds / read}
        rows.append(row | ({"tiles": asdict(each)} if each else {}))
    return sorted(rows, key=lambda row: row["us"])


def product_rows(chain: Chain, weights: str, device: Any, read: float) -> dict[str, Any]:
    """As a step computes it: one row may take the kernel of streams."""
    import torch

    from tradespace.kernels.linear.triton_rows import rows_linear

    x_TC, scale_T = chain.activations()
    R = chain.weights[0].rows // (2 if chain.gated else 1)
    out_TR = torch.empty(chain.rows, R, dtype=torch.bfloat16, device=device)

    def run() -> None:
        for weight in chain.weights:
            rows_linear(x_TC, weight, chain.scratch, x_scale_T=scale_T, out_TR=out_TR, gated=chain.gated, pdl=chain.pdl)

    seconds = seconds_of(run, device) / len(chain.weights)
    each = chain.nbytes / len(chain.weights)
    what = f"{chain.name}, {chain.weights[0].columns} → {R}{' gated' if chain.gated else ''}, {chain.rows} rows"
    return {"part": "products", "what": what, "format": weights, "us": seconds * 1e6, "share": each / seconds / read}


def read_bytes_per_s(device: Any, nbytes: int = 4 * GiB) -> float:
    """By torch's largest number of so many bytes."""
    import torch

    numbers = torch.zeros(nbytes // 4, device=device)
    found = torch.empty((), device=device)
    return nbytes / seconds_of(lambda: torch.amax(numbers, 0, out=found), device)  # pyright: ignore[reportArgumentType]


def run(*, quick: bool, say: Callable[[str], None], only: Sequence[str]) -> Record:
    """Measures these parts. quick: int8 alone. Raises UnsupportedError without a CUDA device."""
    import torch

    from tradespace.llm_cuda import device_spec
    from tradespace.tile_search import Request, chains_of

    if not torch.cuda.is_available():
        raise UnsupportedError("gpu-kernels measures a CUDA device, and torch sees none. `tradespace bench decode MODEL` measures a step on this CPU")
    device, spec = torch.device("cuda", 0), replace(find_model(MODEL), max_context=CONTEXT)
    mixer = spec.layers[0].mixer
    assert isinstance(mixer, Attention), f"{MODEL} is a plain transformer"
    read = read_bytes_per_s(device)
    say(f"reading: {read / 1e9:,.0f} GB/s")
    rows: list[dict[str, Any]] = []
    for weights in ("int8",) if quick else FORMATS:
        if "products" in only:
            held = WeightPlan(default=weights, exceptions={} if weights == "bf16" else {"embed": "bf16"}, layout="cuda")
            for chain in chains_of(Request(spec=spec, weights=held, rows=ROWS, index=0)):
                rows.append(product_rows(chain, weights, device, read))
            say(f"{weights}: " + ", ".join(f"{row['share']:.0%}" for row in rows if row["format"] == weights))
    for part in ("attention", "tiles"):
        for store in ("int8",) if quick else STORES:
            for sequences, length in CELLS if part in only else ():
                cell = Cell(store=store, sequences=sequences, length=length, mixer=mixer)
                others = tuple(candidates(split=cuda.decode_splits(sequences, mixer.K, cell.context) > 1)) if part == "tiles" else ()
                found = attention_rows(cell, device, read, others)
                rows += found
                said = (f"{row['what']}: {row['us']:.1f} us, {row['share']:.0%}" + (f" with {row['tiles']}" if part == "tiles" else "") for row in found)
                say(f"{store}, {next(said, f'{sequences} × {length:,} tokens: no tiles that this card can hold')}")
                torch.cuda.empty_cache()
    figures = {"reading": Figure.of([read / 1e9], "GB/s")}
    figures |= {f"{row['part']}:{row['what']} {row['format']}": Figure.of([row["us"]], "us") for row in reversed(rows)}  # of tiles the fastest
    return new_record("gpu-kernels", command=command_line(), device=device_spec(0), repeats=1, figures=figures, rows=rows)


def markdown(record: Record) -> str:
    """A line a product and a cache; of other tiles the fastest of each."""
    fastest: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in record.rows:
        fastest.setdefault((row["part"], row["what"], row["format"]), row)
    rows = [(row["what"], row["format"], f"{row['us']:.1f}", f"{row['share']:.0%}", _tiles(row)) for row in fastest.values()]
    return markdown_table(("what", "format", "us", "of the bandwidth", "tiles"), rows)


def _tiles(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in row["tiles"].items() if name != "M") if "tiles" in row else "as shipped"
