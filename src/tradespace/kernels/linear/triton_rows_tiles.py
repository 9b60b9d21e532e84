"""Tile sizes of the products of few rows, as data.

`triton_rows_tiles.json` ships what was fastest inside a decode step of the Llama-3-8B shape on an H100, and what the search found for Llama-2-70B's. What
`triton_rows_search.py` measured on a card here lies in a file of the same shape in the cache folder, one for each card and version of the kernel, and comes
first for products of its sizes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tradespace.home import cache_folder
from tradespace.kernels.triton_device import listed_device
from tradespace.spec.cuda import COUNTERS, PARTIALS

FILE = Path(__file__).with_name("triton_rows_tiles.json")
KERNEL = Path(__file__).with_name("triton_rows_kernel.py")
BUCKETS = (8, 16, 64, 128)  # padded numbers of tokens that tiles are measured for
SAME_SIZE = 0.02  # by what part a matrix's number of weights may differ from that of a measured one that it shares tiles with

Tiles = dict[str, dict[str, dict[str, dict[str, Any]]]]  # kind and group → padded tokens → weights of the matrix → RowTiles


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


_measurements = [0]  # how often measured tiles were kept


def edition() -> int:
    """Changes when tiles do: what was found before is then out of date."""
    return _measurements[0]


@lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, dict[str, dict]]]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def key_of(kind: str, group: int) -> str:
    """How a table names a kind of codes."""
    return f"{kind}-{group}" if group else kind


def measured_file(card: str) -> Path:
    """Where this card's measured tiles of this version of the kernel are kept."""
    version = hashlib.sha256(KERNEL.read_bytes()).hexdigest()[:12]
    return cache_folder() / "tiles" / f"{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}-{version}.json"


@lru_cache(maxsize=8)
def read_measured(path: Path) -> Tiles:
    """What is kept there; nothing where there is no such file or it cannot be read as tiles (it is then measured again)."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        found = json.loads(path.read_text(encoding="utf-8"))
        for by_tokens in found.values():
            for by_size in by_tokens.values():
                for entry in by_size.values():
                    RowTiles(**entry)
        return found
    return {}


def keep_measured(path: Path, found: Mapping[tuple[str, int, int], RowTiles]) -> None:
    """Adds tiles by (kind and group, padded tokens, weights of the matrix) to what is kept. The file is replaced as a whole."""
    tiles = json.loads(json.dumps(read_measured(path)))
    for (kind, tokens, size), entry in found.items():
        tiles.setdefault(kind, {}).setdefault(str(tokens), {})[str(size)] = asdict(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(tiles, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    read_measured.cache_clear()
    _measurements[0] += 1


def measured_tiles(path: Path, kind: str, M: int, size: int) -> RowTiles | None:
    """The tiles that were measured for M padded tokens and a matrix of about `size` weights."""
    by_tokens = read_measured(path).get(kind, {})
    by_size = by_tokens.get(min((key for key in by_tokens if int(key) >= M), key=int, default=""), {})
    nearest = min(by_size, key=lambda key: abs(float(key) - size), default=None)
    return RowTiles(**by_size[nearest]) if nearest is not None and abs(float(nearest) / size - 1) <= SAME_SIZE else None


@lru_cache(maxsize=8)
def _measured_here(device: torch.device) -> Path:
    return measured_file(torch.cuda.get_device_name(device))


def ships_tiles(capability: tuple[int, int]) -> bool:
    """Whether tiles measured on a card of this compute capability ship with us (an entry for any format alone is a guess)."""
    return len(_table().get(f"sm{capability[0]}{capability[1]}", {})) > 1


def find_tiles(kind: str, group: int, M: int, rows: int, columns: int, *, gated: bool, device: torch.device) -> RowTiles:
    """The tiles for M tokens (padded) and a matrix of this size: those measured on this card for it, else the shipped entry with the nearest number of weights
    at that M, or the next larger M."""
    table, size = _table(), rows * columns * (2 if gated else 1)
    if device.type == "cuda" and (here := measured_tiles(_measured_here(device), key_of(kind, group), M, size)):
        return here
    name = listed_device(table, device)
    entries = table[name].get(key_of(kind, group)) or table[name]["any"]
    by_size = entries[min((key for key in entries if int(key) >= M), key=int, default=max(entries, key=int))]
    return RowTiles(**by_size[min(by_size, key=lambda key: abs(float(key) - size))])
