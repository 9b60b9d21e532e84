"""Attention over a paged cache where it lies (Triton): decode split over the keys, and ragged steps of chunks, drafts and decoding sequences mixed.

Grids depend on shapes alone, so that both can be captured. Held beside q and the output: decode's partial results, `spec.cuda.attention_scratch_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tradespace.errors import UnsupportedError
from tradespace.kernels.attention.triton_interpreter import interprets
from tradespace.kernels.attention.triton_paged_decode import decode_kernel, gather_kernel
from tradespace.kernels.attention.triton_paged_kernel import ragged_kernel
from tradespace.kernels.triton_launch import ceil_div, launch, padded, present
from tradespace.spec.attention_pattern import Prefix, Sliding
from tradespace.spec.cuda import COUNTERS
from tradespace.spec.mixers import Attention
from tradespace.spec.paged import mixer_refusal

SHORT_CONTEXT = 8192  # tokens of the longest sequence that tables have room for
GATHERED_CHANNELS = 32  # of a head that a program combines
STORES = ("fp32", "bf16", "fp16", "fp8", "int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Planes:
    """One layer's planes of a cache, slot by slot: keys (slots, K, H), values (slots, K, Hv), int8's fp16 scales (slots, K). Any strides but the last."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    store: str
    block_size: int

    @property
    def paired(self) -> bool:
        """Whether scales of two heads share a word, as where there is an even number of heads and nothing between."""
        scales = (self.key_scales, self.value_scales)
        return all(x is not None and x.shape[1] % 2 == 0 and x.stride(1) == 1 and x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0 for x in scales)

    @property
    def code(self) -> str:
        return self.store if self.store in ("fp8", "int8") else "plain"


class DecodeScratch:
    """Results of splits on their way to the one that combines them; counters are zero between calls. Shared by all layers."""

    def __init__(self, device: torch.device | str, max_sequences: int, heads: int, value_width: int, splits: int):
        rows = max_sequences * heads * splits
        self.partial = torch.zeros(rows * value_width, device=device)
        self.sums = torch.zeros(rows, device=device)
        self.counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return self.partial.nbytes + self.sums.nbytes + self.counters.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedTiles:
    """N keys at a time, warps and stages. M: rows of queries (ragged only); least: keys of a split, gather: splits are combined by a kernel of its own (decode
    only).
    """

    N: int
    warps: int = 4
    stages: int = 3
    M: int = 0
    least: int = 512
    gather: bool = False


def refusal(mixer: Attention, store: str) -> str | None:
    """Why these kernels cannot take such a layer; None: they can."""
    if store not in STORES:
        return f"paged attention reads stores {', '.join(STORES)}, not {store}"
    return mixer_refusal(mixer)


def paged_decode(
    q_BNH: Tensor,
    planes: Planes,
    tables_BM: Tensor,
    lengths_B: Tensor,
    mixer: Attention,
    scratch: DecodeScratch,
    out_BNHv: Tensor,
    *,
    splits: int,
    sinks_N: Tensor | None = None,
    tiles: PagedTiles | None = None,
    pdl: bool = False,
) -> Tensor:
    """One query a sequence, at its last position, over all that its blocks hold. A sequence of no tokens gets zeros. `splits` is a number of the host's."""
    B = q_BNH.shape[0]
    if B == 0:
        return out_BNHv
    flags, numbers, strides = _common(q_BNH, planes, mixer, out_BNHv, tables_BM, sinks_N)
    assert B * mixer.K <= COUNTERS and B * mixer.N * splits <= scratch.sums.numel(), "the scratch was made for fewer sequences or splits"
    tiles = tiles or _decode_tiles(planes, mixer, q_BNH.device, splits=splits, context=tables_BM.shape[1] * planes.block_size)
    flags |= {
        "GP": max(16, padded(mixer.G)),
        "SPLIT": 1 if splits == 1 else max(2, padded(splits)),
        "N": tiles.N,
        "LEAST": tiles.least,
        "STAGES": tiles.stages,
    }
    gather = tiles.gather and splits > 1
    launch(
        decode_kernel, (B * mixer.K, splits), q_BNH,
        q_BNH, *_pointers(planes), tables_BM, lengths_B, present(sinks_N, q_BNH), out_BNHv, scratch.partial, scratch.sums, scratch.counters,
        *numbers, splits, mixer.K, *strides, **flags, GATHER=gather, num_warps=tiles.warps, num_stages=tiles.stages, pdl=pdl, beside=True,
    )  # fmt: skip
    if gather:
        shared = {name: flags[name] for name in ("HV", "N", "LEAST", "SPLIT", "WINDOW", "SINKS")}
        launch(
            gather_kernel, (B * mixer.N, ceil_div(mixer.Hv, GATHERED_CHANNELS)), q_BNH,
            scratch.partial, scratch.sums, present(sinks_N, q_BNH), lengths_B, out_BNHv, numbers[2], splits, mixer.N, out_BNHv.stride(0), out_BNHv.stride(1),
            **shared, C=GATHERED_CHANNELS, num_warps=2, pdl=pdl, beside=True,
        )  # fmt: skip
    return out_BNHv


