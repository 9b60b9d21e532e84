"""One training run: its folder and budget, its plan, the loop under the meter, and the result, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tradespace import api
from tradespace.adapt.lora import Shape
from tradespace.adapt.peft_files import save_adapter
from tradespace.build_training import build_model, prepare
from tradespace.errors import BudgetError, InputError
from tradespace.measure.memory import limit_heap_growth, process_bytes, return_freed_memory
from tradespace.measure.record import write_atomically
from tradespace.model.transformer import Transformer
from tradespace.planner.training import Question, best_plan
from tradespace.spec.model import ModelSpec
from tradespace.spec.training import TrainPlan, flops_per_token, parse_checkpointing
from tradespace.spec.weights import WeightPlan
from tradespace.train import checkpoints
from tradespace.train.data import Document, Order, Packed, pack
from tradespace.train.initialise import init
from tradespace.train.loop import Limits, Objective, StepReport, Trainer, next_token
from tradespace.train.optimizer import Hyper, Optimizer
from tradespace.train.ranks import join, leave
from tradespace.train.schedule import Schedule
from tradespace.train.shards import Shards
from tradespace.tuning_models import parse_shape, save_model
from tradespace.tuning_place import ALLOCATOR_SHARE, CardPeak, HostPeak, find_training_place
from tradespace.tuning_settings import Beside, Progress, Run, Settings
from tradespace.units import KiB, format_bytes

Say = Callable[[str], None]
MERGED, ADAPTER, TOKENIZER = "model", "adapter", "tokenizer"


class Job:
    """One run's folder, budget and settings."""

    def __init__(self, out: Path, settings: Settings, on_progress: Callable[[Progress], None], say: Say):
        self.out, self.settings, self.on_progress, self.say = out, settings, on_progress, say
        self.began = time.monotonic()
        self.place, self.device = find_training_place(settings.device)
        self.meter = HostPeak() if self.place.type == "cpu" else CardPeak(self.place.index or 0)
        self.ranks = join(settings.data_parallel, settings.tensor_parallel, self.place.type)
        if not self.ranks.leader:
            self.on_progress, self.say = (lambda progress: None), (lambda line: None)
        if out.exists() and not out.is_dir():
            raise InputError(f"--output {out} is a file. Give a folder")
        self.last = checkpoints.latest(out, self.say) if out.exists() else None
        if out.exists() and any(out.iterdir()) and not settings.resume:
            raise InputError(f"--output {out} is not empty. Give --resume to go on with the run in it, or another folder")
        self.budget = api.budget_bytes(settings.memory, self.device)
        if settings.memory is None or str(settings.memory).strip().endswith("%"):
            # one machine's free memory is shared by the ranks on it; on cards each has its own
            self.budget //= self.ranks.world if self.place.type == "cpu" else 1
        self.ranks.wait()  # all have looked at the folder before one writes to it

    @contextmanager
    def metered(self) -> Iterator[None]:
        """The run, from its data to its result. What fails before its first checkpoint leaves nothing behind."""
        # a step's tensors come and go in another order than a stack's: in the heap they leave holes of 20 to 50 MiB, as mappings of their own none
        limit_heap_growth(128 * KiB)
        there = self.out.exists()
        fresh = not there or not any(self.out.iterdir())
        try:
            with self.meter:
                yield
        except BaseException:
            if fresh and self.ranks.leader and self.out.exists() and checkpoints.latest(self.out) is None:
                shutil.rmtree(self.out)
                if there:
                    self.out.mkdir()
            raise

    def first(self, work: Callable[[], None]) -> None:
        """`work` on rank 0, the others waiting."""
        if self.ranks.leader:
            work()
        self.ranks.wait()

    def check_context(self, spec: ModelSpec) -> None:
        """Raises InputError where the model takes no sequences of this length: before anything is read or made for them."""
        if self.settings.context > spec.max_context:
            raise InputError(f"--context {self.settings.context}: {spec.name} takes at most {spec.max_context} tokens")

    def pack(self, documents: Sequence[Document], *, chat: bool) -> Packed:
        return pack(documents, self.settings.context, source="the data", split=not chat)

    def plan(self, spec: ModelSpec, data: Packed, *, method: str | None, rank: int = 16, alpha: float = 32.0, beside: Beside | None = None) -> TrainPlan:
        """The plan to run. Raises BudgetError with what would fit."""
        settings = self.settings
        # what the process costs by now is measured: it takes the place of the runtime, the tokenizer and the data
        room, here = self.budget, None
        if self.place.type == "cpu":
            rehearse()
            return_freed_memory()
            here = int(max(self.ranks.gather(process_bytes())))
        else:
            room = int(self.budget * ALLOCATOR_SHARE)
            self.meter.hold(self.budget)
        segments = None if settings.checkpointing is None else parse_checkpointing(settings.checkpointing, spec.L)
        question = Question(
            spec=spec, device=self.device, memory_bytes=room, context=settings.context, batch=settings.batch, method=method, weights=settings.weights,
            optimizer=settings.optimizer, checkpointing=segments, rank=rank, alpha=alpha, fused=settings.fused if not settings.clip else False,
            here_bytes=here, data_parallel=self.ranks.data, tensor_parallel=self.ranks.tensor,
            **asdict(beside or Beside(only_method=False)),
        )  # fmt: skip
        if settings.batch > len(data):
            self.say(f"a step of {settings.batch} sequences passes over the data more than once: they make {len(data)} of {settings.context} tokens")
        found = best_plan(question)
        self.ledger, self.spec, self.dense = found.ledger, spec, found.plan.weights.dense
        self.predicted = found.ledger.total_bytes + question.spare(found.plan)
        self.say(f"plan: {found.plan.describe()}; predicted {format_bytes(self.predicted)} of {format_bytes(self.budget)}")
        return found.plan

    def run(
        self,
        net: Transformer,
        plan: TrainPlan,
        data: Packed,
        objective: Objective,
        *,
        default_lr: float,
        name: str,
        extra: dict[str, Any] | None = None,
        shards: Shards | None = None,
    ) -> Run:
        settings, ranks = self.settings, self.ranks
        shards = None if ranks.world == 1 else shards
        order = Order(len(data), plan.micro_batch, plan.accumulation, settings.seed, settings.shuffle, ranks.data, ranks.data_rank)
        steps = settings.steps or max(1, round(settings.epochs * len(data) / order.blocks_per_step))
        lr = default_lr if settings.lr is None else settings.lr
        parameters = prepare(net, plan, settings.seed)
        if shards is not None:
            parameters = shards.local(parameters, fused=plan.fused)
        described = {
            **plan.to_dict(), "lr": lr, "schedule": settings.schedule, "warmup": settings.warmup, "decay": settings.decay, "clip": settings.clip,
            "seed": settings.seed, "shuffle": settings.shuffle, "steps": steps, "blocks": len(data), "tokens": data.num_tokens, **(extra or {}),
        }  # fmt: skip
        described.pop("memory_bytes")
        trainer = Trainer(
            model=net, parameters=parameters, optimizer=Optimizer(plan.optimizer, parameters, Hyper(lr=lr, decay=settings.decay)), data=data, order=order,
            schedule=Schedule(lr=lr, steps=steps, warmup=settings.warmup, shape=settings.schedule), objective=objective,
            limits=Limits(steps=steps, time_s=settings.time_limit_s, save_every=settings.save_every, clip=settings.clip), fused=plan.fused, settings=described,
            shards=shards, device=self.place,
        )  # fmt: skip
        if settings.resume and self.last is not None:
            trainer.restore(self.last)
            self.say(f"resumed from step {trainer.step} of {steps}")
        self.first(lambda: write_atomically(self.out / "run.json", json.dumps(described, indent=1) + "\n"))
        speeds: list[float] = []
        try:
            ended = trainer.run(self.out, on_step=lambda report: self._told(report, trainer, speeds), say=self.say)
        except torch.cuda.OutOfMemoryError as error:
            raise BudgetError(
                f"torch found no room for a step within {format_bytes(self.budget)}; {format_bytes(self.predicted)} were predicted. Checkpoints are whole. "
                f"Go on with --resume --memory {format_bytes(self.budget * 1.1).replace(' ', '')}",
                need_bytes=self.predicted,
                have_bytes=self.budget,
            ) from error
        result, peak = self._write(net, plan, name, shards), self.meter.peak_bytes
        if ranks.leader:
            loss_curve(self.out / "loss.png", trainer.losses, self.say)
        by_rank = ranks.gather({"predicted_bytes": self.predicted, "peak_bytes": peak})
        leave(ranks)
        speed = sorted(speeds)[len(speeds) // 2] if speeds else 0.0
        return Run(
            model=name, output=str(self.out), result=str(result), plan=plan.to_dict(), ledger=self.ledger.to_dict(), steps=trainer.step, ended=ended,
            losses=trainer.losses, tokens_per_s=speed, mfu=self._mfu(speed), predicted_bytes=self.predicted,
            peak_bytes=peak, budget_bytes=self.budget, seconds=time.monotonic() - self.began,
            resumed_from=self.last.step if settings.resume and self.last else None, rank=ranks.rank, ranks=by_rank if ranks.world > 1 else [],
        )  # fmt: skip

    def _mfu(self, tokens_per_s: float) -> float | None:
        """Of all ranks: on a CPU they share one machine's rate, on cards each has its own."""
        rate = self.device.flops_per_s(self.dense)
        devices = 1 if self.place.type == "cpu" else self.ranks.world
        return None if rate.value is None else flops_per_token(self.spec, self.settings.context) * tokens_per_s / (rate.value * devices)

    def _told(self, report: StepReport, trainer: Trainer, speeds: list[float]) -> None:
        speeds.append(report.tokens / report.seconds)
        speed = sorted(speeds[-20:])[len(speeds[-20:]) // 2]
        left = (trainer.limits.steps - report.step) * report.tokens / speed
        peak = self.meter.peak_bytes
        mfu = self._mfu(speed)
        self.on_progress(
            Progress(step=report.step, steps=trainer.limits.steps, loss=report.loss, lr=report.lr, tokens_per_s=speed, mfu=mfu, memory_bytes=peak,
                     budget_bytes=self.budget, eta_s=left)
        )  # fmt: skip
        if self.ranks.any(peak > self.budget):
            peak = max(self.ranks.gather(peak))
            trainer.save(self.out)
            raise BudgetError(
                f"the run took {format_bytes(peak)}; {format_bytes(self.budget)} were stated, and {format_bytes(self.predicted)} predicted. It was stopped "
                f"at step {report.step} with a checkpoint. Go on with --resume --memory {format_bytes(peak * 1.05).replace(' ', '')}",
                need_bytes=peak,
                have_bytes=self.budget,
            )

    def _write(self, net: Transformer, plan: TrainPlan, name: str, shards: Shards | None) -> Path:
        """The result, whole or not at all, by rank 0."""
        target = self.out / (MERGED if plan.method == "full" else ADAPTER)
        partial = self.out / f".{target.name}.partial"
        self.first(lambda: shutil.rmtree(partial, ignore_errors=True))
        if plan.method == "full":
            save_model(net, partial, dtype=torch.float32 if plan.weights.default == "fp32" else torch.bfloat16, shards=shards)
            if not self.ranks.leader:
                return target
            if (self.out / TOKENIZER).is_dir():
                shutil.copytree(self.out / TOKENIZER, partial, dirs_exist_ok=True)
        elif self.ranks.leader:
            save_adapter(net, partial, Shape(rank=plan.rank, alpha=plan.alpha, targets=plan.targets), base=name)
        if self.ranks.leader:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
        return target


def rehearse() -> None:
    """A step of a model of a few thousand numbers: what the libraries load and allocate for the first backward pass is then there, and counted."""
    spec = parse_shape("layers=1,width=32,heads=2,vocab=64,context=64")
    assert spec is not None
    plan = TrainPlan(model=spec.name, weights=WeightPlan(default="fp32"), context=32, checkpointing=parse_checkpointing("full", 1))
    net = build_model(spec, plan.weights, context=32)
    init(net, 0)
    parameters = prepare(net, plan, 0)
    data = pack([Document(list(range(64)))], 32)
    optimizer = Optimizer("adamw", parameters, Hyper())
    order, schedule = Order(len(data), 1, 1, 0), Schedule(lr=1e-3, steps=1)
    Trainer(net, parameters, optimizer, data, order, schedule, next_token(32), Limits(steps=1)).advance()


def loss_curve(path: Path, losses: Sequence[float], say: Say) -> None:
    """A picture of the loss over steps, with its mean over 20."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no loss curve: matplotlib is not installed (pip install 'tradespace[lab]')")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color="0.75", linewidth=0.8, label="each step")
    means = [sum(losses[max(0, i - 19) : i + 1]) / len(losses[max(0, i - 19) : i + 1]) for i in range(len(losses))]
    axes.plot(range(1, len(losses) + 1), means, color="tab:blue", label="mean of 20")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.legend()
    figure.savefig(path, dpi=120)
