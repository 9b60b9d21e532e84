"""Claims about small and recomputed caches that the record of `lab kv-cache` decides. Nothing here measures."""

from __future__ import annotations

from collections.abc import Callable

from tradespace.lab.claims_found import CONFIRMED, HOLDS_IF, NOT_MEASURED, REFUTED, Found, judged
from tradespace.lab.kv_cache_findings import agreement_text, at, crossing, lengths, over_full, readings, recomputing, seconds, verdict_of
from tradespace.lab.kv_cache_kinds import FULL, IDS, MINIMAL_NAME, RECENT, ROOT
from tradespace.lab.kv_cache_simulation import against_published, is_simulated, ratio_text
from tradespace.measure.record import Record
from tradespace.units import format_bytes

Decide = Callable[[Record], Found]
FREE_KL = 1e-3  # nats a token that nobody would notice
SLOWER = 1.05  # a cache is no rival in speed if it takes this much longer


def of_model(decide: Decide) -> Decide:
    """Only of a record that has the real model's part."""
    return lambda record: decide(record) if lengths(record) else Found(NOT_MEASURED, "the record has the simulation alone: tradespace lab run kv-cache")


def of_simulation(decide: Decide) -> Decide:
    """Only of a record that has the simulation."""
    return lambda record: decide(record) if is_simulated(record) else Found(NOT_MEASURED, "the record lacks it: tradespace lab kv-cache --published-simulation")


def recompute_possible(record: Record) -> Found:
    n = lengths(record)[-1]
    rows = [row for row in record.rows if row["part"] == "model" and row["name"] in (RECENT, IDS)]
    text = f"{agreement_text(record)}; at {n:,} tokens " + ", ".join(f"{name} {1 / over_full(record, name, n):,.0f} times the time" for name in (RECENT, IDS))
    return judged(all(row["top1_agreement"] == 1 for row in rows), text)


def constant_is_recomputing(record: Record) -> Found:
    n = lengths(record)[-1]
    rows = at(record, n)
    window, ids = rows[MINIMAL_NAME], rows[IDS]
    text = (
        f"as published it recomputes nothing and forgets: a window of {window['tokens_kept']} has the full cache's likeliest token at "
        f"{window['top1_agreement']:.0%} of positions (KL {window['mean_kl']:.2g}); what does recompute keeps every token's id, "
        f"{format_bytes(ids['bytes'])} at {n:,} tokens, which is not constant"
    )
    return judged(window["top1_agreement"] == 1, text)


def published_speeds(record: Record) -> Found:
    found = against_published(record, "afresh")
    hits = [name for name, what in found.items() if what == "as published"]
    speeds = " / ".join(f"{record.figures[f'simulation: afresh {name}'].median:,.0f}" for name in ("full", *found))
    cached = record.figures["simulation: cached full"].median
    compared = ", ".join(f"{name} {what}" for name, what in found.items())
    text = f"{speeds} tokens a second here, {ratio_text(record, 'afresh')} ({compared}); full really cached {cached:,.0f}"
    if len(hits) == len(found):
        return Found(CONFIRMED, text)
    return Found(HOLDS_IF, f"{hits[0]} alone is meant, keys and values projected afresh at every step: {text}") if hits else Found(REFUTED, text)


def published_ratios(record: Record) -> Found:
    """A real model first; the simulation's own rules make it hold under them alone."""
    found = {reading: verdict_of(root, one) for reading, root, one in readings(record)}
    text = "; ".join(f"{reading} √n {root:.3g}×, O(1) {one:.3g}×" for reading, root, one in readings(record))
    real = [verdict for reading, verdict in found.items() if not reading.startswith("simulation")]
    if CONFIRMED in real:
        return Found(CONFIRMED, text)
    afresh = [verdict for reading, verdict in found.items() if "afresh" in reading]
    if afresh and afresh[0] != REFUTED:
        hits = [name for name, what in against_published(record, "afresh").items() if what == "as published"]
        which = "" if afresh[0] == CONFIRMED else f" and {hits[0]} alone is meant"
        return Found(HOLDS_IF, f"the full version caches nothing and projects all keys and values at every step{which}: {text}")
    return Found(REFUTED, text)


def moving_slower(record: Record) -> Found:
    n = lengths(record)[-1]
    found = recomputing(record, IDS, n)
    text = (
        f"at {n:,} tokens rebuilding takes {found.compute_s:.3g} s a token, reading {format_bytes(found.saved_bytes)} {found.read_s:.2g} s: "
        f"{found.compute_s / found.read_s:,.0f} times longer; {crossing([recomputing(record, IDS, each) for each in lengths(record)])}"
    )
    return judged(found.compute_s < found.read_s, text)


def root_optimal(record: Record) -> Found:
    n = lengths(record)[-1]
    rows = at(record, n)
    root = rows[ROOT]
    better = [
        name
        for name, row in rows.items()
        if name != ROOT
        and row["bytes"] <= root["bytes"]
        and row["mean_kl"] < root["mean_kl"]
        and row["group"] != "exact"
        and seconds(record, name, n) <= SLOWER * seconds(record, ROOT, n)
    ]
    windows = [row for row in rows.values() if row["group"] == "window"]
    text = f"at {n:,} tokens " + ", ".join(f"{row['name']} {over_full(record, row['name'], n):.2f}× at KL {row['mean_kl']:.2g}" for row in windows)
    if better:
        return Found(REFUTED, f"{' and '.join(better)} holds no more, is as fast and loses less: {text}")
    return Found(CONFIRMED if len(windows) > 3 else HOLDS_IF, text if len(windows) > 3 else f"no other windows are tried: {text}")


def int8_cache(record: Record) -> Found:
    n = lengths(record)[-1]
    row, slower = at(record, n)["int8"], 1 / over_full(record, "int8", n)
    text = (
        f"KL {row['mean_kl']:.2g} ± {row['kl_error']:.1g} nats, {slower - 1:+.0%} time a token at {n:,} tokens on {record.device['name']} (torch), against fp32"
    )
    return judged(row["mean_kl"] < 0.005 and slower <= SLOWER, text)


def costs_nothing(record: Record) -> Found:
    n = lengths(record)[-1]
    rows = [row for row in at(record, n).values() if row["name"] != FULL and row["bytes"] < at(record, n)[FULL]["bytes"]]
    free = [row["name"] for row in rows if row["mean_kl"] < FREE_KL and over_full(record, row["name"], n) >= 1 / SLOWER]
    text = f"of {len(rows)} caches smaller than the full one, at {n:,} tokens {len(free)} cost neither {FREE_KL:g} nats nor {SLOWER - 1:.0%} of time"
    return judged(len(free) > len(rows) / 2, text + (f": {', '.join(free)}" if free else ""))


KV: dict[int, Decide] = {
    34: of_model(recompute_possible),
    48: of_model(constant_is_recomputing),
    50: of_simulation(published_speeds),
    51: published_ratios,
    52: of_model(moving_slower),
    56: of_model(root_optimal),
    75: of_model(int8_cache),
    106: of_model(costs_nothing),
}
