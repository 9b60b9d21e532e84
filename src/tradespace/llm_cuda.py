"""A model opened on a CUDA device: the same calls as on the CPU, with the budget on the device.

Chosen by itself where there is a card that the zoo knows and torch can use; `device="cpu"` or `"cuda:1"` say otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tradespace import api
from tradespace.choosing import check_device_plan, choose_plan, read_plan
from tradespace.cost.memory import Ledger, ledger
from tradespace.defaults import Defaults
from tradespace.errors import BudgetError, EngineError, InputError, UnsupportedError
from tradespace.llm import LLM
from tradespace.loading.gguf import held_headers
from tradespace.loading.resolve import resolve
from tradespace.loading.tokenizer import Tokenizer
from tradespace.measure.accelerators import Accelerator, find_accelerators
from tradespace.measure.memory import MemoryMeter, peak_rss_bytes
from tradespace.measure.report import Report, ReportLine
from tradespace.progress import StepClock, loading_bar, steps_bar
from tradespace.spec import cuda
from tradespace.spec.attention_imposed import impose
from tradespace.spec.device import DeviceSpec
from tradespace.spec.estimate import Estimate
from tradespace.spec.model import ModelSpec
from tradespace.spec.plan import Plan
from tradespace.units import format_bytes

if TYPE_CHECKING:
    from tradespace.build_cuda import BuiltOnDevice


def find_place(device: str | None) -> int | None:
    """Index of the CUDA device that is meant; None: the CPU. None, or "auto", takes the first card that can be used, if there is one.

    Raises InputError for a name that means nothing here, UnsupportedError for a card that is not there.
    """
    name = (device or "auto").lower()
    if name in ("cpu", "this"):
        return None
    if name == "auto":
        return 0 if _usable() else None
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdigit()):
        raise InputError(f"device '{device}': choose cpu, cuda, cuda:N or auto. A card of the zoo is for planning: tradespace plan --device {device}")
    index, cards = int(number or 0), [card for card in find_accelerators() if card.kind == "cuda"]
    if index >= len(cards):
        raise UnsupportedError(f"device {device}: this machine has {len(cards)} CUDA devices. Use --device cpu")
    if not _torch_sees():
        raise UnsupportedError("the installed torch has no CUDA. Install one that has (tradespace[gpu]), or use --device cpu")
    return index


def _torch_sees() -> bool:
    import torch

    return torch.backends.cuda.is_built() and torch.cuda.is_available()


def _usable() -> bool:
    from tradespace.measure.accelerators import has_nvidia_files

    return sys.platform != "darwin" and has_nvidia_files() and _torch_sees()


def device_spec(index: int) -> DeviceSpec:
    """The zoo's row for the card, with the memory that is free now. Raises UnsupportedError for a card that the zoo does not know."""
    cards: list[Accelerator] = [card for card in find_accelerators() if card.kind == "cuda"]
    found = cards[index].as_device()
    if found is None:
        raise UnsupportedError(f"the zoo of devices does not know '{cards[index].name}': its rates are missing. Use --device cpu, or add its data sheet's row")
    return found


class DeviceLLM(LLM):
    """As `LLM`."""

    def __init__(self, built: BuiltOnDevice, device: DeviceSpec, predicted: Ledger, meter: MemoryMeter, defaults: Defaults):
        super().__init__(built, device, predicted, meter, {}, defaults)  # pyright: ignore[reportArgumentType]

    def report(self) -> Report:
        """Predicted against measured: each ledger line of the device, what the driver counts, and the speed of the last generation."""
        built: Any = self._open()
        plan, measured = self.plan, built.measured_bytes
        groups = {
            "runtime": (("runtime",), ("context", "rehearsal"), "the driver's context, the libraries and their workspaces"),
            "weights": (("weights",), ("weights",), "codes, scales and norms, and the workspaces of products"),
            "kv cache": (("kv cache",), ("kv cache",), self._predicted.line("kv cache").formula),
            "step buffers": (("step buffers", "engine tensors"), ("buffers",), "of the largest step"),
            "graphs": (("graphs",), ("graphs",), "captured steps"),
        }
        lines = []
        for name, (starts, parts, formula) in groups.items():
            also = "dequantized matrix" if name == "weights" else name
            found = [line.bytes for line in self._predicted.lines if line.pool == "device" and (line.name.startswith(starts) or line.name == also)]
            lines.append(
                ReportLine(name, Estimate(sum(each.require() for each in found), found[0].source), sum(measured[part] for part in parts), "bytes", formula)
            )
        used = max(built.meter.used_bytes(), built.meter.peak_bytes)
        lines.append(ReportLine("peak of the device", self._predicted.total_bytes("device"), used, "bytes", built.meter.described))
        lines.append(ReportLine("peak resident size", Estimate.unknown("of the host's process"), peak_rss_bytes(), "bytes", "the kernel's high-water mark"))
        lines += self._speed_lines()
        facts = [
            ("budget", f"{format_bytes(plan.memory_bytes)} of the device ({'kept' if used <= plan.memory_bytes else 'EXCEEDED'})"),
            ("plan", f"{plan.describe()} · {plan.kv_tokens:,} cache slots"),
            *(("note", note) for note in built.notes),
        ]
        return Report(f"{self.spec.name}: predicted against measured", tuple(lines), tuple(facts))

    def close(self) -> None:
        """Frees the engine and gives the device's memory back."""
        import torch

        if self._built is None:
            return
        self._built.engine.scheduler.reset("abort")
        self._built = None
        self._meter.__exit__(None, None, None)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)


