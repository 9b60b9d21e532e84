"""Experiment architecture: small Llamas of equal parameters learn the same tokens, three seeds each: what fewer KV heads, more depth, or another feed-forward
cost in held-out loss, and what they gain in cache bytes and decode speed. Every training is kept (`lab.kept`): cut and begun again, the experiment goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from tradespace.build_training import build_model
from tradespace.kernels.view import Span, StepBatch
from tradespace.kv.cache import KVCache
from tradespace.lab.common import command_line, markdown_table
from tradespace.lab.kept import Clock, go_on, kept, settings_of
from tradespace.lab.place import find_lab_device
from tradespace.lab.training_text import book_tokens, digest, held_out_loss, scratch_trainer, shaped
from tradespace.measure.record import Figure, Record, new_record
from tradespace.model.transformer import Transformer
from tradespace.spec.kv import KVPlan
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import model_tensors
from tradespace.spec.weights import WeightPlan
from tradespace.train.data import Document, Packed, pack
from tradespace.train.initialise import init
from tradespace.train.loop import Limits
from tradespace.units import format_seconds

VOCAB, CONTEXT = 1024, 128
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
LONG = 2048  # tokens that decode looks back on: where the cache weighs more than the weights
ROUNDS = 7


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How long every model learns; chars of the books are tokenized."""

    steps: int
    batch: int
    lr: float
    chars: int
    test_blocks: int = 256
    clip: float = 1.0


# about an hour of one thread; a few minutes of a device, which takes large batches in the time of small ones
SCALES = {
    "cpu": Scale(steps=1000, batch=8, lr=2e-3, chars=3_200_000),
    "cuda": Scale(steps=600, batch=160, lr=4e-3, chars=25_000_000),
    "quick": Scale(steps=10, batch=8, lr=2e-3, chars=200_000, test_blocks=16),
}


def run(*, quick: bool, say: Callable[[str], None], device: str | None = None, time_limit_s: float | None = None) -> Record:
    """Trains every way under every seed, on the same blocks in the seed's order. Raises EngineError at the time limit: the same command goes on."""
    clock = Clock(time_limit_s)
    place, described = find_lab_device(device)
    scale, seeds = (SCALES["quick"], SEEDS[:1]) if quick else (SCALES[place.type], SEEDS)
    train, held_out = book_tokens(VOCAB, scale.chars)
    data, test = pack([Document(train)], CONTEXT, source="pd-books"), held_out[: CONTEXT * scale.test_blocks]
    rows: list[dict[str, Any]] = []
    figures: dict[str, Figure] = {}
    for name, shape in WAYS.items():
        spec = shaped(f"{shape},vocab={VOCAB},context={CONTEXT}")
        found = []
        for seed in seeds:
            settings = settings_of(
                shape=shape, vocab=VOCAB, context=CONTEXT, seed=seed, device=described.name, tokens=digest(train), held_out=digest(test), **asdict(scale)
            )

            def learn(folder: Path, spec: ModelSpec = spec, seed: int = seed, settings: dict[str, Any] = settings) -> dict[str, float]:
                return _trained(folder, spec, data, test, scale, seed, settings, place, say, clock)

            found.append(kept("architecture", settings, learn))
            say(f"{name}, seed {seed}: {found[-1]['loss']:.4f} nats, {found[-1]['seconds']:.1f} s; {format_seconds(clock.spent_s)} since the start")
        losses = [each["loss"] for each in found]
        figures[f"{name}: held-out loss"] = Figure.of(losses, "nats")
        rows.append(
            {
                "name": name, "shape": shape, "parameters": sum(prod(tensor.shape) for tensor in model_tensors(spec)), "kv_bytes_per_token": kv_bytes(spec),
                "loss": fmean(losses), "tokens": scale.steps * scale.batch * CONTEXT, "train_s": [each["seconds"] for each in found],
            }
        )  # fmt: skip
    tokens, long, rounds = (16, 256, 1) if quick else (32, LONG, ROUNDS)
    figures |= decode_speeds(place, tokens, long, rounds)
    notes = (
        f"{findings(rows)}. {scale.steps} steps of {scale.batch} × {CONTEXT} tokens, AdamW {scale.lr}, cosine, clip {scale.clip}; seeds "
        f"{', '.join(map(str, seeds))}; tokens {digest(train)}. Decode: one sequence in fp32 through torch, the ways in turn, at {CONTEXT} and {long} tokens"
    )
    say(notes)
    return new_record("architecture", command=command_line(), device=described, repeats=len(seeds), figures=figures, rows=rows, notes=notes)


