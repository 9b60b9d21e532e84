"""Tile sizes of the flash kernels, as data: `triton_flash_tiles.json` holds what was fastest where it was measured (experiment script `lab/flash_device.py`).

A device that nobody measured takes the entry of the nearest one below it in compute capability. The interpreter has small tiles, so that small shapes have
several.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from tradespace.kernels.triton_device import listed_device

FILE = Path(__file__).with_name("triton_flash_tiles.json")
PHASES = ("forward", "keys", "queries")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """M queries by N keys, warps of a program, stages of its pipeline; `tma`: tiles come through the tensor memory accelerator (Hopper and later)."""

    M: int
    N: int
    warps: int = 4
    stages: int = 1
    tma: bool = False


@lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, dict[str, Tiles]]]:
    raw = json.loads(FILE.read_text(encoding="utf-8"))
    return {device: {phase: {width: Tiles(**tiles) for width, tiles in by.items()} for phase, by in phases.items()} for device, phases in raw.items()}


def find_shipped(device: str, phase: str, width: int) -> Tiles:
    """The data's tiles of a phase for heads padded to `width`, on a device of the table ("sm90")."""
    by_width = _table()[device][phase]
    return by_width[min((key for key in by_width if int(key) >= width), key=int)]


def find_tiles(phase: str, width: int, dtype: torch.dtype, device: torch.device, *, block: int = 0) -> Tiles:
    """The tiles of a phase for heads padded to `width`; at most `block` on either side where blocks are listed. fp32 takes a quarter of the area."""
    tiles = find_shipped(listed_device(_table(), device), phase, width)
    if dtype == torch.float32 and device.type == "cuda":
        tiles = replace(tiles, M=max(16, tiles.M // 2), N=max(16, tiles.N // 2), stages=1, tma=False)
    return replace(tiles, M=min(tiles.M, block), N=min(tiles.N, block)) if block else tiles
