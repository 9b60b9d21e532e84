"""A model boiled down to the few numbers that costs are sums of, and one device's share of its tensors.

Costs are sums over layers, and most layers are alike: `Summary.groups` holds each distinct layer once with its count, so that a search over thousands of
plans does not walk hundreds of tensors for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import ceil

from tradespace.spec.kv import KVPlan, id_bytes, mixer_state_bytes, mixer_token_bytes
from tradespace.spec.mixers import Attention
from tradespace.spec.model import LayerSpec, ModelSpec, RoutedFFN
from tradespace.spec.products import dense_shapes, is_coded
from tradespace.spec.tensors import TensorSpec, active_parameters, layer_tensors, model_tensors
from tradespace.spec.weights import WeightPlan, unpacked_elements, workspace_shape

Product = tuple[int, int, int]  # outputs, columns, rows up to which another kernel takes it


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that equal each other: the layer, how many, and the index of the first."""

    layer: LayerSpec
    count: int
    first: int


@dataclass(frozen=True)
class Summary:
    """What costs need to know about a model, computed once."""

    model: ModelSpec
    groups: tuple[LayerGroup, ...]
    group_of: tuple[int, ...]  # of each layer: the index of its group
    active_parameters: int
    state_bytes_per_sequence: int

    @property
    def head_parameters(self) -> int:
        """Parameters of the product that gives logits, tied or not."""
        return self.model.V * self.model.D

    @cached_property
    def attention_groups(self) -> tuple[tuple[Attention, int], ...]:
        return tuple((group.layer.mixer, group.count) for group in self.groups if isinstance(group.layer.mixer, Attention))

    @cached_property
    def rope_dims(self) -> int:
        """Widths of the distinct rotary tables, summed."""
        return sum(rope.dims for rope in {mixer.rope for mixer, _ in self.attention_groups if mixer.rope is not None})

    @cached_property
    def heads_divide(self) -> tuple[int, ...]:
        """Degrees of tensor parallelism among 1, 2, 4, 8 that every layer's query heads divide by."""
        return tuple(degree for degree in (1, 2, 4, 8) if all(mixer.N % degree == 0 for mixer, _ in self.attention_groups))


@lru_cache(maxsize=32)
def summarize(model: ModelSpec) -> Summary:
    """The summary of `model`, cached."""
    counts: dict[LayerSpec, list[int]] = {}
    for index, layer in enumerate(model.layers):
        counts.setdefault(layer, []).append(index)
    groups = tuple(LayerGroup(layer, len(indices), indices[0]) for layer, indices in counts.items())
    states = sum(group.count * group.layer.mixer.state_bytes_per_sequence for group in groups if group.layer.mixer is not None)
    group_of = dict(sorted((index, number) for number, indices in enumerate(counts.values()) for index in indices))
    return Summary(model, groups, tuple(group_of.values()), active_parameters(model), states)


# ---------------------------------------------------------------------------------------------------------------- one device's share


def heads_per_device(heads: int, degree: int) -> int:
    """Heads that one of `degree` devices holds: an equal part, but never less than one, so that few key-value heads are replicated.

    >>> heads_per_device(64, 8), heads_per_device(8, 8), heads_per_device(1, 4)
    (8, 1, 1)
    """
    return max(1, ceil(heads / degree))


def shard_shape(model: ModelSpec, tensor: TensorSpec, degree: int) -> tuple[int, ...]:
    """Shape of one device's part of `tensor`: projections in by rows (heads, hidden columns), projections out by columns, the vocabulary by rows.

    Norms, positions, routers and the biases of what is summed are replicated.
    """
    if degree == 1 or tensor.role in ("norm", "positions", "router"):
        return tensor.shape
    mixer = model.layers[tensor.layer].mixer if tensor.layer >= 0 else None
    if isinstance(mixer, Attention) and ".attn." in tensor.name:
        N, K = heads_per_device(mixer.N, degree), heads_per_device(mixer.K, degree)
        if ".attn.qkv." in tensor.name:
            return (N * mixer.H + K * (mixer.H + mixer.Hv), *tensor.shape[1:])
        if ".attn.gate." in tensor.name:
            return (N * mixer.Hv, *tensor.shape[1:])
        if tensor.role == "attn_out":
            return (tensor.shape[0], N * mixer.Hv)
    if tensor.role == "bias":
        return tensor.shape
    if tensor.role == "experts":  # (E, out, in): every device holds a slice of every expert
        E, out, columns = tensor.shape
        return (E, out, ceil(columns / degree)) if ".down." in tensor.name else (E, ceil(out / degree), columns)
    if tensor.role in ("down", "attn_out"):
        return (*tensor.shape[:-1], ceil(tensor.shape[-1] / degree))
    return (ceil(tensor.shape[0] / degree), *tensor.shape[1:])


@dataclass(frozen=True)
class WeightShare:
    """Bytes of one device's weights: outside of the layers and per layer, each by (role, format name)."""

    outside: Mapping[tuple[str, str], int]
    layers: tuple[Mapping[tuple[str, str], int], ...]

    @cached_property
    def layer_bytes(self) -> tuple[int, ...]:
        return tuple(sum(layer.values()) for layer in self.layers)

    @cached_property
    def outside_bytes(self) -> int:
        return sum(self.outside.values())

    @cached_property
    def total_bytes(self) -> int:
        return self.outside_bytes + sum(self.layer_bytes)

    @cached_property
    def streamed_bytes(self) -> tuple[int, ...]:
        """Entry k: bytes of the last k layers."""
        found = [0]
        for layer_bytes in reversed(self.layer_bytes):
            found.append(found[-1] + layer_bytes)
        return tuple(found)

    @cached_property
    def largest_layer_bytes(self) -> int:
        return max(self.layer_bytes, default=0)


