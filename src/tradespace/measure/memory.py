"""What the process tree costs in memory, sampled while it runs.

On Linux a process counts with its proportional set size (PSS: a page that n processes share counts 1/n in each) plus what it has in swap and in huge
pages, summed over the tree. That sum is exact for the tree where nobody outside maps the same pages. The kernel computes it by walking every mapped page
(about 10 ms per GiB of 4 KiB pages here), so the sampler reads the resident size every period (tens of microseconds) and PSS only where it matters:

    bytes = PSS at the last walk + growth of the resident size since       (a newly resident page adds at most itself to the PSS)

with the kernel's high-water mark in place of the resident size wherever the mark rose since the previous sample: a spike between two samples is not lost.
Everybody is walked again when 1 MiB was gained (but walks are held to 5% of the time), when a process joins or leaves the tree, and at marks. The error is
upwards, so the peak is an upper bound, up to pages that processes outside the tree stopped sharing since the last walk. Elsewhere than on Linux it is the
summed resident size, labelled "rss": shared pages count once per process.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache
from types import TracebackType

import psutil

from tradespace.units import KiB, MiB

PSS, RSS = "pss", "rss"
_REWALK_GROWTH_BYTES = MiB  # resident growth that makes the last walk stale
_WALK_SHARE = 0.05  # of the time, at most, is spent in walks
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_ON_LINUX = sys.platform == "linux"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


@dataclass(slots=True)
class _ProcessReading:
    """What the last samples said about one process of the tree."""

    high_water_bytes: int = 0  # 0: not sampled yet
    walked_pss_bytes: int = 0  # at the last walk
    walked_rss_bytes: int = 0
    next_walk_s: float = 0.0


# ---------------------------------------------------------------------------------------------------------------- pure parsing


def parse_kb_fields(text: str) -> dict[str, int]:
    """`Name:   123 kB` lines (meminfo, status, smaps_rollup) as bytes; other lines are skipped.

    >>> parse_kb_fields("Rss:   4 kB\\nName:\\tpython\\n")
    {'Rss': 4096}
    """
    fields: dict[str, int] = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        parts = rest.split()
        if len(parts) == 2 and parts[1] == "kB" and parts[0].isdigit():
            fields[name] = int(parts[0]) * KiB
    return fields


def pss_of_rollup(text: str) -> int:
    """Bytes that a smaps_rollup charges to its process: PSS, its share of swap, and private huge pages (which PSS leaves out).

    >>> pss_of_rollup("00-ff ---p 00:00 0 [rollup]\\nRss: 10 kB\\nPss: 8 kB\\nPrivate_Hugetlb: 4 kB\\nSwapPss: 1 kB\\n")
    13312
    """
    fields = parse_kb_fields(text)
    return fields["Pss"] + fields.get("SwapPss", 0) + fields.get("Private_Hugetlb", 0)


# ---------------------------------------------------------------------------------------------------------------- one process


def _read(path: str) -> str | None:
    """The text of a /proc file, or None where its process has just ended or is not ours to look at."""
    try:
        with open(path, encoding="ascii", errors="replace") as stream:
            return stream.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


@cache
def memory_method() -> str:
    """ "pss" where the kernel tells the proportional set size, else "rss"."""
    text = _read("/proc/self/smaps_rollup") if _ON_LINUX else None
    return PSS if text and "Pss:" in text else RSS


def process_bytes(pid: int | None = None) -> int:
    """Bytes that one process (default: this one) costs now: PSS with swap on Linux, resident size elsewhere. 0 for a process that has ended."""
    pid = os.getpid() if pid is None else pid
    if memory_method() == PSS:
        text = _read(f"/proc/{pid}/smaps_rollup")
        # a zombie's rollup is empty: its memory is gone
        return pss_of_rollup(text) if text and "Pss:" in text else 0
    return _rss_and_high_water(pid)[0]


def peak_rss_bytes(pid: int | None = None) -> int:
    """The kernel's high-water mark of the resident size, since the process began or since `reset_peak`. 0 for a process that has ended."""
    return _rss_and_high_water(os.getpid() if pid is None else pid)[1]


