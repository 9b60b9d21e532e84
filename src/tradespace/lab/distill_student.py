"""Experiment distill-student: a student of about 30 M parameters on SmolLM2's tokenizer learns books, once taught by SmolLM2-135M and once alone, from the same
random weights over the same tokens in the same order; both, and the taught one in int4, are read on held-out books, and the engine's decode is timed.

With a time limit both trainings get the same number of steps: as many as fit, by a measurement of either. Finished trainings are kept (`lab.kept`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tradespace.build_training import build_model, fill, prepare
from tradespace.errors import BudgetError
from tradespace.lab.common import command_line, data_file, markdown_table
from tradespace.lab.kept import Clock, folder_of, go_on, kept, settings_of
from tradespace.lab.place import find_lab_device
from tradespace.lab.student_reading import INT4, against_teacher, decode_speeds, rounded, written
from tradespace.lab.training_text import digest, held_out_loss, shaped
from tradespace.loading.resolve import ModelFiles, resolve
from tradespace.loading.tokenizer import Tokenizer
from tradespace.measure.record import Figure, Record, new_record
from tradespace.model.transformer import Transformer
from tradespace.quantize.source import with_halves
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import model_tensors
from tradespace.spec.training import TrainPlan, every
from tradespace.spec.weights import WeightPlan, weight_bytes
from tradespace.train.data import Document, Order, Packed, pack
from tradespace.train.distill import Distillation, distillation
from tradespace.train.initialise import init
from tradespace.train.loop import Limits, Objective, Trainer, next_token
from tradespace.train.optimizer import Hyper, Optimizer
from tradespace.train.schedule import Schedule
from tradespace.tuning import opened
from tradespace.units import format_seconds

TEACHER = "smollm2-135m"
CHOICE = Distillation(direction="forward", temperature=1.0, share=0.7)
SEED = 11
STUDENT = "student.safetensors"
READING_S = 100.0  # kept back of a time limit: held-out text, int4, decode


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is learned. steps: at the most; chars of the books are tokenized; loss_tokens: whose logits exist at once."""

    shape: str
    steps: int
    context: int
    batch: int
    lr: float
    chars: int
    test_blocks: int
    loss_tokens: int
    decay: float = 0.1
    clip: float = 1.0


LARGE = "layers=10,width=320,heads=5,kv-heads=5,ffn=1024"  # 30 M parameters with SmolLM2's vocabulary
SCALES = {
    "cuda": Scale(shape=LARGE, steps=2000, context=256, batch=64, lr=1e-3, chars=25_000_000, test_blocks=512, loss_tokens=4096),
    "cpu": Scale(shape=LARGE, steps=200, context=128, batch=8, lr=1e-3, chars=2_000_000, test_blocks=64, loss_tokens=128),
    "quick": Scale(shape="layers=2,width=64,heads=2,kv-heads=2,ffn=192", steps=20, context=32, batch=2, lr=1e-3, chars=40_000, test_blocks=4, loss_tokens=32),
}


def run(
    *, quick: bool, say: Callable[[str], None], device: str | None = None, time_limit_s: float | None = None, model: str | None = None
) -> Record:  # fmt: skip
    """Trains both, reads both, and the taught one in int4. `model`: the teacher, by default SmolLM2-135M. Raises BudgetError for a limit that holds nothing."""
    clock = Clock(time_limit_s)
    place, described = find_lab_device(device)
    scale = SCALES["quick" if quick else place.type]
    files = resolve(model or TEACHER, offline=model is not None)
    teacher = load_teacher(files, scale.context, place)
    train, test = tokens_of_books(files, scale)
    say(f"{len(train):,} tokens, {len(test):,} held out, in {format_seconds(clock.spent_s)}; teacher {Path(teacher.spec.name).name} on {described.name}")
    spec, data = shaped(f"{scale.shape},vocab={teacher.spec.V},context={scale.context}"), pack([Document(train)], scale.context, source="pd-books")
    objectives = {"taught": distillation(teacher, CHOICE, scale.loss_tokens), "alone": next_token(scale.loss_tokens)}
    common = settings_of(**asdict(scale), teacher=digest_of(files), choice=asdict(CHOICE), seed=SEED, device=described.name, tokens=digest(train))
    steps = _steps(spec, data, objectives, scale, common, place, clock, say)
    rows = [_read("teacher", teacher, teacher, test, scale, place, say)]
    students: dict[str, Transformer] = {}
    for name, objective in objectives.items():
        settings = {**common, "steps": steps, "student": name}

        def learn(folder: Path, name: str = name, objective: Objective = objective, settings: dict[str, Any] = settings) -> Mapping[str, Any]:
            say(f"{name}: {steps} steps of {scale.batch} × {scale.context} tokens")
            return _trained(folder, spec, data, scale, steps, objective, settings, place, clock, say)

        found = kept("distill-student", settings, learn)
        students[name] = _student(spec, scale, folder_of("distill-student", settings) / STUDENT, place)
        rows.append(_read(name, students[name], teacher, test, scale, place, say) | {"train_s": found["seconds"], "last_losses": found["losses"][-20:]})
    int4 = rounded(students["taught"], INT4, scale.context, place)
    rows.append(_read("taught, int4", int4, teacher, test, scale, place, say) | {"bytes": weight_bytes(spec, INT4)})
    folder = folder_of("distill-student", {**common, "steps": steps, "student": "taught"})
    dense, coded = written(students["taught"], files, folder)
    models = {"teacher": str(files.weights[0]) if files.kind == "gguf" else str(files.folder), "taught": str(dense), "taught, int4": str(coded)}
    rows += decode_speeds(models, place.type, scale.context, say)
    notes = findings(rows, spec, scale, steps, Path(teacher.spec.name).name)
    say(notes)
    return new_record("distill-student", command=command_line(), device=described, repeats=1, figures=_figures(rows), rows=rows, notes=notes)