def tune(plan: Plan, spec: ModelSpec, index: int, say: Callable[[str], None], *, show: bool) -> None:
    """On a card that no tile sizes ship for: measures those of this model's decode products, once, in a process that ends before the budget counts."""
    from tradespace import tile_search

    if not tile_search.is_needed(index) or cuda.refusal(spec, plan.kv):  # what is refused is said when it is built
        return
    say("measuring tile sizes of decode for this card and model, once (a few minutes; they are kept)")
    with steps_bar("measuring tiles", show=show) as tell:
        try:
            found = tile_search.search(plan, spec, index=index, tell=tell)
        except EngineError as error:
            say(f"note: {error}. Sizes of another card are taken; `tradespace bench tiles` tries again")
            return
    if found:
        fit = [row for row in found if row["before_s"] is not None]
        gain = sum(row["before_s"] for row in fit) / sum(row["seconds"] for row in fit) if fit else 1.0
        unfit = f"; {len(found) - len(fit)} for which those do not fit" if len(fit) < len(found) else ""
        say(f"tiles: {len(found)} products measured, {gain:.2f} times as fast as with another card's{unfit}")


def open_on_device(
    index: int,
    model: str,
    *,
    memory: str | int | None,
    plan: Plan | str | Path | None,
    context: int | None,
    concurrency: int,
    goal: str,
    fixed: Mapping[str, str | None],
    pattern: str | None,
    revision: str | None,
    offline: bool,
    progress: bool,
    random_weights: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> LLM:
    """As `llm.open`, on CUDA device `index`. Raises what that raises."""
    from tradespace.build_cuda import build_on_device
    from tradespace.measure.device_memory import DeviceMeter

    device = device_spec(index)
    chosen = read_plan(plan) if plan is not None else None
    budget = chosen.memory_bytes if memory is None and chosen is not None and chosen.memory_bytes else api.budget_bytes(memory, device)
    say(f"budget: {format_bytes(budget)} of {format_bytes(device.free_bytes)} free on {device.name} (cuda:{index})")
    if budget > device.free_bytes:
        budget = device.free_bytes
        say(f"note: planned within the {format_bytes(budget)} that are free now")
    meter = MemoryMeter().__enter__()
    try:
        driver = DeviceMeter.start(index)
        if random_weights:
            files, spec, defaults, tokenizer, stored = None, impose(api.find_spec(model), pattern or ""), Defaults(), None, None
        else:
            files = resolve(model, revision=revision, offline=offline, progress=progress)
            with held_headers():
                spec, defaults = impose(api.spec_of_files(files), pattern or "" if chosen is None else chosen.pattern), Defaults.of(files)
                stored = api.stored_weights(files, spec) if chosen is None else None
                tokenizer = Tokenizer.from_files(files)
        if chosen is None:
            chosen = choose_plan(spec, device, budget, context, concurrency, goal, **fixed, stored=stored)  # pyright: ignore[reportArgumentType]
        else:
            check_device_plan(chosen, spec, {"context": context, "attention_pattern": pattern, **fixed}, device)
        chosen = replace(chosen, memory_bytes=budget, device=device.name)
        need = round(ledger(spec, chosen, device).total_bytes().require())
        if need > budget:
            raise BudgetError(
                f"this plan needs {format_bytes(need)} of the device; the budget is {format_bytes(budget)}. Let the planner choose (leave --plan away), or "
                f"give --memory {format_bytes(need * 1.02).replace(' ', '')}",
                need_bytes=need,
                have_bytes=budget,
            )
        say(f"plan: {chosen.describe()} · {chosen.kv_tokens:,} cache slots · {format_bytes(need)} predicted")
        tune(chosen, spec, index, say, show=progress)
        with loading_bar(show=progress) as on_load:
            built = build_on_device(spec, files, chosen, tokenizer=tokenizer, index=index, on_load=on_load, meter=driver)
        for note in built.notes:
            say(f"note: {note}")
        return DeviceLLM(built, device, ledger(spec, built.plan, device), meter, defaults)
    except BaseException:
        meter.__exit__(*sys.exc_info())
        raise


__all__ = ["DeviceLLM", "StepClock", "find_place", "open_on_device"]
