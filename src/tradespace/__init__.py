"""tradespace: a large language model engine in which memory is a budget that you state.

    import tradespace as ts

    frontier = ts.plan("llama-2-70b", memory="40GB", device="a100-40gb")   # pure arithmetic, no torch
    with ts.open("smollm2-135m", memory="900MiB") as llm:
        for text in llm.stream("Why is the sky blue?", ts.SamplingParams(max_tokens=64)):
            print(text, end="")
        print(llm.report())

What `__all__` names is the public interface; all else may change. Names load on first use, so that planning never imports torch.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tradespace import testing
    from tradespace.api import fit, models, plan, pull, what_if
    from tradespace.engine.beam import BeamOutput, BeamParams
    from tradespace.engine.request import Completion, SamplingParams
    from tradespace.errors import BudgetError, CorruptFileError, DownloadError, EngineError, InputError, TradespaceError, UnsupportedError
    from tradespace.evaluating import Evaluation, evaluate
    from tradespace.llm import LLM, open
    from tradespace.measure.machine import this_machine
    from tradespace.planner.search import Frontier
    from tradespace.quantizing import Quantized, quantize
    from tradespace.spec.device import DeviceSpec
    from tradespace.spec.estimate import Estimate
    from tradespace.spec.model import ModelSpec
    from tradespace.spec.plan import Plan
    from tradespace.spec.workload import Workload
    from tradespace.tuning import distill, finetune, train

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "BeamOutput",
    "BeamParams",
    "BudgetError",
    "Completion",
    "CorruptFileError",
    "DeviceSpec",
    "DownloadError",
    "EngineError",
    "Estimate",
    "Evaluation",
    "Frontier",
    "InputError",
    "ModelSpec",
    "Plan",
    "Quantized",
    "SamplingParams",
    "TradespaceError",
    "UnsupportedError",
    "Workload",
    "distill",
    "evaluate",
    "finetune",
    "fit",
    "models",
    "open",
    "plan",
    "pull",
    "quantize",
    "testing",
    "this_machine",
    "train",
    "what_if",
]

_HOMES = {
    "tradespace.api": ("fit", "models", "plan", "pull", "what_if"),
    "tradespace.evaluating": ("Evaluation", "evaluate"),
    "tradespace.llm": ("LLM", "open"),
    "tradespace.engine.beam": ("BeamOutput", "BeamParams"),
    "tradespace.engine.request": ("Completion", "SamplingParams"),
    "tradespace.errors": ("BudgetError", "CorruptFileError", "DownloadError", "EngineError", "InputError", "TradespaceError", "UnsupportedError"),
    "tradespace.measure.machine": ("this_machine",),
    "tradespace.planner.search": ("Frontier",),
    "tradespace.quantizing": ("Quantized", "quantize"),
    "tradespace.tuning": ("distill", "finetune", "train"),
    "tradespace.spec.device": ("DeviceSpec",),
    "tradespace.spec.estimate": ("Estimate",),
    "tradespace.spec.model": ("ModelSpec",),
    "tradespace.spec.plan": ("Plan",),
    "tradespace.spec.workload": ("Workload",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str):
    if name == "testing":  # checks for a user's own technique: it knows torch, so it loads when it is asked for
        from importlib import import_module

        return import_module("tradespace.testing")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'tradespace' has no attribute '{name}'")
    from importlib import import_module

    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


class _Interface(ModuleType):
    """This module. A part of the package never takes the place of a public name: `ts.quantize` stays the function, whoever imports tradespace.quantize."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Interface


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
