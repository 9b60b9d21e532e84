"""A model quantized layer by layer into what appears whole or not at all. Killed at any moment, it goes on where it stopped, and writes the same bytes.

In memory: one layer in fp32 (as it was and as it became), the Gram matrices of its inputs and one window's activations. The windows' hidden states wait
in a file between two layers. OUT.partial holds `checkpoint`, which becomes OUT in one rename at the end, and `work`: the journal and the hidden states.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tradespace.errors import InputError
from tradespace.loading.resolve import ModelFiles
from tradespace.loading.weights import Source
from tradespace.quantize.aiming import aim_layer
from tradespace.quantize.folds import norm_rounding
from tradespace.quantize.journal import Journal
from tradespace.quantize.layer_passes import collect_grams, run_own, run_quantized
from tradespace.quantize.methods import Method, QuantizedLayer, check_formats, quantize_layer, round_matrix
from tradespace.quantize.shards import sync_folder, write_in_chunks, write_shard
from tradespace.quantize.smoothing import choose_alpha
from tradespace.quantize.source import Weights
from tradespace.quantize.stream import HiddenFile, LayerRunner, read_layer, write_embeddings
from tradespace.quantize.writing import Checkpoint
from tradespace.quantize.writing_gguf import GGUFCheckpoint
from tradespace.spec.formats import refusal
from tradespace.spec.tensors import TensorSpec, model_tensors
from tradespace.spec.weights import WeightPlan

ALPHA_WINDOWS = 8
CHUNK_ROWS = 2048  # of an embedding or a head at a time
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is to be done: `weights` (rotated already where the method rotates) in the formats of `plan` by `method`, on calibration `windows`."""

    weights: Weights
    plan: WeightPlan
    method: Method
    windows: Sequence[Sequence[int]] = ()
    alpha: float | None = None
    seed: int = 0
    target: Literal["compressed-tensors", "gguf"] = "compressed-tensors"

    def naming(self, files: ModelFiles, source: Source) -> Checkpoint | GGUFCheckpoint:
        """How tensors are called and stored in what is written. Raises UnsupportedError or InputError where that cannot hold the model."""
        spec = self.weights.spec
        if self.target == "gguf":
            return GGUFCheckpoint(files, source, spec, self.weights.stored_spec, self.plan)
        return Checkpoint.of(files, source, spec, self.plan)

    def job(self, files: ModelFiles) -> dict[str, Any]:
        """What another run must have in common to go on with this one's work."""
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files.weights]
        windows = hashlib.sha256(repr([list(window) for window in self.windows]).encode()).hexdigest()
        plan = {"default": self.plan.default, "exceptions": dict(sorted(self.plan.exceptions.items()))}
        return {
            "version": 1,
            "weights": stats,
            "plan": plan,
            "method": self.method.name,
            "windows": windows,
            "alpha": self.alpha,
            "seed": self.seed,
            "to": self.target,
        }


@dataclass
class Outcome:
    """What was written: bytes of tensors, relative squared output error by "layer.linear", folds' α, and whether an earlier run's work was taken up."""

    folder: Path
    nbytes: int
    errors: dict[str, float] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    resumed: bool = False


def check_output(out: Path) -> None:
    """Raises InputError where OUT is taken, or would lie in a file."""
    if out.exists():
        raise InputError(f"{out} exists already. Give another -o, or remove it first")
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir():
        raise InputError(f"{out} cannot be written: {above} is a file, not a folder. Give another -o")


