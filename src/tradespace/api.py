"""The half of the library that needs no torch: name a model, state what there is, get the frontier of plans."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from tradespace.errors import InputError, TradespaceError, UnsupportedError
from tradespace.loading.at_home import is_ollama
from tradespace.loading.gguf import GGUFFile, read_floats, read_gguf
from tradespace.loading.hub import fetch_config, parse_hub_name
from tradespace.loading.packages import PACKAGED
from tradespace.loading.pull import ModelEntry, find_fetched, is_local, list_models
from tradespace.loading.pull import pull as _pull
from tradespace.loading.resolve import ModelFiles, read_json_object, resolve
from tradespace.loading.safetensors import read_sharded
from tradespace.measure.machine import this_machine
from tradespace.planner.fit import Fit
from tradespace.planner.fit import fit as fit_models
from tradespace.planner.search import Frontier, budget_error, plan_frontier
from tradespace.spec.attention_imposed import impose
from tradespace.spec.device import DeviceSpec
from tradespace.spec.device_zoo import find_device
from tradespace.spec.families import model_spec_from_config
from tradespace.spec.gguf_config import model_spec_from_gguf
from tradespace.spec.model import ModelSpec
from tradespace.spec.weights import WeightPlan
from tradespace.spec.what_if import parse_what_if
from tradespace.spec.what_if import what_if as what_if_spec
from tradespace.spec.workload import Workload
from tradespace.spec.zoo import find_model, zoo_names
from tradespace.units import MiB, parse_bytes

DEFAULT_SHARE = "80%"  # of what is free now, where no budget is stated
Size = str | int


def find_spec(model: str | ModelSpec | Path, *, revision: str | None = None, offline: bool = False) -> ModelSpec:
    """The ModelSpec behind a name: a zoo name, a folder, a GGUF file, a hub id. Weights are never fetched for it.

    A hub id that the zoo does not know fetches config.json alone. Raises InputError with the nearest names for what is none of these.
    """
    if isinstance(model, ModelSpec):
        return model
    name = str(model)
    if is_local(name):
        return _local_spec(Path(name).expanduser(), name)
    if is_ollama(name):
        return spec_of_files(resolve(name))
    hub_name = parse_hub_name(name)
    if name in PACKAGED or hub_name is None or (hub_name.gguf_file is None and find_fetched(name, revision=revision) is None):
        try:
            return find_model(name)
        except InputError as error:
            if hub_name is None:
                near = get_close_matches(name[:200], _names_at_hand(), n=3, cutoff=0.5)
                raise InputError(f"{error}. Near it at hand: {', '.join(near)}" if near else str(error)) from None
    if hub_name.gguf_file is None and find_fetched(name, revision=revision) is None:
        return _config_spec(fetch_config(hub_name, revision=revision, offline=offline), name)
    return spec_of_files(resolve(name, revision=revision, offline=offline, download=False))


def _names_at_hand() -> list[str]:
    """What `models()` lists, and the model files and folders here."""
    here = [path for path in Path().iterdir() if path.suffix == ".gguf" or (path / "config.json").is_file()]
    return [*(entry.name for entry in list_models()), *map(str, here)]


def _local_spec(path: Path, name: str) -> ModelSpec:
    if path.is_dir() and (path / "config.json").is_file():
        return _config_spec(path / "config.json", name)
    return _config_spec(path, name) if path.suffix == ".json" else spec_of_files(resolve(name, download=False))


def _config_spec(path: Path, name: str) -> ModelSpec:
    config = read_json_object(path)
    if config is None:
        raise InputError(f"'{path}' does not exist. Give a model's folder, its config.json, a .gguf file, or a name")
    return model_spec_from_config(config, name)


def spec_of_files(files: ModelFiles) -> ModelSpec:
    """The ModelSpec that a model's own files state."""
    if files.kind == "gguf":
        return spec_of_gguf(read_gguf(files.weights[0]), files.name)
    assert files.config is not None, "a safetensors model was resolved with its config"
    return model_spec_from_config(files.config, files.name)


