"""What this host offers: cores, instruction sets, memory, compiler, cards. Read from the system, nothing is timed; the parsing is functions of text.

A container's limits count: a cgroup (version 1 or 2, at every level up to the root) may lower the memory total, the memory free and the cores.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tradespace.measure.memory import parse_kb_fields
from tradespace.units import MiB

_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as 2**63 rounded down to a page
# Those that some kernel of ours, of torch's or of a compiler picks by; the rest of cpuinfo's hundred flags decide nothing here.
_KNOWN_SETS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- pure: functions of text


@dataclass(frozen=True, kw_only=True)
class CgroupMemory:
    """One level of the cgroup tree: its limit (None: none), what is used, and how much of that is file cache that the kernel would give up."""

    limit_bytes: int | None
    used_bytes: int
    reclaimable_bytes: int

    @property
    def free_bytes(self) -> int | None:
        return None if self.limit_bytes is None else max(0, self.limit_bytes - self.used_bytes + self.reclaimable_bytes)


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Total and free bytes, each the lowest of what the system and its cgroups allow; `limit` names which of them counts for the total."""

    total_bytes: int
    free_bytes: int
    limit: str  # "physical memory" or "cgroup v2 /path"


def parse_limit(text: str) -> int | None:
    """A cgroup limit in bytes; None for "max" (version 2) and for version 1's astronomically large number.

    >>> parse_limit("max\\n"), parse_limit("9223372036854771712\\n"), parse_limit("536870912\\n")
    (None, None, 536870912)
    """
    word = text.strip()
    if not word.isdigit():
        return None
    limit_bytes = int(word)
    return None if limit_bytes >= _UNLIMITED else limit_bytes


def parse_cgroup_memory(limits: Iterable[str], used: str, stat: str) -> CgroupMemory:
    """One level from the text of its limit files (version 2: memory.max and memory.high, of which the lower counts: above `high` the kernel throttles
    the process to a crawl; version 1: memory.limit_in_bytes), of memory.current or memory.usage_in_bytes, and of memory.stat."""
    known = [limit for text in limits if (limit := parse_limit(text)) is not None]
    counts = {name: int(value) for name, _, value in (line.partition(" ") for line in stat.splitlines()) if value.isdigit()}
    # version 1 prefixes the sums over the subtree with total_, and only those match usage_in_bytes
    prefix = "total_" if "total_inactive_file" in counts else ""
    reclaimable_bytes = counts.get(f"{prefix}inactive_file", 0) + counts.get(f"{prefix}active_file", 0)
    return CgroupMemory(limit_bytes=min(known, default=None), used_bytes=int(used), reclaimable_bytes=reclaimable_bytes)


def parse_cpu_quota(version: int, *texts: str) -> float | None:
    """Cores' worth of time that a cgroup allows, or None. Version 2: the text of cpu.max; version 1: of cpu.cfs_quota_us and cpu.cfs_period_us.

    >>> parse_cpu_quota(2, "150000 100000\\n"), parse_cpu_quota(2, "max 100000\\n"), parse_cpu_quota(1, "-1\\n", "100000\\n")
    (1.5, None, None)
    """
    quota, period = texts[0].split() if version == 2 else (texts[0].strip(), texts[1].strip())
    if quota in ("max", "-1") or int(period) <= 0:
        return None
    return int(quota) / int(period)


def parse_cgroup_paths(text: str) -> dict[str, str]:
    """/proc/self/cgroup as controller → path; version 2's one line is under "".

    >>> parse_cgroup_paths("4:cpu,cpuacct:/a\\n0::/b\\n")
    {'cpu': '/a', 'cpuacct': '/a', '': '/b'}
    """
    paths: dict[str, str] = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    return paths


def parse_physical_cores(cpuinfo: str, allowed: set[int]) -> int:
    """Physical cores among the logical ones in `allowed`: siblings of one core count once. Where cpuinfo names no cores (ARM), each logical one counts."""
    cores = set()
    for block in cpuinfo.split("\n\n"):
        fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in block.splitlines())}
        if "processor" in fields and int(fields["processor"]) in allowed:
            cores.add((fields["physical id"], fields["core id"]) if "core id" in fields and "physical id" in fields else fields["processor"])
    return len(cores)


def parse_cpu_model(cpuinfo: str) -> str | None:
    """The processor's name as cpuinfo gives it (ARM kernels give none)."""
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return match.group(1).strip() if match else None


