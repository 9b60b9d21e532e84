"""Experiment distill-student: a student of about 30 M parameters on SmolLM2's tokenizer learns books, once taught by SmolLM2-135M and once alone, from the same
random weights over the same tokens; then both, and the taught one in int4, are read on held-out books.
python -m tradespace.lab.distill_student --output results/distill_student.json [--teacher FILE.gguf] [--tokens FILE.npz] [--weights FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from math import exp, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tradespace.build_training import build_model, fill, prepare
from tradespace.errors import UnsupportedError
from tradespace.formats import DenseWeight
from tradespace.kernels.view import StepBatch, positions_of
from tradespace.lab.common import data_file, markdown_table
from tradespace.lab.training_text import held_out_loss, shaped
from tradespace.loading.resolve import resolve
from tradespace.loading.tokenizer import Tokenizer
from tradespace.measure.record import Record, read_record
from tradespace.model.transformer import Transformer
from tradespace.quantize.rtn import fill_rtn
from tradespace.quantize.source import with_halves
from tradespace.spec.tensors import model_tensors
from tradespace.spec.training import TrainPlan, every
from tradespace.spec.weights import WeightPlan, weight_bytes
from tradespace.train.data import Document, Order, pack
from tradespace.train.distill import Distillation, distillation
from tradespace.train.initialise import init
from tradespace.train.loop import Limits, Objective, Trainer, next_token
from tradespace.train.optimizer import Hyper, Optimizer
from tradespace.train.schedule import Schedule
from tradespace.tuning import opened

TEACHER = "smollm2-135m"
SHAPE = "layers=10,width=320,heads=5,kv-heads=5,ffn=1024,vocab=49152,context=256"
CONTEXT, BATCH, LR, SEED = 256, 64, 1e-3, 11
CHOICE = Distillation(direction="forward", temperature=1.0, share=0.7)
HELD_OUT_BLOCKS = 512
INT4 = WeightPlan(default="int4-g64", exceptions={"embed": "bf16"})


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """As an experiment. Raises UnsupportedError without a CUDA device: on a CPU it would take a day."""
    import tempfile

    if not torch.cuda.is_available():
        raise UnsupportedError("this experiment needs a CUDA device, and torch sees none. The record that is shipped was made on an H100")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        main(["--output", str(path), *(["--steps", "20"] if quick else [])], say)
        return read_record(path)


def tokens_of_books() -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) tokens of the books in the teacher's vocabulary."""
    tokenizer = Tokenizer.from_files(resolve(TEACHER, offline=True))
    found = []
    for name in ("train.txt", "valid.txt"):
        text = data_file("pd-books", name).read_text(encoding="utf-8")
        pieces = [text[start : start + 500_000] for start in range(0, len(text), 500_000)]
        found.append(np.concatenate([np.asarray(tokenizer.encode(piece, add_special_tokens=False), np.uint16) for piece in pieces]))
    return found[0], found[1]


def load_teacher(name: str, device: torch.device) -> Transformer:
    """In bf16."""
    stored, source = opened(resolve(name, offline=True))
    model = build_model(with_halves(stored), WeightPlan(default="bf16"), context=CONTEXT, device=device)
    fill(model, source, stored)
    return model.eval()


