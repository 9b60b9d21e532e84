"""`ts.train`, `ts.finetune`, `ts.distill`: a run inside a stated memory, planned, logged, resumable, reported predicted against measured."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from tradespace import api
from tradespace.build_training import build_model, build_part, fill
from tradespace.errors import InputError, UnsupportedError
from tradespace.loading.gguf import read_gguf
from tradespace.loading.resolve import ModelFiles, resolve
from tradespace.loading.safetensors import read_sharded
from tradespace.loading.tokenizer import Tokenizer
from tradespace.loading.weights import Source
from tradespace.measure.record import write_atomically
from tradespace.quantize.source import with_halves
from tradespace.spec.formats import ELEMENT_BYTES
from tradespace.spec.model import ModelSpec
from tradespace.spec.weights import WeightPlan, weight_bytes
from tradespace.train.data import Packed
from tradespace.train.distill import LOGIT_BYTES, Distillation, begin_as_teacher, distillation, dropped, kept_layers
from tradespace.train.initialise import init
from tradespace.train.loop import next_token
from tradespace.train.reading import is_chat, read_documents
from tradespace.tuning_job import TOKENIZER, Beside, Job, Progress, Run, Say, Settings
from tradespace.tuning_models import copy_tokenizer, find_shape, parse_shape, read_tokenizer, train_tokenizer


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
    job = Job(out, settings, on_progress, say)
    spec, paths = find_shape(str(model)), _paths(data)
    job.check_context(spec)
    with job.metered():
        found = _tokenizer_for_scratch(job, str(model), spec, tokenizer, paths)
        if found.vocab_size > spec.V:
            raise InputError(
                f"the tokenizer has {found.vocab_size} tokens; the shape has vocab={spec.V}. Give vocab={found.vocab_size}, or another --tokenizer"
            )
        packed = job.pack(read_documents(paths, found, end=_end(found), say=say), chat=is_chat(paths))
        plan = job.plan(spec, packed, method="full", beside=Beside())
        net, shards = build_part(spec, plan, job.ranks, context=settings.context, device=job.place)
        init(net, settings.seed, shards)
        return job.run(net, plan, packed, next_token(plan.loss_tokens), default_lr=1e-3, name=str(model), shards=shards)


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
    job = Job(out, settings, on_progress, say)
    files = resolve(model, offline=settings.offline)
    with job.metered():
        stored, source, packed = _read(job, files, _paths(data), say)
        spec = with_halves(stored)
        plan = job.plan(spec, packed, method=method, rank=rank, alpha=2.0 * rank if alpha is None else alpha)
        job.first(lambda: copy_tokenizer(files, out / TOKENIZER))
        net, shards = build_part(spec, plan, job.ranks, context=settings.context, device=job.place)
        fill(net, source, stored, shards=shards)
        return job.run(net, plan, packed, next_token(plan.loss_tokens), default_lr=1e-5 if plan.method == "full" else 2e-4, name=model, shards=shards)


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
    job = Job(out, settings, on_progress, say)
    if job.ranks.world > 1:
        raise UnsupportedError(f"distill runs in one process, and {job.ranks.world} were started. Start it without torchrun")
    if student.startswith("drop:") and not student[5:].isdigit():
        raise InputError(f"--student {student}: write drop:N with the number of the teacher's layers to begin with, such as drop:15")
    files = resolve(teacher, offline=settings.offline)
    with job.metered():
        stored, source, packed = _read(job, files, _paths(data), say)
        master_spec = with_halves(stored)
        layers = int(student[5:]) if student.startswith("drop:") and student[5:].isdigit() else None
        theirs: tuple[Source, ModelSpec] | None = None
        if layers is not None:
            spec = dropped(master_spec, layers)
        elif (shaped := parse_shape(student, vocab=master_spec.V)) is not None:
            spec = shaped
        else:
            student_stored, student_source = opened(resolve(student, offline=settings.offline))
            spec, theirs = with_halves(student_stored), (student_source, student_stored)
        if spec.V != master_spec.V:
            raise InputError(f"{teacher} knows {master_spec.V} tokens, the student {spec.V}. Give a student of the same tokenizer, or a shape")
        teaching = WeightPlan(default="fp32" if settings.weights == "fp32" or settings.weights is None else settings.weights)
        held = weight_bytes(master_spec, teaching)
        stream = master_spec.D * ELEMENT_BYTES[teaching.dense]
        plan = job.plan(spec, packed, method="full", beside=Beside(spare_bytes=held, spare_token_bytes=stream, logit_bytes=LOGIT_BYTES))
        copy_tokenizer(files, out / TOKENIZER)
        master = build_model(master_spec, teaching, context=settings.context, device=job.place).eval()
        fill(master, source, stored)
        job.check_context(spec)
        net = build_model(spec, plan.weights, context=settings.context, device=job.place)
        if theirs is not None:
            fill(net, *theirs)
        elif layers is not None:
            begin_as_teacher(net, master, kept_layers(master_spec.L, layers))
        else:
            init(net, settings.seed)
        objective = distillation(master, choice, plan.loss_tokens)
        return job.run(net, plan, packed, objective, default_lr=5e-4, name=student, extra={"teacher": teacher, **asdict(choice)})


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
    write_atomically(path, "\n".join(lines) + "\n")
    return path


def _paths(data: Sequence[str | os.PathLike[str]]) -> list[Path]:
    if not data:
        raise InputError("no data. Give --data FILE: a UTF-8 text, or a .jsonl file of conversations")
    return [Path(path) for path in data]


def opened(files: ModelFiles) -> tuple[ModelSpec, Source]:
    """A model that is there: its spec as stored, and its weights."""
    source = read_gguf(files.weights[0]) if files.kind == "gguf" else read_sharded(files.folder)
    return api.spec_of_files(files), source


def _read(job: Job, files: ModelFiles, paths: Sequence[Path], say: Say) -> tuple[ModelSpec, Source, Packed]:
    """A model that is there: its spec, its weights, and the data in its own tokens."""
    stored, source = opened(files)
    job.check_context(stored)
    tokenizer = Tokenizer.from_files(files)
    return stored, source, job.pack(read_documents(paths, tokenizer, end=_end(tokenizer), say=say), chat=is_chat(paths))


def _end(tokenizer: Tokenizer) -> int | None:
    return min(tokenizer.eos_ids) if tokenizer.eos_ids else None


def _tokenizer_for_scratch(job: Job, model: str, spec: ModelSpec, tokenizer: str | None, paths: Sequence[Path]) -> Tokenizer:
    folder = job.out / TOKENIZER

    def make() -> None:
        own = Path(model).expanduser()
        if (folder / "tokenizer.json").is_file():
            return
        if tokenizer is not None:
            copy_tokenizer(resolve(tokenizer, offline=job.settings.offline), folder)
        elif own.is_dir() and (own / "tokenizer.json").is_file():
            folder.mkdir(parents=True)
            for path in own.glob("tokenizer*"):
                shutil.copyfile(path, folder / path.name)
        else:
            job.say(f"a byte-level tokenizer of {spec.V:,} entries is trained on the data")
            train_tokenizer(paths, spec.V, folder)

    job.first(make)
    return read_tokenizer(folder)
