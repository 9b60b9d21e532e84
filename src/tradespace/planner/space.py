"""The discrete space that the search walks: every axis with every value on it, narrowed by what the model, the device or the user rules out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tradespace.cost.summary import summarize
from tradespace.errors import InputError
from tradespace.spec import cuda, native
from tradespace.spec.attention import KERNELS, find_kernel, refusal, weights_refusal
from tradespace.spec.device import DeviceSpec
from tradespace.spec.formats import FORMATS, find_format
from tradespace.spec.formats import refusal as unsuitable
from tradespace.spec.kv import (
    FULL,
    STORES,
    KVPlan,
    Retain,
    model_refusal,
    parse_retain,
    parse_stores,
    pointless,
    resolve_budget,
    sharing_refusal,
)  # fmt: skip
from tradespace.spec.model import ModelSpec
from tradespace.spec.plan import ACTIVATIONS, LINEAR_KERNELS
from tradespace.spec.tensors import QUANTIZABLE_ROLES, model_tensors
from tradespace.spec.weights import WeightPlan
from tradespace.spec.workload import Workload

STEP_TOKENS = (32, 128, 512, 2048)
LAYOUTS = (("paged", 16), ("paged", 64), ("contiguous", 16))
DEGREES = (1, 2, 4, 8)
# the formats that are searched: of those that differ by the size of their groups or by zero points alone, one or two stand for all. Any other can be pinned
OFFERED = ("fp32", "bf16", "fp16", "int8", "w8a8", "fp8", "int4", "int4-g32", "nf4", "int3", "int2", "e8")
_EAGER = ("reference", "chunked", "sdpa")
PINS = (
    *("weights", "head", "kv_store", "kv_retain", "layout", "block_size", "prefix_sharing", "attention", "linear", "activations"),
    *("step_tokens", "placement", "tensor_parallel"),
)


@dataclass(frozen=True, kw_only=True)
class Space:
    """The axes. `sources`: where layers may be streamed from; `must_stream`: only plans that do; `refused`: kernels with the reason why they are left out.

    `prefix_sharing`: plans share prefixes where layout and retention allow it.
    """

    weights: tuple[WeightPlan, ...]
    stores: tuple[str, ...] | None  # None: the activations' own dtype and every quantized one
    layouts: tuple[tuple[str, int], ...]
    prefix_sharing: bool
    kernels: tuple[str, ...]
    linear: str
    activations: str
    step_tokens: tuple[int, ...]
    degrees: tuple[int, ...]
    sources: tuple[str, ...]
    must_stream: bool
    refused: Mapping[str, str]
    own: frozenset[WeightPlan] = frozenset()  # those of `weights` that are the checkpoint's own, without any loss beside it
    native_stores: Mapping[str, str] = field(default_factory=dict)  # what a native step with weights of a format holds unless told otherwise
    own_store: bool = False  # the activations' own dtype is tried beside `stores`
    retain: Retain = FULL
    refused_stores: Mapping[str, str] = field(default_factory=dict)  # with the reason why they are left out

    def of_smallest_steps(self) -> Space:
        """The part of the space whose steps are smallest: where none of it fits, nothing does, as bytes grow with a step's tokens."""
        return replace(self, step_tokens=self.step_tokens[:1])

    def frugal(self) -> Space:
        """The part of it that is enough to tell whether anything fits: the smallest steps, over the store of the fewest bits and the activations' own."""
        offered = (store for store in STORES.values() if store.offered and not store.of_input)
        narrow = self.stores or (min(offered, key=lambda store: store.bits).name,)
        return replace(self.of_smallest_steps(), stores=narrow, own_store=self.stores is None)

    def stores_for(self, weights: WeightPlan) -> tuple[str, ...]:
        """KV stores that make sense beside the activations: theirs, bf16 under fp32, and all narrower ones. Native steps hold 16 bits unless told not to."""
        dense = weights.dense
        if weights.layout == "cuda":
            offered = cuda.KV_STORES if self.stores is None else (dense, *self.stores) if self.own_store else self.stores
            return tuple(name for name in offered if name != "fp16" and cuda.cache_refusal(self.kv_plan(name, "paged", 16)) is None)
        if weights.layout == "native":
            if self.stores is None or self.own_store:
                return (self.native_stores[weights.default],)
            return tuple(name for name in self.stores if native.cache_refusal(self.kv_plan(name, "paged", 16)) is None)
        if self.stores is not None:
            return (dense, *self.stores) if self.own_store else self.stores
        exact = (dense, "bf16") if dense == "fp32" else (dense,)
        others = (store for store in STORES.values() if store.offered and store.name not in self.refused_stores)
        return exact + tuple(store.name for store in others if not store.exact or (store.of_input and store.codec == dense))

    def kv_plan(self, store: str, layout: str, block_size: int) -> KVPlan:
        """The cache of these choices; `store` as `parse_stores` reads it. Prefixes are shared where that can be."""
        keys, values = parse_stores(store)
        kv = KVPlan(retain=self.retain, layout=layout, block_size=block_size, store=keys, values="" if values == keys else values)
        return replace(kv, prefix_sharing=True) if self.prefix_sharing and sharing_refusal(kv) is None else kv


