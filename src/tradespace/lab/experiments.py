"""The experiments that `tradespace lab` knows, in one visible table. Each asks one question, measures it here, and returns a Record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from tradespace.errors import InputError
from tradespace.lab.common import record_file
from tradespace.measure.record import Record


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """name: of the record, too. `module` has the functions `run` and `markdown` under these names, or under those given.

    parts: what `run` can do alone, if it takes `only`; rows of its record name theirs, and figures begin with it.

    A module is imported when its experiment runs: a parent that had loaded torch would share its pages with the processes that "memory" measures.
    """

    name: str
    question: str
    minutes: float
    module: str
    runner: str = "run"
    parts: tuple[str, ...] = ()
    on: str = "cpu"  # the kind of device that it needs
    anywhere: bool = False  # its `run` takes a `device` and runs on a CPU and on a card
    timed: bool = False  # its `run` takes a `time_limit_s`, keeps what is finished, and goes on from there
    of_model: bool = False  # its `run` takes a `model`, by name or path
    picture: str = ""  # the function of `module` that draws a record as a PNG, for one that is kept beside it

    @property
    def file(self) -> str:
        """The record's name in its folder."""
        return record_file(self.name)

    def run(
        self,
        *,
        quick: bool,
        say: Callable[[str], None],
        only: Sequence[str] = (),
        device: str | None = None,
        time_limit_s: float | None = None,
        model: str | None = None,
    ) -> Record:
        """Measures (with `only`, these parts), and returns the record. Raises InputError for a part, a device or an option that it does not have."""
        given: dict[str, Any] = {}
        for takes, flag, key, value in (
            (self.anywhere, "device", "device", device),
            (self.timed, "time-limit", "time_limit_s", time_limit_s),
            (self.of_model, "model", "model", model),
        ):
            if takes:
                given[key] = value
            elif value is not None:
                raise InputError(f"--{flag} {value}: {self.name} takes none. These do: {_takers(flag)}")
        for part in only:
            if part not in self.parts:
                raise InputError(f"--only {part}: {self.name} has {', '.join(self.parts) or 'no parts'}")
        run = getattr(import_module(f"tradespace.lab.{self.module}"), self.runner)
        if self.parts:
            given["only"] = tuple(only) or self.parts
        return run(quick=quick, say=say, **given)

    def joined(self, before: Record, now: Record, only: Sequence[str]) -> Record:
        """`now`, a run of the parts `only`, with the other parts of an earlier record. Each row then says at which commit and when it was measured."""
        kept = [part for part in self.parts if part not in only]
        rows = [{"commit": before.commit, "date": before.date[:10]} | dict(row) for row in before.rows if row.get("part") in kept]
        rows += [{"commit": now.commit, "date": now.date[:10]} | dict(row) for row in now.rows]
        figures = {name: figure for name, figure in before.figures.items() if name.split(":")[0] in kept}
        rows.sort(key=lambda row: self.parts.index(row["part"]))
        return replace(now, rows=tuple(rows), figures=figures | dict(now.figures))

    def draw(self, record: Record, path: Path) -> Path | None:
        """Draws the record that lies at `path`, if the experiment has a picture, and returns where."""
        if not self.picture:
            return None
        drawn = path.with_suffix(".png")
        getattr(import_module(f"tradespace.lab.{self.module}"), self.picture)(record, drawn)
        return drawn

    def markdown(self, record: Record) -> str:
        """The table that the documentation shows."""
        return import_module(f"tradespace.lab.{self.module}").markdown(record)


def _takers(flag: str) -> str:
    taking = {"device": "anywhere", "time-limit": "timed", "model": "of_model"}[flag]
    return ", ".join(experiment.name for experiment in EXPERIMENTS.values() if getattr(experiment, taking))


