"""A Plan: one point in the tradespace, frozen. Cost predicts it, build assembles it, measure proves it. A technique that is not in here does not exist."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from tradespace.errors import InputError
from tradespace.spec import cuda
from tradespace.spec.attention import KERNELS, find_kernel, weights_refusal
from tradespace.spec.attention_pattern import parse_pattern
from tradespace.spec.formats import FORMATS
from tradespace.spec.kv import KVPlan, Retain, drafting_refusal, refusal
from tradespace.spec.native import cache_refusal
from tradespace.spec.weights import WeightPlan

# how x @ W.T is computed: "reference" in fp32 over fixed tiles of rows, "torch" as the library does it best, "native" the whole step in C++ on a CPU,
# "cuda" the whole step in Triton on a CUDA device
LINEAR_KERNELS = ("torch", "reference", "native", "cuda")
# what the native kernels multiply by: "auto" int8 for integer codes and bf16 for bf16 weights, "fp32" exact products
ACTIVATIONS = ("auto", "fp32")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where layers live: the last `streamed_layers` of them are read from `stream_from` ("host" or "disk") at every step, the rest stay resident."""

    streamed_layers: int = 0
    stream_from: str = "host"

    @property
    def runs_since(self) -> str | None:
        return "0.1" if self.streamed_layers == 0 else None

    def describe(self) -> str:
        return "resident" if self.streamed_layers == 0 else f"{self.streamed_layers} layers from {self.stream_from}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """memory_bytes: the budget of the pool that the model computes in (host for a CPU, each device otherwise).

    pattern         an attention pattern imposed on the model (`attention_pattern.parse_pattern`); "": the model's own
    attention, linear   kernels; "reference" for both, or "native" for both, gives each request the same bits whatever else is in the batch
    activations     what native products multiply by: see ACTIVATIONS
    max_sequences   most sequences that are in a step at once
    max_context     most tokens of one sequence, prompt and output together
    step_tokens     most tokens of one step (chunked prefill shares it with decode); the workspace is sized for it
    kv_tokens       token slots that the cache holds over all sequences; a multiple of the block size
    tensor_parallel devices that share every layer by heads and feed-forward columns
    speculation     tokens drafted and verified per step; 0: none
    checkpointing   training only
    """

    model: str
    weights: WeightPlan = field(default_factory=WeightPlan)
    kv: KVPlan = field(default_factory=KVPlan)
    attention: str = "sdpa"
    pattern: str = ""
    linear: str = "torch"
    activations: str = "auto"
    max_sequences: int = 1
    max_context: int = 2048
    step_tokens: int = 512
    kv_tokens: int = 2048
    placement: Placement = field(default_factory=Placement)
    tensor_parallel: int = 1
    speculation: int = 0
    checkpointing: str = "none"
    device: str = "cpu"
    threads: int = 0  # 0: as many as physical cores may be used
    memory_bytes: int = 0

    def __post_init__(self):
        find_kernel(self.attention)
        if self.pattern:
            parse_pattern(self.pattern)
        if self.linear not in LINEAR_KERNELS:
            raise InputError(f"unknown linear kernel '{self.linear}'. Known: {', '.join(LINEAR_KERNELS)}")
        if self.activations not in ACTIVATIONS:
            raise InputError(f"plan: unknown activations '{self.activations}'. Known: {', '.join(ACTIVATIONS)}")
        together = (self.linear == "native", self.attention == "native", self.weights.layout == "native")
        if any(together) and not all(together):
            raise InputError("plan: the native step is one: linear, attention and weights.layout are 'native' all three, or none of them")
        together = (self.linear == "cuda", self.attention == "paged", self.weights.layout == "cuda")
        if any(together) and not all(together):
            raise InputError("plan: the CUDA step is one: linear 'cuda', attention 'paged' and weights.layout 'cuda', or none of them")
        for name in ("max_sequences", "max_context", "step_tokens", "kv_tokens", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise InputError(f"plan: {name} is {getattr(self, name)}; at least 1 is needed")
        for name in ("speculation", "threads", "memory_bytes"):
            if getattr(self, name) < 0:
                raise InputError(f"plan: {name} is {getattr(self, name)}; it cannot be negative")
        if self.kv.layout == "paged" and self.kv_tokens % self.kv.block_size:
            raise InputError(f"plan: kv_tokens {self.kv_tokens} is not a multiple of the block size {self.kv.block_size}")

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache: token slots over block size, or one region of max_context a sequence where contiguous."""
        return self.kv_tokens // self.kv.block_size if self.kv.layout == "paged" else self.max_sequences

    @property
    def logit_rows(self) -> int:
        """Most rows of logits of a step: one for each sequence, and one more for each token drafted."""
        return min(self.step_tokens, self.max_sequences * (1 + self.speculation))

    def cannot_run(self) -> tuple[str, ...]:
        """Every choice in the plan that is priced but has no implementation yet; empty: the plan runs."""
        reasons = [f"weight format {name}" for name in self.weights.names if FORMATS[name].runs_since is None]
        reasons += [f"KV store {store.name}" for store in dict.fromkeys(self.kv.stores) if store.runs_since is None]
        if self.kv.retain.runs_since is None:
            reasons.append(f"KV retention {self.kv.retain.kind}")
        found = refusal(self.kv) or (drafting_refusal(self.kv) if self.speculation else None)
        if found is not None:
            reasons.append(found)
        if self.kv.retain.evicts and (found := weights_refusal(self.attention)) is not None:
            reasons.append(found)
        if self.attention == "native" and (found := cache_refusal(self.kv)) is not None:
            reasons.append(found)
        if self.attention == "paged" and (found := cuda.cache_refusal(self.kv)) is not None:
            reasons.append(found)
        if KERNELS[self.attention].runs_since is None:
            reasons.append(f"attention kernel {self.attention}")
        if self.placement.runs_since is None:
            reasons.append(f"layers streamed from {self.placement.stream_from}")
        if self.tensor_parallel > 1:
            reasons.append(f"tensor parallel over {self.tensor_parallel} devices")
        if self.speculation:
            reasons.append("speculation")
        if self.checkpointing != "none":
            reasons.append(f"checkpointing {self.checkpointing}")
        return tuple(reasons)

    def describe(self) -> str:
        """One line: what a table of plans shows."""
        parts = [self.weights.describe(), f"KV {self.kv.describe()}", self.attention]
        if self.pattern:
            parts.append(f"{self.pattern} imposed")
        if self.placement.streamed_layers:
            parts.append(self.placement.describe())
        if self.tensor_parallel > 1:
            parts.append(f"{self.tensor_parallel} devices")
        return " · ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML or JSON; `plan_from_dict` reads them back."""
        found = asdict(self)
        found["weights"]["exceptions"] = dict(self.weights.exceptions)
        return found


_NESTED = {"weights": WeightPlan, "kv": KVPlan, "placement": Placement, "retain": Retain}


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: expected a mapping of settings, got {type(values).__name__}")
    known = {f.name: f for f in fields(cls)}
    for key in values:
        if key not in known:
            raise InputError(f"{where}: unknown setting '{key}'. Known: {', '.join(known)}")
    arguments = {}
    for key, value in values.items():
        if key in _NESTED:
            arguments[key] = _build(_NESTED[key], value, f"{where}.{key}")
            continue
        default = known[key].default
        expected = Mapping if key == "exceptions" else str if default is MISSING else type(default)
        if not isinstance(value, expected) or isinstance(value, bool) != (expected is bool):
            raise InputError(f"{where}.{key}: expected {expected.__name__}, got {value!r}")
        arguments[key] = value
    try:
        return cls(**arguments)
    except TypeError as error:
        raise InputError(f"{where}: {error}") from None


def plan_from_dict(values: Mapping[str, Any]) -> Plan:
    """The Plan that `Plan.to_dict` wrote; unknown or ill-typed settings are errors that name them."""
    return _build(Plan, values, "plan")


__all__ = ["KVPlan", "Placement", "Plan", "WeightPlan", "plan_from_dict"]
