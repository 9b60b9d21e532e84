"""What the training experiments share: books as tokens of a small vocabulary, a model of a given shape drawn at random, its trainer, and its held-out loss."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from tradespace.build_training import build_model, prepare
from tradespace.lab.common import data_file
from tradespace.model.transformer import Transformer
from tradespace.spec.model import ModelSpec
from tradespace.spec.training import TrainPlan, every
from tradespace.spec.weights import WeightPlan
from tradespace.train.data import IGNORED, Document, Order, Packed, pack
from tradespace.train.initialise import init
from tradespace.train.loop import Limits, Trainer, next_token
from tradespace.train.loss import chunked_loss, cross_entropy
from tradespace.train.optimizer import Hyper, Optimizer
from tradespace.train.schedule import Schedule
from tradespace.tuning_models import parse_shape, train_tokenizer

TOKENIZER_CHARS = 2_000_000  # of the training text that the vocabulary is made from


def book_tokens(vocab: int, chars: int, valid_chars: int = 200_000) -> tuple[list[int], list[int]]:
    """(training, held-out) tokens of the books' first characters, by a byte-level BPE vocabulary made from the training text."""
    text = data_file("pd-books", "train.txt").read_text(encoding="utf-8")[: max(chars, TOKENIZER_CHARS)]
    held_out = data_file("pd-books", "valid.txt").read_text(encoding="utf-8")[:valid_chars]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_text(text[:TOKENIZER_CHARS], encoding="utf-8")
        tokenizer = train_tokenizer([path], vocab, Path(folder))
        return tokenizer.encode(text[:chars], add_special_tokens=False), tokenizer.encode(held_out, add_special_tokens=False)


def digest(tokens: Sequence[int]) -> str:
    """Short name of a list of tokens, for a record."""
    return hashlib.sha256(np.asarray(tokens, np.int32).tobytes()).hexdigest()[:16]


def shaped(text: str) -> ModelSpec:
    """The spec of a shape list that is known to be one."""
    spec = parse_shape(text)
    assert spec is not None, f"{text} is a shape"
    return spec


def scratch_trainer(
    spec: ModelSpec, data: Packed, *, steps: int, batch: int, lr: float, seed: int, warmup: int = 0, decay: float = 0.0, clip: float = 0.0,
    shape: str = "cosine", device: torch.device | str = "cpu",
) -> Trainer:  # fmt: skip
    """A model in fp32 with random weights of this seed, and all of it learning by AdamW, everything kept."""
    plan = TrainPlan(model=spec.name, weights=WeightPlan(default="fp32"), context=data.context, micro_batch=batch, checkpointing=every(1, spec.L, "none"))
    model = build_model(spec, plan.weights, context=data.context, device=device)
    init(model, seed)
    parameters = prepare(model, plan, seed)
    return Trainer(
        model=model, parameters=parameters, optimizer=Optimizer("adamw", parameters, Hyper(lr=lr, decay=decay)), data=data,
        order=Order(len(data), batch, 1, seed), schedule=Schedule(lr=lr, steps=steps, warmup=warmup, shape=shape), objective=next_token(512),
        limits=Limits(steps=steps, clip=clip), device=device,
    )  # fmt: skip


@torch.no_grad()
def held_out_loss(model: Transformer, tokens: Sequence[int], context: int, *, device: torch.device | str = "cpu", blocks_at_once: int = 8) -> float:
    """Mean loss in nats over all targets of `tokens` in blocks of `context`."""
    data = pack([Document(list(tokens))], context, source="held-out text")
    total, count = 0.0, 0
    for start in range(0, len(data), blocks_at_once):
        micro = data.micro_batch(range(start, min(start + blocks_at_once, len(data))), device)
        hidden_TD = model(micro.tokens_T, micro.positions_T, micro.batch)
        total += float(chunked_loss(model, hidden_TD, cross_entropy(micro.targets_T), scale=1.0, chunk=512))
        count += int((micro.targets_T != IGNORED).sum())
    return total / count


def bigram_loss(train: Sequence[int], held_out: Sequence[int], vocab: int) -> float:
    """Held-out nats a token of pair counts backed off to single ones, discounted absolutely by 0.75 (Kneser and Ney's discount without their counts)."""
    discount = 0.75
    ids, test = np.asarray(train, np.int64), np.asarray(held_out, np.int64)
    singles = (np.bincount(ids, minlength=vocab) + 0.1) / (len(ids) + 0.1 * vocab)
    pairs, counts = np.unique(ids[:-1] * vocab + ids[1:], return_counts=True)
    totals, kinds = np.bincount(pairs // vocab, weights=counts, minlength=vocab), np.bincount(pairs // vocab, minlength=vocab)
    asked = test[:-1] * vocab + test[1:]
    place = np.searchsorted(pairs, asked).clip(max=len(pairs) - 1)
    seen = np.where(pairs[place] == asked, counts[place] - discount, 0.0)
    total, first = totals[test[:-1]], test[:-1]
    backed = singles[test[1:]]
    share = np.where(total > 0, discount * kinds[first] / np.maximum(total, 1), 1.0)
    return float(-np.log(seen / np.maximum(total, 1) + share * backed).mean())
