"""What attention holds beyond q, k, v and the output, and what time it takes, from 512 to 32,768 tokens: exponents fitted, and verdicts on what is said of it.

One head of 64 in fp32, causal, on this CPU; bytes are read off torch's record of allocations. The tiles of the GPU kernel come from its own record (flash).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tradespace.lab.common import command_line, markdown_table
from tradespace.lab.fitting import exponent, power_text
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Figure, Record, new_record
from tradespace.spec.attention import score_matrix_bytes
from tradespace.units import MiB, format_bytes

LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
QUICK = (512, 1024, 2048, 4096)
TIMED_FROM = 4096  # time below it is spent on starting, not on pairs
STORED_FROM = 2048  # bytes below it are constants of the tiles
REPEATS = 3
LONG = 16_384  # from here on once


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """Every kind at every length: bytes once, time three times (once where it takes seconds)."""
    rows: list[dict[str, Any]] = []
    figures: dict[str, Figure] = {}
    device = this_machine()
    for n in QUICK if quick else LENGTHS:
        rows += measured(n, device.free_bytes, figures, say)
        say(f"{n:,} tokens: " + "; ".join(f"{row['kind']} {format_bytes(row['held_bytes'])}" for row in rows if row["n"] == n))
    notes = (
        f"one head of 64, fp32, causal; bytes beyond q, k, v and the output; exponents fitted to bytes from {STORED_FROM} and times from {TIMED_FROM} tokens"
    )
    return new_record("attention", command=command_line(), device=device, repeats=REPEATS, figures=figures, rows=rows, notes=notes)


def measured(n: int, free_bytes: int, figures: dict[str, Figure], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The rows of one length; times go into `figures`. The matrix is left out, aloud, where twice its scores exceed what is free."""
    import torch

    from tradespace.lab.attention_kinds import KINDS, H, peak_bytes

    gen = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn((n, H), generator=gen) for _ in range(3))
    rows: list[dict[str, Any]] = []
    expected = None
    with torch.inference_mode():
        for kind in KINDS:
            if kind.growth == 2.0 and 2 * score_matrix_bytes(n, n) > free_bytes:
                say(f"{n:,} tokens: {kind.name} left out, its scores alone take {format_bytes(score_matrix_bytes(n, n))}")
                continue
            once = n >= LONG  # long calls need no other to warm up
            out = q if once else kind.attend(q, k, v)
            taken = []
            for _ in range(1 if once else REPEATS):
                start = time.perf_counter()
                out = kind.attend(q, k, v)
                taken.append(time.perf_counter() - start)
            held = kind.counted(n) if kind.counted else peak_bytes(partial(kind.attend, q, k, v))
            expected = out if expected is None else expected
            difference = float((out - expected).abs().max())
            figures[f"{kind.name} {n}"] = Figure.of(taken, "s")
            rows.append({"kind": kind.name, "n": n, "held_bytes": held, "growth": kind.growth, "idea": kind.idea, "difference": difference})
    return rows


def points(record: Record, kind: str) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """((n, bytes) …, (n, seconds) …) of one kind, from the lengths on where constants no longer hide the growth."""
    rows = [row for row in record.rows if row["kind"] == kind]
    stored = [(row["n"], row["held_bytes"]) for row in rows]
    timed = [(row["n"], record.figures[f"{kind} {row['n']}"].median) for row in rows]
    long = [point for point in stored if point[0] >= STORED_FROM], [point for point in timed if point[0] >= TIMED_FROM]
    return long[0] if len(long[0]) > 1 else stored, long[1] if len(long[1]) > 1 else timed


def kinds_of(record: Record) -> list[Mapping[str, Any]]:
    """One row of each kind, in the record's order."""
    return list({row["kind"]: row for row in reversed(record.rows)}.values())[::-1]


def summary(record: Record) -> dict[str, dict[str, float]]:
    """Fitted powers of n of each kind, and its bytes and seconds at the longest length."""
    found = {}
    for row in kinds_of(record):
        stored, timed = points(record, row["kind"])
        found[row["kind"]] = {
            "bytes_power": exponent(stored) if len(stored) > 1 else float("nan"),
            "time_power": exponent(timed) if len(timed) > 1 else float("nan"),
            "longest": stored[-1][0],
            "bytes": stored[-1][1],
            "seconds": timed[-1][1],
        }
    return found


def markdown(record: Record) -> str:
    found = summary(record)
    rows = []
    for row in kinds_of(record):
        own = found[row["kind"]]
        rows.append(
            (
                row["kind"],
                row["idea"],
                f"{own['longest']:,.0f}",
                format_bytes(int(own["bytes"])),
                power_text(own["bytes_power"]),
                f"{own['seconds']:.2f} s",
                power_text(own["time_power"]),
            )
        )
    header = ("kind", "held beyond q, k, v and the output", "at n", "bytes", "fitted", "time", "fitted")
    return markdown_table(header, rows, left=2) + "\n\n" + "\n".join(f"- {line}" for line in verdicts(record))


def verdicts(record: Record) -> list[str]:
    """The claims of the audit that this record decides, in a line each."""
    from tradespace.lab.claims import decide, find_record, load_claims

    claims = load_claims()
    lines = []
    for number in (2, 4, 5, 44):
        found = decide(claims[number], lambda name: record if name == "attention" else find_record(name))
        lines.append(f"“{claims[number].wording}” (claim {number}): **{found.verdict}**. {found.figure}")
    stored = summary(record)
    flash, chunks = stored["flash (torch, CPU)"], stored["chunked"]
    lines.append(
        f"“flash is O(√n)” (said of what is stored): **refuted**. Its log-sums are linear in n ({_log_sums()}); √n is what chunks of √n keys hold: "
        f"n^{chunks['bytes_power']:.2f} fitted. Torch's kernel on the CPU adds tiles of constant size: {format_bytes(int(flash['bytes']))} in all."
    )
    return lines


def _log_sums() -> str:
    """The power of n of the GPU kernel's bytes, from its own record beside this one; without it, the count."""
    from tradespace.lab.claims import find_record

    device = find_record("flash")
    if device is None:
        return "4 bytes per query and head by count"
    rows = [row for row in device.rows if row["kind"] == "memory"]
    power = exponent([(row["length"], row["forward_bytes"]) for row in rows])
    return f"n^{power:.2f} measured on {device.device['name']}; {format_bytes(rows[-1]['forward_bytes'])} at {rows[-1]['length']:,} tokens"


def draw(record: Record, path: Path) -> None:
    """Bytes and seconds over length, both on logarithmic axes, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    powers = summary(record)
    for row, colour, shape in zip(kinds_of(record), ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"), "os^Dv", strict=False):
        own = [each for each in record.rows if each["kind"] == row["kind"]]
        lengths = [each["n"] for each in own]
        power = powers[row["kind"]]
        left.plot(lengths, [each["held_bytes"] / MiB for each in own], color=colour, marker=shape, label=f"{row['kind']}: {power_text(power['bytes_power'])}")
        seconds = [record.figures[f"{row['kind']} {n}"].median for n in lengths]
        right.plot(lengths, seconds, color=colour, marker=shape, label=f"{row['kind']}: {power_text(power['time_power'])}")
    for axes, label in ((left, "held beyond q, k, v and the output, MiB"), (right, "seconds")):
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle("Attention, one head of 64 in fp32: space and time", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