def tokens_of_books(files: ModelFiles, scale: Scale) -> tuple[list[int], list[int]]:
    """(training, held-out) tokens of the books in the teacher's vocabulary."""
    tokenizer = Tokenizer.from_files(files)
    found = []
    for name in ("train.txt", "valid.txt"):
        text = data_file("pd-books", name).read_text(encoding="utf-8")[: scale.chars]
        pieces = [text[start : start + 500_000] for start in range(0, len(text), 500_000)]
        found.append(np.concatenate([np.asarray(tokenizer.encode(piece, add_special_tokens=False), np.int32) for piece in pieces]).tolist())
    return found[0], found[1][: scale.test_blocks * scale.context]


def digest_of(files: ModelFiles) -> str:
    """Name and bytes of a teacher's files: what tells one from another without reading them."""
    return " ".join(f"{path.name}:{path.stat().st_size}" for path in files.weights)


def load_teacher(files: ModelFiles, context: int, place: torch.device) -> Transformer:
    """In bf16 on a device, else in fp32."""
    stored, source = opened(files)
    model = build_model(with_halves(stored), WeightPlan(default="bf16" if place.type == "cuda" else "fp32"), context=context, device=place)
    fill(model, source, stored)
    return model.eval()


def _student(spec: ModelSpec, scale: Scale, path: Path | None, place: torch.device) -> Transformer:
    """With the weights in `path`, else as every student begins."""
    model = build_model(spec, WeightPlan(default="bf16" if place.type == "cuda" else "fp32"), context=scale.context, device=place)
    if path is None:
        init(model, SEED)
        return model
    stored = load_file(path)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(stored[name])
    return model.eval()


