"""A small model whole in memory, for comparing quantizers: quantized layer by layer by the same functions as `tradespace quantize`, then read against itself.

Weights are those of the file in fp32, rounded ones as they decode, and products are in fp32 (activations in int8 where the format says so): what differs is
what the quantizer did. Everything lies on torch's default device, so an accelerator does the work where the experiment sets one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tradespace import api
from tradespace.formats import decode
from tradespace.loading.gguf import read_gguf
from tradespace.loading.resolve import resolve
from tradespace.loading.safetensors import read_sharded
from tradespace.quality.divergence import Divergence, Tally
from tradespace.quantize.aiming import aim_layer
from tradespace.quantize.folds import Tensors
from tradespace.quantize.hadamard import RotatedWeights
from tradespace.quantize.head_divergence import logits_of
from tradespace.quantize.layer_passes import built, collect_grams, run_own, run_quantized
from tradespace.quantize.methods import Method, QuantizedLayer, layer_matrices, quantize_layer, round_matrix
from tradespace.quantize.sensitivity import SensitivityPass
from tradespace.quantize.source import StoredWeights, Weights
from tradespace.quantize.stream import HiddenStates, LayerRunner, read_layer, read_norm
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import TensorSpec, model_tensors
from tradespace.spec.weights import WeightPlan

WINDOWS = 16  # that run through a layer at once
LOGIT_ROWS = 512


class HeldWeights:
    """`Weights` of which every tensor lies on the device."""

    def __init__(self, name: str):
        files = resolve(name)
        spec = api.spec_of_files(files)
        with torch.device("cpu"):
            stored = StoredWeights(read_gguf(files.weights[0]) if files.kind == "gguf" else read_sharded(files.folder), spec)
            self.tensors = {tensor.name: stored.read(tensor.name) for tensor in model_tensors(stored.spec)}
        self.files, self.spec, self.stored_spec = files, stored.spec, stored.stored_spec
        device = torch.get_default_device()
        self.tensors = {name: values.to(device) for name, values in self.tensors.items()}

    def turned(self, seed: int) -> HeldWeights:
        """The same model in the basis of a random Hadamard matrix, its head untied. Raises UnsupportedError where its norms do not commute with one."""
        turned, other = RotatedWeights(self, seed), copy(self)
        outer = ("embed.weight", "lm_head.weight")
        other.tensors = {tensor.name: turned.read(tensor.name) for tensor in model_tensors(turned.spec) if tensor.name not in outer}
        other.tensors |= {name: torch.cat([rows_RC for _, rows_RC in turned.row_chunks(name)]) for name in outer}
        other.spec = turned.spec
        return other

    def read(self, name: str) -> Tensor:
        return self.tensors[name].clone()

    def row_chunks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """The matrix in one piece."""
        yield 0, self.tensors[name]


class HeldHidden:
    """Hidden states in memory, `windows` windows to a piece."""

    def __init__(self, pieces: Sequence[Tensor] = ()):
        self.pieces = list(pieces)

    @property
    def num_windows(self) -> int:
        return len(self.pieces)

    def read(self, window: int) -> Tensor:
        return self.pieces[window].clone()

    def write_all(self, windows: Iterator[Tensor]) -> None:
        self.pieces = list(windows)

    def copied(self) -> HeldHidden:
        """The same states, to be written over by somebody else."""
        return HeldHidden(self.pieces)


def embedded(weights: Weights, windows: Sequence[Sequence[int]], *, together: int) -> HeldHidden:
    """The layers' first input. `windows` come `together` to a piece, and must be whole pieces."""
    spec, norm = weights.spec, read_norm(weights, "embed_norm") if weights.spec.embed_norm else None
    assert not spec.learned_positions and len(windows) % together == 0, "whole pieces of a model with rotary positions"
    table_VD = torch.cat([rows_VD.clone() for _, rows_VD in weights.row_chunks("embed.weight")])
    pieces = []
    for start in range(0, len(windows), together):
        ids_T = torch.tensor([token for window in windows[start : start + together] for token in window], dtype=torch.int64)
        hidden_TD = table_VD[ids_T] * spec.embed_scale
        pieces.append(hidden_TD if norm is None else norm(hidden_TD))
    return HeldHidden(pieces)


@dataclass
class QuantizedModel:
    """`tensors`: as the model then computes, fp32, what a quantizer left alone included. `formats`: of each matrix that it changed."""

    tensors: Tensors
    formats: dict[str, str] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)


def quantize_whole(
    weights: HeldWeights, plan: WeightPlan, method: Method, runner: LayerRunner, calibration: HeldHidden, *, alpha: float | None = None
) -> QuantizedModel:
    """The model in the formats of `plan`, its layers one after the other, each learning from what the quantized ones before it give it."""
    spec, hidden, reference = weights.spec, calibration.copied(), calibration.copied()
    found = QuantizedModel(dict(weights.tensors))
    for index in range(spec.L):
        tensors = read_layer(weights, index)
        if method.aims:
            done = aim_layer(runner, index, tensors, plan, method, reference, hidden)
            reference.write_all(run_own(runner, index, tensors, reference))
        else:
            grams = collect_grams(runner, index, tensors, hidden) if method.needs_text else {}
            done = quantize_layer(spec, index, tensors, grams, plan, method, alpha=alpha)
        if method.needs_text and index + 1 < spec.L:
            hidden.write_all(run_quantized(runner, index, done, hidden))
        _keep(found, index, done)
    for tensor in outer_matrices(spec):
        fmt = plan.format_of(tensor)
        if fmt.name != "fp32":
            rounding = "nearest" if method.rounding == "nearest" else "search"
            found.tensors[tensor.name] = decode(fmt.name, round_matrix(fmt, weights.read(tensor.name), None, rounding))
            found.formats[tensor.name] = fmt.name
    return found


