"""What else one could do: other plans, more devices, a smaller model, another shape of model, each with its price."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from tradespace.cost.formulas import kv_cache_bytes
from tradespace.cost.time import decode_time, decode_tokens_per_s
from tradespace.planner.candidate import Candidate
from tradespace.planner.search import Frontier, plan_frontier
from tradespace.spec.device import DeviceSpec
from tradespace.spec.estimate import Estimate
from tradespace.spec.kv import KVPlan, token_bytes
from tradespace.spec.model import DenseFFN, ModelSpec, RoutedFFN
from tradespace.spec.plan import Plan
from tradespace.spec.tensors import num_parameters
from tradespace.spec.weights import WeightPlan, weight_bytes
from tradespace.spec.workload import Workload
from tradespace.spec.zoo import ZOO, find_model
from tradespace.units import format_bytes

SMALLER_FORMATS = ("bf16", "int8")


@dataclass(frozen=True)
class Alternative:
    """One answer to "what else": `kind` is "resident", "devices", "streamed" or "smaller model"; `text` says it in a line."""

    kind: str
    text: str
    candidate: Candidate

    def to_dict(self) -> dict[str, object]:
        model = self.candidate.question.model.name
        return {"kind": self.kind, "text": self.text, "model": model, **self.candidate.to_dict(), "ledger": self.candidate.ledger.to_dict()}


def alternatives(model: ModelSpec, device: DeviceSpec, workload: Workload, memory: int | None = None, *, frontier: Frontier | None = None) -> list[Alternative]:
    """The ways out where no resident plan on the devices at hand keeps the quality; empty where one does, as then there is nothing to trade.

    In this order: the best plan that is resident all the same; the fewest devices like this one with which quality is kept; layers streamed; the largest
    smaller relative that fits in bf16 or int8. `frontier`: the same question's over the whole space, where it is priced already.
    """
    if frontier is None:
        frontier = plan_frontier(model, device, workload, memory_bytes=memory)
    resident = _preferred(frontier, lambda c: c.fits and c.placement.streamed_layers == 0)
    if resident is not None and resident.comfort == 0 and _keeps_quality(resident):
        return []
    found = []
    if resident is not None:
        found.append(Alternative("resident", f"{_where(resident)}, all layers resident in {resident.weights.describe()}{_loss(resident)}", resident))
    found += [found_for for found_for in (_on_more_devices(frontier), _streamed(frontier)) if found_for is not None]
    smaller = _smaller_model(model, device, workload, memory)
    return [*found, smaller] if smaller is not None else found


def _preferred(frontier: Frontier, accept: Callable[[Candidate], bool]) -> Candidate | None:
    return min((c for c in frontier.candidates if accept(c)), key=lambda c: (*c.preference, len(c.runs)), default=None)


def _keeps_quality(candidate: Candidate) -> bool:
    return candidate.quality_key[0] == 0


def _loss(candidate: Candidate) -> str:
    return "; its loss on the reference text is unknown" if candidate.quality.value is None else f"; loses {candidate.quality.value:.4f} nats a token"


def _where(candidate: Candidate) -> str:
    name = candidate.question.device.name
    return f"{candidate.tensor_parallel} × {name}" if candidate.tensor_parallel > 1 else f"one {name}"


def _on_more_devices(frontier: Frontier) -> Alternative | None:
    """The fewest devices that hold every layer with the quality kept."""
    degrees = sorted({c.tensor_parallel for c in frontier.candidates if c.tensor_parallel > 1})
    for degree in degrees:
        found = _preferred(frontier, lambda c, n=degree: c.tensor_parallel == n and c.fits_memory and c.comfort == 0 and _keeps_quality(c))
        if found is not None:
            text = f"{_where(found)}, {found.weights.describe()}, {format_bytes(found.bytes_each)} on each"
            return Alternative("devices", text, found)
    return None


def _streamed(frontier: Frontier) -> Alternative | None:
    """Layers streamed at every step, with the speed that this costs."""
    found = _preferred(frontier, lambda c: c.fits and c.comfort == 1 and _keeps_quality(c))
    if found is None:
        return None
    speed = found.decode_tokens_per_s
    rate = "at an unknown speed" if speed.value is None else f"at {speed.value:.2g} tok/s"
    layers, source = found.placement.streamed_layers, found.placement.stream_from
    return Alternative(
        "streamed", f"{layers} of {frontier.question.model.L} layers in {found.weights.describe()} streamed from {source} at every step, {rate}", found
    )


def relatives(model: ModelSpec) -> list[ModelSpec]:
    """Smaller models of the zoo, the largest first: those of the same generation by name ("llama-2"), else of the same architecture."""
    size = num_parameters(model)
    names = [name for name, entry in ZOO.items() if entry.config.get("model_type") == model.family and name != model.name]
    same_generation = [name for name in names if _stem(name) == _stem(model.name)]
    found = [find_model(name) for name in same_generation] or [find_model(name) for name in names]
    return sorted((other for other in found if num_parameters(other) < size), key=num_parameters, reverse=True)


def _stem(name: str) -> str:
    """A model's name up to its size: llama-2 of llama-2-70b."""
    return re.split(r"-\d+(?:\.\d+)?x?\d*[bm](?:-|$)", name, maxsplit=1)[0]


