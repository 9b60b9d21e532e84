"""The experiments that `tradespace lab` knows, in one visible table. Each asks one question, measures it here, and returns a Record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from tradespace.measure.record import Record


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """name: of the record, too. `module` has the functions `run` and `markdown` under these names, or under those given.

    A module is imported when its experiment runs: a parent that had loaded torch would share its pages with the processes that "memory" measures.
    """

    name: str
    question: str
    minutes: float
    module: str
    runner: str = "run"
    on: str = "cpu"  # the kind of device that it needs

    def run(self, *, quick: bool, say: Callable[[str], None]) -> Record:
        """Measures, and returns the record."""
        return getattr(import_module(f"tradespace.lab.{self.module}"), self.runner)(quick=quick, say=say)

    def markdown(self, record: Record) -> str:
        """The table that the documentation shows."""
        return import_module(f"tradespace.lab.{self.module}").markdown(record)


_BUDGET = "does the process stay inside its budget, and is its peak what was predicted?"

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment(name="memory", question=_BUDGET, minutes=9, module="memory"),
        Experiment(name="speed", question="how fast are prefill and decode, against the prediction?", minutes=4, module="speed"),
        Experiment(name="paging", question="what do pages waste, and what do they cost?", minutes=4, module="paging"),
        Experiment(name="batching", question="what does continuous batching gain over fixed batches?", minutes=6, module="batching"),
        Experiment(name="quality", question="what does each weight format cost in KL divergence?", minutes=5, module="quality"),
        Experiment(name="agreement", question="does it compute what llama.cpp computes?", minutes=6, module="agreement"),
        Experiment(name="attention", question="what does attention hold beyond q, k, v and the output, and how does it grow?", minutes=2, module="attention"),
        Experiment(name="flash", question="is the GPU kernel right, how fast is it, what does it hold?", minutes=2, module="flash", on="cuda"),
        Experiment(name="calibration", question="what do the cost model's measured constants come to here?", minutes=12, module="calibrate"),
        Experiment(name="demo", question="what does make demo print here?", minutes=1, module="commands", runner="run_demo"),
        Experiment(name="tests", question="how do the tests end here, and in what time?", minutes=9, module="commands", runner="run_tests"),
    )
}
