"""The processes of one training run, as `torchrun` started them: a mesh of data × tensor ranks, and the few words that they exchange beside tensors."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from tradespace.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TIMEOUT_S = 120.0  # a rank that waits longer for another ends with an error
GLOO_THREAD = "pt_gloo_runloop"
ENDED = ("", "")  # name and state of a thread that is no more


@dataclass(frozen=True)
class Ranks:
    """This process among `data` × `tensor` ranks. Alone: 1 × 1, without a mesh."""

    data: int = 1
    tensor: int = 1
    rank: int = 0
    mesh: DeviceMesh | None = None

    @property
    def world(self) -> int:
        return self.data * self.tensor

    @property
    def leader(self) -> bool:
        """Whether this one speaks and writes."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    def along(self, axis: str) -> DeviceMesh:
        """The mesh of this rank's data ("data") or tensor ("tensor") companions."""
        assert self.mesh is not None, "asked where there are several ranks"
        return self.mesh[axis]

    def sum(self, value: float, axis: str | None = None) -> float:
        """Over all ranks, or over those of an axis. The same number, bit for bit, on each."""
        if self.world == 1 or (axis is not None and getattr(self, axis) == 1):
            return value
        held = torch.tensor(value, dtype=torch.float64, device=self._device)
        dist.all_reduce(held, group=None if axis is None else self.along(axis).get_group())
        return float(held)

    def sum_tensors(self, tensors: list[Tensor], axis: str) -> None:
        """In place, over the ranks of an axis."""
        if getattr(self, axis) == 1:
            return
        for tensor in tensors:
            dist.all_reduce(tensor, group=self.along(axis).get_group())

    def any(self, value: bool) -> bool:
        """Whether it holds on some rank: what all of them then act on."""
        return self.sum(float(value)) > 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    @property
    def _device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


ALONE = Ranks()


def sizes(data: int | None, tensor: int | None) -> tuple[int, int]:
    """(data, tensor) ranks out of what was asked and what torchrun started. Raises InputError where they differ."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    tensor = 1 if tensor is None else tensor
    if tensor < 1 or (data is not None and data < 1):
        raise InputError(f"--data-parallel {data} --tensor-parallel {tensor}: at least 1 of each")
    wanted = tensor * (data or max(1, started // tensor))
    if wanted != started:
        what = f"--data-parallel {data or wanted // tensor} × --tensor-parallel {tensor} is {wanted} processes"
        raise InputError(f"{what}; {started} {'was' if started == 1 else 'were'} started. Start with: torchrun --nproc-per-node {wanted} -m tradespace …")
    return wanted // tensor, tensor


def join(data: int | None, tensor: int | None, device: str = "cpu") -> Ranks:
    """Joins the processes that torchrun started: gloo on CPUs, NCCL on CUDA devices. Alone without torchrun. Raises InputError as `sizes` does."""
    data, tensor = sizes(data, tensor)
    if data * tensor == 1:
        return ALONE
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=TIMEOUT_S))
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device, (data, tensor), mesh_dim_names=("data", "tensor"))
    return Ranks(data, tensor, dist.get_rank(), mesh)


def leave(ranks: Ranks) -> None:
    """Ends the process group, once all are done."""
    if ranks.world > 1 and dist.is_initialized():
        dist.destroy_process_group()
        until_asleep(GLOO_THREAD)


def settle() -> None:
    """Waits until gloo's threads hold nothing of what they have sent."""
    until_asleep(GLOO_THREAD, pause_s=0.0003)


def until_asleep(name: str, limit_s: float = 5.0, pause_s: float = 0.002) -> None:
    """Waits until the threads of this process with that name (as Linux shows it) sleep: seen twice, so that none waits for the interpreter's lock.

    The meshes that torch's caches keep let gloo's threads live on. One that drops a tensor while the interpreter ends cannot have the lock for that,
    and C++ then aborts the process ("terminate called without an active exception"), although all was done.
    """
    end, looks = time.monotonic() + limit_s, 0
    found = [task for task in Path("/proc/self/task").glob("*/stat") if _thread(task)[0] == name]
    while looks < 2 and time.monotonic() < end:
        time.sleep(pause_s)  # without the lock: who waits for it runs
        looks = 0 if any(_thread(task) not in {(name, "S"), ENDED} for task in found) else looks + 1


def _thread(stat: Path) -> tuple[str, str]:
    """Name and state of a thread."""
    try:
        thread, _, rest = stat.read_text().partition("(")[2].rpartition(")")
    except OSError:
        return ENDED
    return thread, rest.split()[0]
