"""One rank of a small training, as torchrun starts it: losses, checkpoints and measured bytes, in JSON files for the test to compare."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from tradespace.build_training import build_part, prepare
from tradespace.measure.allocations import peak_allocated
from tradespace.spec.training import TrainPlan, parse_checkpointing
from tradespace.spec.weights import WeightPlan
from tradespace.train import checkpoints
from tradespace.train.data import Order
from tradespace.train.initialise import init
from tradespace.train.loop import Limits, Trainer, next_token
from tradespace.train.optimizer import Hyper, Optimizer
from tradespace.train.ranks import join, leave
from tradespace.train.schedule import Schedule
from train.small import small_data, small_spec

CONTEXT, BATCH, STEPS = 48, 4, 6


def trainer_of(case: dict) -> Trainer:
    """The same training however many ranks share it: case names method, checkpointing, fmt, data, tensor, spec, context, clip, fused."""
    ranks = join(case.get("data", 1), case.get("tensor", 1))
    spec = small_spec(**case.get("spec", {}))
    context, steps = case.get("context", CONTEXT), case.get("steps", STEPS)
    plan = TrainPlan(
        model="small", method=case.get("method", "full"), weights=WeightPlan(default=case.get("fmt", "fp32")), rank=4, context=context,
        micro_batch=BATCH // ranks.data, checkpointing=parse_checkpointing(case.get("checkpointing", "none"), spec.L), loss_tokens=case.get("loss_tokens", 40),
        data_parallel=ranks.data, tensor_parallel=ranks.tensor, optimizer=case.get("optimizer", "adamw"), fused=case.get("fused", False),
    )  # fmt: skip
    model, shards = build_part(spec, plan, ranks, context=context)
    init(model, 0, shards)
    parameters = prepare(model, plan, 0)
    if not shards.alone:
        parameters = shards.local(parameters, fused=plan.fused)
    data = small_data(context, spec.V, 8)
    return Trainer(
        model=model, parameters=parameters, optimizer=Optimizer(plan.optimizer, parameters, Hyper(lr=3e-3, decay=0.1)), data=data,
        order=Order(len(data), plan.micro_batch, 1, 0, ranks=ranks.data, rank=ranks.data_rank), schedule=Schedule(lr=3e-3, steps=steps),
        objective=next_token(plan.loss_tokens), limits=Limits(steps=steps, clip=case.get("clip", 0.0), save_every=3), fused=plan.fused,
        settings={"plan": plan.describe()}, shards=None if shards.alone else shards,
    )  # fmt: skip


def main(case: dict, folder: Path) -> None:
    trainer = trainer_of(case)
    found: dict = {"held": {name: tensor.nbytes for name, tensor in trainer.parameters.items()}, "optimizer": trainer.optimizer.nbytes}
    if (last := checkpoints.latest(folder)) is not None and case.get("resume"):
        trainer.restore(last)
    if case.get("stop"):
        trainer.limits = replace(trainer.limits, steps=case["stop"])
    norms: list[float | None] = []
    trainer.run(folder, on_step=lambda report: norms.append(report.grad_norm))
    found |= {"losses": trainer.losses, "norms": norms, "steps": trainer.step}
    if case.get("measure"):
        found["peak"] = peak_allocated(trainer.advance)
    if trainer.shards is not None:
        found["sums"] = {name: float(trainer.shards.whole(name).double().sum()) for name in trainer.shards.parameters}
    ranks = trainer.ranks
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    ranks.wait()
    leave(ranks)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