def _keep(found: QuantizedModel, index: int, done: QuantizedLayer) -> None:
    found.tensors |= done.tensors
    found.formats |= {name: fmt for name, (fmt, _) in done.codes.items()}
    found.alphas |= {f"{index}.{stem}": alpha for stem, alpha in done.alphas.items()}


def outer_matrices(spec: ModelSpec) -> list[TensorSpec]:
    """Embedding and head."""
    return [tensor for tensor in model_tensors(spec) if tensor.role in ("embed", "lm_head") and tensor.name.endswith(".weight")]


class Reader:
    """Windows of a text, and what the model itself predicts in them."""

    def __init__(self, weights: HeldWeights, windows: Sequence[Sequence[int]], *, together: int = WINDOWS):
        self.weights, self.windows, self.together = weights, windows, together
        self.runner = LayerRunner(weights.spec, len(windows[0]), windows=together)
        self.reference = self._final(QuantizedModel(weights.tensors))

    @torch.no_grad()
    def _final(self, model: QuantizedModel) -> HeldHidden:
        """Hidden states after the final norm."""
        spec, weights = self.weights.spec, _Values(self.weights, model.tensors)
        hidden = embedded(weights, self.windows, together=self.together)
        for index in range(spec.L):
            tensors = {name: values for name, values in model.tensors.items() if name.startswith(f"layers.{index}.")}
            formats = {tensor.name: model.formats[tensor.name] for tensor in layer_matrices(spec, index) if tensor.name in model.formats}
            layer = built(self.runner, index, tensors, formats)
            hidden.write_all(self.runner.run(index, layer, hidden.read(piece)) for piece in range(hidden.num_windows))
        if spec.final_norm:
            norm = read_norm(weights, "final_norm")
            hidden.write_all(norm(piece_TD) for piece_TD in list(hidden.pieces))
        return hidden

    @torch.no_grad()
    def divergence(self, model: QuantizedModel) -> Divergence:
        """Of the model from itself, over all windows."""
        spec, found, tally = self.weights.spec, self._final(model), Tally()
        head = "embed.weight" if spec.tied else "lm_head.weight"
        heads = [tensors[head][: spec.V] for tensors in (self.weights.tensors, model.tensors)]
        context = len(self.windows[0])
        ids = [token for window in self.windows for token in window]
        for piece in range(found.num_windows):
            start = piece * self.together * context
            # a window's last position predicts a token that is not in it
            rows = [row for row in range(self.together * context) if (row + 1) % context]
            for first in range(0, len(rows), LOGIT_ROWS):
                here = rows[first : first + LOGIT_ROWS]
                index_R, targets_R = torch.tensor(here), torch.tensor([ids[start + row + 1] for row in here])
                reference_RV, other_RV = (
                    logits_of(spec, states.pieces[piece][index_R], head_VD).log_softmax(-1)
                    for states, head_VD in zip((self.reference, found), heads, strict=True)
                )
                tally.add(reference_RV, other_RV, targets_R)
        return on_cpu(tally)


def on_cpu(tally: Tally) -> Divergence:
    """The figures of a tally that lies on a device."""
    with torch.device("cpu"):
        return Tally(*([part.cpu() for part in parts] for parts in (tally.kl, tally.reference_nats, tally.nats, tally.same))).result()


class _Values:
    """`Weights` with other values in them."""

    def __init__(self, weights: HeldWeights, tensors: Mapping[str, Tensor]):
        self.spec, self.stored_spec, self.tensors = weights.spec, weights.stored_spec, tensors

    def read(self, name: str) -> Tensor:
        return self.tensors[name].clone()

    def row_chunks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.tensors[name]


class HeldSensitivities(SensitivityPass):
    """The sensitivity pass of `tradespace quantize --bytes`, its hidden states in memory instead of in files."""

    def __init__(self, weights: Weights, method: Method, formats: Sequence[str], windows: Sequence[Sequence[int]], work: Path):
        super().__init__(weights, method, formats, windows, work, progress=lambda what, done, total: None)
        self.held: dict[tuple[str, int], HeldHidden] = {}

    def _file(self, kind: str, index: int, windows: int) -> HeldHidden:
        return self.held.setdefault((kind, index), HeldHidden())

    def _embed(self, weights: Weights, windows: Sequence[Sequence[int]], hidden: HiddenStates) -> None:
        assert isinstance(hidden, HeldHidden), "as `_file` makes them"
        hidden.pieces = embedded(weights, windows, together=1).pieces

    def _drop(self, index: int) -> None:
        for kind in ("probes", "reference"):
            self.held.pop((kind, index), None)