def parse_instruction_sets(cpuinfo: str) -> tuple[str, ...]:
    """Those of the first core's flags (x86: "flags", ARM: "Features") that kernels are chosen by, in a fixed order."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = set(match.group(1).split()) if match else set()
    return tuple(name for name in _KNOWN_SETS if name in flags)


# ---------------------------------------------------------------------------------------------------------------- this host


def _text(path: str | Path) -> str:
    """A system file's text, or "" where this kernel or container has none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cgroup_levels(mount: Path, path: str) -> list[tuple[str, Path]]:
    """(label, folder) of a cgroup and all above it that can be seen. A container often sees its own as the root of the mount: then that is the one."""
    parts = [part for part in path.split("/") if part and part != ".."]
    folders = [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return [("/" + "/".join(folder.relative_to(mount).parts), folder) for folder in folders if folder.is_dir()]


def _cgroup_memories() -> list[tuple[str, CgroupMemory]]:
    paths, root = parse_cgroup_paths(_text("/proc/self/cgroup")), Path("/sys/fs/cgroup")
    levels = []
    for label, folder in _cgroup_levels(root, paths.get("", "/")):
        if used := _text(folder / "memory.current"):
            limits = (_text(folder / "memory.max"), _text(folder / "memory.high"))
            levels.append((f"cgroup v2 {label}", parse_cgroup_memory(limits, used, _text(folder / "memory.stat"))))
    for label, folder in _cgroup_levels(root / "memory", paths["memory"]) if "memory" in paths else ():
        if used := _text(folder / "memory.usage_in_bytes"):
            levels.append((f"cgroup v1 {label}", parse_cgroup_memory((_text(folder / "memory.limit_in_bytes"),), used, _text(folder / "memory.stat"))))
    return levels


def host_memory() -> HostMemory:
    """What this process could use and what it could take now. Swap does not count: a model in swap runs at the speed of the disk."""
    if sys.platform != "linux":
        memory = psutil.virtual_memory()
        return HostMemory(total_bytes=memory.total, free_bytes=memory.available, limit="physical memory")
    fields = parse_kb_fields(_text("/proc/meminfo"))
    return lowest_memory(fields["MemTotal"], fields["MemAvailable"], _cgroup_memories())


def lowest_memory(total_bytes: int, free_bytes: int, levels: Iterable[tuple[str, CgroupMemory]]) -> HostMemory:
    """The lowest limit for the total, the lowest remainder for what is free: they may come from different levels."""
    limit = "physical memory"
    for label, level in levels:
        if level.limit_bytes is None or level.free_bytes is None:
            continue
        free_bytes = min(free_bytes, level.free_bytes)
        if level.limit_bytes < total_bytes:
            total_bytes, limit = level.limit_bytes, label
    return HostMemory(total_bytes=total_bytes, free_bytes=min(free_bytes, total_bytes), limit=limit)


def _cpu_quota() -> float | None:
    paths, root = parse_cgroup_paths(_text("/proc/self/cgroup")), Path("/sys/fs/cgroup")
    quotas = [parse_cpu_quota(2, text) for _, folder in _cgroup_levels(root, paths.get("", "/")) if (text := _text(folder / "cpu.max"))]
    for _, folder in _cgroup_levels(root / "cpu", paths["cpu"]) if "cpu" in paths else ():
        if (quota := _text(folder / "cpu.cfs_quota_us")) and (period := _text(folder / "cpu.cfs_period_us")):
            quotas.append(parse_cpu_quota(1, quota, period))
    return min((quota for quota in quotas if quota is not None), default=None)


def physical_cores() -> int:
    """Physical cores that this process may use: its affinity counts, and so does a cgroup's quota, rounded down (a thread on a fraction of a core holds
    up all the others at every barrier)."""
    if sys.platform == "linux":
        allowed = os.sched_getaffinity(0)
        cores = parse_physical_cores(_text("/proc/cpuinfo"), set(allowed)) or len(allowed)
        quota = _cpu_quota()
        return cores if quota is None else max(1, min(cores, int(quota)))
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def _sysctl(name: str) -> str:
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    except OSError:
        return ""


def cpu_model() -> str:
    """The processor's name as its maker writes it, or the architecture's."""
    named = _sysctl("machdep.cpu.brand_string") if sys.platform == "darwin" else parse_cpu_model(_text("/proc/cpuinfo"))
    return named or platform.processor() or platform.machine()


def instruction_sets() -> tuple[str, ...]:
    """Vector and matrix instructions, by the names that Linux gives them; elsewhere as far as the system tells."""
    if sys.platform == "linux":
        return parse_instruction_sets(_text("/proc/cpuinfo"))
    if sys.platform == "darwin":
        arm = {"hw.optional.neon": "neon", "hw.optional.arm.FEAT_FP16": "asimdhp", "hw.optional.arm.FEAT_DotProd": "asimddp"}
        arm |= {"hw.optional.arm.FEAT_BF16": "bf16", "hw.optional.arm.FEAT_I8MM": "i8mm", "hw.optional.arm.FEAT_SME": "sme"}
        intel = {"hw.optional.avx2_0": "avx2", "hw.optional.fma": "fma", "hw.optional.avx512f": "avx512f"}
        return tuple(label for key, label in (arm | intel).items() if _sysctl(key) == "1")
    return (platform.machine().lower(),)


def last_cache_bytes() -> int | None:
    """Size of the largest cache level that the first core sees, or None where the system does not tell."""
    sizes = [_text(path).strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    found = [int(size[:-1]) * {"K": 1024, "M": MiB}[size[-1]] for size in sizes if size[:-1].isdigit() and size[-1] in "KM"]
    return max(found, default=None)


def find_compiler() -> str | None:
    """A C++ compiler for the native kernels: the first of the system's, else the one that the ziglang wheel carries. None: neither."""
    for name in ("c++", "g++", "clang++", "zig"):
        if path := shutil.which(name):
            return path
    with contextlib.suppress(ImportError, ValueError):
        if importlib.util.find_spec("ziglang") is not None:
            return "zig (ziglang wheel)"
    return None


def has_torch() -> bool:
    """Whether torch can be imported, without importing it."""
    return importlib.util.find_spec("torch") is not None
