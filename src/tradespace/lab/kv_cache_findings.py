"""What the record of the cache experiment says, in words that its numbers choose: windows are one finding, rebuilding exactly is another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tradespace.lab.claims_found import CONFIRMED, HOLDS_IF, REFUTED
from tradespace.lab.fitting import exponent, power_text
from tradespace.lab.kv_cache_kinds import FULL, IDS, INPUT, INPUT8, MINIMAL_NAME, NOTHING, RECENT, ROOT, SINKS_NAME
from tradespace.lab.kv_cache_simulation import PUBLISHED, TOLERANCE, is_simulated, ratios
from tradespace.measure.record import Record
from tradespace.spec.kv import token_bytes
from tradespace.spec.zoo import find_model
from tradespace.units import format_bytes

NOISE = 1.03  # what a ratio of times must exceed to count as faster
SLOW_WINDOW = "At none of these lengths is the smallest one faster: keeping its ring in order costs what not reading the rest spares"
UNSHARED = "gpt2"  # a model whose heads share no keys and values

Row = Mapping[str, Any]


def lengths(record: Record) -> list[int]:
    return sorted({row["n"] for row in record.rows if row["part"] == "model"})


def at(record: Record, n: int) -> dict[str, Row]:
    """The real model's rows at n tokens, by name."""
    return {row["name"]: row for row in record.rows if row["part"] == "model" and row["n"] == n}


def seconds(record: Record, name: str, n: int) -> float:
    """Median time of a token."""
    return record.figures[f"model: {name} at {n}"].median


def over_full(record: Record, name: str, n: int) -> float:
    """Speed over the full cache's: the median of paired ratios."""
    return record.figures[f"model: {name} at {n} over full"].median


# ---------------------------------------------------------------------------------------------------------------- (a) windows


def windows_text(record: Record) -> str:
    """Finding (a): what a window gains in speed, the most that it could, and what it loses."""
    all_n = lengths(record)
    n = all_n[-1]
    rows = at(record, n)
    names = [name for name in (ROOT, SINKS_NAME, MINIMAL_NAME) if name in rows]
    speeds = ", ".join(f"{name} ({rows[name]['tokens_kept']} tokens) {over_full(record, name, n):.2f}" for name in names)
    faster = [each for each in all_n if over_full(record, MINIMAL_NAME, each) > NOISE]
    since = f"From {faster[0]:,} tokens on the smallest one is faster at all" if faster else SLOW_WINDOW
    most = over_full(record, NOTHING, n)
    losses = ", ".join(f"{name} {rows[name]['perplexity']:.4g} (KL {rows[name]['mean_kl']:.2g})" for name in names)
    full = f"{rows[FULL]['perplexity']:.4g} with the full cache"
    return (
        f"**(a) A small window does less work, and forgets.** At {n:,} tokens it decodes at so many times the full cache's speed: {speeds}. {since}. With no "
        f"past at all the model would reach {most:.2f}: the rest of a step is weights and fixed costs, so no window gains more. What it costs: perplexity of "
        f"the same {rows[FULL]['num_tokens']} tokens is {full}, {losses}. None of these is the full cache made smaller: all are lossy."
    )


# ---------------------------------------------------------------------------------------------------------------- (b) rebuilding


@dataclass(frozen=True, kw_only=True)
class Recomputing:
    """One cache that holds less and computes the rest, at one length: bytes saved over the full cache, seconds of a token that computing takes (what it is
    slower by, and what it spares of reading), and the bandwidth at which both would be equal (None: nothing is saved, or computing cost no time)."""

    n: int
    saved_bytes: int
    compute_s: float
    read_s: float

    @property
    def pays_below(self) -> float | None:
        """Bytes a second: memory slower than this makes recomputing the faster one."""
        return self.saved_bytes / self.compute_s if self.saved_bytes > 0 and self.compute_s > 0 else None


def recomputing(record: Record, name: str, n: int) -> Recomputing:
    """From the record's times and its device's bandwidth."""
    rows = at(record, n)
    saved = rows[FULL]["bytes"] - rows[name]["bytes"]
    read_s = saved / record.device["read_bytes_per_s"]["value"]
    return Recomputing(n=n, saved_bytes=saved, compute_s=seconds(record, name, n) - seconds(record, FULL, n) + read_s, read_s=read_s)


def crossing(found: list[Recomputing]) -> str:
    """From which length on computing would take less time than reading, along the fitted power of its growth: reading grows as n."""
    if len(found) < 2:
        return "one length alone shows no growth"
    power = exponent([(each.n, each.compute_s) for each in found])
    last = found[-1]
    gap = last.compute_s / last.read_s
    if gap <= 1:
        return f"it pays at {last.n:,} tokens already"
    if power >= 0.98:  # within the noise of a fit, as fast as reading or faster
        return f"computing grows as {power_text(power)}, reading as n: at no length does it pay, and a longer text does not help"
    length = last.n * gap ** (1 / (1 - power))
    return f"computing grows as {power_text(power)}, reading as n: along these fits it would pay from {length:.1e} tokens on"