def paged_prefill(
    q_TNH: Tensor,
    planes: Planes,
    tables_BM: Tensor,
    starts_B1: Tensor,
    lengths_B: Tensor,
    mixer: Attention,
    out_TNHv: Tensor,
    *,
    sinks_N: Tensor | None = None,
    tiles: PagedTiles | None = None,
) -> Tensor:
    """A ragged step: sequence b's queries are rows starts[b] … starts[b + 1] - 1, the last of its lengths[b] positions. Other rows are left alone."""
    T, B = q_TNH.shape[0], len(lengths_B)
    if T == 0 or B == 0:
        return out_TNHv
    flags, numbers, strides = _common(q_TNH, planes, mixer, out_TNHv, tables_BM, sinks_N)
    tiles = tiles or _ragged_tiles(planes, mixer, q_TNH.device)
    group = padded(mixer.G)
    M = max(tiles.M, group)
    flags["HP"] = flags["HVP"] = max(flags["HP"], flags["HVP"])
    flags |= {"M": M, "N": tiles.N, "STAGES": tiles.stages, "PREFIX": isinstance(mixer.pattern, Prefix)}
    launch(
        ragged_kernel, (T // (M // group) + B, mixer.K), q_TNH,
        q_TNH, *_pointers(planes), tables_BM, starts_B1, lengths_B, present(sinks_N, q_TNH), out_TNHv,
        *numbers, B, *strides, **flags, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out_TNHv


def _common(q: Tensor, planes: Planes, mixer: Attention, out: Tensor, tables: Tensor, sinks: Tensor | None) -> tuple[dict[str, Any], tuple, tuple]:
    """Flags, numbers and strides that both kernels take."""
    if (reason := refusal(mixer, planes.store)) is not None:
        raise UnsupportedError(reason)
    assert q.stride(2) == 1 and out.stride(2) == 1 and planes.keys.stride(2) == 1 and planes.values.stride(2) == 1, "heads lie in one piece"
    pattern, coded = mixer.pattern, planes.code != "plain"
    windows = [w for w in (mixer.window, pattern.window if isinstance(pattern, Sliding) else None) if w is not None]
    fp32 = q.dtype == torch.float32
    half = 2 if coded else 1
    flags = {
        "G": mixer.G,
        "GROUP": padded(mixer.G),
        "H": mixer.H,
        "HV": mixer.Hv,
        "HP": max(16, padded(mixer.H // half)),
        "HVP": max(16, padded(mixer.Hv // half)),
        "P": planes.block_size,
        "CODE": planes.code,
        "PAIRED": planes.paired,
        "WINDOW": 0 if not windows else 2 if mixer.chunked else 1,
        "SOFTCAP": mixer.logit_softcap is not None,
        "SINKS": sinks is not None,
        "FAST": q.dtype == torch.bfloat16 and not interprets(),
        "PRECISION": "ieee" if fp32 else "tf32",
    }
    numbers = (mixer.softmax_scale, mixer.logit_softcap or 0.0, min(windows, default=0), pattern.length if isinstance(pattern, Prefix) else 0)
    scales = planes.key_scales
    word = 2 if planes.paired else 1
    strides = (
        *(q.stride(0), q.stride(1)),
        *(x // half for plane in (planes.keys, planes.values) for x in (plane.stride(0), plane.stride(1))),
        *((0, 0) if scales is None else (scales.stride(0) // word, scales.stride(1))),
        *(tables.stride(0), out.stride(0), out.stride(1)),
    )
    return flags, numbers, strides


def _pointers(planes: Planes) -> tuple[Tensor, ...]:
    """Keys, values and scales as the kernels read them: coded ones as pairs."""
    keys, values = planes.keys, planes.values
    if planes.code != "plain":
        keys, values = keys.view(torch.int16), values.view(torch.int16)
    scales = (x.view(torch.int32) if planes.paired and x is not None else x for x in (planes.key_scales, planes.value_scales))
    return keys, values, *(present(x, keys) for x in scales)


def _decode_tiles(planes: Planes, mixer: Attention, device: torch.device, *, splits: int, context: int) -> PagedTiles:
    if device.type != "cuda":
        return PagedTiles(N=16, stages=1)
    if max(mixer.H, mixer.Hv) > 128 or planes.store == "fp32":
        return PagedTiles(N=32, warps=4, stages=2)
    # measured on an H100: a context that may be long is split over many programs and combined by a kernel of its own (a last split of one warp takes 5 us to do
    # that); a short one takes few programs, whose warps share a tile: their code is short, and most of what a step of one sequence waits for is that
    if splits > 1 and context > SHORT_CONTEXT:
        # splits of one or two tiles where a sequence is not long: reasoned, not measured (of 512 keys each, four programs a head read 2,048 tokens)
        if planes.code == "plain":
            return PagedTiles(N=32, warps=1, stages=4, least=64, gather=True)
        return PagedTiles(N=128, warps=4, stages=2, least=128, gather=True)
    if planes.code == "plain":
        return PagedTiles(N=64, warps=4, stages=2) if splits > 1 else PagedTiles(N=64, warps=2, stages=3)
    return PagedTiles(N=64, warps=2, stages=4) if splits > 1 else PagedTiles(N=32, warps=1, stages=4)


def _ragged_tiles(planes: Planes, mixer: Attention, device: torch.device) -> PagedTiles:
    if device.type != "cuda":
        return PagedTiles(M=16, N=16, stages=1)
    wide = max(mixer.H, mixer.Hv) > 128 or planes.store == "fp32"
    # on an H100 few keys at a time, four warps and deep prefetch beat wider tiles in mixed steps, chunks and first prompts, over bf16, int8 and fp8 alike
    return PagedTiles(M=64, N=32, warps=4, stages=2) if wide else PagedTiles(M=128, N=32, warps=4, stages=5)
