"""`ts.train`, `ts.finetune`, `ts.distill`: a run inside a stated memory, planned, logged, resumable, reported predicted against measured."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tradespace import api
from tradespace.adapt.lora import Shape
from tradespace.adapt.peft_files import save_adapter
from tradespace.build_training import build_model, fill, prepare
from tradespace.errors import BudgetError, InputError
from tradespace.loading.gguf import read_gguf
from tradespace.loading.resolve import ModelFiles, resolve
from tradespace.loading.safetensors import read_sharded
from tradespace.loading.tokenizer import Tokenizer
from tradespace.loading.weights import Source
from tradespace.measure.memory import MemoryMeter, limit_heap_growth, process_bytes
from tradespace.model.transformer import Transformer
from tradespace.planner.training import Question, best_plan
from tradespace.quantize.source import with_halves
from tradespace.spec.model import ModelSpec
from tradespace.spec.training import TrainPlan, flops_per_token, parse_checkpointing
from tradespace.spec.weights import WeightPlan, weight_bytes
from tradespace.train import checkpoints
from tradespace.train.data import Document, Order, Packed, pack
from tradespace.train.distill import Distillation, begin_as_teacher, distillation, dropped, kept_layers
from tradespace.train.initialise import init
from tradespace.train.loop import Limits, Objective, StepReport, Trainer, next_token
from tradespace.train.optimizer import Hyper, Optimizer
from tradespace.train.reading import is_chat, read_documents
from tradespace.train.schedule import Schedule
from tradespace.tuning_models import copy_tokenizer, find_shape, parse_shape, read_tokenizer, save_model, train_tokenizer
from tradespace.units import MiB, format_bytes, parse_bytes

Say = Callable[[str], None]
MERGED, ADAPTER, TOKENIZER = "model", "adapter", "tokenizer"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a run shows while it runs. mfu: share of the machine's measured product rate, recomputation not counted."""

    step: int
    steps: int
    loss: float
    lr: float
    tokens_per_s: float
    mfu: float | None
    memory_bytes: int
    budget_bytes: int
    eta_s: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run was and what came of it. losses: of every step."""

    model: str
    output: str
    result: str
    plan: dict[str, Any]
    ledger: dict[str, Any]
    steps: int
    ended: str
    losses: list[float] = field(repr=False)
    tokens_per_s: float
    mfu: float | None
    predicted_bytes: int
    peak_bytes: int
    budget_bytes: int
    seconds: float
    resumed_from: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to learn, for all three commands. batch: sequences of a step; epochs counts where steps is None."""

    context: int = 512
    batch: int = 8
    steps: int | None = None
    epochs: float = 1.0
    lr: float | None = None
    schedule: str = "cosine"
    warmup: int = 0
    decay: float = 0.0
    clip: float = 0.0
    optimizer: str | None = None
    weights: str | None = None
    checkpointing: str | None = None
    fused: bool | None = None
    seed: int = 0
    shuffle: bool = True
    save_every: int = 100
    time_limit_s: float | None = None
    memory: str | int | None = None
    resume: bool = False
    offline: bool = False


def train(
    model: str | os.PathLike[str],
    data: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    tokenizer: str | None = None,
    settings: Settings | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    say: Say = lambda line: None,
) -> Run:
    """Trains a model of this shape (layers=6,width=256,heads=4, a config.json, a name) from random weights on next tokens of the texts `data`.

    tokenizer  the model whose tokenizer to use; default: the folder's own, else one is trained on the texts
    Raises InputError for data or settings that make no sense, BudgetError with what would fit where the memory holds no plan.
    """
    settings, out = settings or Settings(), Path(output)
    job = _Job(out, settings, on_progress, say)
    spec, paths = find_shape(str(model)), _paths(data)
    with job.metered():
        found = _tokenizer_for_scratch(job, str(model), spec, tokenizer, paths)
        if found.vocab_size > spec.V:
            raise InputError(
                f"the tokenizer has {found.vocab_size} tokens; the shape has vocab={spec.V}. Give vocab={found.vocab_size}, or another --tokenizer"
            )
        packed = job.pack(read_documents(paths, found, end=_end(found), say=say), chat=is_chat(paths))
        plan = job.plan(spec, packed, method="full")
        net = build_model(spec, plan.weights, context=settings.context)
        init(net, settings.seed)
        return job.run(net, plan, packed, next_token(plan.loss_tokens), default_lr=1e-3, name=str(model))


