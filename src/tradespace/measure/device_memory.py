"""Bytes that this process takes on a CUDA device, as the driver counts them: context, kernels, graphs, and all that the allocator holds.

NVML says it per process where it can see our process; in a container it often cannot, and then the device's used bytes count, less those that were used before
we came, as long as nobody else is on the device. Which of the two it was is recorded (`method`).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from dataclasses import dataclass

from tradespace.errors import UnsupportedError
from tradespace.units import MiB


def _smi(query: str, index: int) -> list[list[str]]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    run = subprocess.run([tool, "-i", str(index), query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=30, check=False)
    return [[field.strip() for field in line.split(",")] for line in run.stdout.splitlines() if line.strip()] if run.returncode == 0 else []


def _nvml_process_bytes(index: int) -> int | None:
    """Of our own process, or None where NVML is not there or does not know us."""
    if importlib.util.find_spec("pynvml") is not None:
        import pynvml  # pyright: ignore[reportMissingImports]

        try:
            pynvml.nvmlInit()
            found = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(index))
        except pynvml.NVMLError:
            return None
        return next((int(entry.usedGpuMemory) for entry in found if entry.pid == os.getpid() and entry.usedGpuMemory), None)
    rows = _smi("--query-compute-apps=pid,used_memory", index)
    return next((int(row[1]) * MiB for row in rows if len(row) == 2 and row[0] == str(os.getpid()) and row[1].isdigit()), None)


@dataclass
class DeviceMeter:
    """Made before the process touches the device. `method`: "NVML, this process" or "the device's used bytes, less those before"."""

    index: int = 0
    baseline_bytes: int = 0
    method: str = ""
    peak_bytes: int = 0

    @classmethod
    def start(cls, index: int = 0) -> DeviceMeter:
        """What is in use now is not ours."""
        rows = _smi("--query-gpu=memory.used", index)
        used = int(rows[0][0]) * MiB if rows and rows[0][0].isdigit() else 0
        return cls(index, used)

    def used_bytes(self) -> int:
        """What this process takes now; the context must be there. Raises UnsupportedError where others use the device and ours cannot be told from theirs."""
        import torch

        if self.method != "driver":
            own = _nvml_process_bytes(self.index)
            if own is not None:
                self.method = "NVML, this process"
                self.peak_bytes = max(self.peak_bytes, own)
                return own
            others = [row for row in _smi("--query-compute-apps=pid,used_memory", self.index) if row and row[0].isdigit()]
            if len(others) > 1:
                raise UnsupportedError(f"{len(others)} processes use device {self.index} and the driver does not say what ours takes. Use a device of your own")
            self.method = "driver"
        free, total = torch.cuda.mem_get_info(self.index)
        used = total - free - self.baseline_bytes
        self.peak_bytes = max(self.peak_bytes, used)
        return used

    @property
    def described(self) -> str:
        return "the device's used bytes, less those before" if self.method == "driver" else self.method or "not measured"
