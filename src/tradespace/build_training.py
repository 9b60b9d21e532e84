"""TrainPlan → what trains: weights at their final size, filled or drawn; adapters; checkpointing. All before the first step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tradespace.adapt.lora import Shape, adapter_parameters, lora
from tradespace.adapt.recompute import recompute
from tradespace.errors import UnsupportedError
from tradespace.formats import DTYPES, DenseWeight, Weight
from tradespace.kernels.attention.dispatch import resolve_kernels
from tradespace.kernels.attention.packed import attend, trains
from tradespace.kernels.rope import RopeTable
from tradespace.loading.weights import Source
from tradespace.model.layer import Layer
from tradespace.model.transformer import Transformer
from tradespace.quantize.rtn import fill_rtn
from tradespace.quantize.source import StoredWeights
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec
from tradespace.spec.parallel import shard_spec, split_refusal
from tradespace.spec.tensors import model_tensors
from tradespace.spec.training import TrainPlan, refusal, trained
from tradespace.spec.weights import WeightPlan
from tradespace.train.ranks import Ranks
from tradespace.train.shards import Shards

FILL_ELEMENTS = 2**21  # of a matrix, on their way into their format at once


def build_model(
    spec: ModelSpec,
    weights: WeightPlan,
    *,
    context: int,
    attention: str | None = None,
    device: torch.device | str = "cpu",
    without_memory: bool = False,
) -> Transformer:
    """Uninitialised, for training or as a teacher; `attention` by default the library's fused kernel. Raises UnsupportedError for what cannot be trained.

    without_memory  parameters are on torch's "meta" device until `materialize`
    """
    if (reason := refusal(spec)) is not None:
        raise UnsupportedError(f"{spec.name} cannot be trained yet: {reason}")
    on_device = torch.device(device).type == "cuda"
    kernels = resolve_kernels(spec, attention or ("flash" if on_device else "sdpa"), DTYPES[weights.dense], device)
    model = Transformer(spec, weights, attention=kernels, max_context=context, device="meta" if without_memory else device)
    if on_device and attention is None:
        for layer, described in zip(model.layers, spec.layers, strict=True):
            if isinstance(layer, Layer) and layer.attn is not None and isinstance(described.mixer, Attention) and trains(described.mixer):
                layer.attn.attend = attend  # the library's kernel where documents are whole; flash knows windows and patterns, too
    return model


def build_part(spec: ModelSpec, plan: TrainPlan, ranks: Ranks, *, context: int, device: torch.device | str = "cpu") -> tuple[Transformer, Shards]:
    """One rank's part of a model, without values. What is cut into rows never lies whole in memory; codes of a frozen base are whole on every data rank."""
    if (reason := split_refusal(spec, ranks.tensor)) is not None:
        raise UnsupportedError(f"{spec.name} over {ranks.tensor} tensor ranks: {reason}")
    late = ranks.data > 1 and plan.method != "qlora"
    model = build_model(shard_spec(spec, ranks.tensor), plan.weights, context=context, device=device, without_memory=late)
    if plan.method == "full":
        for parameter in model.parameters():
            parameter.requires_grad_()
    shards = Shards(spec, ranks)
    shards.apply(model)
    if late:
        materialize(model, device)
    return model, shards


def materialize(model: Transformer, device: torch.device | str) -> None:
    """Memory for what `without_memory` left out: parameters, and the rotary tables, which are no parameters."""
    model.to_empty(device=device)
    model.rope_tables = {rope: RopeTable(rope, model.max_context, device) for rope in model.rope_tables}
    for layer, rope in zip(model.layers, model.layer_ropes, strict=True):
        if isinstance(layer, Layer) and layer.attn is not None and rope is not None:
            layer.attn.rope_table = model.rope_tables[rope]


@torch.no_grad()
def fill(
    model: Transformer,
    source: Source,
    stored_spec: ModelSpec,
    on_load: Callable[[int, int], None] | None = None,
    *,
    shards: Shards | None = None,
) -> None:
    """Weights from files, one tensor at a time, rotary pairs in halves; with `shards` this rank's part of each."""
    weights = StoredWeights(source, stored_spec)
    shards = shards or Shards(model.spec)
    tensors, held = model_tensors(shards.spec), {} if shards.alone else shards.find(model)
    for number, tensor in enumerate(tensors):
        if tensor.name in held:
            shards.put(held[tensor.name], tensor.name, weights.read(tensor.name))
            continue
        stem, kind = tensor.name.rsplit(".", 1)
        module = model.get_submodule(stem)
        if isinstance(module, Weight) and kind == "weight":
            in_rows = isinstance(module, DenseWeight) or module.format_name == "int8"  # each row for itself
            if tensor.role in ("embed", "lm_head") and len(weights.pieces[tensor.name]) == 1 and in_rows:
                for row, rows_RC in weights.row_chunks(tensor.name):
                    fill_rtn(module, row, rows_RC.to(_device_of(module), copy=True), name=tensor.name)
            else:
                _fill_rows(module, weights.read(tensor.name), tensor.name)
        else:
            model.get_parameter(tensor.name).copy_(weights.read(tensor.name))
        if on_load is not None:
            on_load(number + 1, len(tensors))


def _fill_rows(module: Weight, values_RC: Tensor, name: str) -> None:
    step, device = max(1, FILL_ELEMENTS // values_RC.shape[-1]), _device_of(module)
    for start in range(0, len(values_RC), step):
        fill_rtn(module, start, values_RC[start : start + step].to(device), name=name)  # pyright: ignore


def _device_of(module: Weight) -> torch.device:
    return next(tensor.device for tensor in (*module.parameters(), *module.buffers()))


def prepare(model: Transformer, plan: TrainPlan, seed: int) -> dict[str, Tensor]:
    """What learns, by name, in the order of `spec.training.trained`; checkpointing in place."""
    if plan.method == "full":
        for parameter in model.parameters():
            parameter.requires_grad_()
        held = Shards(model.spec).find(model)
        found: dict[str, Tensor] = {name: held[name] for name, _, _ in trained(model.spec, plan)}
    else:
        lora(model, Shape(rank=plan.rank, alpha=plan.alpha, targets=plan.targets), learn=True, seed=seed)
        found = dict(adapter_parameters(model))
    recompute(model, plan.checkpointing)
    return found