def _rss_and_high_water(pid: int) -> tuple[int, int]:
    if _ON_LINUX:
        text = _read(f"/proc/{pid}/status")
        fields = parse_kb_fields(text) if text else {}
        rss_bytes = fields.get("VmRSS", 0)
        return rss_bytes, max(rss_bytes, fields.get("VmHWM", 0))
    try:
        info = psutil.Process(pid).memory_info()
    except psutil.Error:
        return 0, 0
    # Windows keeps a peak; macOS keeps one for the calling process alone
    peak_bytes = getattr(info, "peak_wset", 0)
    if not peak_bytes and pid == os.getpid():
        import resource  # absent on Windows, which has peak_wset

        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else KiB)
    return info.rss, max(info.rss, peak_bytes)


def child_pids(root_pid: int) -> list[int]:
    """All descendants of a process that live now."""
    if not _ON_LINUX or _read(f"/proc/self/task/{os.getpid()}/children") is None:  # a kernel built without CONFIG_PROC_CHILDREN
        try:
            return [child.pid for child in psutil.Process(root_pid).children(recursive=True)]
        except psutil.Error:
            return []
    found: list[int] = []
    waiting = [root_pid]
    while waiting:
        pid = waiting.pop()
        try:
            threads = os.listdir(f"/proc/{pid}/task")  # a child hangs off the thread that forked it
        except OSError:
            continue
        for thread in threads:
            children = [int(child) for child in (_read(f"/proc/{pid}/task/{thread}/children") or "").split()]
            found += children
            waiting += children
    return found


# ---------------------------------------------------------------------------------------------------------------- acting on the process


