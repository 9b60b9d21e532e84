"""Experiment checkpointing: bytes and seconds of a training step for segments of k layers of a deep model, where the least lies against √(L·c/a), how that
least grows with the layers, and what recomputing less than whole layers saves; its time on a wider model, whose products weigh more than their calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import isqrt, sqrt
from statistics import median

import numpy as np

from tradespace.adapt.recompute import recompute
from tradespace.api import find_machine
from tradespace.build_training import build_model, prepare
from tradespace.cost.training import activation_peak, layer_kept
from tradespace.lab.common import command_line, markdown_table
from tradespace.lab.fitting import exponent
from tradespace.lab.training_text import shaped
from tradespace.measure.allocations import peak_allocated
from tradespace.measure.record import Figure, Record, new_record
from tradespace.spec.model import ModelSpec
from tradespace.spec.training import BY_LAYER, Kind, Segment, TrainPlan, best_k, every
from tradespace.spec.weights import WeightPlan
from tradespace.train.data import Document, Order, pack
from tradespace.train.initialise import init
from tradespace.train.loop import Limits, Trainer, next_token
from tradespace.train.optimizer import Hyper, Optimizer
from tradespace.train.schedule import Schedule
from tradespace.units import format_bytes, format_seconds

CONTEXT, LOSS_TOKENS = 256, 128
DEEP = 64
WIDE_LAYERS, WIDE_CONTEXT = 8, 512
LENGTHS = (64, 128, 256, 512)
LIMIT_LENGTHS = (1024, 2048, 4096)  # priced, not run


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """Seconds first (every k of one model, in turn, round by round), then bytes of the same, then the least bytes of deeper models."""
    L, rounds = (16, 1) if quick else (DEEP, 3)
    trainer, plan = _deep(L)
    by_layer: list[tuple[Kind, int, tuple[Segment, ...]]] = [(kind, 0, every(1, L, kind)) for kind in BY_LAYER]
    ways = by_layer + [("full", k, every(k, L)) for k in range(1, L + 1)]
    seconds: dict[tuple[str, int], list[float]] = {(kind, k): [] for kind, k, _ in ways}
    for number in range(rounds + 1):  # the first one warms up
        for kind, k, segments in ways:
            recompute(trainer.model, segments)
            began = time.perf_counter()
            trainer.advance()
            if number:
                seconds[kind, k].append(time.perf_counter() - began)
    say("seconds are measured; bytes follow")
    rows, figures = [], {}
    for kind, k, segments in ways:
        recompute(trainer.model, segments)
        trainer.advance()
        measured, predicted = peak_allocated(trainer.advance), activation_peak(trainer.model.spec, plan, segments)[1]
        figures[_name(kind, k)] = Figure.of(seconds[kind, k], "s")
        rows.append({"part": "k", "kind": kind, "k": k, "L": L, "bytes": measured, "predicted_bytes": predicted, "seconds": figures[_name(kind, k)].median})
        say(f"{_name(kind, k)}: {format_bytes(measured)} ({format_bytes(predicted)} predicted), {format_seconds(rows[-1]['seconds'])}")
    rows += _wide(rounds, say)
    for deep in (16, 32) if quick else LENGTHS:
        rows += _least(deep, say)
    for deep in LIMIT_LENGTHS:
        _, k, predicted = _best(deep)
        rows.append({"part": "L priced", "kind": "full", "k": k, "L": deep, "predicted_bytes": predicted})
    notes = findings(rows)
    say(notes)
    return new_record("checkpointing", command=command_line(), device=find_machine(None), repeats=rounds, figures=figures, rows=rows, notes=notes)


def _wide(rounds: int, say: Callable[[str], None]) -> list[dict[str, object]]:
    """Seconds and bytes of a model of few wide layers, the kinds in turn."""
    spec = shaped(f"layers={WIDE_LAYERS},width=512,heads=8,kv-heads=8,ffn=1408,vocab=320,context={WIDE_CONTEXT}")
    trainer, plan = _trainer(spec, WIDE_CONTEXT)
    kinds: tuple[Kind, ...] = (*BY_LAYER, "full")
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind in kinds:
            recompute(trainer.model, every(1, spec.L, kind))
            began = time.perf_counter()
            trainer.advance()
            if number:
                seconds[kind].append(time.perf_counter() - began)
    rows: list[dict[str, object]] = []
    for kind in kinds:
        segments = every(1, spec.L, kind)
        recompute(trainer.model, segments)
        measured, predicted = peak_allocated(trainer.advance), activation_peak(spec, plan, segments)[1]
        row: dict[str, object] = {"part": "wide", "kind": kind, "k": 1 if kind == "full" else 0, "L": spec.L, "bytes": measured, "predicted_bytes": predicted}
        row["seconds"] = median(seconds[kind])
        rows.append(row)
        say(f"wide, {kind}: {format_bytes(measured)} ({format_bytes(predicted)} predicted), {format_seconds(median(seconds[kind]))}")
    return rows


def _name(kind: str, k: int) -> str:
    return kind if k == 0 else f"every {k}"


def _plan(spec: ModelSpec, context: int = CONTEXT) -> TrainPlan:
    segments = every(1, spec.L, "none")
    return TrainPlan(model=spec.name, weights=WeightPlan(default="fp32"), context=context, checkpointing=segments, optimizer="sgd", loss_tokens=LOSS_TOKENS)


def _spec(L: int) -> ModelSpec:
    return shaped(f"layers={L},width=64,heads=4,kv-heads=2,ffn=192,vocab=320,context={CONTEXT}")


def _deep(L: int) -> tuple[Trainer, TrainPlan]:
    return _trainer(_spec(L), CONTEXT)


def _trainer(spec: ModelSpec, context: int) -> tuple[Trainer, TrainPlan]:
    plan = _plan(spec, context)
    model = build_model(spec, plan.weights, context=context)
    init(model, 0)
    parameters = prepare(model, plan, 0)
    data = pack([Document((np.arange(context * 4) % spec.V).tolist())], context)
    optimizer, order, schedule = Optimizer("sgd", parameters, Hyper()), Order(len(data), 1, 1, 0), Schedule(lr=1e-6, steps=10**6)
    return Trainer(model, parameters, optimizer, data, order, schedule, next_token(LOSS_TOKENS), Limits(steps=10**6)), plan


def _best(L: int) -> tuple[float, int, int]:
    """(k*, the k of least bytes by the ledger, those bytes)."""
    spec = _spec(L)
    plan = _plan(spec)
    star = _star(L)
    near = range(max(1, round(star) - 3), round(star) + 4)
    bytes_of = {k: activation_peak(spec, plan, every(k, L))[1] for k in near}
    k = min(near, key=lambda k: bytes_of[k])
    return star, k, bytes_of[k]


def _star(L: int) -> float:
    layer = _spec(1).layers[0]
    c, a = (layer_kept(layer, 64, CONTEXT, 4, kind) for kind in ("full", "none"))
    return best_k(L, c, a)


def _least(L: int, say: Callable[[str], None]) -> list[dict[str, object]]:
    """Measured bytes of a model of L layers at its best k, and with each layer by itself."""
    star, k, _ = _best(L)
    trainer, plan = _deep(L)
    rows: list[dict[str, object]] = []
    for part, every_k in (("L", k), ("L each", 1)):
        recompute(trainer.model, every(every_k, L))
        trainer.advance()
        measured, predicted = peak_allocated(trainer.advance), activation_peak(trainer.model.spec, plan, every(every_k, L))[1]
        rows.append({"part": part, "kind": "full", "k": every_k, "L": L, "k_star": star, "bytes": measured, "predicted_bytes": predicted})
        say(f"L = {L}, every {every_k} (k* = {star:.1f}): {format_bytes(measured)} ({format_bytes(predicted)} predicted)")
    return rows


def findings(rows: Sequence[dict]) -> str:
    """What the rows say, in sentences."""
    sweep = [row for row in rows if row["part"] == "k"]
    by_k = {row["k"]: row for row in sweep if row["kind"] == "full"}
    kinds = {row["kind"]: row for row in sweep if row["k"] == 0}
    L = sweep[0]["L"]
    star, least = _star(L), min(by_k.values(), key=lambda row: row["bytes"])
    quoted = by_k[isqrt(L)]
    none = kinds["none"]

    def against(row: dict) -> str:
        return f"{none['bytes'] / row['bytes']:.2f}× fewer bytes ({1 - row['bytes'] / none['bytes']:.1%}) for {row['seconds'] / none['seconds'] - 1:+.1%} time"

    within = "within" if abs(least["k"] - star) <= 1 else "NOT within"
    layer = _spec(1).layers[0]
    sizes = {kind: layer_kept(layer, 64, CONTEXT, 4, kind) for kind in ("none", "norms", "selective")}
    lengths = [row for row in rows if row["part"] == "L" and row["k_star"] >= 2]
    priced = [row for row in rows if row["part"] == "L priced"]
    text = (
        f"L = {L}: k* = √(L·c/a) = {star:.2f}, least measured at k = {least['k']} ({within} one step); the quoted k = √L = {isqrt(L)} takes "
        f" {quoted['bytes'] / least['bytes']:.2f}× those bytes. Every layer by itself: {against(by_k[1])}; at the least: "
        f"{against(least)}; norms: {against(kinds['norms'])}; selective: {against(kinds['selective'])} (kept by a layer: norms "
        f"{1 - sizes['norms'] / sizes['none']:.1%} fewer, selective {sizes['none'] / sizes['selective']:.2f}× fewer). "
        f"Worst prediction {max(abs(row['predicted_bytes'] / row['bytes'] - 1) for row in rows if 'bytes' in row):.1%} off"
    )
    wide = {row["kind"]: row for row in rows if row["part"] == "wide"}
    if wide:
        none = wide["none"]
        text += f". {none['L']} layers of width 512: norms {against(wide['norms'])}; selective {against(wide['selective'])}; full {against(wide['full'])}"
    if len(lengths) > 1:
        power = exponent([(row["L"], row["bytes"]) for row in lengths])
        text += f". Least bytes over L = {', '.join(str(row['L']) for row in lengths)} grow as L^{power:.2f}"
    if len(priced) > 1:
        steps = [exponent([(one["L"], one["predicted_bytes"]), (two["L"], two["predicted_bytes"])]) for one, two in pairwise(priced)]
        text += f"; by the ledger between L = {', '.join(str(row['L']) for row in priced)}: " + ", ".join(f"L^{power:.2f}" for power in steps)
    return text


def markdown(record: Record) -> str:
    """Bytes and seconds by segment."""
    sweep = [row for row in record.rows if row["part"] == "k"]
    plain = next(row for row in sweep if row["kind"] == "none")
    shown = {1, 2, 3, 4, isqrt(plain["L"]), round(sqrt(plain["L"]) * 2), plain["L"]}
    table = [
        (
            row["kind"] if row["k"] == 0 else f"every {row['k']} layers",
            format_bytes(row["bytes"]),
            f"{row['predicted_bytes'] / row['bytes'] - 1:+.1%}",
            f"{row['bytes'] / plain['bytes']:.3f}",
            f"{row['seconds'] / plain['seconds']:.2f}",
        )
        for row in sweep
        if row["k"] == 0 or row["k"] in shown
    ]
    return markdown_table(("checkpointing", "bytes of a step", "predicted", "of none's bytes", "of none's time"), table) + f"\n\n{record.notes}"
