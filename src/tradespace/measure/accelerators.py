"""Cards in this machine: through torch where it is installed with CUDA, else through nvidia-smi. Found, not timed.

torch is asked in a process of its own (`python -m tradespace.measure.accelerators`): asking about free memory makes a CUDA context, which costs hundreds of
MiB on the card and in the host, and those belong into a budget only when a plan uses the card.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

from tradespace.spec.device import DeviceSpec
from tradespace.spec.device_zoo import match_driver_name
from tradespace.units import MiB

_QUERY = "name,driver_version,memory.total,memory.free"


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One card as its driver shows it. `free_bytes` is what could be taken now, before the context of a process that takes it."""

    name: str
    kind: str  # "cuda" | "mps"
    memory_bytes: int
    free_bytes: int
    driver: str
    found_by: str  # "nvidia-smi" | "torch"

    def as_device(self) -> DeviceSpec | None:
        """The zoo's row for this card with the memory it has here, or None where the zoo does not know it."""
        row = match_driver_name(self.name, self.memory_bytes)
        return None if row is None else replace(row, memory_bytes=self.memory_bytes, free_bytes=self.free_bytes)


def parse_nvidia_smi(text: str) -> list[Accelerator]:
    """The cards in the output of `nvidia-smi --query-gpu=name,driver_version,memory.total,memory.free --format=csv,noheader,nounits` (MiB).

    >>> parse_nvidia_smi("NVIDIA L4, 580.159.04, 23034, 22563\\n")[0].free_bytes // 2**20
    22563
    """
    cards = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.rsplit(",", 3)]
        if len(fields) == 4 and fields[2].isdigit() and fields[3].isdigit():  # "[N/A]" and error lines are no card with memory
            name, driver, total, free = fields
            cards.append(
                Accelerator(name=name, kind="cuda", memory_bytes=int(total) * MiB, free_bytes=int(free) * MiB, driver=f"NVIDIA {driver}", found_by="nvidia-smi")
            )
    return cards


def find_accelerators() -> tuple[Accelerator, ...]:
    """The cards that a process of ours could use now. nvidia-smi first, because it makes no context; torch where there is only that."""
    if tool := shutil.which("nvidia-smi"):
        try:
            run = subprocess.run([tool, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20, check=False)
        except subprocess.TimeoutExpired:
            return ()  # a driver that hangs offers no card
        if run.returncode == 0 and (cards := parse_nvidia_smi(run.stdout)):
            return tuple(cards)
    if importlib.util.find_spec("torch") is None or (sys.platform == "linux" and not has_nvidia_files()):
        return ()
    run = subprocess.run([sys.executable, "-m", "tradespace.measure.accelerators"], capture_output=True, text=True, timeout=120, check=False)
    return tuple(Accelerator(**card) for card in json.loads(run.stdout)) if run.returncode == 0 else ()


def has_nvidia_files() -> bool:
    """Whether this system has a CUDA device at all: asked before torch is, which takes long to say no."""
    from pathlib import Path

    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()  # the second: Windows' Linux


def ask_torch() -> list[Accelerator]:
    """What torch sees. Makes a context on every card: call it in a process that ends afterwards."""
    import torch

    if torch.cuda.is_available():
        cards = []
        for index in range(torch.cuda.device_count()):
            free_bytes, total_bytes = torch.cuda.mem_get_info(index)
            cards.append(
                Accelerator(
                    name=torch.cuda.get_device_name(index),
                    kind="cuda",
                    memory_bytes=total_bytes,
                    free_bytes=free_bytes,
                    driver=f"CUDA {torch.version.cuda}",
                    found_by="torch",
                )
            )
        return cards
    if torch.backends.mps.is_available():
        limit_bytes = torch.mps.recommended_max_memory()  # what Metal lends the GPU of the memory it shares with the processor
        name = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False).stdout.strip()
        driver = f"Metal, macOS {platform.mac_ver()[0]}"
        return [Accelerator(name=name, kind="mps", memory_bytes=limit_bytes, free_bytes=limit_bytes, driver=driver, found_by="torch")]
    return []


if __name__ == "__main__":
    print(json.dumps([asdict(card) for card in ask_torch()]))
