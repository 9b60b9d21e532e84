"""Experiment qlora-curve: QLoRA of SmolLM2-135M here and by bitsandbytes + PEFT, the same weights, first adapter and blocks, on the CPU: the
losses step by step, the bytes that each base takes, and adapters that either side opens."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from tradespace.adapt.lora import Shape, adapter_parameters
from tradespace.adapt.peft_files import load_adapter, save_adapter
from tradespace.api import find_machine
from tradespace.build_training import build_model, fill, prepare
from tradespace.lab.common import command_line, markdown_table, read_text
from tradespace.loading.resolve import resolve
from tradespace.loading.tokenizer import Tokenizer
from tradespace.measure.record import Figure, Record, new_record
from tradespace.quantize.source import with_halves
from tradespace.spec.model import ModelSpec
from tradespace.spec.training import TrainPlan, every, qlora_weights
from tradespace.spec.weights import WeightPlan
from tradespace.train.data import Document, Order, Packed, pack
from tradespace.train.loop import Limits, Trainer, next_token
from tradespace.train.optimizer import Hyper, Optimizer
from tradespace.train.schedule import Schedule
from tradespace.tuning import opened
from tradespace.tuning_models import save_model

MODEL = "smollm2-135m"
CONTEXT, BATCH, LR, RANK, SEED = 128, 2, 2e-4, 16, 5
BAR = 0.02
WINDOW = 10


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """Trains ours, then theirs, and hands adapters both ways."""
    steps = 4 if quick else 60
    files = resolve(MODEL, offline=True)
    stored, source = opened(files)
    spec = with_halves(stored)
    tokens = Tokenizer.from_files(files).encode(read_text("pd-books", "train.txt")[: 5 * CONTEXT * BATCH * (steps + 4)], add_special_tokens=False)
    data = pack([Document(tokens)], CONTEXT, source="pd-books")
    order = Order(len(data), BATCH, 1, SEED)
    plan = TrainPlan(
        model=spec.name, method="qlora", weights=qlora_weights("nf4"), rank=RANK, context=CONTEXT, micro_batch=BATCH, checkpointing=every(1, spec.L, "none")
    )
    shape = Shape(rank=RANK, alpha=2.0 * RANK)
    with TemporaryDirectory() as folder:
        place = Path(folder)
        dense = build_model(spec, WeightPlan(default="bf16"), context=CONTEXT)
        fill(dense, source, stored)
        save_model(dense, place / "base", dtype=torch.bfloat16)
        del dense
        model = build_model(spec, plan.weights, context=CONTEXT)
        fill(model, source, stored)
        parameters = prepare(model, plan, SEED)
        save_adapter(model, place / "start", shape, base=str(place / "base"))
        optimizer = Optimizer("adamw", parameters, Hyper(lr=LR))
        schedule = Schedule(lr=LR, steps=steps)
        trainer = Trainer(model, parameters, optimizer, data, order, schedule, next_token(CONTEXT * BATCH), Limits(steps=steps))
        began = time.perf_counter()
        for step in range(steps):
            report = trainer.advance()
            if step % 20 == 19:
                say(f"ours: step {step + 1}, loss {report.loss:.4f}")
        ours_s = time.perf_counter() - began
        save_adapter(model, place / "ours", shape, base=str(place / "base"))
        base_bytes = sum(part.nbytes for name, part in model.state_dict().items() if ".adapters." not in name)
        theirs, theirs_bytes, theirs_s, read = bitsandbytes_losses(place, data, order, steps, say)
        handed = _opens(spec, place / "theirs", place / "ours", read)
    ours = trainer.losses
    means = [np.convolve(losses, np.ones(min(WINDOW, steps)) / min(WINDOW, steps), mode="valid") for losses in (ours, theirs)]
    off = float(np.abs(means[0] / means[1] - 1).max())
    each = float(np.abs(np.array(ours) / np.array(theirs) - 1).max())
    figures = {
        "largest difference of a step's loss": Figure.of([each], "share"),
        f"largest difference of {WINDOW}-step means": Figure.of([off], "share"),
        "base, ours": Figure.of([base_bytes], "bytes"),
        "base, bitsandbytes": Figure.of([theirs_bytes], "bytes"),
        "seconds, ours": Figure.of([ours_s], "s"),
        "seconds, bitsandbytes + PEFT": Figure.of([theirs_s], "s"),
    }
    notes = (
        f"{MODEL}, nf4 with double quantization, rank {RANK} on all linears, {steps} steps of {BATCH} × {CONTEXT} tokens, AdamW {LR}, the same first adapter. "
        f"Every loss within {each:.2%}, {WINDOW}-step means within {off:.2%} (bar {BAR:.0%}): {'held' if off <= BAR else 'NOT held'}. Base with embedding: "
        f"{base_bytes / 2**20:.1f} MiB, bitsandbytes' {theirs_bytes / 2**20:.1f} MiB. Adapters: {handed}. Seconds are of a machine that others used, too"
    )
    say(notes)
    rows = [{"step": step + 1, "ours": ours[step], "theirs": theirs[step]} for step in range(steps)]
    return new_record("qlora-curve", command=command_line(), device=find_machine(None), repeats=1, figures=figures, rows=rows, notes=notes)


def bitsandbytes_losses(
    place: Path, data: Packed, order: Order, steps: int, say: Callable[[str], None]
) -> tuple[list[float], int, float, Callable[[Path], dict[str, torch.Tensor]]]:
    """(losses, bytes of the base, seconds, what reads an adapter by PEFT) of the same run by the peers, which begin with the adapter in `place`/start."""
    import peft
    import transformers

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base", quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"})
    nbytes = sum(part.nbytes for part in {part.data_ptr(): part for part in base.state_dict().values() if isinstance(part, torch.Tensor)}.values())
    model: Any = peft.PeftModel.from_pretrained(base, str(place / "start"), is_trainable=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=LR, weight_decay=0.0)
    losses, began = [], time.perf_counter()
    model.train()
    for step in range(steps):
        (blocks,) = order.blocks(step)
        ids = torch.from_numpy(np.stack([data.tokens[data.starts[block] : data.starts[block] + CONTEXT] for block in blocks]).astype(np.int64))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % 20 == 19:
            say(f"bitsandbytes + PEFT: step {step + 1}, loss {losses[-1]:.4f}")
    seconds = time.perf_counter() - began
    model.save_pretrained(place / "theirs")

    def read(folder: Path) -> dict[str, torch.Tensor]:
        model.load_adapter(str(folder), adapter_name="other")
        return {name.replace(".other", ""): part.detach() for name, part in model.named_parameters() if ".other" in name}

    return losses, nbytes, seconds, read


def _opens(spec: ModelSpec, theirs: Path, ours: Path, read: Callable[[Path], dict[str, torch.Tensor]]) -> str:
    """Theirs here and ours there, number by number."""
    from safetensors.torch import load_file

    model = build_model(spec, WeightPlan(default="bf16"), context=CONTEXT)
    load_adapter(model, theirs, name="theirs")
    count = sum(part.numel() for part in adapter_parameters(model, "theirs").values())
    wrote = sum(part.numel() for part in load_file(theirs / "adapter_model.safetensors").values())
    held = load_file(ours / "adapter_model.safetensors")
    same = all(torch.equal(part.float(), held[name].float()) for name, part in read(ours).items())
    return f"theirs opens here ({count:,} of {wrote:,} numbers), ours opens in PEFT ({'the same numbers' if same else 'OTHER numbers'})"


def markdown(record: Record) -> str:
    """Some steps' losses."""
    last = record.rows[-1]["step"]
    rows = [row for row in record.rows if row["step"] == 1 or row["step"] % 10 == 0 or row["step"] == last]
    table = [(f"{row['step']}", f"{row['ours']:.4f}", f"{row['theirs']:.4f}", f"{row['ours'] / row['theirs'] - 1:+.2%}") for row in rows]
    return markdown_table(("step", "loss, ours", "bitsandbytes + PEFT", "difference"), table, left=0) + f"\n\n{record.notes}"
