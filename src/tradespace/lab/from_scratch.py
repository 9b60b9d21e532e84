"""Experiment from-scratch: a small Llama learns books, here and by transformers' Trainer, from the same random weights and the same data in the same order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import exp
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from tradespace.api import find_machine
from tradespace.lab.common import command_line, markdown_table
from tradespace.lab.training_text import bigram_loss, book_tokens, digest, held_out_loss, scratch_trainer, shaped
from tradespace.measure.record import Figure, Record, new_record
from tradespace.spec.tensors import model_tensors
from tradespace.train.data import Document, Packed, pack
from tradespace.tuning_models import save_model

SHAPE = "layers=6,width=256,heads=4,kv-heads=2,ffn=768,vocab=2048,context=128"
CONTEXT, BATCH, LR, DECAY, CLIP, SEED = 128, 4, 1e-3, 0.1, 1.0, 7
WINDOW, EARLY = 20, 50
EARLY_BAR, MEAN_BAR = 1e-4, 0.01


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """Trains both and compares their losses step by step; then the held-out loss of ours beside a bigram's of the same tokens."""
    steps = 40 if quick else 1000
    spec = shaped(SHAPE)
    train, held_out = book_tokens(spec.V, 400_000 if quick else 2_400_000)
    data = pack([Document(train)], CONTEXT, source="pd-books")
    trainer = scratch_trainer(spec, data, steps=steps, batch=BATCH, lr=LR, seed=SEED, warmup=steps // 20, decay=DECAY, clip=CLIP)
    with TemporaryDirectory() as folder:
        save_model(trainer.model, Path(folder), dtype=torch.float32)
        began = time.perf_counter()
        for step in range(steps):
            report = trainer.advance()
            if step % 100 == 99:
                say(f"ours: step {step + 1}, loss {report.loss:.4f}")
        ours_s = time.perf_counter() - began
        say("transformers' Trainer")
        began = time.perf_counter()
        theirs = trainer_losses(Path(folder), data, [blocks for step in range(steps) for blocks in trainer.order.blocks(step)], steps)
        theirs_s = time.perf_counter() - began
    apart = np.abs(np.array(trainer.losses) - np.array(theirs))
    means = [_means(losses) for losses in (trainer.losses, theirs)]
    off = np.abs(means[0] / means[1] - 1)
    tokens = trainer.data.context * BATCH * steps
    test = held_out[: CONTEXT * 256]
    loss, bigram = held_out_loss(trainer.model, test, CONTEXT), bigram_loss(train[:tokens], test, spec.V)
    count = sum(int(np.prod(tensor.shape)) for tensor in model_tensors(spec))
    figures = {
        f"largest difference of the first {EARLY} losses": Figure.of([float(apart[:EARLY].max())], "nats"),
        f"largest difference of {WINDOW}-step means": Figure.of([float(off.max())], "share"),
        "held-out loss": Figure.of([loss], "nats"),
        "held-out loss of a bigram": Figure.of([bigram], "nats"),
        "seconds, ours": Figure.of([ours_s], "s"),
        "seconds, transformers": Figure.of([theirs_s], "s"),
    }
    held = float(apart[:EARLY].max()) <= EARLY_BAR and float(off.max()) <= MEAN_BAR
    notes = (
        f"{count:,} parameters, {steps} steps of {BATCH} × {CONTEXT} tokens in fp32, AdamW {LR}, decay {DECAY}, clip {CLIP}, cosine after {steps // 20} steps, "
        f"seed {SEED}, tokens {digest(train)}. First {EARLY} losses within {apart[:EARLY].max():.1e} (bar {EARLY_BAR:g}), {WINDOW}-step means within "
        f"{off.max():.3%} (bar {MEAN_BAR:.0%}): {'held' if held else 'NOT held'}. Held-out perplexity {exp(loss):.1f}; "
        f"a bigram of the same tokens {exp(bigram):.1f}. Seconds are of a machine that others used, too"
    )
    say(notes)
    rows = [
        {"step": step + 1, "ours": trainer.losses[step], "transformers": theirs[step], "apart": float(apart[step])}
        for step in range(steps)
        if step < EARLY or step % WINDOW == WINDOW - 1
    ]
    return new_record("from-scratch", command=command_line(), device=find_machine(None), repeats=1, figures=figures, rows=rows, notes=notes)


def _means(losses: Sequence[float]) -> np.ndarray:
    """Means of WINDOW consecutive losses, at every step that has so many behind it."""
    return np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid")


def trainer_losses(folder: Path, data: Packed, order: Sequence[Sequence[int]], steps: int) -> list[float]:
    """Every step's loss by transformers' Trainer from the weights in `folder`, over these blocks in this order. Its own log rounds; this does not."""
    import transformers

    blocks = [torch.from_numpy(data.tokens[data.starts[block] : data.starts[block] + CONTEXT].astype(np.int64)) for micro in order for block in micro]
    losses: list[float] = []

    class Noting(transformers.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(*args, **kwargs)
            losses.append(float(found))  # pyright: ignore[reportArgumentType] - outputs are not asked for
            return found

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(blocks)

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=LR, weight_decay=DECAY, max_grad_norm=CLIP,
        lr_scheduler_type="cosine", warmup_steps=steps // 20, use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        dataloader_drop_last=True,
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids} for ids in blocks]
    Noting(model=model, args=arguments, train_dataset=rows).train()  # pyright: ignore[reportArgumentType]
    return losses


def markdown(record: Record) -> str:
    """Some steps' losses of both."""
    rows = [row for row in record.rows if row["step"] in (1, 10, 50) or row["step"] % 200 == 0]
    table = [(f"{row['step']}", f"{row['ours']:.5f}", f"{row['transformers']:.5f}", f"{row['apart']:.1e}") for row in rows]
    return markdown_table(("step", "loss, ours", "transformers' Trainer", "difference"), table, left=0) + f"\n\n{record.notes}"
