"""Experiment checkpointing: bytes and seconds of a training step for segments of k layers of a deep model, and where the least lies against √(L·c/a)."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from tradespace.adapt.recompute import recompute
from tradespace.api import find_machine
from tradespace.build_training import build_model, prepare
from tradespace.cost.training import activation_peak, layer_kept
from tradespace.lab.common import command_line, markdown_table
from tradespace.measure.allocations import peak_allocated
from tradespace.measure.record import Figure, Record, new_record
from tradespace.spec.training import TrainPlan, best_k, every
from tradespace.spec.weights import WeightPlan
from tradespace.train.data import Document, Order, pack
from tradespace.train.initialise import init
from tradespace.train.loop import Limits, Trainer, next_token
from tradespace.train.optimizer import Hyper, Optimizer
from tradespace.train.schedule import Schedule
from tradespace.tuning_models import parse_shape
from tradespace.units import format_bytes, format_seconds

CONTEXT = 256


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """Measures every k with the others' weights and data the same."""
    L = 16 if quick else 64
    spec = parse_shape(f"layers={L},width=64,heads=4,kv-heads=2,ffn=192,vocab=320")
    assert spec is not None, "a shape"
    plan = TrainPlan(model=spec.name, weights=WeightPlan(default="fp32"), context=CONTEXT, checkpointing=every(1, L, "none"))
    model = build_model(spec, plan.weights, context=CONTEXT)
    init(model, 0)
    parameters = prepare(model, plan, 0)
    data = pack([Document((np.arange(CONTEXT * 4) % spec.V).tolist())], CONTEXT)
    optimizer = Optimizer("sgd", parameters, Hyper())
    trainer = Trainer(model, parameters, optimizer, data, Order(len(data), 1, 1, 0), Schedule(lr=1e-6, steps=10**6), next_token(128), Limits(steps=10**6))
    ways = [("none", 0, every(1, L, "none")), ("selective", 0, every(1, L, "selective"))]
    ways += [("full", k, every(k, L)) for k in range(1, L + 1) if k <= 10 or L % k == 0]
    rows, figures = [], {}
    for kind, k, segments in ways:
        recompute(model, segments)
        trainer.advance()
        measured = peak_allocated(trainer.advance)
        seconds = []
        for _ in range(2 if quick else 5):
            began = time.perf_counter()
            trainer.advance()
            seconds.append(time.perf_counter() - began)
        predicted = activation_peak(spec, plan, segments)[1]
        name = kind if k == 0 else f"every {k}"
        figures[name] = Figure.of(seconds, "s")
        rows.append({"kind": kind, "k": k, "bytes": measured, "predicted_bytes": predicted, "seconds": figures[name].median})
        say(f"{name}: {format_bytes(measured)} ({format_bytes(predicted)} predicted), {format_seconds(figures[name].median)}")
    c, a = (layer_kept(spec.layers[0], spec.D, CONTEXT, 4, kind) for kind in ("full", "none"))
    best = min((row for row in rows if row["kind"] == "full"), key=lambda row: row["bytes"])
    notes = f"L = {L}, c = {c} bytes, a = {a} bytes: k* = √(L·c/a) = {best_k(L, c, a):.2f}; least measured at k = {best['k']}"
    say(notes)
    return new_record("checkpointing", command=command_line(), device=find_machine(None), repeats=2 if quick else 5, figures=figures, rows=rows, notes=notes)


def markdown(record: Record) -> str:
    """Bytes and seconds by segment."""
    plain = next(row for row in record.rows if row["kind"] == "none")
    table = [
        (
            row["kind"] if row["k"] == 0 else f"every {row['k']} layers",
            format_bytes(row["bytes"]),
            f"{row['predicted_bytes'] / row['bytes'] - 1:+.1%}",
            f"{row['bytes'] / plain['bytes']:.3f}",
            f"{row['seconds'] / plain['seconds']:.2f}",
        )
        for row in record.rows
    ]
    return markdown_table(("checkpointing", "bytes of a step", "predicted", "of none's bytes", "of none's time"), table) + f"\n\n{record.notes}"