def _formats(pins: Mapping[str, str]) -> tuple[str, ...]:
    """The format that was asked for, or those of the search."""
    return (pins["weights"],) if "weights" in pins else OFFERED


def weight_plans(model: ModelSpec, names: tuple[str, ...], heads: tuple[str, ...], layout: str) -> tuple[WeightPlan, ...]:
    """Every format for all matrices, and every narrow one with embedding and head left in the activations' dtype."""
    widths = {tensor.shape[-1] for tensor in model_tensors(model) if tensor.role in QUANTIZABLE_ROLES}
    found = []
    for name in names:
        if any(unsuitable(FORMATS[name], width) for width in widths):
            continue
        if layout == "cuda" and not cuda.runs(name):
            continue
        if layout == "native":  # packed for its kernels, the head with the rest; formats that they do not read are no part of the space
            found += [WeightPlan(default=name, layout="native")] if native.runs(name) else []
            continue
        dense = "bf16" if layout == "cuda" else FORMATS[name].compute
        if "same" in heads or name == dense:
            found.append(WeightPlan(default=name, layout=layout))
        if "dense" in heads and name != dense:
            roles = ("embed",) if model.tied else ("embed", "lm_head")
            found.append(WeightPlan(default=name, exceptions=dict.fromkeys(roles, dense), layout=layout))
    return tuple(found)


def _number(pins: Mapping[str, str], key: str) -> int:
    text = str(pins[key])
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"{key} '{text}': a whole number of at least 1 is needed")
    return int(text)


def _one_of(pins: Mapping[str, str], key: str, known: tuple[str, ...]) -> tuple[str, ...]:
    if key not in pins:
        return known
    if pins[key] not in known:
        raise InputError(f"{key} '{pins[key]}': choose one of {', '.join(known)}")
    return (pins[key],)


def own_plans(stored: WeightPlan | None) -> tuple[WeightPlan, ...]:
    """The checkpoint's own formats in every layout that holds them."""
    if stored is None:
        return ()
    packed = [layout for layout, kernels in (("native", native), ("cuda", cuda)) if all(kernels.runs(name) for name in stored.names)]
    return (stored, *(replace(stored, layout=layout) for layout in packed))