def reset_peak() -> bool:
    """Sets this process's high-water mark back to its present resident size. False where the system does not let us (then the peak is since the start)."""
    if not _ON_LINUX:
        return False
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as stream:
            stream.write("5")
    except OSError:
        return False
    return True


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library if it is glibc (musl, macOS and Windows have neither malloc_trim nor these thresholds)."""
    if not _ON_LINUX:
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


def return_freed_memory() -> bool:
    """Gives the free pages inside the heap back to the system. False where the C library has no such call, or there was nothing to give."""
    library = _glibc()
    return library is not None and bool(library.malloc_trim(0))


def limit_heap_growth(threshold_bytes: int = MiB) -> bool:
    """Makes every allocation from `threshold_bytes` on a mapping of its own, which freeing it returns to the system at once. False where not glibc.

    glibc raises this threshold by itself (up to 32 MiB) each time such a mapping is freed: a staging buffer of 16 MiB that is allocated twice then lives in
    the heap, and its pages stay resident after the free, under whatever was allocated above them. The budget would pay for it a second time. Setting the
    threshold by hand fixes it; the price is a page fault per 4 KiB each time such a buffer is allocated, so what recurs should be kept and reused.
    """
    library = _glibc()
    if library is None:
        return False
    return library.mallopt(_M_MMAP_THRESHOLD, threshold_bytes) == 1 and library.mallopt(_M_TRIM_THRESHOLD, threshold_bytes) == 1


# ---------------------------------------------------------------------------------------------------------------- the meter


class MemoryMeter:
    """Samples this process (or another, `root_pid`) and its descendants in a daemon thread while a `with` block runs.

    peak_bytes        highest bytes of the tree (see the module's text for what is counted)
    method            "pss" or "rss"
    samples           number of samples taken; overhead_s: seconds that they took (0.06 ms each and 0.01 a thread, and the walks)
    peak_rss_by_pid   the kernel's high-water mark of each process seen, since that process began (call `reset_peak()` first to begin at the meter)
    marks             peak of each phase ended by `mark(label)`

    A sample waits for the interpreter's lock: while a C call holds it no sample is taken, and the high-water mark covers the gap.

    >>> with MemoryMeter() as meter:
    ...     _ = meter.mark("loading")
    >>> meter.peak_bytes >= meter.marks["loading"] > 0
    True
    """

    def __init__(self, period_s: float = 0.02, *, root_pid: int | None = None) -> None:
        self.period_s = period_s
        self.root_pid = os.getpid() if root_pid is None else root_pid
        self.method = memory_method()
        self.peak_bytes = 0
        self.samples = 0
        self.overhead_s = 0.0
        self.peak_rss_by_pid: dict[int, int] = {}
        self.marks: dict[str, int] = {}
        self._phase_peak_bytes = 0
        self._readings: dict[int, _ProcessReading] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def __enter__(self) -> MemoryMeter:
        self._stop.clear()
        self._sample(walk=True)
        self._thread = threading.Thread(target=self._run, name="tradespace-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        assert self._thread is not None, "a meter is left only after it was entered"
        self._thread.join()
        if self._failure is not None and error is None:
            raise self._failure  # a meter that stopped sampling must not report a peak
        self._sample(walk=True)

    def mark(self, label: str) -> int:
        """Ends a phase: its peak (bytes) is kept under `label` and returned; the next phase begins at what is used now. A label used twice keeps the higher."""
        with self._lock:
            self._sample_locked(walk=True)
            peak_bytes = self._phase_peak_bytes
            self.marks[label] = max(self.marks.get(label, 0), peak_bytes)
            self._phase_peak_bytes = 0
            self._sample_locked(walk=True)
        return peak_bytes

    def _run(self) -> None:
        try:
            while not self._stop.wait(self.period_s):
                self._sample(walk=False)
        except Exception as error:
            self._failure = error

    def _sample(self, *, walk: bool) -> None:
        with self._lock:
            self._sample_locked(walk=walk)

    def _sample_locked(self, *, walk: bool) -> None:
        start = time.perf_counter()
        pids = [self.root_pid, *child_pids(self.root_pid)]
        # a fork halves the shares of what it shares, an end gives them back: no resident size tells, so everybody is walked again
        walk = walk or set(pids) != self._readings.keys()
        self._readings = {pid: self._readings.get(pid) or _ProcessReading() for pid in pids}
        total_bytes = sum(self._process_now(pid, reading, walk=walk) for pid, reading in self._readings.items())
        self.peak_bytes = max(self.peak_bytes, total_bytes)
        self._phase_peak_bytes = max(self._phase_peak_bytes, total_bytes)
        self.samples += 1
        self.overhead_s += time.perf_counter() - start

    def _process_now(self, pid: int, reading: _ProcessReading, *, walk: bool) -> int:
        """Bytes that one process may have cost at any moment since the previous sample: an upper bound (see the module's text)."""
        rss_bytes, high_water_bytes = _rss_and_high_water(pid)
        # the kernel's mark rose: there was a moment since the previous sample at which this much was resident
        rose = 0 < reading.high_water_bytes < high_water_bytes
        top_bytes = high_water_bytes if rose else rss_bytes
        reading.high_water_bytes = high_water_bytes
        self.peak_rss_by_pid[pid] = max(self.peak_rss_by_pid.get(pid, 0), high_water_bytes)
        if self.method == RSS:
            return top_bytes
        now_s = time.perf_counter()
        stale = rss_bytes - reading.walked_rss_bytes > _REWALK_GROWTH_BYTES and now_s >= reading.next_walk_s
        if walk or stale:
            reading.walked_pss_bytes, reading.walked_rss_bytes = process_bytes(pid), rss_bytes
            done_s = time.perf_counter()
            reading.next_walk_s = done_s + (done_s - now_s) / _WALK_SHARE
        return reading.walked_pss_bytes + max(0, top_bytes - reading.walked_rss_bytes)
