"""The published simulation of KV caches, rebuilt, and beside it the same with a cache: one attention layer, half of the sequence is the prompt.

As published, nothing is cached: at every step keys and values of all tokens in view are projected from their inputs anew. "√n" is a window of 4√n tokens,
"O(1)" one of 8; both forget. Cached, each token is projected once. A step is one token's output; speed is that of steps spread over all lengths.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from tradespace.lab.common import markdown_table
from tradespace.lab.kv_cache_kinds import MINIMAL
from tradespace.measure.record import Figure, Record
from tradespace.units import MiB

LENGTH, WIDTH, HEADS = 2048, 768, 12
ROUNDS, STEPS = 7, 32  # of each round, steps at lengths spread evenly
QUICK_ROUNDS, QUICK_STEPS = 3, 12
SEED = 20231116
NAMES = ("full", "√n", "O(1)")
WAYS = ("afresh", "cached")
# what was published, for the verdict: speed over the full cache's
PUBLISHED = {"√n": 6.8, "O(1)": 21.2}
TOLERANCE = 0.3


@dataclass(frozen=True, kw_only=True)
class Toy:
    """inputs (n, D) and the four matrices of the layer; keys and values of all positions, for the steps that find them cached."""

    x_ND: Tensor
    q_DD: Tensor
    k_DD: Tensor
    v_DD: Tensor
    o_DD: Tensor
    heads: int
    keys_ND: Tensor
    values_ND: Tensor

    @classmethod
    def draw(cls, length: int, width: int, heads: int) -> Toy:
        draw = torch.Generator().manual_seed(SEED)
        x_ND = torch.randn((length, width), generator=draw)
        q, k, v, o = (torch.randn((width, width), generator=draw) * width**-0.5 for _ in range(4))
        return cls(x_ND=x_ND, q_DD=q, k_DD=k, v_DD=v, o_DD=o, heads=heads, keys_ND=linear(x_ND, k), values_ND=linear(x_ND, v))

    def step(self, at: int, window: int, *, afresh: bool) -> Tensor:
        """Output (D) of the token at position `at`, which sees the last `window` ones, itself included."""
        x_D, seen = self.x_ND[at], slice(max(0, at + 1 - window), at + 1)
        q_D = linear(x_D, self.q_DD)
        if afresh:
            k_SD, v_SD = linear(self.x_ND[seen], self.k_DD), linear(self.x_ND[seen], self.v_DD)
        else:
            self.keys_ND[at], self.values_ND[at] = linear(x_D, self.k_DD), linear(x_D, self.v_DD)
            k_SD, v_SD = self.keys_ND[seen], self.values_ND[seen]
        q_1N1H, k_1NSH, v_1NSH = (each.view(1, -1, self.heads, x_D.shape[0] // self.heads).transpose(1, 2) for each in (q_D, k_SD, v_SD))
        return linear(scaled_dot_product_attention(q_1N1H, k_1NSH, v_1NSH).reshape(-1), self.o_DD)


def windows(length: int) -> dict[str, int]:
    """Tokens that each of the three keeps.

    >>> windows(2048)
    {'full': 2048, '√n': 181, 'O(1)': 8}
    """
    return {"full": length, "√n": int(4 * length**0.5), "O(1)": MINIMAL}


@torch.inference_mode()
def simulate(*, quick: bool, length: int = LENGTH, width: int = WIDTH, heads: int = HEADS) -> tuple[list[dict[str, Any]], dict[str, Figure]]:
    """Rows and figures of all six; rounds of them take turns, and each ratio is of the same round."""
    rounds, count = (QUICK_ROUNDS, QUICK_STEPS) if quick else (ROUNDS, STEPS)
    toy = Toy.draw(length, width, heads)
    places = [length // 2 + index * (length // 2) // count for index in range(count)]
    kept = windows(length)
    steps = {(way, name): partial(toy.step, window=kept[name], afresh=way == "afresh") for way in WAYS for name in NAMES}
    assert torch.allclose(steps["afresh", "full"](places[-1]), steps["cached", "full"](places[-1]), atol=1e-3), "cached and afresh must be one computation"
    speeds: dict[tuple[str, str], list[float]] = {each: [] for each in steps}
    for _ in range(rounds):
        for each, step in steps.items():
            speeds[each].append(count / seconds_of(step, places))
    figures, rows = {}, []
    for (way, name), values in speeds.items():
        figures[f"simulation: {way} {name}"] = Figure.of(values, "tok/s")
        over = [own / full for own, full in zip(values, speeds[way, "full"], strict=True)]
        figures[f"simulation: {way} {name} over full"] = Figure.of(over, "×")
        rows.append(
            {
                "part": "simulation", "name": name, "way": way, "n": length, "tokens_kept": kept[name], "bytes": kept[name] * 2 * width * 4,
                "steps": count, "width": width, "heads": heads, "published": PUBLISHED.get(name, 1.0),
            }
        )  # fmt: skip
    once = [own / full for own, full in zip(speeds["cached", "full"], speeds["afresh", "full"], strict=True)]
    figures["simulation: full, cached over afresh"] = Figure.of(once, "×")
    return rows, figures


def seconds_of(step: Callable[[int], Tensor], places: Sequence[int]) -> float:
    """Of one pass over the places, after one step that is not counted."""
    step(places[0])
    start = time.perf_counter()
    for place in places:
        step(place)
    return time.perf_counter() - start


def ratios(record: Record, way: str) -> dict[str, float]:
    """Speed of the two windows over the full one's, done in this way."""
    return {name: record.figures[f"simulation: {way} {name} over full"].median for name in PUBLISHED}


