"""Experiment train-ledger: every line of the training ledger against what torch allocates, over models and methods, sequence lengths and checkpointing
policies. Weights and tokens are random: no line depends on their values. On a CPU allocations are counted by the profiler, on a card by the allocator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tradespace.adapt.recompute import recompute
from tradespace.build_training import build_model, prepare
from tradespace.cost.training import activation_peak, element_bytes, fixed_lines, rope_rows
from tradespace.lab.common import command_line, markdown_table
from tradespace.lab.kept import Clock
from tradespace.lab.place import find_lab_device
from tradespace.lab.train_gpu_ours import draw
from tradespace.lab.training_text import shaped
from tradespace.measure.allocations import kept_allocated, peak_allocated
from tradespace.measure.record import Figure, Record, new_record
from tradespace.spec.model import ModelSpec
from tradespace.spec.training import TrainPlan, parse_checkpointing, qlora_weights
from tradespace.spec.weights import TRAINING_LAYOUT, WeightPlan
from tradespace.spec.zoo import find_model
from tradespace.train.data import Document, Order, pack
from tradespace.train.loop import Limits, Trainer, next_token
from tradespace.train.optimizer import Hyper, Optimizer
from tradespace.train.schedule import Schedule
from tradespace.units import format_bytes, format_seconds

BAR = 0.05
POLICIES = ("none", "norms", "selective", "full", "every-3")
EXACT = ("weights", "adapters", "gradients", "optimizer", "dequantizing")  # lines that no step changes


@dataclass(frozen=True, kw_only=True)
class Way:
    """A model and how it learns. spec: a name of the zoo or a shape; tokens: (context, micro-batch) pairs."""

    spec: str
    method: str = "full"
    weights: str = "bf16"
    optimizer: str = "adamw"
    fused: bool = False
    tokens: tuple[tuple[int, int], ...]
    loss_tokens: int = 128

    @property
    def name(self) -> str:
        return f"{self.spec}, {self.method} {self.weights}, {self.optimizer}{' fused' if self.fused else ''}"


DEEP, WIDE = "layers=6,width=192,heads=6,kv-heads=2,ffn=512,vocab=1000,context=1024", "layers=3,width=384,heads=6,kv-heads=6,ffn=1024,vocab=6000,context=1024"
GRIDS = {
    "cpu": (
        Way(spec=DEEP, weights="fp32", tokens=((128, 4), (512, 1), (1024, 1))),
        Way(spec=DEEP, weights="bf16", optimizer="adamw8bit", fused=True, tokens=((512, 2),)),
        Way(spec=WIDE, weights="fp32", optimizer="adafactor", fused=True, tokens=((256, 2), (768, 1))),
        Way(spec=WIDE, method="lora", weights="fp32", tokens=((256, 2), (768, 1))),
        Way(spec=WIDE, method="qlora", weights="nf4", tokens=((1024, 1),)),
    ),
    "cuda": (
        Way(spec="llama-3.2-1b", fused=True, tokens=((1024, 2), (2048, 4), (8192, 1)), loss_tokens=1024),
        Way(spec="llama-3-8b", method="qlora", weights="nf4", tokens=((2048, 1), (4096, 1)), loss_tokens=1024),
        Way(spec="llama-3.2-1b", method="lora", tokens=((2048, 2), (8192, 1)), loss_tokens=1024),
        Way(spec="smollm2-135m", tokens=((512, 4), (2048, 4)), loss_tokens=2048),
        Way(spec="llama-3.2-1b", optimizer="adamw8bit", fused=True, tokens=((2048, 2),), loss_tokens=1024),
    ),
    "quick": (Way(spec=DEEP, weights="fp32", tokens=((256, 1),)), Way(spec=WIDE, method="qlora", weights="nf4", tokens=((256, 1),))),
}


def run(*, quick: bool, say: Callable[[str], None], device: str | None = None, time_limit_s: float | None = None) -> Record:
    """Steps every way under every policy. At the time limit the rest of the grid is left out, and the record says so."""
    clock = Clock(time_limit_s)
    place, described = find_lab_device(device)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for way in GRIDS["quick" if quick else place.type]:
        if clock.left_s is not None and clock.left_s < 10:
            left_out.append(way.name)
            continue
        rows += _way(way, place, clock, say)
        if place.type == "cuda":
            torch.cuda.empty_cache()
    figures = {}
    for line in dict.fromkeys(key for row in rows for key in row["predicted"]):
        off = [row["predicted"][line] / row["measured"][line] - 1 for row in rows if row["measured"].get(line)]
        if off:
            figures[f"{line}: predicted over measured"] = Figure.of([1 + each for each in off], "ratio")
    notes = findings(rows) + (f". Left out by the time limit: {'; '.join(left_out)}" if left_out else "")
    say(notes)
    return new_record("train-ledger", command=command_line(), device=described, repeats=1, figures=figures, rows=rows, notes=notes)


def plan_of(way: Way, spec: ModelSpec, *, context: int, micro_batch: int, policy: str, on_device: bool) -> TrainPlan:
    """The plan of one row: `micro_batch` sequences of `context` tokens under a checkpointing policy."""
    weights = WeightPlan(default=way.weights)
    if way.method == "qlora":
        weights = qlora_weights(way.weights, "bf16", TRAINING_LAYOUT if on_device else "stored")
    return TrainPlan(
        model=spec.name, method=way.method, weights=weights, optimizer=way.optimizer, fused=way.fused, context=context, micro_batch=micro_batch,
        loss_tokens=way.loss_tokens, logit_bytes=2 if on_device else 8, fused_kernels=on_device, checkpointing=parse_checkpointing(policy, spec.L),
    )  # fmt: skip


def _way(way: Way, place: torch.device, clock: Clock, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One model, built once; every length and policy on it."""
    longest = max(context for context, _ in way.tokens)
    spec = shaped(way.spec) if "=" in way.spec else replace(find_model(way.spec), max_context=longest)
    on_device = place.type == "cuda"
    base = plan_of(way, spec, context=longest, micro_batch=1, policy="none", on_device=on_device)
    model = build_model(spec, base.weights, context=longest, device=place)
    draw(model)
    parameters = prepare(model, base, 0)
    optimizer = Optimizer(way.optimizer, parameters, Hyper(lr=1e-6))
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    adapters = sum(parameter.nbytes for parameter in parameters.values()) if way.method != "full" else 0
    found = []
    for context, micro in way.tokens:
        data = pack([Document(torch.randint(0, spec.V, (context * micro,)).tolist())], context)
        trainer = Trainer(
            model=model, parameters=parameters, optimizer=optimizer, data=data, order=Order(len(data), micro, 1, 0), schedule=Schedule(lr=1e-6, steps=10**6),
            objective=next_token(way.loss_tokens), limits=Limits(steps=10**6), fused=way.fused, device=place,
        )  # fmt: skip
        fixed = {
            "weights": held - adapters, "adapters": adapters, "gradients": trainer.gradient_bytes, "optimizer": optimizer.nbytes,
            "dequantizing": 0 if model.workspace is None else model.workspace.nbytes,
        }  # fmt: skip
        for policy in POLICIES + (("offload",) if on_device else ()):
            plan = plan_of(way, spec, context=context, micro_batch=micro, policy=policy, on_device=on_device)
            recompute(model, plan.checkpointing)
            measured = _measured(trainer, place) | fixed
            found.append(_row(way, spec, plan, policy, measured))
            say(_shown(found[-1], clock))
        trainer.release()
    return found