def spec_of_gguf(file: GGUFFile, name: str) -> ModelSpec:
    """The ModelSpec that a GGUF file's metadata and tensor table state."""
    shapes = {tensor.name: tensor.shape for tensor in file.tensors.values()}
    return model_spec_from_gguf(file.metadata, shapes, name, read_factors=lambda tensor: read_floats(file, tensor))


def stored_weights(files: ModelFiles, spec: ModelSpec) -> WeightPlan | None:
    """The formats that a model's files hold its weights in, where those are quantized; None where they are floats."""
    if files.kind == "gguf":
        return _stored_plan(files.weights[0], spec)
    if not spec.quantization or files.config is None:
        return None
    from tradespace.loading.quantized import stored_formats  # knows torch, which planning by name does without

    return stored_formats(files.config, spec, read_sharded(files.folder))


def weights_at_hand(name: str, revision: str | None) -> WeightPlan | None:
    """How the files of a model hold its weights, where they lie here already; None for what would have to be fetched."""
    if not (Path(name).suffix == ".gguf" if is_local(name) else find_fetched(name, revision=revision) is not None):
        return None
    files = resolve(name, revision=revision, download=False)
    return stored_weights(files, spec_of_files(files))


def _stored_plan(path: Path, spec: ModelSpec) -> WeightPlan | None:
    try:
        from tradespace.loading.stored import stored_plan
    except ImportError:  # without torch plans are made, not run: the formats stand for what the file holds
        return None
    return stored_plan(read_gguf(path), spec)


def find_machine(device: str | DeviceSpec | None) -> DeviceSpec:
    """A device of the zoo by name, or (None, "this") the machine this runs on, measured."""
    if isinstance(device, DeviceSpec):
        return device
    if device is None or device.lower() in ("this", "cpu", "auto"):
        return this_machine()
    return find_device(device)


def budget_bytes(memory: Size | None, device: DeviceSpec) -> int:
    """The stated budget in bytes; without one, 80% of what is free on the device now. A bare small number is a unit forgotten: InputError."""
    if isinstance(memory, str) and memory.strip().isdigit() and int(memory) < MiB:
        raise InputError(f"--memory {memory} is {memory} bytes. Give a unit: {memory.strip()}GiB, {memory.strip()}GB or {memory.strip()}MiB")
    return parse_bytes(DEFAULT_SHARE if memory is None else memory, free_bytes=device.free_bytes)


def plan(
    model: str | ModelSpec | Path,
    *,
    memory: Size | None = None,
    device: str | DeviceSpec | None = None,
    device_memory: Size | None = None,
    host_memory: Size | None = None,
    context: int | None = None,
    concurrency: int = 1,
    prompt: int | None = None,
    output: int | None = None,
    goal: Literal["latency", "throughput"] = "latency",
    runnable_only: bool = False,
    pins: Mapping[str, str] | None = None,
    stored: WeightPlan | None = None,
    pattern: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    only_best: bool = False,
) -> Frontier:
    """Every plan for `model` within a budget, evaluated: `.best`, `.pareto`, `.why_not`, `.to_dicts()`.

    memory         budget of the pool the model computes in: the host's for a CPU, each device's otherwise ("6GiB", "40GB", "80%", bytes)
    device_memory  the same for a device, when `memory` is left to mean the host; host_memory: what the host may hold for streamed layers
    device         a name of the zoo ("a100-40gb", "2x h100-80gb"), or None for this machine
    context        tokens a sequence may reach; default: prompt + output, at least 2,048, at most what the model takes
    stored         how the checkpoint holds its weights, where that is quantized: run as they are, they lose nothing (a local GGUF file states it itself)
    pattern        an attention pattern imposed on the model, such as "sliding:1024": its quality is unknown until it is measured
    pins           fixes an axis: {"weights": "int4", "kv_store": "bf16", "attention": "sdpa", "layout": "paged"}
    only_best      where only `.best` will be asked for: the same one, found sooner

    Raises InputError for names and numbers that make no sense. A budget that nothing fits is not an error here: `.best` is then None, and `.nearest`
    says what would fit.

    >>> frontier = plan("llama-2-7b", memory="16GB", device="rtx-4090")
    >>> frontier.best.plan.weights.default
    'int8'
    """
    spec = impose(find_spec(model, revision=revision, offline=offline), pattern or "")
    machine = find_machine(device)
    if stored is None and not isinstance(model, ModelSpec):
        stored = weights_at_hand(str(model), revision)
    work = workload(spec, context=context, concurrency=concurrency, prompt=prompt, output=output, goal=goal)
    return plan_frontier(
        spec,
        machine,
        work,
        memory_bytes=budget_bytes(device_memory if device_memory is not None else memory, machine),
        host_memory_bytes=None if host_memory is None else parse_bytes(host_memory),
        runnable_only=runnable_only,
        pins=dict(pins or {}),
        stored=stored,
        only_best=only_best,
    )