def is_simulated(record: Record) -> bool:
    return any(row["part"] == "simulation" for row in record.rows)


def against_published(record: Record, way: str) -> dict[str, str]:
    """Of each ratio whether it comes out as published, within the tolerance: "as published", "above" or "below"."""
    found = {}
    for name, ratio in ratios(record, way).items():
        off = ratio / PUBLISHED[name] - 1
        found[name] = "as published" if abs(off) <= TOLERANCE else "above" if off > 0 else "below"
    return found


def ratio_text(record: Record, way: str) -> str:
    """Speeds of full, √n and O(1) as multiples of the first."""
    return " : ".join(["1", *(f"{ratio:.1f}" for ratio in ratios(record, way).values())])


def markdown(record: Record) -> str:
    """The six side by side, and which of the two ways gives what was published."""
    ways = {"afresh": "projected afresh at every step (as published)", "cached": "really cached"}
    rows = []
    for row in record.rows:
        if row["part"] != "simulation":
            continue
        speed, over = (record.figures[f"simulation: {row['way']} {row['name']}{what}"] for what in ("", " over full"))
        held = f"{row['bytes'] / MiB:.2f}"
        said = f"{row['published']:g}×"
        rows.append((ways[row["way"]], row["name"], f"{row['tokens_kept']:,}", held, _spread(speed), f"{over.median:.1f}×", said))
    header = ("keys and values", "cache", "tokens in view", "MiB", "tok/s", "over its full", "published")
    return markdown_table(header, rows, left=2) + "\n\n" + finding(record)


def _spread(figure: Figure) -> str:
    return f"{figure.median:,.0f} [{figure.min:,.0f}–{figure.max:,.0f}]"


def finding(record: Record) -> str:
    """Which of the two gives the published ratios, from the figures."""
    row = next(row for row in record.rows if row["part"] == "simulation")
    said = " : ".join(["1", *(f"{ratio:g}" for ratio in PUBLISHED.values())])
    found = []
    for way, words in (("afresh", "projected afresh"), ("cached", "really cached")):
        judged = ", ".join(f"{name} {what}" for name, what in against_published(record, way).items())
        found.append(f"{words} {ratio_text(record, way)} ({judged})")
    faster = record.figures["simulation: full, cached over afresh"].median
    return (
        f"The published toy (one layer of width {row['width']}, {row['heads']} heads, {row['n']:,} tokens, half of them prompt) stated {said} for full, √n and "
        f"O(1). Here, within {TOLERANCE:.0%}: {'; '.join(found)}. Really cached, its full version is {faster:.0f} times faster than as published: the "
        "published ratios compare more projecting with less, not more memory with less, and both small caches forget what they drop."
    )
