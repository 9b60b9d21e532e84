"""How kernels are launched on a card, with stand-ins for Triton's own: one compiled for each kind of call, found again without asking Triton."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from tradespace.kernels import triton_launch
from tradespace.kernels.triton_launch import launch


class Compiled:
    packed_metadata = (4, 1, 0)

    def __init__(self, function: int, calls: list[Any]):
        self.function, self._calls = function, calls

    def run(self, *arguments: Any) -> None:
        self._calls.append(arguments)


class Kernel:
    """As a JITFunction: `kernel[grid](...)` finds or compiles, and launches."""

    arg_names = ("x", "count", "eps", "BLOCK", "KIND", "PDL")

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []
        self.calls: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def first(*arguments: Any, **options: Any) -> Compiled:
            self.compiled.append(Compiled(len(self.compiled) + 1, self.calls))
            return self.compiled[-1]

        return first


class OnCard(Tensor):
    """A tensor that says it lies on a card."""

    is_cuda = True

    def get_device(self) -> int:
        return 0


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    found: list[int] = []
    monkeypatch.setattr(triton_launch, "prefer_shared", found.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(triton_launch, "raw_stream", lambda device: 77)
    return found


def test_a_second_call_of_a_kind_does_not_ask_triton(shared: list[int]):
    kernel, x = Kernel(), torch.zeros(64).as_subclass(OnCard)
    for count in (32, 48, 64):
        launch(kernel, (3, 2), x, x, count, 0.5, BLOCK=128, KIND="int8", num_warps=4, pdl=True, beside=True)
    assert len(kernel.compiled) == 1 and shared == [1]
    assert [call[:9] for call in kernel.calls] == [(3, 2, 1, 77, 1, (4, 1, 0), None, None, None)] * 2
    assert [call[10:] for call in kernel.calls] == [(48, 0.5, 128, "int8", True), (64, 0.5, 128, "int8", True)]


def test_what_triton_would_compile_anew_is_another_kind(shared: list[int]):
    kernel, x = Kernel(), torch.zeros(64).as_subclass(OnCard)
    calls: list[tuple[Any, ...]] = [(x, 32, 0.5), (x[1:], 32, 0.5), (x.double().as_subclass(OnCard), 32, 0.5), (x, 31, 0.5), (x, 1, 0.5), (x, 2**40, 0.5)]
    for arguments in calls:
        launch(kernel, (1,), x, *arguments, BLOCK=128, KIND="int8", pdl=False)
    launch(kernel, (1,), x, x, 32, 0.5, BLOCK=64, KIND="int8", pdl=False)
    launch(kernel, (1,), x, x, 32, 0.5, BLOCK=128, KIND="int8", pdl=True)
    launch(kernel, (1,), x, x, 32, 0.5, BLOCK=128, KIND="int8", num_warps=8, pdl=False)
    assert len(kernel.compiled) == len(calls) + 3 and not kernel.calls and not shared
    same = object()
    for _ in range(2):
        launch(kernel, (1,), x, x, 32, 0.5, BLOCK=128, KIND="int8", pdl=False, same=same)
    assert len(kernel.compiled) == len(calls) + 4 and len(kernel.calls) == 1


def test_a_profilers_hook_goes_triton_s_way(shared: list[int], monkeypatch: pytest.MonkeyPatch):
    kernel, x = Kernel(), torch.zeros(64).as_subclass(OnCard)
    for hooked in (False, True):
        monkeypatch.setattr(triton_launch.knobs.runtime, "launch_enter_hook", type("Hook", (), {"calls": [print] if hooked else []})())
        launch(kernel, (1,), x, x, 32, 0.5, BLOCK=128, KIND="int8", pdl=False)
    assert len(kernel.compiled) == 2 and not kernel.calls