MODELS = ("smollm2-135m", "gemma3-270m")
KV_PARTS = ("model", "simulation")
PREDICTED = ("bf16", "int8", "fp8-a8", "int4-g128")  # weights whose speeds on a GPU are compared with the planner's, of many sequences and of one alone
GPU_PREDICTIONS = tuple(f"{part}-{weights}" for part in ("predictions", "alone") for weights in PREDICTED)
GPU_PARTS = ("decode", "mixes", "fp8-mixes", "memory", *GPU_PREDICTIONS, "start-up", "70B")
CPU_PARTS = ("decode", "prefill", "batch", "start")
_BUDGET = "does the process stay inside its budget, and is its peak what was predicted?"

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment(name="memory", question=_BUDGET, minutes=9, module="memory"),
        Experiment(name="speed", question="how fast are prefill and decode, against the prediction?", minutes=4, module="speed"),
        Experiment(name="paging", question="what do pages waste, and what do they cost?", minutes=4, module="paging"),
        Experiment(name="batching", question="what does continuous batching gain over fixed batches?", minutes=6, module="batching"),
        Experiment(name="prefix", question="what do shared prefixes gain, and what do they cost where nothing is shared?", minutes=4, module="prefix"),
        Experiment(name="quality", question="what does each weight format cost in KL divergence?", minutes=12, module="quality"),
        Experiment(name="sweep", question="which format by which method, at how many bytes?", minutes=30, module="sweep", picture="draw_png"),
        Experiment(name="quantizers", question="which quantizer makes the most of the same bits?", minutes=10, module="quantizers", parts=MODELS),
        Experiment(name="kv-quality", question="what does holding less of the past cost in KL divergence?", minutes=15, module="kv_quality"),
        Experiment(name="kv-exact", question="do exact ways to hold the past give the full cache's tokens?", minutes=12, module="kv_exact", parts=MODELS),
        Experiment(name="kv-cache", question="what do bytes, speed and quality do as the cache shrinks?", minutes=30, module="kv_cache", parts=KV_PARTS),
        Experiment(name="agreement", question="does it compute what llama.cpp computes?", minutes=6, module="agreement"),
        Experiment(
            name="activations",
            question="what do activations in int8 cost, beside llama.cpp's, and how exact is fp32?",
            minutes=8,
            module="activations",
            parts=("int8", "caches", "exact"),
        ),
        Experiment(name="native-quality", question="does the native path predict as well as the torch path?", minutes=8, module="native_quality"),
        Experiment(name="cpu-speed", question="does the CPU engine hold its bars?", minutes=18, module="cpu_speed", parts=CPU_PARTS),
        Experiment(name="attention", question="what does attention hold beyond q, k, v and the output, and how does it grow?", minutes=2, module="attention"),
        Experiment(name="flash", question="is the GPU kernel right, how fast is it, what does it hold?", minutes=2, module="flash", on="cuda"),
        Experiment(
            name="gpu-agreement",
            question="does the GPU engine compute what the CPU engine does, from a real checkpoint?",
            minutes=3,
            module="gpu_agreement",
            on="cuda",
            of_model=True,
        ),
        Experiment(name="gpu-speed", question="does the GPU engine hold its bars, and its budget?", minutes=15, module="gpu_speed", parts=GPU_PARTS, on="cuda"),
        Experiment(
            name="gpu-kernels",
            question="at which share of a GPU's bandwidth do the kernels of a decode step read?",
            minutes=8,
            module="gpu_kernels",
            parts=("products", "attention", "tiles"),
            on="cuda",
        ),
        Experiment(name="checkpointing", question="what does recomputing layers save and cost in training, by segment?", minutes=4, module="checkpointing"),
        Experiment(name="from-scratch", question="does training learn what transformers' Trainer learns, step by step?", minutes=15, module="from_scratch"),
        Experiment(
            name="architecture",
            question="what do fewer KV heads, depth and a narrow feed-forward cost in loss?",
            minutes=60,
            module="architecture",
            anywhere=True,
            timed=True,
        ),
        Experiment(name="batch-size", question="how many tokens to a loss, by batch size?", minutes=10, module="batch_size"),
        Experiment(
            name="distill-student",
            question="what does a teacher give a student?",
            minutes=8,
            module="distill_student",
            on="cuda",
            anywhere=True,
            timed=True,
            of_model=True,
        ),
        Experiment(
            name="train-ledger",
            question="does a training step take the bytes that its ledger says?",
            minutes=3,
            module="train_ledger",
            anywhere=True,
            timed=True,
        ),
        Experiment(name="qlora-curve", question="does QLoRA learn as bitsandbytes + PEFT does?", minutes=6, module="qlora_curve"),
        Experiment(name="train-gpu", question="how fast does a GPU train, in how many bytes, beside its peers?", minutes=5, module="train_gpu", on="cuda"),
        Experiment(name="calibration", question="what do the cost model's measured constants come to here?", minutes=12, module="calibrate"),
        Experiment(
            name="quantize_safety", question="does quantize keep its budget, survive SIGKILL, and does int4 run as int4?", minutes=12, module="quantizing"
        ),
        Experiment(
            name="serve-constraints",
            question="is constrained output valid, and what does it cost?",
            minutes=8,
            module="serving.constraints",
            parts=("valid", "cost"),
        ),
        Experiment(name="serve-overload", question="does the server stay whole when far too much arrives?", minutes=14, module="serving.overload"),
        Experiment(name="serve-faults", question="does the server answer others whatever some clients do?", minutes=8, module="serving.faults"),
        Experiment(name="serve-prefix", question="what does the prefix cache gain over HTTP?", minutes=6, module="serving.prefix"),
        Experiment(name="serve-throughput", question="what does HTTP cost of the engine's tokens a second?", minutes=3, module="serving.throughput"),
        Experiment(name="serve-client", question="does bench serve measure what guidellm measures?", minutes=9, module="serving.client"),
        Experiment(name="serve-scores", question="does lm-eval over HTTP score as tradespace eval does?", minutes=5, module="serving.scores"),
        Experiment(name="plan-speed", question="how long does the search over the whole space take?", minutes=1, module="plan_speed"),
        Experiment(name="first-block", question="how long is it from a clone to the first table, without torch?", minutes=2, module="first_block"),
        Experiment(name="demo", question="what does make demo print here?", minutes=1, module="commands", runner="run_demo"),
        Experiment(name="tests", question="how do the tests end here, and in what time?", minutes=9, module="commands", runner="run_tests"),
    )
}
