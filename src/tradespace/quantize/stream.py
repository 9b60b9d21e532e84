"""One layer of a model at a time: its weights in fp32, run over the calibration windows, whose hidden states lie in a file between the layers.

Layers are computed on torch's default device (the CPU, unless an experiment sets another).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tradespace.errors import CorruptFileError
from tradespace.kernels.attention.dispatch import make_kernels, resolve_kernels
from tradespace.kernels.rope import RopeTable
from tradespace.kernels.view import StepBatch, positions_of
from tradespace.model.layer import Layer
from tradespace.model.parts import Norm, Parts
from tradespace.quantize.source import Weights
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import layer_tensors
from tradespace.spec.weights import WeightPlan


class HiddenStates(Protocol):
    """Hidden states between two layers, a few windows' at a time (`num_windows` pieces): in a file, or wherever else they fit."""

    @property
    def num_windows(self) -> int: ...

    def read(self, window: int) -> Tensor:
        """hidden_TD, the caller's own."""
        ...

    def write_all(self, windows: Iterator[Tensor]) -> None:
        """Replaces them all; what is there may still be read while they come."""
        ...


class HiddenFile:
    """Hidden states (windows, context, D) in fp32 in a file: read and written one window at a time, through no mapping, so that they cost a window of
    memory."""

    def __init__(self, path: Path, num_windows: int, context: int, width: int):
        self.path, self.num_windows, self.context, self.width = path, num_windows, context, width
        self.window_bytes = 4 * context * width

    @property
    def nbytes(self) -> int:
        return self.num_windows * self.window_bytes

    def read(self, window: int) -> Tensor:
        """hidden_TD of one window."""
        found_TD = torch.empty(self.context, self.width)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(window * self.window_bytes)
            view = found_TD.view(-1).numpy().view("uint8").data
            got = 0
            while got < self.window_bytes:
                step = file.readinto(view[got:])
                if not step:
                    raise CorruptFileError(f"{self.path} ends at window {window} of {self.num_windows}. Delete its folder and quantize again")
                got += step
        return found_TD

    def write_all(self, windows: Iterator[Tensor]) -> None:
        """All windows in order, into a file that appears whole or not at all and survives a power cut."""
        partial = self.path.with_name(self.path.name + ".new")
        with open(partial, "wb", buffering=0) as file:
            for hidden_TD in windows:
                data = hidden_TD.contiguous().view(-1).numpy().view("uint8").data
                done = 0
                while done < len(data):
                    done += file.write(data[done:])
            os.fsync(file.fileno())
        os.replace(partial, self.path)


def write_embeddings(weights: Weights, windows: Sequence[Sequence[int]], hidden: HiddenFile) -> None:
    """The layers' first input: the embedding's rows at each token, scaled and normalized as the model does. One pass over the table, a chunk at a time."""
    spec = weights.spec
    ids_T = torch.tensor([token for window in windows for token in window], dtype=torch.int64)
    order_T = ids_T.argsort(stable=True)
    sorted_T = ids_T[order_T]
    scale = spec.embed_scale
    partial = hidden.path.with_name(hidden.path.name + ".new")
    row_bytes = 4 * hidden.width
    norm = read_norm(weights, "embed_norm") if spec.embed_norm else None
    positions_SD = weights.read("positions.weight") if spec.learned_positions else None
    with open(partial, "w+b", buffering=0) as file:
        file.truncate(hidden.nbytes)
        for row, values_RC in weights.row_chunks("embed.weight"):
            first, last = (int(torch.searchsorted(sorted_T, edge)) for edge in (row, row + len(values_RC)))
            for index in range(first, last):
                place = int(order_T[index])
                h_D = values_RC[sorted_T[index] - row]
                h_D = h_D * scale if scale != 1.0 else h_D
                if norm is not None:
                    h_D = norm(h_D[None])[0]
                if positions_SD is not None:
                    h_D = h_D + positions_SD[place % hidden.context + spec.position_offset]
                os.pwrite(file.fileno(), h_D.contiguous().numpy().tobytes(), place * row_bytes)
        os.fsync(file.fileno())
    os.replace(partial, hidden.path)


def read_norm(weights: Weights, name: str) -> Norm:
    """A norm outside of the layers."""
    parts = Parts(weights.spec, WeightPlan(default="fp32"), linear="torch", device=torch.get_default_device())
    norm = parts.norm(name)
    assert norm is not None, f"{weights.spec.name} has no {name}"
    norm.weight.data = weights.read(f"{name}.weight")
    if norm.bias is not None:
        norm.bias.data = weights.read(f"{name}.bias")
    return norm


class LayerRunner:
    """Builds single layers of a model in fp32 and runs windows through them, `windows` of them at a time. Keeps rotary tables and attention kernels, no
    weights."""

    def __init__(self, spec: ModelSpec, context: int, *, windows: int = 1):
        self.spec, self.context, device = spec, context, torch.get_default_device()
        self.plan = WeightPlan(default="fp32")
        self.attends = make_kernels(resolve_kernels(spec, "sdpa", torch.float32, "cpu"))
        self.ropes = [layer.mixer.rope if isinstance(layer.mixer, Attention) else None for layer in spec.layers]
        self.tables = {rope: RopeTable(rope, context, device) for rope in dict.fromkeys(self.ropes) if rope is not None}
        self.batch = StepBatch.packed([context] * windows, device=device)
        self.positions_T = positions_of(self.batch.spans, device=device)

    def build(self, index: int, tensors: dict[str, Tensor]) -> Layer:
        """Layer `index` over these very tensors (canonical name → fp32), which it does not copy."""
        with torch.device("meta"):
            parts = Parts(self.spec, self.plan, linear="torch", device="meta")
            layer = Layer(parts, index, self.spec.layers[index], self.attends[index])
        prefix = f"layers.{index}."
        for tensor in layer_tensors(self.spec, index):
            stem, kind = tensor.name.removeprefix(prefix).rpartition(".")[::2]
            parameter = torch.nn.Parameter(tensors[tensor.name], requires_grad=False)
            setattr(layer.get_submodule(stem), kind, parameter)
        return layer

    @torch.inference_mode()
    def run(self, index: int, layer: Layer, hidden_TD: Tensor) -> Tensor:
        """The layer's output for one window (which it may overwrite)."""
        rope = self.ropes[index]
        rows = None if rope is None else self.tables[rope].rows(self.positions_T, torch.float32)
        return layer(hidden_TD, rows, self.batch, None)


def read_layer(weights: Weights, index: int) -> dict[str, Tensor]:
    """All tensors of one layer by canonical name."""
    return {tensor.name: weights.read(tensor.name) for tensor in layer_tensors(weights.spec, index)}