def _trained(
    folder: Path, spec: ModelSpec, data: Packed, test: Sequence[int], scale: Scale, seed: int, settings: dict[str, Any], place: torch.device,
    say: Callable[[str], None], clock: Clock,
) -> dict[str, float]:  # fmt: skip
    trainer = scratch_trainer(spec, data, steps=scale.steps, batch=scale.batch, lr=scale.lr, seed=seed, warmup=scale.steps // 20, clip=scale.clip, device=place)
    trainer.settings, trainer.limits = settings, Limits(steps=scale.steps, save_every=200, clip=scale.clip)
    began = time.perf_counter()
    first = go_on(trainer, folder, say, clock, every=200)
    seconds = (time.perf_counter() - began) * scale.steps / max(1, scale.steps - first)
    return {"loss": held_out_loss(trainer.model, test, CONTEXT, device=place), "seconds": seconds}


def kv_bytes(spec: ModelSpec) -> int:
    """Of a token over all layers, in 16 bits."""
    return sum(2 * layer.mixer.K * (layer.mixer.H + layer.mixer.Hv) for layer in spec.layers if isinstance(layer.mixer, Attention))


def decode_speeds(place: torch.device, tokens: int, long: int, rounds: int) -> dict[str, Figure]:
    """Of all ways in turn, behind a short and behind a long past; which numbers the weights are does not matter."""
    seen: dict[str, list[float]] = {}
    for past in (CONTEXT, long):
        models = {}
        for name, shape in WAYS.items():
            spec = replace(shaped(f"{shape},vocab={VOCAB},context={CONTEXT}"), max_context=past)
            models[name] = build_model(spec, WeightPlan(default="fp32"), context=past, attention="sdpa", device=place)
            init(models[name], 0)
        for _ in range(rounds):
            for name, model in models.items():
                label = f"{name}: decode" if past == CONTEXT else f"{name}: decode behind {past} tokens"
                seen.setdefault(label, []).append(decode_speed(model, tokens, past, place))
    return {label: Figure.of(speeds, "tok/s") for label, speeds in seen.items()}


@torch.no_grad()
def decode_speed(model: Transformer, tokens: int, past: int, place: torch.device) -> float:
    """Tokens a second of one sequence, one token at a time, the last ones of `past`. What is cached before them is zeros."""
    plan = KVPlan(layout="contiguous", store="fp32")
    cache = KVCache(model.spec, plan, num_blocks=1, block_size=past, dtype=torch.float32, device=place)
    began = 0.0
    for number, position in enumerate(range(past - tokens - WARM, past)):
        if number == WARM:
            if place.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
        batch = StepBatch.from_spans([Span(0, 1, position + 1, (0,))], block_size=past, device=place)
        logits = model.logits(model(torch.tensor([position % VOCAB], device=place), torch.tensor([position], device=place), batch, cache))
        int(logits.argmax())  # as sampling does: waits for the device
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
            f"{next(f.median for key, f in record.figures.items() if key.startswith(row['name'] + ': decode behind')):,.0f}",
        )
        for row in record.rows
    ]
    return (
        markdown_table(("shape", "parameters", "held-out loss, nats", "over seeds", "cache bytes a token", "decode, tok/s", "behind a long past"), table)
        + f"\n\n{record.notes}"
    )
