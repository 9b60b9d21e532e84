"""Which plan a run obeys: the planner's best one that runs here, or the one that a file states, obeyed to the letter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tradespace import api
from tradespace.build import check_runs
from tradespace.errors import InputError, UnsupportedError
from tradespace.kernels.attention.triton_interpreter import interprets
from tradespace.spec.device import DeviceSpec
from tradespace.spec.device_zoo import find_device
from tradespace.spec.model import ModelSpec
from tradespace.spec.plan import Plan, plan_from_dict
from tradespace.spec.weights import WeightPlan
from tradespace.units import format_bytes

MAX_PLAN_BYTES = 1 << 20


def choose_plan(
    spec: ModelSpec,
    device: DeviceSpec,
    budget: int,
    context: int | None,
    concurrency: int,
    goal: str,
    weights: str | None,
    attention: str | None,
    activations: str | None = None,
    *,
    kv_store: str | None = None,
    kv_retain: str | None = None,
    prefix_sharing: str | None = None,
    linear: str | None = None,
    stored: WeightPlan | None = None,
) -> Plan:
    """The planner's best plan that runs; BudgetError with the nearest one where nothing fits. `stored` is how the checkpoint holds its weights."""
    asked = {"weights": weights, "attention": attention, "activations": activations, "kv_store": kv_store, "kv_retain": kv_retain}
    pins = {axis: value for axis, value in (asked | {"prefix_sharing": prefix_sharing, "linear": linear}).items() if value}
    frontier = api.plan(
        spec,
        memory=budget,
        device=device,
        context=min(2048, spec.max_context) if context is None else context,
        concurrency=concurrency,
        goal="throughput" if goal == "throughput" else "latency",
        runnable_only=True,
        pins=pins,
        stored=stored,
        only_best=True,
    )
    if frontier.best is None:
        raise api.no_plan(frontier)
    return frontier.best.plan


def read_plan(plan: Plan | str | Path) -> Plan:
    """A Plan as it is, or out of the YAML file that `tradespace plan --save` wrote. Raises InputError naming what is wrong."""
    if isinstance(plan, Plan):
        return plan
    import yaml

    path = Path(plan)
    try:
        if path.stat().st_size > MAX_PLAN_BYTES:
            raise InputError(f"{path} is {format_bytes(path.stat().st_size)}; a plan has at most {format_bytes(MAX_PLAN_BYTES)}. Is it another file?")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the plan {path}: {error.strerror}. Write one with: tradespace plan MODEL --save {path}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    return plan_from_dict(values)


def check_plan(plan: Plan, spec: ModelSpec, flags: Mapping[str, object]) -> None:
    """Whether a plan from outside can be obeyed to the letter on this CPU. Raises InputError for a flag that contradicts it, UnsupportedError for what cannot
    run."""
    _check_stated(plan, spec, flags)
    if plan.device not in ("cpu", api.find_machine(None).name):
        try:
            kind = find_device(plan.device).kind
        except InputError as error:
            here = f"This machine is '{api.find_machine(None).name}', and 'cpu' means any"
            raise InputError(f"plan: {error}. {here}: change `device`, or plan anew on this machine") from None
        if kind != "cpu":
            raise UnsupportedError(f"this plan is for {plan.device}, and this is to run on the CPU. Plan without --device: tradespace plan {spec.name}")
    check_runs(plan, spec)
    if plan.attention == "flash" and not interprets():  # another kernel in its place would need more than the plan counts with
        raise UnsupportedError("plan: attention by flash, a kernel for CUDA devices, and this is to run on the CPU. Set attention to sdpa or chunked")


def check_device_plan(plan: Plan, spec: ModelSpec, flags: Mapping[str, object], device: DeviceSpec) -> None:
    """As `check_plan`, on the CUDA device `device`: whether it can run there is known once it is built."""
    _check_stated(plan, spec, flags)
    if plan.linear != "cuda":
        raise UnsupportedError(
            f"plan: linear by '{plan.linear}', a kernel for CPUs, and this is to run on {device.name}. Use --device cpu, or plan anew: "
            f"tradespace plan {spec.name} --device {device.name}"
        )
    if plan.device != device.name:
        raise InputError(f"this plan is for {plan.device}, and the card is {device.name}: change `device`, or plan anew with --device {device.name}")


def _check_stated(plan: Plan, spec: ModelSpec, flags: Mapping[str, object]) -> None:
    stated = [name.replace("_", "-") for name, value in flags.items() if value is not None]
    if stated:
        flag = " and --".join(stated).replace("_", "-")
        raise InputError(f"--plan is obeyed to the letter, and it states its own {', '.join(stated)}. Leave --{flag} away, or change the plan")
    if plan.max_context > spec.max_context:
        raise InputError(f"plan: max_context {plan.max_context} exceeds the {spec.max_context} tokens that {spec.name} was made for")
