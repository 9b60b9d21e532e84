"""What a machine offers: pools of bytes, bytes per second, operations per second. Facts only; how they are measured is `measure/machine.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tradespace.spec.estimate import Estimate


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """One kind of device, `count` of them alike, as the planner sees it.

    memory_bytes   total of one device (for a CPU: of the host, or the cgroup's limit if lower)
    free_bytes     what could be taken now; for a device out of the zoo its whole memory
    read_bytes_per_s    sequential read far beyond the last cache
    bandwidth_curve     (working set in bytes, bytes/s) pairs, ascending; empty where nobody measured it
    matmul_flops_per_s  dense rate per dtype name ("fp32", "bf16", "fp16", "int8", "fp8"); a dtype the chip has no instruction for is absent
    native_flops_per_s  on a CPU, what our own kernels reach in products by many tokens, per form of the activations; empty where nobody measured it
    op_overhead_s       cost of starting one operation from Python (eager kernel call), the floor under tiny operations
    host_link_bytes_per_s  host memory to device (PCIe, NVLink-C2C); None on a CPU: weights are already there
    peer_link_bytes_per_s  device to device, for tensor parallelism
    disk_bytes_per_s       sequential read of the disk that holds the weights
    runtime_bytes          what the process itself costs before any model: interpreter, libraries, context
    """

    name: str
    kind: str  # "cpu" | "cuda" | "mps"
    count: int = 1
    memory_bytes: int
    free_bytes: int
    read_bytes_per_s: Estimate
    bandwidth_curve: tuple[tuple[int, float], ...] = ()
    matmul_flops_per_s: Mapping[str, Estimate] = field(default_factory=dict)
    native_flops_per_s: Mapping[str, Estimate] = field(default_factory=dict)
    op_overhead_s: Estimate
    host_link_bytes_per_s: Estimate | None = None
    peer_link_bytes_per_s: Estimate | None = None
    disk_bytes_per_s: Estimate = field(default_factory=lambda: Estimate.unknown("no disk measured"))
    runtime_bytes: Estimate = field(default_factory=lambda: Estimate.unknown("not measured"))
    cores: int = 0  # physical cores this process may use; 0 where it does not matter
    instruction_sets: tuple[str, ...] = ()
    no_native: str = ""  # why the native CPU kernels cannot run there; empty: they can (or it is no CPU)
    source: str = ""  # data sheet, or "measured on <date>"

    def flops_per_s(self, dtype: str) -> Estimate:
        """Dense matmul rate for `dtype`, or unknown where the chip has no instruction for it."""
        return self.matmul_flops_per_s.get(dtype, Estimate.unknown(f"{self.name} has no {dtype} matmul rate"))

    def bandwidth_at(self, working_set_bytes: float) -> Estimate:
        """Read bandwidth for a working set of this size: from the measured curve where there is one (the next larger point), else the plain figure."""
        for size_bytes, bytes_per_s in self.bandwidth_curve:
            if working_set_bytes <= size_bytes:
                return Estimate(bytes_per_s, self.read_bytes_per_s.source)
        return self.read_bytes_per_s
