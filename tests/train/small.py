"""Small models, data and trainers for the tests of training."""

from __future__ import annotations

import numpy as np

from tradespace.adapt.recompute import recompute
from tradespace.model.transformer import Transformer
from tradespace.spec.mixers import Attention, Rope
from tradespace.spec.model import DenseFFN, LayerSpec, ModelSpec
from tradespace.spec.training import TrainPlan, parse_checkpointing
from tradespace.spec.weights import WeightPlan
from tradespace.train.data import Document, Order, Packed, pack
from tradespace.train.initialise import init
from tradespace.train.loop import Limits, Trainer, next_token
from tradespace.train.optimizer import Hyper, Optimizer
from tradespace.train.schedule import Schedule

V = 151


def small_spec(L: int = 3, D: int = 64, F: int = 160, vocab: int = V, tied: bool = True, **mixer) -> ModelSpec:
    layer = LayerSpec(mixer=Attention(N=4, K=2, H=D // 4, rope=Rope(dims=D // 4), **mixer), ffn=DenseFFN(F=F))
    return ModelSpec(name="small", family="llama", D=D, V=vocab, layers=(layer,) * L, max_context=1024, tied=tied)


def small_model(spec: ModelSpec, fmt: str = "fp32", **kernels: str) -> Transformer:
    model = Transformer(spec, WeightPlan(default=fmt), max_context=1024, **kernels)  # type: ignore[arg-type]
    init(model, 0)
    return model


def documents(count: int = 6, length: int = 300, vocab: int = V) -> list[Document]:
    draw = np.random.default_rng(0)
    return [Document((np.cumsum(draw.integers(0, 3, length)) % vocab).tolist()) for _ in range(count)]


def small_data(context: int = 48, vocab: int = V, count: int = 6) -> Packed:
    return pack(documents(count, vocab=vocab), context)


def small_trainer(
    optimizer: str = "adamw", *, checkpointing: str = "none", fused: bool = False, fmt: str = "fp32", micro: int = 2, accumulation: int = 1, data: Packed | None = None,  # noqa: E501
    lr: float = 3e-3, limits: Limits | None = None, spec: ModelSpec | None = None, loss_tokens: int = 40, clip: float = 0.0,
) -> Trainer:  # fmt: skip
    spec = spec or small_spec()
    model = small_model(spec, fmt)
    for parameter in model.parameters():
        parameter.requires_grad_()
    recompute(model, parse_checkpointing(checkpointing, spec.L))
    parameters = dict(model.named_parameters())
    data = small_data(vocab=spec.V) if data is None else data
    return Trainer(
        model=model, parameters=parameters, optimizer=Optimizer(optimizer, parameters, Hyper(lr=lr)), data=data, order=Order(len(data), micro, accumulation, 0),
        schedule=Schedule(lr=lr, steps=60), objective=next_token(loss_tokens), limits=limits or Limits(steps=60, clip=clip), fused=fused, settings={"seed": 0},
    )  # fmt: skip


def plan_of(trainer: Trainer, checkpointing: str, *, micro: int, context: int, fused: bool, loss_tokens: int, fmt: str = "fp32") -> TrainPlan:
    return TrainPlan(
        model="small", weights=WeightPlan(default=fmt), context=context, micro_batch=micro, checkpointing=parse_checkpointing(checkpointing, trainer.model.spec.L),  # noqa: E501
        fused=fused, loss_tokens=loss_tokens,
    )  # fmt: skip
