"""Tile sizes of the products of few rows, as data: `triton_rows_tiles.json` holds what was fastest inside a
decode step of the Llama-3-8B shape on an H100."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from tradespace.kernels.triton_device import listed_device
from tradespace.spec.cuda import COUNTERS, PARTIALS

FILE = Path(__file__).with_name("triton_rows_tiles.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTiles:
    """N weight rows by K columns (where no group fixes them), warps and stages of a program; columns are split until there are `programs` of them."""

    N: int
    K: int = 128
    warps: int = 4
    stages: int = 4
    programs: int = 512

    def split_for(self, rows: int, columns: int, K: int, M: int, *, gated: bool) -> int:
        """Into how many pieces the columns are split: a number of shapes alone. At least two steps each, and no more partial sums than there is room for."""
        tiles, steps = -(-rows // self.N), -(-columns // K)
        room = PARTIALS // (tiles * self.N * M * (2 if gated else 1))
        split = max(1, min(round(self.programs / tiles), steps // 2, room))
        if tiles > COUNTERS or split == 1:
            return 1
        return -(-steps // -(-steps // split))  # none that would have nothing to do


@lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, dict[str, dict]]]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def find_tiles(kind: str, group: int, M: int, rows: int, columns: int, *, gated: bool, device: torch.device) -> RowTiles:
    """The tiles for M tokens (padded) and a matrix of this size: the measured entry with the nearest number of weights at that M, or the next larger M."""
    table = _table()
    name = listed_device(table, device)
    entries = table[name].get(f"{kind}-{group}" if group else kind) or table[name]["any"]
    by_size = entries[min((key for key in entries if int(key) >= M), key=int, default=max(entries, key=int))]
    size = rows * columns * (2 if gated else 1)
    return RowTiles(**by_size[min(by_size, key=lambda key: abs(float(key) - size))])