def _trainer(spec: ModelSpec, data: Packed, scale: Scale, steps: int, objective: Objective, settings: Mapping[str, Any], place: torch.device) -> Trainer:
    model = _student(spec, scale, None, place)
    plan = TrainPlan(model=spec.name, weights=model.plan, context=scale.context, micro_batch=scale.batch, checkpointing=every(1, spec.L, "none"))
    parameters = prepare(model, plan, SEED)
    return Trainer(
        model=model, parameters=parameters, optimizer=Optimizer("adamw", parameters, Hyper(lr=scale.lr, decay=scale.decay)), data=data,
        order=Order(len(data), scale.batch, 1, SEED), schedule=Schedule(lr=scale.lr, steps=steps, warmup=steps // 20, shape="cosine"), objective=objective,
        limits=Limits(steps=steps, clip=scale.clip, save_every=500), device=place, settings=settings,
    )  # fmt: skip


def _trained(
    folder: Path, spec: ModelSpec, data: Packed, scale: Scale, steps: int, objective: Objective, settings: Mapping[str, Any], place: torch.device,
    clock: Clock, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    trainer = _trainer(spec, data, scale, steps, objective, settings, place)
    began = time.monotonic()
    first = go_on(trainer, folder, say, clock, every=100 if steps >= 200 else 10)
    seconds = (time.monotonic() - began) * steps / max(1, steps - first)
    save_file({name: parameter.detach().cpu().contiguous() for name, parameter in trainer.model.named_parameters()}, folder / STUDENT)
    return {"seconds": seconds, "losses": trainer.losses}


def _steps(
    spec: ModelSpec, data: Packed, objectives: Mapping[str, Objective], scale: Scale, common: Mapping[str, Any], place: torch.device, clock: Clock,
    say: Callable[[str], None],
) -> int:  # fmt: skip
    """Steps that both trainings take: the scale's, or as many as fit in what is left. Kept, so that a run that goes on takes as many."""
    if clock.left_s is None:
        return scale.steps

    def probe(folder: Path) -> dict[str, Any]:
        seconds = {name: _seconds_of_a_step(_trainer(spec, data, scale, 100, objective, {}, place), place) for name, objective in objectives.items()}
        left = (clock.left_s or 0.0) - READING_S
        return {"steps": min(scale.steps, int(0.9 * left / sum(seconds.values())) // 10 * 10), "seconds": seconds}

    found = kept("distill-student", {**common, "time_limit_s": clock.limit_s}, probe)
    shown = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in found["seconds"].items())
    say(f"a step takes {shown}: {found['steps']} steps of each within the limit")
    if found["steps"] < 10:
        need = READING_S + 10 * sum(found["seconds"].values()) / 0.9 + clock.spent_s
        raise BudgetError(f"10 steps of each take {format_seconds(need)}; {format_seconds(clock.limit_s or 0.0)} are allowed. Give --time-limit {need:.0f}s")
    return found["steps"]


def _seconds_of_a_step(trainer: Trainer, place: torch.device, warm: int = 3, timed: int = 5) -> float:
    began = 0.0
    for number in range(warm + timed):
        if number == warm:
            if place.type == "cuda":
                torch.cuda.synchronize()
            began = time.monotonic()
        trainer.advance()
    if place.type == "cuda":
        torch.cuda.synchronize()
    return (time.monotonic() - began) / timed


def _read(
    name: str, model: Transformer, teacher: Transformer, test: Sequence[int], scale: Scale, place: torch.device, say: Callable[[str], None]
) -> dict[str, Any]:
    loss = held_out_loss(model, test, scale.context, device=place)
    agreement, divergence = against_teacher(model, teacher, test, scale.context, place)
    say(f"{name}: perplexity {exp(loss):.2f}, agreement {agreement:.2%}, {divergence:.3f} nats from the teacher")
    return {
        "part": "quality",
        "model": name,
        "loss": loss,
        "perplexity": exp(loss),
        "agreement": agreement,
        "kl": divergence,
        "bytes": weight_bytes(model.spec, WeightPlan(default="bf16")),
    }


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    found = {}
    for row in rows:
        if row["part"] == "quality":
            found[f"{row['model']}: perplexity"] = Figure.of([row["perplexity"]], "perplexity")
            found[f"{row['model']}: agreement"] = Figure.of([row["agreement"]], "share")
        elif "speeds" in row:
            found[f"{row['model']} on {row['device']}: decode"] = Figure.of(row["speeds"], "tok/s")
    return found


def findings(rows: Sequence[Mapping[str, Any]], spec: ModelSpec, scale: Scale, steps: int, teacher: str) -> str:
    """Both bars, and the recipe."""
    by_name = {row["model"]: row for row in rows if row["part"] == "quality"}
    taught, alone = by_name["taught"], by_name["alone"]
    better = taught["perplexity"] < alone["perplexity"] and taught["agreement"] > alone["agreement"]
    count = sum(prod(tensor.shape) for tensor in model_tensors(spec))
    return (
        f"Taught is better on both: {'yes' if better else 'NO'} (perplexity {taught['perplexity']:.2f} against {alone['perplexity']:.2f}, agreement "
        f"{taught['agreement']:.1%} against {alone['agreement']:.1%}). {count:,} parameters ({scale.shape}), {steps} steps of {scale.batch} × {scale.context} "
        f"tokens of pd-books, AdamW {scale.lr}, cosine, decay {scale.decay}, clip {scale.clip}, seed {SEED}; teacher {teacher}, forward KL at temperature "
        f"{CHOICE.temperature} for {CHOICE.share:.0%} of the loss. int4: groups of 64, scales by least squared error, the embedding in int8"
    )


def markdown(record: Record) -> str:
    """Perplexity, agreement and bytes of teacher and students; their decode through the engine."""
    quality = [
        (row["model"], f"{row['perplexity']:.2f}", f"{row['agreement']:.1%}", f"{row['kl']:.3f}", f"{row['bytes'] / 1e6:.1f}", f"{row.get('train_s', 0):.0f}")
        for row in record.rows
        if row["part"] == "quality"
    ]
    speed = [(row["model"], row["device"], f"{row['tokens_per_s']:,.0f}", f"{row['weight_bytes'] / 1e6:.1f}") for row in record.rows if "tokens_per_s" in row]
    refused = [f"{row['model']} on {row['device']} did not run: {row['not_run']}" for row in record.rows if "not_run" in row]
    header = ("model", "perplexity, held-out books", "same likeliest token", "KL to the teacher", "MB", "seconds of training")
    parts = [markdown_table(header, quality)]
    if speed:
        parts.append(markdown_table(("model", "engine on", "decode, tok/s", "MB of weights"), speed, left=2))
    return "\n\n".join([*parts, *refused, f"{record.notes}."])
