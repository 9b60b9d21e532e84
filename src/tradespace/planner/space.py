"""The discrete space that the search walks: every axis with every value on it, narrowed by what the model, the device or the user rules out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tradespace.cost.summary import summarize
from tradespace.errors import InputError
from tradespace.spec.attention import KERNELS, find_kernel
from tradespace.spec.device import DeviceSpec
from tradespace.spec.kv import STORES
from tradespace.spec.mixers import Attention
from tradespace.spec.model import ModelSpec
from tradespace.spec.plan import LINEAR_KERNELS
from tradespace.spec.weights import FORMATS, WeightPlan, find_format
from tradespace.spec.workload import Workload

STEP_TOKENS = (32, 128, 512, 2048)
LAYOUTS = (("paged", 16), ("paged", 64), ("contiguous", 16))
DEGREES = (1, 2, 4, 8)
PINS = ("weights", "head", "kv_store", "layout", "block_size", "attention", "linear", "step_tokens", "placement", "tensor_parallel")


@dataclass(frozen=True, kw_only=True)
class Space:
    """The axes. `sources`: where layers may be streamed from; `must_stream`: only plans that do; `refused`: kernels with the reason why they are left out."""

    weights: tuple[WeightPlan, ...]
    stores: tuple[str, ...] | None  # None: the activations' own dtype and every quantized one
    layouts: tuple[tuple[str, int], ...]
    kernels: tuple[str, ...]
    linear: str
    step_tokens: tuple[int, ...]
    degrees: tuple[int, ...]
    sources: tuple[str, ...]
    must_stream: bool
    refused: Mapping[str, str]

    def stores_for(self, dense: str) -> tuple[str, ...]:
        """KV stores that make sense beside activations in `dense`: theirs, bf16 under fp32, and all narrower ones."""
        if self.stores is not None:
            return self.stores
        exact = (dense, "bf16") if dense == "fp32" else (dense,)
        return exact + tuple(name for name, store in STORES.items() if not store.exact)


def kernel_refusal(kernel: str, mixer: Attention) -> str | None:
    """Why a kernel cannot compute such a layer; the same conditions as the `supports` of its implementation."""
    if kernel == "sdpa" and mixer.logit_softcap is not None:
        return "torch's fused attention cannot cap the scores"
    if kernel == "sdpa" and mixer.sinks:
        return "torch's fused attention has no learned sinks"
    if mixer.alibi:
        return f"{kernel} has no linear position biases (ALiBi)"
    return None


def weight_plans(model: ModelSpec, names: tuple[str, ...], heads: tuple[str, ...]) -> tuple[WeightPlan, ...]:
    """Every format for all matrices, and every narrow one with embedding and head left in the activations' dtype."""
    found = []
    for name in names:
        dense = FORMATS[name].compute
        if "same" in heads or name == dense:
            found.append(WeightPlan(default=name))
        if "dense" in heads and name != dense:
            roles = ("embed",) if model.tied else ("embed", "lm_head")
            found.append(WeightPlan(default=name, exceptions=dict.fromkeys(roles, dense)))
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


def build_space(model: ModelSpec, device: DeviceSpec, workload: Workload, pins: Mapping[str, str]) -> Space:
    """The space for one question. `pins` fixes axes by name (see `PINS`); an unknown name or value is an InputError that lists what there is."""
    for key in pins:
        if key not in PINS:
            raise InputError(f"unknown choice '{key}'. Known: {', '.join(PINS)}")
    if "weights" in pins:
        find_format(pins["weights"])
    if "attention" in pins:
        find_kernel(pins["attention"])
    if "kv_store" in pins and pins["kv_store"] not in STORES:
        raise InputError(f"unknown KV store '{pins['kv_store']}'. Known: {', '.join(STORES)}")
    summary = summarize(model)
    refused: dict[str, str] = {}
    for kernel in KERNELS:
        reasons = [kernel_refusal(kernel, mixer) for mixer, _ in summary.attention_groups]
        if kernel == "flash" and device.kind != "cuda":
            reasons.append("flash is a kernel for CUDA devices")
        found = next((reason for reason in reasons if reason), None)
        if found:
            refused[kernel] = found
    kernels = tuple(kernel for kernel in _one_of(pins, "attention", tuple(KERNELS)) if kernel not in refused)
    if not kernels and "attention" in pins:
        raise InputError(f"attention kernel {pins['attention']} cannot compute {model.name}: {refused[pins['attention']]}. Leave the choice to the planner")
    if not kernels:  # nothing here computes such a layer: priced all the same, with the reason why it does not run
        kernels = tuple(kernel for kernel in KERNELS if kernel != "flash" or device.kind == "cuda")
    layouts = tuple(layout for layout in LAYOUTS if layout[0] in _one_of(pins, "layout", ("paged", "contiguous")))
    if "block_size" in pins:
        layouts = tuple(dict.fromkeys((name, _number(pins, "block_size") if name == "paged" else block) for name, block in layouts))
    placement = _one_of(pins, "placement", ("resident", "host", "disk"))
    return Space(
        weights=weight_plans(model, _one_of(pins, "weights", tuple(FORMATS)), _one_of(pins, "head", ("same", "dense"))),
        stores=(pins["kv_store"],) if "kv_store" in pins else None,
        layouts=layouts,
        kernels=kernels,
        linear=_one_of(pins, "linear", LINEAR_KERNELS)[0],
        step_tokens=(_number(pins, "step_tokens"),) if "step_tokens" in pins else _step_sizes(workload),
        degrees=(_number(pins, "tensor_parallel"),) if "tensor_parallel" in pins else degrees_for(model, device),
        sources=tuple(source for source in _sources(device) if source in placement),
        must_stream="resident" not in placement,
        refused=refused,
    )


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