def _measured(trainer: Trainer, place: torch.device) -> dict[str, int]:
    """What the layers keep after a forward pass, and the most that a step allocates."""
    trainer.advance()  # what libraries allocate once is no part of a step
    micro = trainer.data.micro_batch(trainer.order.blocks(0)[0], place)
    kept = kept_allocated(lambda: trainer.model(micro.tokens_T, micro.positions_T, micro.batch), place)
    return {"activations": kept, "step": peak_allocated(trainer.advance, place)}


def _row(way: Way, spec: ModelSpec, plan: TrainPlan, policy: str, measured: dict[str, int]) -> dict[str, Any]:
    """The step's line counts activations, too: what is there at the peak. An offloaded input leaves the device."""
    lines = {line.name: int(line.bytes.require()) for line in fixed_lines(spec, plan)}
    kept, peak = activation_peak(spec, plan)
    e = element_bytes(plan)
    predicted = {name: lines.get(name, 0) for name in EXACT}
    # beside what the layers keep: the last stream, and the angles of the step
    predicted |= {"activations": kept + plan.tokens * spec.D * e + rope_rows(spec, plan.tokens, e), "step": peak}
    for lines in (predicted, measured):
        lines["total"] = sum(lines[name] for name in (*EXACT, "step"))
    return {
        "model": way.name, "method": way.method, "context": plan.context, "micro_batch": plan.micro_batch, "policy": policy, "predicted": predicted,
        "measured": measured,
    }  # fmt: skip


def worst(row: dict[str, Any]) -> tuple[str, float]:
    """(line, how far off) of the line that is predicted worst."""
    off = {line: row["predicted"][line] / row["measured"][line] - 1 for line in row["predicted"] if row["measured"][line]}
    name = max(off, key=lambda line: abs(off[line]))
    return name, off[name]


def _shown(row: dict[str, Any], clock: Clock) -> str:
    line, off = worst(row)
    step = row["measured"]["step"]
    return (
        f"{row['model']}, {row['micro_batch']} × {row['context']}, {row['policy']}: step {format_bytes(step)} "
        f"({row['predicted']['step'] / step - 1:+.1%}), worst {line} {off:+.1%}; {format_seconds(clock.spent_s)}"
    )


def findings(rows: Sequence[dict[str, Any]]) -> str:
    """How many lines lie within the bar, and the worst."""
    checked = [(row, line) for row in rows for line in row["predicted"] if row["measured"][line]]
    off = [abs(row["predicted"][line] / row["measured"][line] - 1) for row, line in checked]
    within = sum(each <= BAR for each in off)
    row, line = checked[max(range(len(off)), key=off.__getitem__)]
    exact = all(row["predicted"][name] == row["measured"][name] for row in rows for name in EXACT)
    return (
        f"{within} of {len(off)} lines within {BAR:.0%}; the worst is {line} of {row['model']}, {row['micro_batch']} × {row['context']}, {row['policy']}: "
        f"{row['predicted'][line] / row['measured'][line] - 1:+.1%}. Weights, adapters, gradients, optimizer and workspace "
        f"{'to the byte' if exact else 'NOT to the byte'}"
    )


def markdown(record: Record) -> str:
    """For each model and length: how far off activations and the whole step are, by policy."""
    table: dict[tuple[str, str], dict[str, str]] = {}
    for row in record.rows:
        cell = "{:+.1%} / {:+.1%}".format(*(row["predicted"][line] / row["measured"][line] - 1 for line in ("activations", "total")))
        table.setdefault((row["model"], f"{row['micro_batch']} × {row['context']}"), {})[row["policy"]] = cell
    policies = list(dict.fromkeys(row["policy"] for row in record.rows))
    rows = [(*key, *(cells.get(policy, "") for policy in policies)) for key, cells in table.items()]
    return (
        markdown_table(("model", "tokens", *policies), rows, left=2)
        + f"\n\nActivations that layers keep / all bytes, predicted against measured. {record.notes}."
    )