def build_space(model: ModelSpec, device: DeviceSpec, workload: Workload, pins: Mapping[str, str], stored: WeightPlan | None = None) -> Space:
    """The space for one question. `stored`: how the checkpoint itself holds its weights, where that is quantized.

    `pins` fixes axes by name (see `PINS`); an unknown name or value is an InputError that lists what there is.
    """
    for key in pins:
        if key not in PINS:
            raise InputError(f"unknown choice '{key}'. Known: {', '.join(PINS)}")
    if pins.get("weights", "stored") != "stored":
        find_format(pins["weights"])
    if "attention" in pins:
        find_kernel(pins["attention"])
    retain = parse_retain(pins["kv_retain"], workload.context_tokens) if "kv_retain" in pins else Retain()
    summary = summarize(model)
    refused: dict[str, str] = {}
    for kernel in KERNELS:
        reasons = [refusal(kernel, mixer) for mixer, _ in summary.attention_groups]
        reasons.append(weights_refusal(kernel) if retain.evicts else None)
        if kernel == "flash" and device.kind != "cuda":
            reasons.append("flash is a kernel for CUDA devices")
        if kernel == "native":
            reasons.append(None if device.kind == "cpu" else "native is a kernel for CPUs")
            reasons.append(device.no_native or None)
            reasons.append(native.refusal(model, KVPlan(store="fp16", block_size=LAYOUTS[0][1], retain=retain)))
            if "kv_store" in pins:
                stores = parse_stores(pins["kv_store"])
                reasons.append(native.refusal(model, KVPlan(store=stores[0], values=stores[1])))
            if pins.get("linear", "native") != "native":
                reasons.append(f"the native step has its own products; linear={pins['linear']} was asked for")
        elif kernel == "paged":
            reasons.append(None if device.kind == "cuda" else "paged is a kernel for CUDA devices")
            reasons.append(None if device.kind != "cuda" or device.flops_per_s("bf16").known else f"the CUDA step computes in bf16, which {device.name} cannot")
            reasons.append(cuda.refusal(model, KVPlan(store="bf16", block_size=LAYOUTS[0][1], retain=retain)))
            if "kv_store" in pins:
                stores = parse_stores(pins["kv_store"])
                reasons.append(cuda.cache_refusal(KVPlan(store=stores[0], values=stores[1])))
            if pins.get("layout", "paged") != "paged":
                reasons.append("paged attention reads paged caches")
            if pins.get("linear", "cuda") != "cuda":
                reasons.append(f"the CUDA step has its own products; linear={pins['linear']} was asked for")
        elif pins.get("linear") == "cuda":
            reasons.append("the CUDA step has its own attention; linear=cuda was asked for")
        elif pins.get("linear") == "native":
            reasons.append("the native step has its own attention; linear=native was asked for")
        found = next((reason for reason in reasons if reason), None)
        if found:
            refused[kernel] = found
    kernels = tuple(kernel for kernel in _one_of(pins, "attention", tuple(KERNELS)) if kernel not in refused)
    if not kernels and ("attention" in pins or pins.get("linear") in ("native", "cuda")):
        asked = pins.get("attention", "paged" if pins.get("linear") == "cuda" else "native")
        raise InputError(f"attention kernel {asked} cannot compute {model.name}: {refused[asked]}. Leave the choice to the planner")
    if not kernels:  # nothing here computes such a layer: priced all the same, with the reason why it does not run
        kernels = tuple(kernel for kernel in KERNELS if kernel in _EAGER or (kernel == "flash" and device.kind == "cuda"))
    layouts = tuple(layout for layout in LAYOUTS if layout[0] in _one_of(pins, "layout", ("paged", "contiguous")))
    sharing = pins.get("prefix_sharing", "where it can be")
    if sharing not in ("on", "off", "where it can be"):
        raise InputError(f"prefix_sharing '{sharing}': choose one of on, off")
    if sharing == "on":
        found = {layout: sharing_refusal(KVPlan(layout=layout[0], retain=retain)) for layout in layouts}
        refusals = [reason for reason in found.values() if reason]
        layouts = tuple(layout for layout, reason in found.items() if reason is None)
        if not layouts:
            raise InputError(f"prefix sharing: {refusals[0]}")
    if "block_size" in pins:
        layouts = tuple(dict.fromkeys((name, _number(pins, "block_size") if name == "paged" else block) for name, block in layouts))
    retain, refused_stores = _fitting_stores(model, retain, layouts, pins)
    placement = _one_of(pins, "placement", ("resident", "host", "disk"))
    own = own_plans(stored)
    if pins.get("weights") == "stored" and not own:
        raise InputError(f"weights 'stored': {model.name} comes from no file with quantized weights of its own. Name a format: {', '.join(FORMATS)}")
    heads = _one_of(pins, "head", ("same", "dense"))
    found = [] if pins.get("weights") == "stored" else _every_layout(model, pins, heads)
    if "weights" not in pins or pins["weights"] == "stored":
        found = [*own, *found]
    weights = tuple(plan for plan in dict.fromkeys(found) if _computed(plan, kernels))
    if not weights:
        name = pins.get("weights", "")
        widths = sorted({tensor.shape[-1] for tensor in model_tensors(model) if tensor.role in QUANTIZABLE_ROLES})
        reasons = [reason for width in widths if name in FORMATS and (reason := unsuitable(FORMATS[name], width))]
        raise InputError(f"weights '{name}': " + (reasons[0] if reasons else f"the native kernels do not read it. They read {', '.join(native.FORMAT_KINDS)}"))
    activations = next(iter(_one_of(pins, "activations", ACTIVATIONS)))
    return Space(
        weights=weights,
        own=frozenset(own),
        native_stores={name: native.usual_store(name, activations, device.instruction_sets, model) for name in native.FORMAT_KINDS},
        stores=(pins["kv_store"],) if "kv_store" in pins else None,
        retain=retain,
        refused_stores=refused_stores,
        layouts=layouts,
        prefix_sharing=sharing != "off",
        kernels=kernels,
        linear=next(name for name in _one_of(pins, "linear", LINEAR_KERNELS) if name not in ("native", "cuda") or pins.get("linear") == name),
        activations=activations,
        step_tokens=(_number(pins, "step_tokens"),) if "step_tokens" in pins else _step_sizes(workload),
        degrees=(_number(pins, "tensor_parallel"),) if "tensor_parallel" in pins else degrees_for(model, device),
        sources=tuple(source for source in _sources(device) if source in placement),
        must_stream="resident" not in placement,
        refused=refused,
    )