def finetune(
    model: str,
    data: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    method: str | None = None,
    rank: int = 16,
    alpha: float | None = None,
    settings: Settings | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    say: Say = lambda line: None,
) -> Run:
    """Trains a model's weights, or adapters beside them, on texts or on conversations (JSONL; the loss on answers alone).

    method  full, lora or qlora; None: as much as the memory allows. Adapters are written in PEFT's format, whole models as a folder that transformers opens.
    """
    settings, out = settings or Settings(), Path(output)
    job = _Job(out, settings, on_progress, say)
    paths = _paths(data)
    files = resolve(model, offline=settings.offline)
    with job.metered():
        stored, source = _opened(files)
        spec = with_halves(stored)
        found = Tokenizer.from_files(files)
        packed = job.pack(read_documents(paths, found, end=_end(found), say=say), chat=is_chat(paths))
        plan = job.plan(spec, packed, method=method, rank=rank, alpha=2.0 * rank if alpha is None else alpha)
        copy_tokenizer(files, out / TOKENIZER)
        net = build_model(spec, plan.weights, context=settings.context)
        fill(net, source, stored)
        return job.run(net, plan, packed, next_token(plan.loss_tokens), default_lr=1e-5 if plan.method == "full" else 2e-4, name=model)


def distill(
    teacher: str,
    student: str,
    data: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    choice: Distillation | None = None,
    settings: Settings | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    say: Say = lambda line: None,
) -> Run:
    """Trains a student on its teacher's distributions over `data`, in the teacher's tokens.

    student  a shape (its vocabulary is the teacher's), "drop:15" for 15 of the teacher's layers as a beginning, or a model of the same tokenizer
    """
    settings, out, choice = settings or Settings(), Path(output), choice or Distillation()
    job = _Job(out, settings, on_progress, say)
    paths = _paths(data)
    files = resolve(teacher, offline=settings.offline)
    with job.metered():
        stored, source = _opened(files)
        master_spec = with_halves(stored)
        found = Tokenizer.from_files(files)
        packed = job.pack(read_documents(paths, found, end=_end(found), say=say), chat=is_chat(paths))
        layers = int(student[5:]) if student.startswith("drop:") and student[5:].isdigit() else None
        theirs: tuple[Source, ModelSpec] | None = None
        if layers is not None:
            spec = dropped(master_spec, layers)
        elif (shaped := parse_shape(student, vocab=master_spec.V)) is not None:
            spec = shaped
        else:
            student_stored, student_source = _opened(resolve(student, offline=settings.offline))
            spec, theirs = with_halves(student_stored), (student_source, student_stored)
        if spec.V != master_spec.V:
            raise InputError(f"{teacher} knows {master_spec.V} tokens, the student {spec.V}. Give a student of the same tokenizer, or a shape")
        teaching = WeightPlan(default="fp32" if settings.weights == "fp32" or settings.weights is None else settings.weights)
        spare = weight_bytes(master_spec, teaching) + 4 * settings.context * master_spec.D * 32
        plan = job.plan(spec, packed, method="full", spare_bytes=spare)
        copy_tokenizer(files, out / TOKENIZER)
        master = build_model(master_spec, teaching, context=settings.context).eval()
        fill(master, source, stored)
        net = build_model(spec, plan.weights, context=settings.context)
        if theirs is not None:
            fill(net, *theirs)
        elif layers is not None:
            begin_as_teacher(net, master, kept_layers(master_spec.L, layers))
        else:
            init(net, settings.seed)
        objective = distillation(master, choice, plan.loss_tokens)
        return job.run(net, plan, packed, objective, default_lr=5e-4, name=student, extra={"teacher": teacher, **asdict(choice)}, spare_bytes=spare)


def write_with_teacher(
    teacher: str, prompts: Sequence[str], path: Path, *, tokens: int = 256, memory: str | int | None = None, offline: bool = False, seed: int = 0
) -> Path:
    """Sequence-level distillation's data (arXiv:1606.07947): the teacher's answers to `prompts`, written through our engine as JSONL of texts."""
    from tradespace.engine.request import SamplingParams
    from tradespace.llm import open as open_model

    with open_model(teacher, memory=memory, offline=offline) as llm:
        params = [SamplingParams(max_tokens=tokens, temperature=1.0, seed=seed + number) for number in range(len(prompts))]
        done = llm.generate(list(prompts), params)
    lines = (json.dumps({"text": prompt + completion.text}, ensure_ascii=False) for prompt, completion in zip(prompts, done, strict=True))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------------------- one run


