"""Claims that a record in results/ decides. Each function takes the record of the claim's experiment; nothing here measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import log2
from typing import Any

from tradespace.lab.claims_found import CONFIRMED, HOLDS_IF, NOT_MEASURED, REFUTED, Found, judged, near
from tradespace.lab.claims_kv import KV
from tradespace.lab.claims_training import TRAINING
from tradespace.lab.fitting import exponent, misfit
from tradespace.measure.record import Record
from tradespace.spec.attention import score_matrix_bytes
from tradespace.spec.device_zoo import find_device
from tradespace.spec.formats import FORMATS
from tradespace.units import format_bytes

WHOLE, TILED = "whole matrix", "flash (torch, CPU)"
TILE_WIDTH = 64  # numbers in a head of the attention experiment


def _speed(record: Record, name: str) -> float:
    return record.figures[name].median


# ---------------------------------------------------------------------------------------------------------------- attention


def _summary(record: Record) -> dict[str, dict[str, float]]:
    from tradespace.lab.attention import summary

    return summary(record)


def _both(record: Record) -> list[tuple[int, float]]:
    """(n, time of the tiled kernel over that of the matrix) where both ran."""
    lengths = [row["n"] for row in record.rows if row["kind"] == WHOLE]
    return [(n, record.figures[f"{TILED} {n}"].median / record.figures[f"{WHOLE} {n}"].median) for n in lengths]


def matrix_memory(record: Record) -> Found:
    found = _summary(record)
    power = found[WHOLE]["bytes_power"]
    return judged(
        abs(power - 2) <= 0.1,
        f"n^{power:.2f} where scores are written out; "
        + ", ".join(f"{kind} n^{found[kind]['bytes_power']:.2f}" for kind in ("blocked on one side", "chunked")),
    )


def flash_slower(record: Record) -> Found:
    ratios = _both(record)
    n, last = ratios[-1]
    rows = _speed(record, f"{TILED} {n}") / _speed(record, f"blocked on one side {n}")
    text = f"{last:.2f} times the matrix's time at {n:,} tokens ({rows:.2f} of that with √n rows at once), {ratios[0][1]:.2f} at {ratios[0][0]:,}"
    return judged(1.5 <= last <= 2.5, text)


def longer(record: Record) -> Found:
    """Equal bytes, q, k, v and the output counted: n tokens of the matrix against m of tiles."""
    row, statistic = 4 * TILE_WIDTH * 4, 4
    found = []
    for n in (2048, 8192, 32_768):
        budget = score_matrix_bytes(n, n) + n * row
        found.append((n, budget / (row + statistic) / n))
    least = next(n for n in range(1, 100_000) if (score_matrix_bytes(n, n) + n * row) / (row + statistic) / n >= 10)
    return Found(HOLDS_IF, f"the matrix itself reaches {least:,} tokens: " + ", ".join(f"in the bytes of {n:,} tokens {ratio:.0f}×" for n, ratio in found))


def counterexample(record: Record) -> Found:
    n, ratio = _both(record)[-1]
    bytes_ratio = next(r["held_bytes"] for r in record.rows if r["kind"] == TILED and r["n"] == n) / next(
        r["held_bytes"] for r in record.rows if r["kind"] == WHOLE and r["n"] == n
    )
    return judged(
        ratio >= 1 or bytes_ratio >= 1,
        f"tiles take {bytes_ratio:.1e} of the matrix's bytes and {ratio:.2f} of its time at {n:,} tokens: both fall",
    )


def matrix_time(record: Record) -> Found:
    found = {kind: _summary(record)[kind]["time_power"] for kind in (WHOLE, "blocked on one side")}
    text = f"n^{found['blocked on one side']:.2f} a few rows of scores at a time; n^{found[WHOLE]:.2f} all at once: pages of gigabytes cost more than sums"
    return judged(abs(found["blocked on one side"] - 2) <= 0.2, text)


def no_logarithm(record: Record) -> Found:
    from tradespace.lab.attention import points

    _, timed = points(record, TILED)
    plain, with_log = misfit(timed, lambda n: n * n), misfit(timed, lambda n: n * n * log2(n))
    return judged(with_log < plain, f"times of tiles deviate from n² by {plain:.1%}, from n² log n by {with_log:.1%}; fitted n^{exponent(timed):.2f}")


def little_saving(record: Record) -> Found:
    n = 4096
    held = {kind: next(r["held_bytes"] for r in record.rows if r["kind"] == kind and r["n"] == n) for kind in (WHOLE, TILED)}
    ratio = dict(_both(record))[n]
    return judged(
        held[TILED] >= held[WHOLE] / 2 and 0.6 <= ratio <= 0.8,
        f"{format_bytes(held[WHOLE])} to {format_bytes(held[TILED])}, time {ratio - 1:+.0%}, at {n:,} tokens",
    )


def doubling(record: Record) -> Found:
    lengths = [row["n"] for row in record.rows if row["kind"] == WHOLE]
    short, long = lengths[-2:]
    ratios = {kind: _speed(record, f"{kind} {long}") / _speed(record, f"{kind} {short}") for kind in (TILED, "blocked on one side", WHOLE)}
    text = ", ".join(f"{kind} ×{ratio:.2f}" for kind, ratio in ratios.items())
    return judged(3.5 <= ratios[TILED] <= 4.5, f"{text} from {short:,} to {long:,} tokens; projections only double")


def tiles_both(record: Record) -> Found:
    from tradespace.lab.claims import find_record

    n, ratio = _both(record)[-1]
    device = find_record("flash")
    if device is None:
        return Found(NOT_MEASURED, "bytes are in the record of lab/flash_device.py, which is not there")
    power = _device_power(device)
    return judged(
        abs(power - 1) <= 0.05 and ratio < 1, f"n^{power:.2f} on {device.device['name']}; {ratio:.2f} of the matrix's time at {n:,} tokens on the CPU"
    )


# ---------------------------------------------------------------------------------------------------------------- flash on a GPU


def _device_power(record: Record) -> float:
    return exponent([(row["length"], row["forward_bytes"]) for row in record.rows if row["kind"] == "memory"])


def device_memory(record: Record) -> Found:
    rows = [row for row in record.rows if row["kind"] == "memory"]
    text = ", ".join(f"{row['length']:,} tokens {format_bytes(row['forward_bytes'])}" for row in rows)
    return judged(abs(_device_power(record) - 1) <= 0.05, f"n^{_device_power(record):.2f}: {text} (one number per query and head); twice that backward")


def _checks(record: Record) -> tuple[list[Mapping[str, Any]], float, float]:
    rows = [row for row in record.rows if row["kind"] == "check"]
    worst = {
        dtype: max(max(row.get(key, 0.0) for key in ("output", "dq", "dk", "dv")) for row in rows if row["dtype"] == dtype and row["holds"])
        for dtype in ("float32", "bfloat16")
    }
    return rows, worst["float32"], worst["bfloat16"]


def device_exact(record: Record) -> Found:
    rows, fp32, bf16 = _checks(record)
    return judged(
        all(row["holds"] for row in rows),
        f"{len(rows)} cases on {record.device['name']}: worst difference {fp32:.1e} in fp32, {bf16:.1e} in bf16, of the largest value",
    )


def not_a_window(record: Record) -> Found:
    rows, fp32, _ = _checks(record)
    return judged(
        not all(row["holds"] for row in rows), f"it sees every key and equals full attention ({fp32:.1e} in fp32); what B calls so is a sliding window"
    )


def not_traffic(record: Record) -> Found:
    best = max(
        (row for row in record.rows if row["kind"] == "speed" and "forward_tflops" in row and row["kernel"].startswith("flash") and row["length"] >= 16_384),
        key=lambda row: row["forward_tflops"],
    )
    peak = find_device("h100-80gb").matmul_flops_per_s["bf16"].require() / 1e12
    share = best["forward_tflops"] / peak
    text = f"in tiles {best['forward_tflops']:.0f} TFLOP/s, {share:.0%} of the data sheet's peak, at {best['length']:,} tokens"
    return Found(CONFIRMED if share < 0.25 else HOLDS_IF, f"scores are written out, or one token is decoded; {text}")


# ---------------------------------------------------------------------------------------------------------------- speed on a CPU


def _over_bf16(record: Record, other: str, phase: str = "decode", kernel: str = "native") -> float:
    return _speed(record, f"{kernel}, {other}, 1 × 128: {phase}") / _speed(record, f"{kernel}, bf16, 1 × 128: {phase}")


def int8_slower(record: Record) -> Found:
    ratio = _over_bf16(record, "int8")
    return judged(ratio < 1, f"{ratio:.2f} times bf16's speed, native kernels on {record.device['name']}")


def four_bits(record: Record, low: float, high: float) -> Found:
    ratio = _over_bf16(record, "stored")
    return judged(low <= 1 / ratio <= high, f"{ratio:.2f} times bf16's speed (a 4-bit file, native kernels on {record.device['name']})")


def int8_overhead(record: Record) -> Found:
    ratio = _over_bf16(record, "int8")
    return judged(
        0.85 <= ratio <= 0.95,
        f"{ratio - 1:+.0%} speed, native kernels on {record.device['name']}; torch's own: {_over_bf16(record, 'int8', kernel='sdpa') - 1:+.0%}",
    )


def dequantizing_dominates(record: Record) -> Found:
    ratio = _over_bf16(record, "int8")
    return judged(ratio < 1, f"int8 decodes at {ratio:.2f} times bf16's speed at batch 1: bytes dominate")


def compute_bound_hurts(record: Record) -> Found:
    native, torch = _over_bf16(record, "int8", "prefill"), _over_bf16(record, "int8", "prefill", "sdpa")
    text = f"prefill, int8 over bf16: {native:.2f} with integer products, {torch:.2f} where weights are dequantized first"
    if native < 1 and torch < 1:
        return Found(CONFIRMED, text)
    return Found(HOLDS_IF, "weights are dequantized for each product: " + text) if torch < 1 else Found(REFUTED, text)


def fewer_bytes(record: Record) -> Found:
    ratios = [_over_bf16(record, name) for name in ("fp32", "int8", "stored")]
    text = f"speed over bf16: fp32 (2× the bytes) {ratios[0]:.2f}, int8 (½) {ratios[1]:.2f}, 4 bits (about ⅓) {ratios[2]:.2f}"
    return judged(ratios[0] < 1 < ratios[1] < ratios[2], text)


def usually_costs(record: Record) -> Found:
    from tradespace.lab.claims import find_record

    found = {"int8 weights": 1 / _over_bf16(record, "int8"), "4-bit weights": 1 / _over_bf16(record, "stored")}
    if (attention := find_record("attention")) is not None:
        found["tiled attention"] = _both(attention)[-1][1]
    if (paging := find_record("paging")) is not None:
        found["pages"] = 1 / paging.figures["paged over contiguous 1"].median
    slower = [name for name, ratio in found.items() if ratio > 1.02]
    return judged(len(slower) > len(found) / 2, "time over that without: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in found.items()))


def quarter(record: Record) -> Found:
    bits, ratio = FORMATS["int4-g128"].bits_per_weight, _over_bf16(record, "stored")
    return judged(
        near(bits, 4, 0.1) and ratio > 1, f"{bits:.3f} bits with scales in groups of 128, {bits / 16:.3f} of fp16; decode {ratio:.2f} times bf16's speed"
    )


def _curve(record: Record) -> list[tuple[int, float]]:
    """(bytes, bytes a second) of the machine; empty where none was measured."""
    return [(int(size), float(rate)) for size, rate in record.device.get("bandwidth_curve", ())]


def caches(record: Record) -> Found:
    curve = _curve(record)
    if not curve:
        return Found(NOT_MEASURED, "the record's device has no bandwidth by size")
    ratio = curve[0][1] / curve[-1][1]
    text = ", ".join(f"{format_bytes(size)} {rate / 1e9:.0f} GB/s" for size, rate in curve[:: max(1, len(curve) // 3)])
    return judged(ratio >= 2, f"{text}: {ratio:.1f} times")


def cheap_compute(record: Record) -> Found:
    device = record.device
    edge = device["matmul_flops_per_s"]["bf16"]["value"] / device["read_bytes_per_s"]["value"]
    return judged(edge >= 4, f"{device['name']}: {edge:.0f} operations in the time of a byte; decode uses about 1")


# ---------------------------------------------------------------------------------------------------------------- pages, batches, formats


def batching_gain(record: Record) -> Found:
    found = {name.split(":")[0]: figure.median for name, figure in record.figures.items() if name.endswith("continuous over fixed")}
    return judged(
        all(ratio > 1.1 for ratio in found.values()),
        ", ".join(f"{name} {ratio:.2f}×" for name, ratio in found.items()) + " over fixed batches; tokens unchanged",
    )


def page_waste(record: Record) -> Found:
    rows = [(row["lengths"], row["paged_waste"], row["contiguous_waste"]) for row in record.rows]
    holds = all(paged < 0.05 and 0.5 <= contiguous <= 0.7 for _, paged, contiguous in rows)
    text = "; ".join(f"{name}: pages {paged:.1%}, contiguous {contiguous:.0%}" for name, paged, contiguous in rows)
    return Found(CONFIRMED if holds else HOLDS_IF, text if holds else f"sequences hold many blocks of 16: {text}")


def page_room(record: Record) -> Found:
    ratios = {row["lengths"]: (1 - row["paged_waste"]) / (1 - row["contiguous_waste"]) for row in record.rows}
    holds = all(1.5 <= ratio <= 2.5 for ratio in ratios.values())
    text = ", ".join(f"{name} {ratio:.1f}×" for name, ratio in ratios.items())
    return Found(CONFIRMED if holds else HOLDS_IF, text if holds else f"the longest request is about twice the mean one: {text}")


def page_cost(record: Record) -> Found:
    ratios = {name.rsplit(" ", 1)[1]: f.median for name, f in record.figures.items() if name.startswith("paged over")}
    return judged(
        all(ratio >= 0.95 for ratio in ratios.values()), ", ".join(f"{count} sequence(s) {ratio:.2f} of the speed" for count, ratio in ratios.items())
    )


def _losses(record: Record, name: str) -> dict[str, float]:
    return {row["model"]: row["mean_kl"] for row in record.rows if row["format"] == name}


def format_loss(record: Record, name: str, saving: float, low: float, high: float) -> Found:
    """Bits and KL of one format over the record's models."""
    losses = _losses(record, name)
    if not losses:
        return Found(NOT_MEASURED, f"the record of experiment quality has no {name}")
    bits = FORMATS[name].bits_per_weight
    holds = near(16 / bits, saving, 0.1) and all(low <= loss <= high for loss in losses.values())
    return judged(holds, f"{16 / bits:.2f}× smaller; KL " + ", ".join(f"{model} {loss:.4f}" for model, loss in losses.items()) + " nats a token")


