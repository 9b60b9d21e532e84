"""What each matrix costs in quality in each format: KL of the model's output when only that matrix is quantized, in nats per token on calibration text.

One pass over the layers, one layer in memory: at layer i each of its matrices is rounded in each format, which begins a variant of the hidden states; all
variants
go on through the layers that follow, in a file. At the head their logits are compared with the model's own. Cost: matrices × formats × half a model's pass over
`SENSITIVITY_TOKENS` tokens. Resumes after the last whole layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tradespace.formats import decode
from tradespace.quantize.head_divergence import divergences
from tradespace.quantize.journal import Journal
from tradespace.quantize.layer_passes import built, collect_grams
from tradespace.quantize.methods import Inputs, Method, is_dense, layer_matrices, round_matrix
from tradespace.quantize.pipeline import CHUNK_ROWS, even_chunks
from tradespace.quantize.source import Weights
from tradespace.quantize.stream import HiddenFile, HiddenStates, LayerRunner, read_layer, read_norm, write_embeddings
from tradespace.spec.formats import find_format, refusal
from tradespace.spec.tensors import TensorSpec, model_tensors

SENSITIVITY_TOKENS = 1024
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Mean KL when the tensor alone is held in this format."""

    tensor: str
    fmt: str
    kl: float


def sensitivity_windows(windows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The first windows, cut, with SENSITIVITY_TOKENS tokens together at most, of at least 2 each."""
    context = min(len(windows[0]), SENSITIVITY_TOKENS // 2)
    count = max(1, min(len(windows), SENSITIVITY_TOKENS // context))
    return [list(window[:context]) for window in windows[:count]]


class SensitivityPass:
    """Measures `formats` (names) for every matrix that a format may hold. `work` holds its files and may be gone through again after a kill."""

    def __init__(self, weights: Weights, method: Method, formats: Sequence[str], windows: Sequence[Sequence[int]], work: Path, *, progress: Progress):
        self.weights, self.method, self.work, self.progress = weights, method, work, progress
        self.spec = weights.spec
        self.formats = [name for name in formats if not is_dense(find_format(name))]
        self.windows = [list(window) for window in windows]
        self.probes = sensitivity_windows(windows)
        self.variants: list[tuple[str, str]] = []  # (tensor, format) of each set of hidden states after the reference's

    def run(self, job: dict) -> list[Sensitivity]:
        """All sensitivities. `job` describes what is measured, for taking up an earlier run's work."""
        self.work.mkdir(parents=True, exist_ok=True)
        journal = Journal(self.work / "sensitivity.jsonl", {**job, "formats": self.formats})
        if (line := journal.find("measured")) is not None:
            return [Sensitivity(*entry) for entry in line["found"]]
        done = [line for line in journal.lines if line["step"].startswith("layer-")]
        if not done:
            self._begin()
        else:
            self.variants = [(tensor, fmt) for tensor, fmt in done[-1]["variants"]]
        runner, learner = LayerRunner(self.spec, len(self.probes[0])), LayerRunner(self.spec, len(self.windows[0]))
        for index in range(len(done), self.spec.L):
            self.progress("sensitivities", index, self.spec.L + 1)
            self._layer(index, runner, learner)
            journal.add({"step": f"layer-{index}", "variants": self.variants})
            self._drop(index)
        self.progress("sensitivities", self.spec.L, self.spec.L + 1)
        found = self._divergences()
        journal.add({"step": "measured", "found": [[entry.tensor, entry.fmt, entry.kl] for entry in found]})
        self._drop(self.spec.L)
        return found

    def _file(self, kind: str, index: int, windows: int) -> HiddenStates:
        """Where hidden states before layer `index` lie: "probes" of all variants, or "reference" of the calibration windows."""
        return HiddenFile(self.work / f"{kind}-{index}.bin", windows, self._context(kind), self.spec.D)

    def _context(self, kind: str) -> int:
        return len(self.probes[0]) if kind == "probes" else len(self.windows[0])

    def _embed(self, weights: Weights, windows: Sequence[Sequence[int]], hidden: HiddenStates) -> None:
        assert isinstance(hidden, HiddenFile), "as `_file` makes them"
        write_embeddings(weights, windows, hidden)

    def _drop(self, index: int) -> None:
        for kind in ("probes", "reference"):
            (self.work / f"{kind}-{index}.bin").unlink(missing_ok=True)

    def _fits(self, name: str, tensor: TensorSpec) -> bool:
        return refusal(find_format(name), tensor.shape[-1]) is None

    def _begin(self) -> None:
        """Hidden states before the first layer: the reference's, and one variant per format of the embedding."""
        embed = next(tensor for tensor in model_tensors(self.spec) if tensor.role == "embed")
        first = self._file("probes", 0, len(self.probes))
        self._embed(self.weights, self.probes, first)
        states = [[first.read(window) for window in range(len(self.probes))]]
        for name in self.formats:
            if self._fits(name, embed):
                self._embed(RoundedEmbedding(self.weights, name), self.probes, first)
                states.append([first.read(window) for window in range(len(self.probes))])
                self.variants.append((embed.name, name))
        first.write_all(hidden_TD for windows in states for hidden_TD in windows)
        if self.method.needs_text:
            self._embed(self.weights, self.windows, self._file("reference", 0, len(self.windows)))

    def _layer(self, index: int, runner: LayerRunner, learner: LayerRunner) -> None:
        tensors, count = read_layer(self.weights, index), len(self.probes)
        inputs: dict[str, Inputs] = {}
        if self.method.needs_text:
            reference = self._file("reference", index, len(self.windows))
            inputs = {stem: Inputs(gram) for stem, gram in collect_grams(learner, index, tensors, reference).items()}
            layer = learner.build(index, tensors)
            after = self._file("reference", index + 1, len(self.windows))
            after.write_all(learner.run(index, layer, reference.read(window)) for window in range(len(self.windows)))
        here = self._file("probes", index, count * (1 + len(self.variants)))
        matrices = layer_matrices(self.spec, index)
        begun = [(tensor, name) for tensor in matrices for name in self.formats if self._fits(name, tensor)]

        def states() -> Iterator[Tensor]:
            plain = runner.build(index, tensors)
            for window in range(here.num_windows):
                yield runner.run(index, plain, here.read(window))
            for tensor, name in begun:
                stem = tensor.name.removeprefix(f"layers.{index}.").removesuffix(".weight")
                codes = round_matrix(find_format(name), tensors[tensor.name], inputs.get(stem), self.method.rounding)
                changed = built(runner, index, tensors | {tensor.name: decode(name, codes)}, {tensor.name: name})
                for window in range(count):
                    yield runner.run(index, changed, here.read(window))

        after = self._file("probes", index + 1, count * (1 + len(self.variants) + len(begun)))
        after.write_all(states())
        self.variants += [(tensor.name, name) for tensor, name in begun]

    def _divergences(self) -> list[Sensitivity]:
        tied, count = self.spec.tied, len(self.probes)
        last = self._file("probes", self.spec.L, count * (1 + len(self.variants)))
        norm = read_norm(self.weights, "final_norm") if self.spec.final_norm else None

        def normed(variant: int) -> Tensor:
            hidden_TD = torch.cat([last.read(count * variant + window) for window in range(count)])
            return hidden_TD if norm is None else norm(hidden_TD)

        head = next(tensor for tensor in model_tensors(self.spec) if tensor.role == ("embed" if tied else "lm_head"))
        fitting = [name for name in self.formats if self._fits(name, head)]
        variants = list(self.variants)
        if not tied:
            variants += [(head.name, name) for name in fitting]

        def chunks() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
            for rows_VD in even_chunks(self.weights, head, CHUNK_ROWS):
                yield rows_VD, {name: decode(name, round_matrix(find_format(name), rows_VD, None, "search")) for name in fitting}

        kls = divergences(
            self.spec,
            chunks(),
            normed(0),
            len(variants),
            lambda variant: normed(variant + 1 if variant < len(self.variants) else 0),
            lambda variant: variants[variant][1] if variants[variant][0] == head.name else None,
        )
        return [Sensitivity(tensor, name, kl) for (tensor, name), kl in zip(variants, kls, strict=True)]


class RoundedEmbedding:
    """`Weights` whose embedding is rounded to a format."""

    def __init__(self, weights: Weights, fmt: str):
        self.inner, self.spec, self.stored_spec, self.fmt = weights, weights.spec, weights.stored_spec, fmt

    def read(self, name: str) -> Tensor:
        return self.inner.read(name)

    def row_chunks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """The embedding, rounded a chunk at a time (a scale that spans rows spans those of a chunk)."""
        tensor = next(tensor for tensor in model_tensors(self.spec) if tensor.name == name)
        row = 0
        for values_RC in even_chunks(self.inner, tensor, CHUNK_ROWS):
            yield row, decode(self.fmt, round_matrix(find_format(self.fmt), values_RC, None, "search"))
            row += len(values_RC)