class Pipeline:
    """One run of a recipe. `work` and `journal` may be shared with what comes before it (sensitivities)."""

    def __init__(self, recipe: Recipe, files: ModelFiles, source: Source, out: Path, *, progress: Progress = lambda what, done, total: None):
        check_output(out)
        check_formats(recipe.weights.spec, recipe.plan, recipe.method)
        self.recipe, self.files, self.source, self.out, self.progress = recipe, files, source, out, progress
        self.spec, self.plan = recipe.weights.spec, recipe.plan
        for tensor in self._outer():
            why = refusal(self.plan.format_of(tensor), tensor.shape[-1]) if len(tensor.shape) > 1 else None
            if why is not None:
                raise InputError(f"{tensor.name}: {why}")
        self.naming = recipe.naming(files, source)
        self.round_norm = norm_rounding(self.naming.dtype, added=self.naming.norm_offset)

    def run(self) -> Outcome:
        """Everything; raises what its parts raise, and leaves OUT.partial for the next run then, unless the weights themselves are at fault."""
        partial = self.out.with_name(self.out.name + ".partial")
        self.folder, self.work = partial / "checkpoint", partial / "work"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(exist_ok=True)
        self.journal = Journal(self.work / "journal.jsonl", self.recipe.job(self.files))
        if not self.journal.resumed:
            _empty(self.folder)
            _empty(self.work, keep=self.journal.path)
        shards = [*(f"layer-{index}" for index in range(self.spec.L)), *(tensor.name for tensor in self._outer() if len(tensor.shape) > 1), "rest"]
        self.shard_names = {step: f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number, step in enumerate(shards, 1)}
        try:
            self._layers()
            self._around()
        except InputError:  # weights that are not finite, or of a type that is not read: no later run could go on
            shutil.rmtree(partial)
            raise
        return self._finish(partial)

    def _outer(self) -> list[TensorSpec]:
        return [tensor for tensor in model_tensors(self.spec) if tensor.layer < 0]

    @property
    def _streams(self) -> tuple[str, ...]:
        """Whose hidden states are kept: the quantized model's, and the model's own where linears aim at it."""
        return ("hidden", "reference") if self.recipe.method.aims else ("hidden",)

    def _hidden(self, index: int, stream: str = "hidden") -> HiddenFile:
        windows = self.recipe.windows
        return HiddenFile(self.work / f"{stream}-{index}.bin", len(windows), len(windows[0]), self.spec.D)

    def _layers(self) -> None:
        spec, recipe = self.spec, self.recipe
        learns = recipe.method.needs_text
        if learns and not any(self.journal.find(f"layer-{index}") for index in range(spec.L)) and self.journal.find("embedded") is None:
            for stream in self._streams:
                write_embeddings(recipe.weights, recipe.windows, self._hidden(0, stream))
            self.journal.add({"step": "embedded"})
        runner = LayerRunner(spec, len(recipe.windows[0])) if learns else None
        self.alpha = recipe.alpha
        if recipe.method.fold == "smooth" and self.alpha is None and runner is not None:
            self.alpha = self._smoothing(runner)
        for index in range(spec.L):
            self.progress("quantizing", index, len(self.shard_names))
            if self.journal.find(f"layer-{index}") is None:
                self._layer(index, runner)
            elif index and learns:
                self._drop(index - 1)  # killed between the journal and this

    def _drop(self, index: int) -> None:
        for stream in self._streams:
            self._hidden(index, stream).path.unlink(missing_ok=True)

    def _smoothing(self, runner: LayerRunner) -> float:
        """SmoothQuant's α: measured once, on a few of the windows."""
        line = self.journal.find("alpha")
        if line is None:
            windows = list(self.recipe.windows[:ALPHA_WINDOWS])
            first = HiddenFile(self.work / "alpha.bin", len(windows), len(windows[0]), self.spec.D)
            write_embeddings(self.recipe.weights, windows, first)
            line = {"step": "alpha", "value": choose_alpha(runner, self.recipe.weights, self.plan, first)}
            first.path.unlink()
            self.journal.add(line)
        return line["value"]

    def _layer(self, index: int, runner: LayerRunner | None) -> None:
        tensors = read_layer(self.recipe.weights, index)
        done = self._quantized(index, tensors, runner)
        stored: dict[str, Tensor] = {}
        for name, values in done.tensors.items():
            stored |= self.naming.quantized(name, *done.codes[name]) if name in done.codes else self.naming.dense(name, values)
        write_shard(self.folder / self.shard_names[f"layer-{index}"], stored)
        names = list(stored)
        nbytes = sum(tensor.nbytes for tensor in stored.values())
        del stored
        if runner is not None and index + 1 < self.spec.L:
            if self.recipe.method.aims:
                self._hidden(index + 1, "reference").write_all(run_own(runner, index, tensors, self._hidden(index, "reference")))
            del tensors
            self._hidden(index + 1).write_all(run_quantized(runner, index, done, self._hidden(index)))
        self.journal.add({"step": f"layer-{index}", "names": names, "bytes": nbytes, "errors": done.errors, "alphas": done.alphas})
        if runner is not None:
            self._drop(index)

    def _quantized(self, index: int, tensors: dict[str, Tensor], runner: LayerRunner | None) -> QuantizedLayer:
        method = self.recipe.method
        if runner is not None and method.aims:
            streams = (self._hidden(index, "reference"), self._hidden(index))
            return aim_layer(runner, index, tensors, self.plan, method, *streams, round_norm=self.round_norm)
        grams = {} if runner is None else collect_grams(runner, index, tensors, self._hidden(index))
        return quantize_layer(self.spec, index, tensors, grams, self.plan, method, alpha=self.alpha, round_norm=self.round_norm)

    def _around(self) -> None:
        """Embedding, head, and what little is left."""
        rest: dict[str, Tensor] = {}
        for tensor in self._outer():
            if len(tensor.shape) < 2:
                rest |= self.naming.dense(tensor.name, self.recipe.weights.read(tensor.name))
                continue
            self.progress("quantizing", self.spec.L, len(self.shard_names))
            if self.journal.find(tensor.name) is None:
                self._matrix(tensor)
        if self.journal.find("rest") is None:
            write_shard(self.folder / self.shard_names["rest"], rest)
            self.journal.add({"step": "rest", "names": list(rest), "bytes": sum(tensor.nbytes for tensor in rest.values())})

    def _matrix(self, tensor: TensorSpec) -> None:
        fmt, weights = self.plan.format_of(tensor), self.recipe.weights
        path = self.folder / self.shard_names[tensor.name]
        rounding = "nearest" if self.recipe.method.rounding == "nearest" else "search"
        if fmt.scale_rows != 1 or fmt.nested:
            values_RC = torch.cat([chunk_RC.clone() for _, chunk_RC in weights.row_chunks(tensor.name)])
            stored = self.naming.quantized(tensor.name, fmt.name, round_matrix(fmt, values_RC, None, rounding))
            write_shard(path, stored)
            sizes = {name: part.nbytes for name, part in stored.items()}
        else:
            chunks = (round_matrix(fmt, values_RC, None, rounding) for values_RC in even_chunks(weights, tensor, CHUNK_ROWS))
            parts, fixed = self.naming.quantized_chunks(tensor.name, fmt.name, chunks)
            sizes = write_in_chunks(path, parts, fixed=fixed)
        self.journal.add({"step": tensor.name, "names": list(sizes), "bytes": sum(sizes.values())})

    def _finish(self, partial: Path) -> Outcome:
        self.progress("quantizing", len(self.shard_names), len(self.shard_names))
        lines = {line["step"]: line for line in self.journal.lines if "names" in line}
        weight_map = {name: self.shard_names[step] for step, line in lines.items() for name in line["names"]}
        nbytes = sum(line["bytes"] for line in lines.values())
        found = self.naming.finish(self.folder, self.plan, weight_map, nbytes, self.files, self.source)
        wanted = {*self.shard_names.values()}
        for path in self.folder.iterdir():  # halves of files from before a kill
            if path.name.endswith(".new") or ".part" in path.name or (path.suffix == ".safetensors" and path.name not in wanted):
                path.unlink()
        outcome = Outcome(self.out, nbytes, resumed=self.journal.resumed)
        for index in range(self.spec.L):
            line = lines[f"layer-{index}"]
            outcome.errors |= {f"{index}.{stem}": error for stem, error in line["errors"].items()}
            outcome.alphas |= {f"{index}.{stem}": alpha for stem, alpha in line["alphas"].items()}
        os.rename(found, self.out)
        sync_folder(self.out.parent)
        shutil.rmtree(partial)
        return outcome


def even_chunks(weights: Weights, tensor: TensorSpec, rows: int) -> Iterator[Tensor]:
    """A matrix in runs of exactly `rows` rows (the last one may be shorter), each the caller's own."""
    waiting: list[Tensor] = []
    held = 0
    for _, values_RC in weights.row_chunks(tensor.name):
        start = 0
        while start < len(values_RC):
            take = values_RC[start : start + rows - held].clone()
            waiting.append(take)
            held, start = held + len(take), start + len(take)
            if held == rows:
                yield torch.cat(waiting)
                waiting, held = [], 0
    if waiting:
        yield torch.cat(waiting)


def _empty(folder: Path, keep: Path | None = None) -> None:
    for path in folder.iterdir():
        if path != keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