def lattice(record: Record) -> Found:
    lattice_kl, plain = _losses(record, "e8"), _losses(record, "int2")
    models = lattice_kl.keys() & plain.keys()
    if not models:
        return Found(NOT_MEASURED, "the record of experiment quality has not both e8 and int2")
    return judged(
        all(lattice_kl[m] < plain[m] for m in models), ", ".join(f"{m}: {lattice_kl[m]:.3f} against {plain[m]:.3f} nats a token" for m in sorted(models))
    )


def start_with_int8(record: Record) -> Found:
    from tradespace.lab.claims import find_record

    losses, attention = _losses(record, "int8"), find_record("attention")
    if not losses or attention is None:
        return Found(NOT_MEASURED, "wants records of both experiments, quality (int8) and attention")
    ratio = _both(attention)[-1][1]
    return judged(
        max(losses.values()) < 0.01 and ratio < 1,
        f"int8 loses at most {max(losses.values()):.4f} nats a token; tiles take {ratio:.2f} of the matrix's time, exactly",
    )


VERDICTS: dict[int, Callable[[Record], Found]] = {
    1: matrix_memory,
    3: device_memory,
    4: flash_slower,
    5: longer,
    14: int8_slower,
    16: lambda record: four_bits(record, 2.0, 3.0),
    27: batching_gain,
    28: page_waste,
    36: counterexample,
    43: matrix_time,
    44: no_logarithm,
    47: not_a_window,
    53: caches,
    54: cheap_compute,
    55: caches,
    60: usually_costs,
    66: lambda record: format_loss(record, "int8", 2, 0.0, 0.01),
    67: int8_overhead,
    69: lambda record: format_loss(record, "int4", 4, 0.01, 0.03),
    71: lambda record: four_bits(record, 1.2, 1.3),
    81: page_room,
    82: page_cost,
    93: little_saving,
    96: dequantizing_dominates,
    97: compute_bound_hurts,
    100: device_exact,
    104: lattice,
    105: start_with_int8,
    108: fewer_bytes,
    111: doubling,
    112: not_traffic,
    113: tiles_both,
    117: quarter,
    **KV,
    **TRAINING,
}