def rebuilding_text(record: Record) -> str:
    """Finding (b): what rebuilding exactly costs, and where it would pay."""
    all_n = lengths(record)
    n, device = all_n[-1], record.device
    rows = at(record, n)
    times = "; ".join(_times(record, rows[name], all_n) for name in (RECENT, IDS) if name in rows)
    found = [recomputing(record, IDS, length) for length in all_n]
    last, most = found[-1], max(each.pays_below or 0.0 for each in found)
    disk = device["disk_bytes_per_s"]
    rates = f"memory here reads {device['read_bytes_per_s']['value'] / 1e9:.1f} GB/s" + (f", the disk {disk['value'] / 1e9:.1f} GB/s" if disk else "")
    return (
        f"**(b) Rebuilding exactly costs time.** {times}. Predictions are the full cache's: {agreement_text(record)}. At {n:,} tokens computing one older "
        f"token's keys and values again takes {last.compute_s / n * 1e6:,.1f} µs, reading them {last.read_s / n * 1e6:.2f} µs: {crossing(found)}. It would pay "
        f"with memory slower than {most / 1e6:,.0f} MB/s ({rates}).{_input_text(record, n)}"
    )


def _times(record: Record, row: Row, all_n: list[int]) -> str:
    """A rebuilding cache's time over the full one's at the shortest and the longest length, and its bytes at the longest."""
    at_each = ", ".join(f"{1 / over_full(record, row['name'], n):,.0f} at {n:,} tokens" for n in dict.fromkeys((all_n[0], all_n[-1])))
    stay, more = format_bytes(row["bytes"]), format_bytes(row["transient_bytes"])
    return f"{row['name']} takes so many times the full cache's time: {at_each} ({stay} stay, {more} more at a step's peak; {row['timed_tokens']} tokens timed)"


def agreement_text(record: Record) -> str:
    """How equal the exact caches' predictions are, over all lengths."""
    rows = [row for row in record.rows if row["part"] == "model" and row["exact"] and row["name"] != FULL]
    total = sum(row["num_tokens"] for row in rows)
    same = sum(round(row["top1_agreement"] * row["num_tokens"]) for row in rows)
    return f"the same likeliest token at {same} of {total} positions, KL at most {max(row['mean_kl'] for row in rows):.0e} nats"


def _input_text(record: Record, n: int) -> str:
    """The layer's input held instead: what it saves here and on a model without shared heads, and what it costs."""
    rows = at(record, n)
    if INPUT not in rows:
        return ""
    share = rows[INPUT]["bytes"] / rows[FULL]["bytes"]
    other = find_model(UNSHARED)
    unshared = token_bytes(other, "x-fp32") / token_bytes(other, "fp32")
    text = (
        f" Holding each layer's input and projecting keys and values from it when they are read takes {share:.2f} of the full cache's bytes here, "
        f"{unshared:.2f} with heads that share nothing ({UNSHARED}), and {1 / over_full(record, INPUT, n):.1f} times its time a token"
    )
    if INPUT8 in rows:
        own = recomputing(record, INPUT8, n)
        where = "" if own.pays_below is None else f" and would pay below {own.pays_below / 1e9:.2f} GB/s"
        held = f"{rows[INPUT8]['bytes'] / rows[FULL]['bytes']:.2f} of the bytes"
        text += f"; in int8 it takes {held}, {1 / over_full(record, INPUT8, n):.1f} times the time{where}"
    return text + "."


# ---------------------------------------------------------------------------------------------------------------- the published ratios


def readings(record: Record) -> list[tuple[str, float, float]]:
    """(reading, speed of √n, speed of O(1), over the full cache) for every reading that the record decides."""
    found = []
    if lengths(record):
        n = lengths(record)[-1]
        model = next(iter(at(record, n).values()))["model"]
        found.append((f"windows on {model} at {n:,} tokens", over_full(record, ROOT, n), over_full(record, MINIMAL_NAME, n)))
        found.append((f"exact on {model} at {n:,} tokens (rebuilt)", over_full(record, RECENT, n), over_full(record, IDS, n)))
    if is_simulated(record):
        for way, words in (("afresh", "projected afresh at every step"), ("cached", "really cached")):
            found.append((f"simulation, keys and values {words}", *ratios(record, way).values()))
    return found


def verdict_of(root: float, constant: float) -> str:
    """Confirmed where both ratios are near the published ones; holds if: one is."""
    near = [abs(ratio / said - 1) <= TOLERANCE for ratio, said in zip((root, constant), PUBLISHED.values(), strict=True)]
    return CONFIRMED if all(near) else HOLDS_IF if any(near) else REFUTED


def reading_text(reading: str, root: float, constant: float) -> str:
    verdict = verdict_of(root, constant)
    condition = ""
    if verdict == HOLDS_IF:
        which = next(name for name, ratio in zip(PUBLISHED, (root, constant), strict=True) if abs(ratio / PUBLISHED[name] - 1) <= TOLERANCE)
        condition = f" {which} alone is meant"
    digits = 2 if max(root, constant) < 2 else 1
    shown = [f"{ratio:.{digits}f}×" if ratio >= 0.1 else f"{ratio:.2g}×" for ratio in (root, constant)]
    return f"{reading}: √n {shown[0]}, O(1) {shown[1]}: **{verdict}**{condition}"


def verdict_lines(record: Record) -> list[str]:
    """The claim that √n is 6.8 and O(1) 21 times faster, under each reading."""
    said = " and ".join(f"{name} {ratio:g}×" for name, ratio in PUBLISHED.items())
    return [f"“{said} as fast as the full cache”, within {TOLERANCE:.0%}, by reading:", *(f"- {reading_text(*each)}" for each in readings(record))]


def paragraphs(record: Record) -> list[str]:
    """Both findings, where the real model was measured."""
    return [windows_text(record), rebuilding_text(record)] if lengths(record) else []