class _Job:
    """One run's folder, budget and settings."""

    def __init__(self, out: Path, settings: Settings, on_progress: Callable[[Progress], None], say: Say):
        self.out, self.settings, self.on_progress, self.say = out, settings, on_progress, say
        self.began = time.monotonic()
        if out.exists() and not out.is_dir():
            raise InputError(f"--output {out} is a file. Give a folder")
        self.last = checkpoints.latest(out, say) if out.exists() else None
        if out.exists() and any(out.iterdir()) and not settings.resume:
            raise InputError(f"--output {out} is not empty. Give --resume to go on with the run in it, or another folder")
        self.device = api.find_machine(None)
        self.budget = parse_bytes(api.DEFAULT_SHARE if settings.memory is None else settings.memory, free_bytes=self.device.free_bytes)
        self.meter = MemoryMeter()

    def metered(self) -> MemoryMeter:
        limit_heap_growth(MiB)
        self.out.mkdir(parents=True, exist_ok=True)
        return self.meter

    def pack(self, documents: Sequence[Document], *, chat: bool) -> Packed:
        return pack(documents, self.settings.context, source="the data", split=not chat)

    def plan(self, spec: ModelSpec, data: Packed, *, method: str | None, rank: int = 16, alpha: float = 32.0, spare_bytes: int = 0) -> TrainPlan:
        settings = self.settings
        if settings.context > spec.max_context:
            raise InputError(f"--context {settings.context}: {spec.name} takes at most {spec.max_context} tokens")
        # what the process costs by now is measured: it takes the place of the runtime, the tokenizer and the data
        rehearse()
        here = process_bytes()
        device = replace(self.device, runtime_bytes=replace(self.device.runtime_bytes, value=here, source="measured"))
        segments = None if settings.checkpointing is None else parse_checkpointing(settings.checkpointing, spec.L)
        question = Question(
            spec=spec, device=device, memory_bytes=self.budget, context=settings.context, batch=settings.batch, method=method, weights=settings.weights,
            optimizer=settings.optimizer, checkpointing=segments, rank=rank, alpha=alpha, fused=settings.fused if not settings.clip else False,
            spare_bytes=spare_bytes,
        )  # fmt: skip
        if len(data) < 1:
            raise InputError("the data make no block")
        found = best_plan(question)
        self.ledger, self.spec = found.ledger, spec
        self.say(f"plan: {found.plan.describe()}; predicted {format_bytes(found.ledger.total_bytes + spare_bytes)} of {format_bytes(self.budget)}")
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
        spare_bytes: int = 0,
    ) -> Run:
        settings = self.settings
        order = Order(len(data), plan.micro_batch, plan.accumulation, settings.seed, settings.shuffle)
        steps = settings.steps or max(1, round(settings.epochs * len(data) / (plan.micro_batch * plan.accumulation)))
        lr = settings.lr or default_lr
        parameters = prepare(net, plan, settings.seed)
        described = {
            **plan.to_dict(), "lr": lr, "schedule": settings.schedule, "warmup": settings.warmup, "decay": settings.decay, "clip": settings.clip,
            "seed": settings.seed, "shuffle": settings.shuffle, "steps": steps, "blocks": len(data), "tokens": data.num_tokens, **(extra or {}),
        }  # fmt: skip
        described.pop("memory_bytes")
        trainer = Trainer(
            model=net, parameters=parameters, optimizer=Optimizer(plan.optimizer, parameters, Hyper(lr=lr, decay=settings.decay)), data=data, order=order,
            schedule=Schedule(lr=lr, steps=steps, warmup=settings.warmup, shape=settings.schedule), objective=objective,
            limits=Limits(steps=steps, time_s=settings.time_limit_s, save_every=settings.save_every, clip=settings.clip), fused=plan.fused, settings=described,
        )  # fmt: skip
        if settings.resume and self.last is not None:
            trainer.restore(self.last)
            self.say(f"resumed from step {trainer.step} of {steps}")
        (self.out / "run.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        speeds: list[float] = []
        ended = trainer.run(self.out, on_step=lambda report: self._told(report, trainer, speeds), say=self.say)
        result, peak = self._write(net, plan, name), self.meter.peak_bytes
        loss_curve(self.out / "loss.png", trainer.losses, self.say)
        speed = sorted(speeds)[len(speeds) // 2] if speeds else 0.0
        return Run(
            model=name, output=str(self.out), result=str(result), plan=plan.to_dict(), ledger=self.ledger.to_dict(), steps=trainer.step, ended=ended,
            losses=trainer.losses, tokens_per_s=speed, mfu=self._mfu(plan, speed), predicted_bytes=self.ledger.total_bytes + spare_bytes,
            peak_bytes=peak, budget_bytes=self.budget, seconds=time.monotonic() - self.began,
            resumed_from=self.last.step if settings.resume and self.last else None,
        )  # fmt: skip

    def _mfu(self, plan: TrainPlan, tokens_per_s: float) -> float | None:
        rate = self.device.flops_per_s(plan.weights.dense)
        return None if rate.value is None else flops_per_token(self.spec, plan.context) * tokens_per_s / rate.value

    def _told(self, report: StepReport, trainer: Trainer, speeds: list[float]) -> None:
        speeds.append(report.tokens / report.seconds)
        speed = sorted(speeds[-20:])[len(speeds[-20:]) // 2]
        left = (trainer.limits.steps - report.step) * report.tokens / speed
        peak = self.meter.peak_bytes
        mfu = None
        if (rate := self.device.flops_per_s(trainer.settings["weights"]["default"] if trainer.settings["method"] == "full" else "fp32")).value:
            mfu = flops_per_token(self.spec, trainer.settings["context"]) * speed / rate.value
        self.on_progress(
            Progress(step=report.step, steps=trainer.limits.steps, loss=report.loss, lr=report.lr, tokens_per_s=speed, mfu=mfu, memory_bytes=peak,
                     budget_bytes=self.budget, eta_s=left)
        )  # fmt: skip
        if peak > self.budget:
            trainer.save(self.out)
            raise BudgetError(
                f"the run took {format_bytes(peak)}; {format_bytes(self.budget)} were stated, and {format_bytes(self.ledger.total_bytes)} predicted. It was stopped "  # noqa: E501
                f"at step {report.step} with a checkpoint. Go on with --resume --memory {format_bytes(peak * 1.05).replace(' ', '')}",
                need_bytes=peak,
                have_bytes=self.budget,
            )

    def _write(self, net: Transformer, plan: TrainPlan, name: str) -> Path:
        """The result, whole or not at all."""
        target = self.out / (MERGED if plan.method == "full" else ADAPTER)
        partial = self.out / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        if plan.method == "full":
            save_model(net, partial, dtype=torch.float32 if plan.weights.default == "fp32" else torch.bfloat16)
            if (self.out / TOKENIZER).is_dir():
                shutil.copytree(self.out / TOKENIZER, partial, dirs_exist_ok=True)
        else:
            save_adapter(net, partial, Shape(rank=plan.rank, alpha=plan.alpha, targets=plan.targets), base=name)
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


def _paths(data: Sequence[str | os.PathLike[str]]) -> list[Path]:
    if not data:
        raise InputError("no data. Give --data FILE: a UTF-8 text, or a .jsonl file of conversations")
    return [Path(path) for path in data]


def _opened(files: ModelFiles) -> tuple[ModelSpec, Source]:
    source = read_gguf(files.weights[0]) if files.kind == "gguf" else read_sharded(files.folder)
    return api.spec_of_files(files), source


def _end(tokenizer: Tokenizer) -> int | None:
    return min(tokenizer.eos_ids) if tokenizer.eos_ids else None


def _tokenizer_for_scratch(job: _Job, model: str, spec: ModelSpec, tokenizer: str | None, paths: Sequence[Path]) -> Tokenizer:
    folder = job.out / TOKENIZER
    if (folder / "tokenizer.json").is_file():
        return read_tokenizer(folder)
    if tokenizer is not None:
        copy_tokenizer(resolve(tokenizer, offline=job.settings.offline), folder)
        return read_tokenizer(folder)
    own = Path(model).expanduser()
    if own.is_dir() and (own / "tokenizer.json").is_file():
        folder.mkdir(parents=True)
        for path in own.glob("tokenizer*"):
            shutil.copyfile(path, folder / path.name)
        return read_tokenizer(folder)
    job.say(f"a byte-level tokenizer of {spec.V:,} entries is trained on the data")
    return train_tokenizer(paths, spec.V, folder)


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
