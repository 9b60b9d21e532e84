"""Formats for each matrix of a model under a budget of bytes: the exact optimum of measured sensitivities, and the rules of thumb that it has to beat.

The loss of a choice is the sum of what its matrices cost one by one: quantization errors in different matrices are all but independent, so KL adds up while
it is small. The optimum of that sum is exact (`knapsack.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tradespace.errors import BudgetError
from tradespace.quantize.knapsack import Option, choose
from tradespace.quantize.sensitivity import Sensitivity
from tradespace.spec.formats import FORMATS, find_format, refusal
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import QUANTIZABLE_ROLES, TensorSpec, model_tensors, num_parameters
from tradespace.spec.weights import WeightPlan, weight_bytes
from tradespace.units import format_bytes

# what a budget is spent on unless the user names formats: about a bit apart, then the model itself
CANDIDATES = ("int2-g64-zp", "int3-g64", "int4-g64", "int8", "bf16")


def quantizable(spec: ModelSpec) -> list[TensorSpec]:
    """The matrices that a format may hold, embedding and head included."""
    return [tensor for tensor in model_tensors(spec) if tensor.role in QUANTIZABLE_ROLES and tensor.name.endswith(".weight")]


def budget_of_bits(spec: ModelSpec, bits: float) -> int:
    """Bytes of all weights at so many bits a parameter.

    >>> from tradespace.spec.zoo import find_model
    >>> budget_of_bits(find_model("smollm2-135m"), 8)
    134515008
    """
    return int(num_parameters(spec) * bits / 8)


def _fixed_bytes(spec: ModelSpec, dense: str) -> int:
    """Norms, biases and whatever else no choice changes."""
    chosen = {tensor.name for tensor in quantizable(spec)}
    plan = WeightPlan(default=dense)
    return sum(plan.nbytes(tensor) for tensor in model_tensors(spec) if tensor.name not in chosen)


def allocate(spec: ModelSpec, sensitivities: Sequence[Sensitivity], formats: Sequence[str], budget_bytes: int) -> tuple[WeightPlan, float]:
    """(plan of least summed KL whose weights take at most `budget_bytes`, that sum). A dense format costs nothing in quality.

    Raises BudgetError (need, have, remedy) where the smallest formats do not fit.
    """
    kl = {(entry.tensor, find_format(entry.fmt).name): entry.kl for entry in sensitivities}
    names = list(dict.fromkeys(find_format(name).name for name in formats))
    dense = next((name for name in names if name in ("bf16", "fp16", "fp32")), "bf16")
    matrices, units = quantizable(spec), []
    for tensor in matrices:
        fitting = [name for name in names if refusal(FORMATS[name], tensor.shape[-1]) is None]
        units.append([Option(name, FORMATS[name].nbytes(tensor.shape), kl.get((tensor.name, name), 0.0)) for name in fitting])
    fixed = _fixed_bytes(spec, dense)
    smallest = fixed + sum(min(option.nbytes for option in options) for options in units)
    if smallest > budget_bytes:
        raise BudgetError(
            f"{spec.name} in the smallest of {', '.join(names)} takes {format_bytes(smallest)} ({smallest} bytes); the budget is {format_bytes(budget_bytes)} "
            f"({budget_bytes} bytes). State --bytes {smallest}, or offer smaller formats with --formats",
            need_bytes=smallest,
            have_bytes=budget_bytes,
        )
    best = choose(units, budget_bytes - fixed)
    return plan_of({tensor: option.name for tensor, option in zip(matrices, best.options, strict=True)}), best.loss


def plan_of(chosen: Mapping[TensorSpec, str]) -> WeightPlan:
    """The WeightPlan that says just this: the layers' commonest format as the default, exceptions by role outside of them and by layer within."""
    inside = [name for tensor, name in chosen.items() if tensor.layer >= 0] or list(chosen.values())
    quantized = [name for name in inside if FORMATS[name].group is not None or FORMATS[name].block is not None] or inside
    default = max(dict.fromkeys(quantized), key=quantized.count)
    exceptions = {tensor.role if tensor.layer < 0 else f"{tensor.layer}:{tensor.role}": name for tensor, name in chosen.items() if name != default}
    return WeightPlan(default=default, exceptions=exceptions)


def uniform(spec: ModelSpec, formats: Sequence[str], budget_bytes: int) -> WeightPlan:
    """The baseline: one format for all matrices, the largest that fits. Raises BudgetError where none does."""
    plans = [WeightPlan(default=find_format(name).name) for name in formats]
    return _largest(spec, plans, budget_bytes)


def first_last(spec: ModelSpec, formats: Sequence[str], budget_bytes: int, *, dense: str = "bf16") -> WeightPlan:
    """The rule of thumb: first and last layer, embedding and head in 16 bits, one format for the rest, the largest that fits."""
    edges = {f"{layer}:{role}": dense for layer in {0, spec.L - 1} for role in QUANTIZABLE_ROLES}
    outside = dict.fromkeys(("embed", "lm_head"), dense)
    return _largest(spec, [WeightPlan(default=find_format(name).name, exceptions=edges | outside) for name in formats], budget_bytes)


def _largest(spec: ModelSpec, plans: Sequence[WeightPlan], budget_bytes: int) -> WeightPlan:
    fitting = [(weight_bytes(spec, plan), number) for number, plan in enumerate(plans) if weight_bytes(spec, plan) <= budget_bytes]
    if not fitting:
        smallest = min(weight_bytes(spec, plan) for plan in plans)
        raise BudgetError(
            f"the smallest of these takes {format_bytes(smallest)}; the budget is {format_bytes(budget_bytes)}", need_bytes=smallest, have_bytes=budget_bytes
        )
    return plans[max(fitting)[1]]