def taught(tokens: Sequence[int], steps: int, objective: Objective, device: torch.device, say: Callable[[str], None]) -> tuple[Transformer, Trainer, float]:
    """A student after its steps, fp32 weights."""
    spec = shaped(SHAPE)
    weights = WeightPlan(default="bf16" if device.type == "cuda" else "fp32")
    model = build_model(spec, weights, context=CONTEXT, device=device)
    init(model, SEED)
    plan = TrainPlan(model=spec.name, weights=weights, context=CONTEXT, micro_batch=BATCH, checkpointing=every(1, spec.L, "none"))
    parameters = prepare(model, plan, SEED)
    data = pack([Document(tokens)], CONTEXT, source="pd-books")
    trainer = Trainer(
        model=model, parameters=parameters, optimizer=Optimizer("adamw", parameters, Hyper(lr=LR, decay=0.1)), data=data,
        order=Order(len(data), BATCH, 1, SEED), schedule=Schedule(lr=LR, steps=steps, warmup=steps // 20, shape="cosine"), objective=objective,
        limits=Limits(steps=steps, clip=1.0), device=device,
    )  # fmt: skip
    began = time.perf_counter()
    for step in range(steps):
        report = trainer.advance()
        if step % 100 == 99:
            say(f"step {step + 1}: loss {report.loss:.3f}, {(step + 1) * BATCH * CONTEXT / (time.perf_counter() - began):,.0f} tok/s")
    return model, trainer, time.perf_counter() - began


@torch.no_grad()
def against_teacher(model: Transformer, teacher: Transformer, tokens: Sequence[int], device: torch.device) -> tuple[float, float]:
    """(share of positions whose likeliest token is the teacher's, mean KL divergence from the teacher in nats)."""
    data = pack([Document(list(tokens))], CONTEXT)
    same = divergence = count = 0.0
    for start in range(0, len(data), 4):
        micro = data.micro_batch(range(start, min(start + 4, len(data))), device)
        batch = StepBatch.packed([span.length for span in micro.batch.spans], device=device)
        positions = positions_of(batch.spans, device=device)
        theirs, ours = (each.logits(each(micro.tokens_T, positions, batch)).log_softmax(dim=-1) for each in (teacher, model))
        same += float((theirs.argmax(-1) == ours.argmax(-1)).sum())
        divergence += float((theirs.exp() * (theirs - ours)).sum())
        count += len(theirs)
    return same / count, divergence / count


def coded(model: Transformer, device: torch.device) -> Transformer:
    """The same in int4 by round to nearest, its embedding in bf16."""
    found = build_model(model.spec, INT4, context=CONTEXT, device=device)
    held = dict(model.named_parameters())
    for tensor in model_tensors(model.spec):
        stem, _, kind = tensor.name.rpartition(".")
        module = found.get_submodule(stem)
        if hasattr(module, "set_rows") and kind == "weight" and not isinstance(module, DenseWeight):
            fill_rtn(module, 0, held[tensor.name].detach().float(), name=tensor.name)  # pyright: ignore[reportArgumentType]
        else:
            found.get_parameter(tensor.name).data.copy_(held[tensor.name])
    return found.eval()


def main(arguments: list[str], say: Callable[[str], None] = print) -> int:
    """Trains both, reads both, and writes the record; with --weights the taught student's numbers, in pieces that a small mail takes."""
    parser = argparse.ArgumentParser(description="a student with and without its teacher")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--teacher", default=TEACHER)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--commit", default="unknown: no repository on this machine")
    parser.add_argument("--weights", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.tokens:
        with np.load(options.tokens) as stored:
            train, held_out = stored["train"], stored["held_out"]
    else:
        train, held_out = tokens_of_books()
    train, test = train.astype(np.int32).tolist(), held_out[: HELD_OUT_BLOCKS * CONTEXT].astype(np.int32).tolist()
    if options.steps < 100:
        train, test = train[: 200 * CONTEXT], test[: 4 * CONTEXT]
    teacher = load_teacher(options.teacher, device)
    rows: list[dict[str, Any]] = []

    def read(name: str, model: Transformer, seconds: float, losses: Sequence[float]) -> None:
        loss = held_out_loss(model, test, CONTEXT, device=device)
        agreement, divergence = against_teacher(model, teacher, test, device)
        nbytes = weight_bytes(model.spec, model.plan)
        row = {"model": name, "loss": loss, "perplexity": exp(loss), "agreement": agreement, "kl": divergence, "bytes": nbytes, "seconds": seconds}
        rows.append(row | {"last_losses": list(losses[-20:])})
        say(f"{name}: perplexity {exp(loss):.2f}, agreement {agreement:.2%}, {divergence:.3f} nats, {nbytes:,} bytes, {seconds:.0f} s")

    read("teacher", teacher, 0.0, ())
    for name, objective in (("taught", distillation(teacher, CHOICE, 4096)), ("alone", next_token(4096))):
        model, trainer, seconds = taught(train, options.steps, objective, device, say)
        read(name, model.eval(), seconds, trainer.losses)
        if name == "taught":
            read("taught, int4", coded(model, device), 0.0, ())
            if options.weights:
                _pieces(model, options.weights)
        del model, trainer
    _write(options.output, rows, options.steps, options.commit, device)
    return 0


def _pieces(model: Transformer, folder: Path) -> None:
    """All parameters one after the other in bf16, in files of 15 MB."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = torch.cat([parameter.detach().to(torch.bfloat16).flatten().cpu() for parameter in model.parameters()]).view(torch.uint8).numpy().tobytes()
    for number, start in enumerate(range(0, len(flat), 15_000_000)):
        (folder / f"student.{number}.bin").write_bytes(flat[start : start + 15_000_000])


def _write(path: Path, rows: list[dict[str, Any]], steps: int, commit: str, device: torch.device) -> None:
    where: dict[str, Any] = {"name": "cpu", "kind": "cpu"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        where = {"name": properties.name, "kind": "cuda", "memory_bytes": properties.total_memory}
    by_name = {row["model"]: row for row in rows}
    better = by_name["taught"]["perplexity"] < by_name["alone"]["perplexity"] and by_name["taught"]["agreement"] > by_name["alone"]["agreement"]
    count = sum(prod(tensor.shape) for tensor in model_tensors(shaped(SHAPE)))
    notes = (
        f"{count:,} parameters ({SHAPE}), {steps} steps of {BATCH} × {CONTEXT} tokens of pd-books, AdamW {LR}, cosine, decay 0.1, clip 1, seed {SEED}; teacher "
        f"{TEACHER}, forward KL at temperature {CHOICE.temperature} for {CHOICE.share:.0%} of the loss. Taught is better on both: {'yes' if better else 'NO'}"
    )
    figures = {}
    for row in rows:
        for key, unit in (("perplexity", "perplexity"), ("agreement", "share")):
            figures[f"{row['model']}: {key}"] = {"median": row[key], "min": row[key], "max": row[key], "values": [row[key]], "unit": unit}
    record = {
        "schema": 1, "experiment": "distill-student", "command": "python -m tradespace.lab.distill_student --output results/distill_student.json",
        "commit": commit, "dirty": False, "date": datetime.now(UTC).isoformat(timespec="seconds"), "device": where,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__}, "repeats": 1, "figures": figures, "rows": rows, "notes": notes,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def markdown(record: Record) -> str:
    """Perplexity, agreement and bytes of teacher and students."""
    table = [
        (row["model"], f"{row['perplexity']:.2f}", f"{row['agreement']:.1%}", f"{row['kl']:.3f}", f"{row['bytes'] / 1e6:.1f}", f"{row['seconds']:.0f}")
        for row in record.rows
    ]
    header = ("model", "perplexity, held-out books", "same likeliest token", "KL to the teacher", "MB", "seconds of training")
    return markdown_table(header, table) + f"\n\n{record.notes}."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
