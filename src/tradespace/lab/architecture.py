"""Experiment architecture: small Llamas of equal parameters learn the same tokens, three seeds each: what fewer KV heads, more depth, or another feed-forward
cost in held-out loss, and what they gain in cache bytes and decode speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import prod
from statistics import fmean

import torch

from tradespace.api import find_machine
from tradespace.kernels.view import Span, StepBatch
from tradespace.kv.cache import KVCache
from tradespace.lab.common import command_line, markdown_table
from tradespace.lab.training_text import book_tokens, digest, held_out_loss, scratch_trainer, shaped
from tradespace.measure.record import Figure, Record, new_record
from tradespace.model.transformer import Transformer
from tradespace.spec.kv import KVPlan
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import model_tensors
from tradespace.train.data import Document, pack

VOCAB, CONTEXT, BATCH, LR = 1024, 128, 8, 2e-3
# all within 2% of the parameters of the first: 4 layers, width 128, 8 heads of 16, a feed-forward 3 times as wide
WAYS: dict[str, str] = {
    "kv heads 8 (all)": "layers=4,width=128,heads=8,kv-heads=8,ffn=384",
    "kv heads 2 (a quarter)": "layers=4,width=128,heads=8,kv-heads=2,ffn=448",
    "kv heads 1": "layers=4,width=128,heads=8,kv-heads=1,ffn=459",
    "wide": "layers=2,width=180,heads=10,kv-heads=10,ffn=500",
    "deep": "layers=9,width=86,heads=8,kv-heads=8,ffn=278,head-size=10",
    "feed-forward 2×": "layers=5,width=128,heads=8,kv-heads=8,ffn=272",
    "feed-forward 4×": "layers=3,width=132,heads=6,kv-heads=6,ffn=532",
}
SEEDS = (0, 1, 2)
WARM = 8  # tokens before the clock starts


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """Trains every way under every seed, on the same blocks in the seed's order."""
    steps, seeds = (10, SEEDS[:1]) if quick else (400, SEEDS)
    train, held_out = book_tokens(VOCAB, 200_000 if quick else 1_600_000)
    data = pack([Document(train)], CONTEXT, source="pd-books")
    test = held_out[: CONTEXT * (16 if quick else 256)]
    rows, figures = [], {}
    for name, shape in WAYS.items():
        spec = shaped(f"{shape},vocab={VOCAB},context={CONTEXT}")
        losses, speeds = [], []
        for seed in seeds:
            trainer = scratch_trainer(spec, data, steps=steps, batch=BATCH, lr=LR, seed=seed, warmup=steps // 20, clip=1.0)
            for _ in range(steps):
                trainer.advance()
            losses.append(held_out_loss(trainer.model, test, CONTEXT))
            speeds.append(decode_speed(trainer.model, 16 if quick else 96))
        figures[f"{name}: held-out loss"] = Figure.of(losses, "nats")
        figures[f"{name}: decode"] = Figure.of(speeds, "tok/s")
        count = sum(prod(tensor.shape) for tensor in model_tensors(spec))
        rows.append(
            {"name": name, "shape": shape, "parameters": count, "kv_bytes_per_token": kv_bytes(spec), "loss": fmean(losses), "tokens": steps * BATCH * CONTEXT}
        )
        say(f"{name}: {count:,} parameters, {fmean(losses):.4f} nats ({min(losses):.4f} to {max(losses):.4f}), {kv_bytes(spec)} bytes of cache a token")
    notes = findings(rows) + f". {steps} steps of {BATCH} × {CONTEXT} tokens, AdamW {LR}, cosine; seeds {', '.join(map(str, seeds))}; tokens {digest(train)}"
    say(notes)
    return new_record("architecture", command=command_line(), device=find_machine(None), repeats=len(seeds), figures=figures, rows=rows, notes=notes)


def kv_bytes(spec: ModelSpec) -> int:
    """Of a token over all layers, in 16 bits."""
    return sum(2 * layer.mixer.K * (layer.mixer.H + layer.mixer.Hv) for layer in spec.layers if isinstance(layer.mixer, Attention))


@torch.no_grad()
def decode_speed(model: Transformer, tokens: int) -> float:
    """Tokens a second of one sequence, one token at a time, over a context that grows to `tokens`."""
    plan = KVPlan(layout="contiguous", store="fp32")
    cache = KVCache(model.spec, plan, num_blocks=1, block_size=CONTEXT, dtype=torch.float32)
    began = 0.0
    for position in range(tokens + WARM):
        if position == WARM:
            began = time.perf_counter()
        span = Span(0, 1, position + 1, (0,))
        batch = StepBatch.from_spans([span], block_size=CONTEXT)
        model.logits(model(torch.tensor([position % VOCAB]), torch.tensor([position]), batch, cache))
    return tokens / (time.perf_counter() - began)


def findings(rows: Sequence[dict]) -> str:
    """Loss of each way against its own base."""
    loss = {row["name"]: row["loss"] for row in rows}
    base = loss["kv heads 8 (all)"]
    return "against all KV heads: " + ", ".join(f"{name} {value / base - 1:+.2%}" for name, value in loss.items() if name != "kv heads 8 (all)")


def markdown(record: Record) -> str:
    """Loss, cache and speed of each way."""
    table = [
        (
            row["name"],
            f"{row['parameters']:,}",
            f"{record.figures[row['name'] + ': held-out loss'].median:.4f}",
            f"{record.figures[row['name'] + ': held-out loss'].min:.4f} to {record.figures[row['name'] + ': held-out loss'].max:.4f}",
            f"{row['kv_bytes_per_token']:,}",
            f"{record.figures[row['name'] + ': decode'].median:,.0f}",
        )
        for row in record.rows
    ]
    return markdown_table(("shape", "parameters", "held-out loss, nats", "over seeds", "cache bytes a token", "decode, tok/s"), table) + f"\n\n{record.notes}"