def fit(
    *,
    memory: Size | None = None,
    device: str | DeviceSpec | None = None,
    context: int | None = None,
    concurrency: int = 1,
    runnable_only: bool = False,
) -> list[Fit]:
    """The published models that fit a budget with all layers resident, ranked by published score, then loss, then predicted speed.

    >>> fit(memory="8GB", device="rtx-4090")[0].candidate.fits
    True
    """
    machine = find_machine(device)
    context = 2048 if context is None else context
    prompt = max(1, min(1024, context // 2))
    work = Workload(context_tokens=context, concurrency=concurrency, prompt_tokens=prompt, output_tokens=max(1, min(256, context - prompt)))
    models = [find_model(name) for name in zoo_names()]
    return fit_models(models, machine, work, budget_bytes(memory, machine), runnable_only=runnable_only)


def no_plan(frontier: Frontier) -> TradespaceError:
    """Why a frontier has no best plan: UnsupportedError where nothing that was asked for runs yet, else BudgetError with need, have and the nearest plan."""
    if frontier.runnable_only and all(candidate.runs for candidate in frontier.candidates):
        missing = min((candidate.runs for candidate in frontier.candidates), key=len)
        name = frontier.question.model.name
        return UnsupportedError(f"what was asked for is priced but cannot run yet: {'; '.join(missing)}. What runs: tradespace plan {name} --runnable")
    return budget_error(frontier)


def workload(
    spec: ModelSpec,
    *,
    context: int | None = None,
    concurrency: int = 1,
    prompt: int | None = None,
    output: int | None = None,
    goal: Literal["latency", "throughput"] = "latency",
) -> Workload:
    """The Workload that these numbers mean for this model: what is not given is derived, what does not fit the model's context is an error."""
    if context is not None and context > spec.max_context:
        raise InputError(f"--context {context} exceeds the {spec.max_context} tokens that {spec.name} was made for. Give at most {spec.max_context}")
    if context is None:
        context = min(spec.max_context, max(2048, (prompt or 0) + (output or 0)))
    if prompt is None:
        prompt = max(1, min(1024, context // 2) if output is None else min(1024, context - output))
    if output is None:
        output = max(1, min(256, context - prompt))
    return Workload(context_tokens=context, concurrency=concurrency, prompt_tokens=prompt, output_tokens=output, goal=goal)


def what_if(model: str | ModelSpec, changes: str, *, equal_parameters: bool = False) -> ModelSpec:
    """`model` with other proportions, such as "layers=40,width=8192": what width, depth, feed-forward ratio and KV heads do to bytes.

    >>> what_if("llama-2-7b", "layers=40").L
    40
    """
    parsed = parse_what_if(changes)
    if equal_parameters:
        parsed["equal_parameters"] = True
    return what_if_spec(find_spec(model), **parsed)


def pull(model: str, *, revision: str | None = None, offline: bool = False, progress: bool = True) -> Path:
    """Fetch a model's files and return where they lie: an alias of `models()`, a hub id `org/name`, `org/name:FILE.gguf`, or a local path as it is.

    Raises DownloadError (network, licence, checksum, disk), InputError (no such name). Nothing half-written is left in place.
    """
    return _pull(model, revision=revision, offline=offline, progress=progress)


def models() -> list[ModelEntry]:
    """What can be run without naming a path: packaged aliases, fetched or not, and what lies in our cache and the hub's."""
    return list_models()


__all__ = ["find_spec", "fit", "models", "plan", "pull", "spec_of_files", "what_if", "workload"]
