"""Our side of experiment train-gpu: a case planned within its bytes, drawn at random on the device, and stepped."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tradespace.build_training import build_model, prepare
from tradespace.cost.training import train_ledger
from tradespace.planner.training import Question, best_plan
from tradespace.spec.device_zoo import find_device
from tradespace.spec.estimate import Estimate
from tradespace.spec.model import ModelSpec
from tradespace.spec.training import TrainPlan, flops_per_token, parse_checkpointing
from tradespace.spec.weights import WeightPlan
from tradespace.spec.zoo import find_model
from tradespace.train.data import Document, Order, pack
from tradespace.train.initialise import init
from tradespace.train.loop import Limits, Trainer, next_token
from tradespace.train.optimizer import Hyper, Optimizer
from tradespace.train.schedule import Schedule
from tradespace.tuning_models import parse_shape

TINY = "layers=2,width=64,heads=4,kv-heads=2,ffn=192,vocab=512,context=64"


def ours(case: Any, T: int, tiny: bool) -> dict[str, Any]:
    """Seconds, peak bytes and the ledger of a case; `tiny` on whatever device there is, with everything kept."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = replace(find_model(case.model), max_context=T)
    if tiny:
        shaped = parse_shape(TINY)
        assert shaped is not None, "TINY is a shape"
        spec, T = shaped, 64
    plan = _tiny_plan(spec, case) if tiny else _plan(spec, case, T)
    if case.by_driver and device.type == "cuda":
        _hold(case.memory_bytes)
    ledger = train_ledger(spec, plan)
    model = build_model(spec, plan.weights, context=T, device=device)
    draw(model)
    parameters = prepare(model, plan, 0)
    optimizer = Optimizer(plan.optimizer, parameters, Hyper(lr=1e-5))
    data = pack([Document(torch.randint(0, spec.V, (case.batch * T * 2,)).tolist())], T)
    trainer = Trainer(
        model=model, parameters=parameters, optimizer=optimizer, data=data, order=Order(len(data), plan.micro_batch, plan.accumulation, 0),
        schedule=Schedule(lr=1e-5, steps=10**6), objective=next_token(plan.loss_tokens), limits=Limits(steps=10**6), fused=plan.fused, device=device,
    )  # fmt: skip
    model.train()
    for _ in range(2):
        trainer.advance()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(case.steps):
        began = time.perf_counter()
        trainer.advance()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {
        "seconds": seconds, "plan": plan.describe(), "predicted_bytes": ledger.total_bytes, "ledger": ledger.to_dict()["lines"], "loss": trainer.losses[-1],
        "budget_bytes": case.memory_bytes, "flops_per_token": flops_per_token(spec, T), **device_bytes(),
    }  # fmt: skip


def checked() -> dict[str, Any]:
    """Gradients of a small model in fp32 on the device against the CPU's: the largest relative difference of a tensor, under every kind of checkpointing."""
    spec = parse_shape("layers=3,width=128,heads=4,kv-heads=2,ffn=320,vocab=640,context=96")
    assert spec is not None, "a shape"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = TrainPlan(model=spec.name, weights=WeightPlan(default="fp32"), context=96, micro_batch=3, checkpointing=parse_checkpointing("none", 3))
    data = pack([Document(torch.randint(0, spec.V, (length,)).tolist()) for length in (150, 96, 42)], 96)
    slopes: dict[str, dict[str, torch.Tensor]] = {}
    for kind, where in (("cpu", torch.device("cpu")), ("none", device), ("norms", device), ("selective", device), ("full", device), ("offload", device)):
        model = build_model(spec, plan.weights, context=96, device=where)
        init(model, 3)
        parameters = prepare(model, replace(plan, checkpointing=parse_checkpointing("none" if kind == "cpu" else kind, 3)), 0)
        micro = data.micro_batch([0, 1, 2], where)
        next_token(100)(model, micro, 1 / micro.num_targets).backward()
        slopes[kind] = {name: parameter.grad.cpu() for name, parameter in parameters.items() if parameter.grad is not None}
    want = slopes.pop("cpu")
    return {kind: max(float((found[name] - want[name]).norm() / want[name].norm()) for name in want) for kind, found in slopes.items()}


def device_bytes() -> dict[str, int]:
    """What torch allocated and reserved at the most, and what the driver counts now; zeros without a device."""
    if not torch.cuda.is_available():
        return {"peak_bytes": 1, "reserved_bytes": 0, "driver_bytes": 0}
    free, total = torch.cuda.mem_get_info()
    return {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved(), "driver_bytes": total - free}


def _hold(budget_bytes: int) -> None:
    """What torch's allocator may reserve: the budget less what the driver counts already. It gives back what lies idle rather than pass it."""
    torch.zeros(1, device="cuda")  # the context is there
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((budget_bytes - (total - free)) / total)


def _plan(spec: ModelSpec, case: Any, T: int) -> TrainPlan:
    device = find_device("h100-80gb")
    if not case.by_driver:  # bytes are compared as torch allocates them, as the peers' are: the context is no part of them
        device = replace(device, runtime_bytes=Estimate(0, "left out"))
    weights = {"full": "bf16", "lora": "bf16", "qlora": "nf4"}[case.method]
    room = int(case.memory_bytes * 0.97)  # for what an allocator rounds up
    return best_plan(Question(spec=spec, device=device, memory_bytes=room, context=T, batch=case.batch, method=case.method, weights=weights)).plan


def _tiny_plan(spec: ModelSpec, case: Any) -> TrainPlan:
    from tradespace.spec.training import qlora_weights

    weights = qlora_weights("nf4", "bf16", "cuda-codes" if torch.cuda.is_available() else "stored") if case.method == "qlora" else WeightPlan(default="bf16")
    return TrainPlan(
        model=spec.name,
        method=case.method,
        weights=weights,
        context=64,
        micro_batch=case.batch,
        checkpointing=parse_checkpointing("full", spec.L),
        loss_tokens=64,
    )


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Random weights where they lie: floats normal, codes uniform with scales that make them about as large."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02)
    for name, buffer in model.named_buffers():
        kind = name.rsplit(".", 1)[-1]
        if (kind in ("codes", "weight") and buffer.dtype == torch.uint8) or (kind == "scale" and buffer.dtype == torch.uint8):
            buffer.random_(0, 256)
        elif kind in ("nested", "nested_scale"):
            buffer.fill_(1e-3)
        elif kind == "offset":
            buffer.fill_(0.05)
        elif kind == "scale":
            buffer.fill_(3e-4)