def _by_role_and_format(model: ModelSpec, weights: WeightPlan, degree: int, tensors) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for tensor in tensors:
        held = weights.format_of(tensor)
        key = (tensor.role, held.name)
        found[key] = found.get(key, 0) + weights.nbytes(replace(tensor, shape=shard_shape(model, tensor, degree)))
    return found


def weight_share(summary: Summary, weights: WeightPlan, degree: int = 1) -> WeightShare:
    """Bytes of the weights on each of `degree` devices under `weights`; degree 1 is all of them."""
    model = summary.model
    outside = _by_role_and_format(model, weights, degree, (tensor for tensor in model_tensors(model) if tensor.layer < 0))
    if any(":" in key for key in weights.exceptions):
        return WeightShare(outside, tuple(_by_role_and_format(model, weights, degree, layer_tensors(model, index)) for index in range(model.L)))
    alike = [_by_role_and_format(model, weights, degree, layer_tensors(model, group.first)) for group in summary.groups]
    return WeightShare(outside, tuple(alike[group] for group in summary.group_of))


def cache_token_bytes(summary: Summary, kv: KVPlan | str, degree: int = 1) -> tuple[tuple[int | None, int, int], ...]:
    """(reach, bytes of one token, layers) for each group of layers that caches, on one device; a name stands for that store of everything.

    The reach is the most tokens that a query finds: the layer's window, or what the retention keeps. A latent is replicated: every head reads it.
    """
    kv = KVPlan(store=kv) if isinstance(kv, str) else kv
    found = []
    for group in summary.groups:
        mixer = group.layer.mixer
        if mixer is None or mixer.cache_elements_per_token == 0:
            continue
        if isinstance(mixer, Attention):
            size = mixer_token_bytes(mixer, summary.model.D, kv, heads_per_device(mixer.K, degree))
        else:
            size = kv.stores[0].nbytes(1, mixer.cache_elements_per_token)
        found.append((reach(mixer.window, kv), size, group.count))
    return tuple(found)


def reach(window: int | None, kv: KVPlan) -> int | None:
    """Most tokens that a query finds in a layer with this window; None: all."""
    kept = None if kv.retain.rebuilds else kv.retain.capacity
    return window if kept is None else kept if window is None else min(window, kept)


def cache_state_bytes(summary: Summary, kv: KVPlan, max_context: int, degree: int = 1) -> int:
    """Bytes that the cache keeps for each sequence beside its slots, on one device: tails, and token ids."""
    tails = (mixer_state_bytes(mixer, kv, heads_per_device(mixer.K, degree)) * count for mixer, count in summary.attention_groups)
    return sum(tails) + id_bytes(kv, max_context)


def dequantize_elements(summary: Summary, weights: WeightPlan, degree: int = 1) -> int:
    """Elements of the workspace that a device's coded matrices are decoded into: the largest tile, and a one per row. 0 where none is decoded."""
    if weights.layout == "native":
        return 0
    if weights.layout == "cuda":
        return unpacked_elements(summary.model, weights)
    outside = (tensor for tensor in model_tensors(summary.model) if tensor.layer < 0)
    inside = (tensor for group in summary.groups for tensor in layer_tensors(summary.model, group.first))
    quantized = (tensor for tensor in (*outside, *inside) if len(tensor.shape) >= 2 and is_coded(weights.format_of(tensor)))
    return sum(workspace_shape(shard_shape(summary.model, tensor, degree) for tensor in quantized))


def product_shapes(summary: Summary, weights: WeightPlan, degree: int = 1) -> tuple[frozenset[Product], frozenset[Product]]:
    """The library's products of the layers and of the head; of a stack of experts none, as nothing is compiled ahead for them."""
    model = summary.model
    if weights.layout != "stored":
        return frozenset(), frozenset()
    if any(":" in key for key in weights.exceptions):
        inside = [tensor for index in range(model.L) for tensor in layer_tensors(model, index)]
    else:
        inside = [tensor for group in summary.groups for tensor in layer_tensors(model, group.first)]
    head = "embed" if model.tied else "lm_head"
    outside = [tensor for tensor in model_tensors(model) if tensor.layer < 0 and tensor.role == head]

    def shapes(tensors: Iterable[TensorSpec]) -> frozenset[Product]:
        matrices = [tensor for tensor in tensors if len(tensor.shape) == 2]
        return frozenset(found for tensor in matrices for found in dense_shapes(weights.format_of(tensor), *shard_shape(model, tensor, degree)))

    return shapes(inside), shapes(outside)


def widest_columns(summary: Summary) -> int:
    """Columns of the widest matrix of the layers: the most inputs that a product sums over."""
    shapes = (tensor.shape for group in summary.groups for tensor in layer_tensors(summary.model, group.first) if len(tensor.shape) >= 2)
    return max((shape[-1] for shape in shapes), default=summary.model.D)


def routed_groups(summary: Summary) -> tuple[tuple[RoutedFFN, int], ...]:
    return tuple((group.layer.ffn, group.count) for group in summary.groups if isinstance(group.layer.ffn, RoutedFFN))
