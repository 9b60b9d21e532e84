"""Where a training runs, and the most that it takes there: this machine, or one of its cards."""

from __future__ import annotations

import os
from types import TracebackType

import torch

from tradespace import api
from tradespace.llm_cuda import device_spec, find_place
from tradespace.measure.device_memory import DeviceMeter
from tradespace.measure.memory import MemoryMeter
from tradespace.spec.device import DeviceSpec

ALLOCATOR_SHARE = 0.97  # of a card's budget that is planned with: torch's allocator rounds up and leaves gaps


def find_training_place(device: str | None) -> tuple[torch.device, DeviceSpec]:
    """torch's device and its description. Of several ranks each takes the card of its number. Raises InputError and UnsupportedError as `find_place` does."""
    index = find_place(device)
    if index is None:
        return torch.device("cpu"), api.find_machine(None)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        index = find_place(f"cuda:{os.environ['LOCAL_RANK']}") or 0
    return torch.device("cuda", index), device_spec(index)


class HostPeak:
    """Of the process tree, sampled. A context manager."""

    def __init__(self) -> None:
        self._meter = MemoryMeter()

    @property
    def peak_bytes(self) -> int:
        return self._meter.peak_bytes

    def hold(self, budget_bytes: int) -> None:
        """Nothing holds the host's allocator; a run that passes its budget is stopped after the step."""

    def __enter__(self) -> HostPeak:
        self._meter.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._meter.__exit__(kind, error, trace)


class CardPeak:
    """Of a card: what the driver counted before anything was allocated, and the most that torch reserved since. Made before the card is touched."""

    def __init__(self, index: int) -> None:
        self._driver, self._index, self._context_bytes = DeviceMeter.start(index), index, 0

    @property
    def peak_bytes(self) -> int:
        return self._context_bytes + torch.cuda.max_memory_reserved(self._index)

    def hold(self, budget_bytes: int) -> None:
        """torch reserves no more than the budget leaves beside the context: it gives back what lies idle instead."""
        _, total = torch.cuda.mem_get_info(self._index)
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, budget_bytes - self._context_bytes) / total), self._index)

    def __enter__(self) -> CardPeak:
        torch.cuda.set_device(self._index)
        torch.zeros(1, device="cuda")  # the context is there
        self._context_bytes = max(0, self._driver.used_bytes() - torch.cuda.memory_reserved(self._index))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        torch.cuda.set_per_process_memory_fraction(1.0, self._index)
