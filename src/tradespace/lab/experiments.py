"""The experiments that `tradespace lab` knows, in one visible table. Each asks one question, measures it here, and returns a Record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tradespace.lab import agreement, batching, commands, memory, paging, quality, speed
from tradespace.measure.record import Record


class Run(Protocol):
    def __call__(self, *, quick: bool, say: Callable[[str], None]) -> Record: ...


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """name: of the record, too. markdown(record): the table that the documentation shows."""

    name: str
    question: str
    minutes: float
    run: Run
    markdown: Callable[[Record], str]


EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            name="memory",
            question="does the process stay inside its budget, and is its peak what was predicted?",
            minutes=5,
            run=memory.run,
            markdown=memory.markdown,
        ),
        Experiment(name="speed", question="how fast are prefill and decode, against the prediction?", minutes=2, run=speed.run, markdown=speed.markdown),
        Experiment(name="paging", question="what do pages waste, and what do they cost?", minutes=3, run=paging.run, markdown=paging.markdown),
        Experiment(name="batching", question="what does continuous batching gain over fixed batches?", minutes=4, run=batching.run, markdown=batching.markdown),
        Experiment(name="quality", question="what does each weight format cost in KL divergence?", minutes=6, run=quality.run, markdown=quality.markdown),
        Experiment(name="agreement", question="does it compute what llama.cpp computes?", minutes=4, run=agreement.run, markdown=agreement.markdown),
        Experiment(name="demo", question="what does make demo print here?", minutes=1, run=commands.run_demo, markdown=commands.markdown),
        Experiment(name="tests", question="how do the tests end here, and in what time?", minutes=15, run=commands.run_tests, markdown=commands.markdown),
    )
}