def _smaller_model(model: ModelSpec, device: DeviceSpec, workload: Workload, memory: int | None) -> Alternative | None:
    for other in relatives(model):
        if workload.context_tokens > other.max_context:
            continue
        for weights in SMALLER_FORMATS:
            if weight_bytes(other, WeightPlan(default=weights)) > (device.free_bytes if memory is None else memory):
                continue  # it need not be priced
            frontier = plan_frontier(other, device, workload, memory_bytes=memory, pins={"weights": weights, "placement": "resident"})
            if frontier.best is not None and _keeps_quality(frontier.best):
                text = f"{other.name} in {weights}, {format_bytes(frontier.best.bytes_each)} on {_where(frontier.best)}"
                return Alternative("smaller model", text, frontier.best)
    return None


# ---------------------------------------------------------------------------------------------------------------- shapes of models


@dataclass(frozen=True, slots=True)
class ShapeRow:
    """What a model's proportions come to: `kv_workload_bytes` is the cache of the whole workload, `decode_tokens_per_s` that of the plainest plan."""

    name: str
    layers: int
    width: int
    ffn: int
    kv_heads: int
    parameters: int
    weight_bytes: int
    kv_token_bytes: int
    kv_workload_bytes: int
    decode_tokens_per_s: Estimate
    bound: str

    def to_dict(self) -> dict[str, object]:
        found: dict[str, object] = {name: getattr(self, name) for name in self.__slots__ if name != "decode_tokens_per_s"}
        return found | {"decode_tokens_per_s": self.decode_tokens_per_s.value, "decode_source": self.decode_tokens_per_s.source}


def compare_shapes(models: Sequence[ModelSpec], device: DeviceSpec, workload: Workload, *, weights: str = "bf16", store: str = "bf16") -> list[ShapeRow]:
    """One row per model: what width against depth, the feed-forward ratio and the number of KV heads do to weights, cache and speed. Nothing need fit."""
    return [_shape_row(model, device, workload, WeightPlan(default=weights), store) for model in models]


def _shape_row(model: ModelSpec, device: DeviceSpec, workload: Workload, weights: WeightPlan, store: str) -> ShapeRow:
    slots = workload.concurrency * workload.context_tokens
    plan = Plan(
        model=model.name,
        weights=weights,
        kv=KVPlan(layout="contiguous", store=store),
        max_sequences=workload.concurrency,
        max_context=workload.context_tokens,
        kv_tokens=slots,
        device=device.name,
    )
    step = decode_time(model, plan, replace(device, count=1), workload)
    return ShapeRow(
        name=model.name,
        layers=model.L,
        width=model.D,
        ffn=_most(layer.ffn.F for layer in model.layers if isinstance(layer.ffn, DenseFFN | RoutedFFN)),
        kv_heads=_most(getattr(layer.mixer, "K", 0) for layer in model.layers if layer.mixer is not None),
        parameters=num_parameters(model),
        weight_bytes=weight_bytes(model, weights),
        kv_token_bytes=token_bytes(model, store),
        kv_workload_bytes=kv_cache_bytes(model, workload.context_tokens, workload.concurrency, store),
        decode_tokens_per_s=decode_tokens_per_s(step, workload.concurrency, workload),
        bound=step.bound,
    )


def _most(values: Iterable[int]) -> int:
    return max(values, default=0)
