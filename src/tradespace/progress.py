"""What a load and a generation say of themselves while they go: a bar of the bytes loaded, and the clock of an engine's steps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from tradespace.engine.step import Step


@dataclass
class StepClock:
    """Seconds and tokens of the steps of one generation: those that only decode, and those that hold part of a prompt."""

    decode_tokens: int = 0
    decode_s: float = 0.0
    prefill_tokens: int = 0
    prefill_s: float = 0.0

    def take(self, step: Step, seconds: float) -> None:
        if all(item.num_tokens == 1 and item.start >= item.request.num_prompt for item in step.sequences):
            self.decode_tokens += step.num_tokens
            self.decode_s += seconds
        else:
            self.prefill_tokens += step.num_tokens
            self.prefill_s += seconds

    @property
    def decode_tokens_per_s(self) -> float | None:
        return self.decode_tokens / self.decode_s if self.decode_s else None

    @property
    def prefill_tokens_per_s(self) -> float | None:
        return self.prefill_tokens / self.prefill_s if self.prefill_s else None


class loading_bar:
    """A progress bar of the bytes loaded, on standard error, where that is a terminal."""

    def __init__(self, *, show: bool):
        self.show = show and sys.stderr.isatty()

    def __enter__(self) -> Callable[[int, int], None]:
        if not self.show:
            return lambda done, total: None
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("loading"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self.bar.__enter__()
        self.task = self.bar.add_task("loading", total=None)
        return lambda done, total: self.bar.update(self.task, completed=done, total=total)

    def __exit__(self, *details: object) -> None:
        if self.show:
            self.bar.__exit__(None, None, None)


class steps_bar:
    """A progress bar of parts that each take a known number of steps, on standard error, where that is a terminal: (part, steps done, of how many)."""

    def __init__(self, title: str, *, show: bool):
        self.title, self.show = title, show and sys.stderr.isatty()

    def __enter__(self) -> Callable[[str, int, int], None]:
        if not self.show:
            return lambda what, done, total: None
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn(self.title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self.bar.__enter__()
        self.task = self.bar.add_task("", total=None)
        return lambda what, done, total: self.bar.update(self.task, completed=done, total=total, description=what)

    def __exit__(self, *details: object) -> None:
        if self.show:
            self.bar.__exit__(None, None, None)