def _every_layout(model: ModelSpec, pins: Mapping[str, str], heads: tuple[str, ...]) -> list[WeightPlan]:
    return [plan for layout in ("stored", "native", "cuda") for plan in weight_plans(model, _formats(pins), heads, layout)]


def _computed(plan: WeightPlan, kernels: tuple[str, ...]) -> bool:
    """Whether one of the kernels goes with the plan's layout. Where a device has a step of its own, what that reads is offered in its layout alone."""
    if plan.layout != "stored":
        return {"native": "native", "cuda": "paged"}[plan.layout] in kernels
    return any(kernel not in ("native", "paged") for kernel in kernels) and not ("paged" in kernels and all(cuda.runs(name) for name in plan.names))


def _fitting_stores(model: ModelSpec, retain: Retain, layouts: tuple[tuple[str, int], ...], pins: Mapping[str, str]) -> tuple[Retain, dict[str, str]]:
    """The retention with its budget in tokens, and the stores that make no sense for this model with it, each with the reason.

    Raises InputError where the very store that was asked for is among them.
    """
    if retain.budget_bytes:
        if "kv_store" not in pins:
            raise InputError("a KV budget in bytes needs a store to be divided by: say --kv-store, or give the budget in tokens")
        keys, values = parse_stores(pins["kv_store"])
        retain = resolve_budget(model, KVPlan(retain=retain, store=keys, values=values)).retain
    refused: dict[str, str] = {}
    for name in (pins["kv_store"],) if "kv_store" in pins else tuple(STORES):
        keys, values = parse_stores(name)
        plans = [KVPlan(retain=retain, layout=layout, block_size=block, store=keys, values=values) for layout, block in layouts]
        reasons = [model_refusal(model, kv) or pointless(model, kv) for kv in plans]
        if all(reasons):
            refused[name] = str(reasons[0])
    if "kv_store" in pins and refused:
        raise InputError(refused[pins["kv_store"]])
    return retain, refused


def _step_sizes(workload: Workload) -> tuple[int, ...]:
    """Budgets of tokens per step: at least one for each sequence, and no more than all prompts together could fill."""
    most = workload.concurrency * workload.context_tokens
    return tuple(sorted({min(size, most) for size in STEP_TOKENS if size >= workload.concurrency} or {workload.concurrency}))


def degrees_for(model: ModelSpec, device: DeviceSpec) -> tuple[int, ...]:
    """Degrees of tensor parallelism to price: those that the heads divide by, also beyond the devices at hand."""
    return summarize(model).heads_divide if device.kind == "cuda" else (1,)


def _sources(device: DeviceSpec) -> tuple[str, ...]:
    """Where layers can be streamed from at a rate that is known. On a CPU the host is where they are."""
    found = []
    if device.kind == "cuda" and device.host_link_bytes_per_s is not None and device.host_link_bytes_per_s.known:
        found.append("host")
    if device.disk_bytes_per_s.known:
        found.append("disk")
    return tuple(found)
