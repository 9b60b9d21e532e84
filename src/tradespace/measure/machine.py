"""This machine as a DeviceSpec: timed once, kept with a date, timed again when something it depends on has changed.

Timing takes under ten seconds and happens in child processes (`measure/probe.py`), so it costs a budget nothing; the first time, the native kernels are
compiled for it, which any run needs. What is cheap and fleeting, above all the memory that is free now, is read afresh on every call.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from tradespace.errors import EngineError
from tradespace.home import cache_folder
from tradespace.kernels.native.compiler import COMPILE_TIMEOUT_S, best_isa, find_compiler, library_path
from tradespace.measure import host
from tradespace.measure.accelerators import Accelerator, find_accelerators
from tradespace.measure.record import versions, write_atomically
from tradespace.spec.device import DeviceSpec
from tradespace.spec.estimate import Estimate
from tradespace.units import MiB, format_bytes

_SCHEMA = 2
# A lone process shares 2 to 8 MiB with others (the interpreter, the C library). Where it is more, another process has torch loaded just now and takes over a
# share of it: that share comes back when the other ends, so the resident size is what a budget has to allow for.
_USUAL_SHARED_BYTES = 16 * MiB
_BUSY_PERCENT = 25  # of all cores together
_BUSY_NOTE = "other processes were running while this was timed: the rates may be too low; they are taken again once it is idle"
# ten seconds on an idle machine, and what the kernels' compiler takes; a busy one may take longer before we call it stuck
_PROBE_TIMEOUT_S = 180 + COMPILE_TIMEOUT_S


@dataclass(frozen=True, kw_only=True)
class MachineReport:
    """What `tradespace doctor` shows: the device that plans are made for, and what else is here."""

    device: DeviceSpec
    memory_limit: str  # which limit the memory total comes from
    accelerators: tuple[Accelerator, ...]
    compiler: str | None
    torch_version: str | None
    measured_at: str  # ISO date of the timings
    notes: tuple[str, ...] = ()  # what could not be measured, and why


def this_machine(refresh: bool = False) -> DeviceSpec:
    """The CPU and memory of this machine, measured; `refresh` times it again. The first call takes ten seconds, or as long as the kernels' compiler and they,
    later ones a few milliseconds."""
    return _device(_measured(refresh), host.host_memory())


def machine_report(refresh: bool = False) -> MachineReport:
    """`this_machine` with the accelerators, the compiler and the date. Same cost."""
    measured, memory = _measured(refresh), host.host_memory()
    return MachineReport(
        device=_device(measured, memory),
        memory_limit=memory.limit,
        accelerators=find_accelerators(),
        compiler=host.find_compiler(),
        torch_version=versions()["torch"],
        measured_at=measured["date"],
        notes=(*measured["notes"], *((_BUSY_NOTE,) if measured["busy"] else ())),
    )


def fingerprint() -> dict[str, Any]:
    """What the timings depend on: if any of it changes, they are taken again."""
    known = versions()
    return {
        "schema": _SCHEMA,
        "cpu": host.cpu_model(),
        "cores": host.physical_cores(),
        "torch": known["torch"],
        "numpy": known["numpy"],
        "tradespace": known["tradespace"],
        "kernels": _kernels(),
    }


def _kernels() -> str | None:
    """The file of the native kernels, whose name tells source, compiler and instruction set; None where they cannot be compiled or run."""
    compiler = find_compiler()
    return None if compiler is None or not host.has_torch() else library_path(best_isa(), compiler).name


# ---------------------------------------------------------------------------------------------------------------- the cache


def _measured(refresh: bool) -> dict[str, Any]:
    path, now = cache_folder() / "machine.json", fingerprint()
    # rates taken beside other work serve until the machine is idle
    if not refresh and (kept := read_cache(path, now)) is not None and (not kept["busy"] or is_busy()):
        return kept
    measured = measure(now["cores"])
    kept = {"fingerprint": now, **measured}
    write_atomically(path, json.dumps(kept, indent=1) + "\n")
    return kept


def read_cache(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The measurement kept at `path`, or None if there is none, it is damaged, or it was taken under another fingerprint: then it is time to measure."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(kept, dict) or kept.get("fingerprint") != dict(wanted) or not _is_complete(kept):
        return None
    return kept


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_complete(kept: Mapping[str, Any]) -> bool:
    """Whether every figure that a DeviceSpec takes from a measurement is there and is one."""
    curve, matmul, native = (kept.get(key) for key in ("bandwidth", "matmul", "native"))
    return (
        isinstance(curve, list)
        and bool(curve)
        and all(isinstance(point, list) and len(point) == 2 and all(map(_is_rate, point)) for point in curve)
        and [point[0] for point in curve] == sorted({point[0] for point in curve})
        and isinstance(matmul, dict)
        and all(map(_is_rate, matmul.values()))
        and isinstance(native, dict)
        and all(map(_is_rate, native.values()))
        and all(kept.get(key) is None or _is_rate(kept[key]) for key in ("op_s", "disk"))
        and _is_rate(kept.get("runtime_bytes"))
        and all(isinstance(kept.get(key), str) for key in ("date", "backend", "runtime_method"))
        and isinstance(kept.get("notes"), list)
        and isinstance(kept.get("busy"), bool)
    )


def _device(measured: Mapping[str, Any], memory: host.HostMemory) -> DeviceSpec:
    date, backend = measured["date"][:10], measured["backend"]
    source = f"measured {date}"
    by = f"{source} with {backend}"
    curve = tuple((int(size), float(rate)) for size, rate in measured["bandwidth"])
    missing = "torch is not installed"
    return DeviceSpec(
        name=host.cpu_model(),
        kind="cpu",
        memory_bytes=memory.total_bytes,
        free_bytes=memory.free_bytes,
        read_bytes_per_s=Estimate(curve[-1][1], by),
        bandwidth_curve=curve,
        matmul_flops_per_s={dtype: Estimate(rate, by) for dtype, rate in measured["matmul"].items()},
        native_flops_per_s={form: Estimate(rate, source) for form, rate in measured["native"].items()},
        op_overhead_s=Estimate(measured["op_s"], source) if measured["op_s"] else Estimate.unknown(missing),
        disk_bytes_per_s=Estimate(measured["disk"], source) if measured["disk"] else Estimate.unknown("the page cache could not be kept out of it"),
        runtime_bytes=Estimate(measured["runtime_bytes"], f"{source} as {measured['runtime_method']}"),
        cores=host.physical_cores(),
        instruction_sets=host.instruction_sets(),
        no_native=_no_native(),
        source=source,
    )


def _no_native() -> str:
    """Why the native kernels cannot run here; empty: they can, and are compiled when an engine is first built."""
    return "" if find_compiler() else "no C++ compiler was found for the native kernels (a system's own, or: pip install ziglang)"


# ---------------------------------------------------------------------------------------------------------------- the measurement


def measure(cores: int) -> dict[str, Any]:
    """Everything timed, as plain values. Shows a progress bar on a terminal (stderr). Raises EngineError where a probe does not finish."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    from tradespace.measure.bandwidth import at_least_as_fast_as_larger, working_set_sizes  # loads numpy, which a cached answer does not need

    sizes = working_set_sizes(host.host_memory().free_bytes, host.last_cache_bytes())
    num_steps = len(sizes) + (4 + 3 if host.has_torch() else 1) + 3  # matmul types, those of the native kernels; baseline, overhead, disk
    found: dict[str, Any] = {"bandwidth": [], "matmul": {}, "native": {}, "notes": [], "busy": is_busy()}
    with _progress(num_steps) as advance:
        for line in _probe("baseline", str(cores)):
            runtime_bytes, method = _baseline_bytes(line)
            found |= {"runtime_bytes": runtime_bytes, "runtime_method": method}
            advance("process baseline")
        for line in _probe("speeds", str(cores), str(folder), *map(str, sizes)):
            advance(_take(line, found))
    found |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "backend": "torch" if host.has_torch() else "numpy"}
    found["bandwidth"] = [list(point) for point in at_least_as_fast_as_larger(found["bandwidth"])]
    if not _is_complete(found):
        raise EngineError(f"measuring this machine gave {sorted(found)}, which is not all of it; --device NAME plans without measuring")
    return found


def is_busy() -> bool:
    """Whether others keep the cores busy just now (a tenth of a second's look): a thread that has to wait for its core holds up the rest, and what is timed
    in microseconds comes out a hundred times too slow."""
    return psutil.cpu_percent(interval=0.1) > _BUSY_PERCENT


def _take(line: Mapping[str, Any], found: dict[str, Any]) -> str:
    """Files one line of the probe under `found` and returns what to call it in the progress bar."""
    step, value = line["step"], line["value"]
    if step == "bandwidth":
        found["bandwidth"].append([line["size"], value])
        return f"read {format_bytes(line['size'])}"
    if step in ("matmul", "native"):
        if value is None:
            found["notes"].append(f"no {line['dtype']} {step} rate: {line['why']}")
        else:
            found[step][line["dtype"]] = value
        return f"{step} {line['dtype']}"
    found[{"op": "op_s", "disk": "disk"}[step]] = value
    return {"op": "operation overhead", "disk": "disk"}[step]


def _baseline_bytes(line: Mapping[str, Any]) -> tuple[int, str]:
    """What any run pays before its model, from the probe's two figures for it: see _USUAL_SHARED_BYTES."""
    pss_bytes, rss_bytes = line["pss_bytes"], line["rss_bytes"]
    if line["method"] == "pss" and rss_bytes - pss_bytes <= _USUAL_SHARED_BYTES:
        return pss_bytes, "peak proportional set size"
    return rss_bytes, "peak resident size"


def _probe(*arguments: str) -> Iterator[dict[str, Any]]:
    """The JSON lines of a probe as they come. Raises EngineError with the end of what it complained about where it fails."""
    # the child must find the package that is running now, installed or not
    source = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (source, os.environ.get("PYTHONPATH")) if part)
    command = [sys.executable, "-m", "tradespace.measure.probe", *arguments]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:  # not a pipe: nobody empties it while we read the figures
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True, env={**os.environ, "PYTHONPATH": path})
        watchdog = threading.Timer(_PROBE_TIMEOUT_S, child.kill)
        watchdog.start()
        try:
            assert child.stdout is not None, "it was asked for as a pipe"
            for line in child.stdout:
                yield json.loads(line)
            code = child.wait()
        finally:
            watchdog.cancel()
            child.kill()  # where the reader stopped early (Ctrl-C), nothing is left running; does nothing otherwise
            child.wait()
            if child.stdout is not None:
                child.stdout.close()
        complaints.seek(0)
        complaint = complaints.read().strip()[-500:]
    if code != 0:
        raise EngineError(
            f"measuring this machine failed ({arguments[0]}, exit {code}): {complaint or 'it said nothing'}. --device NAME plans without measuring"
        )


@contextlib.contextmanager
def _progress(num_steps: int) -> Iterator[Callable[[str], None]]:
    """A function that advances a bar by one step; on a terminal only, and on stderr, so that --json and pipes stay clean."""
    if not sys.stderr.isatty():
        yield lambda label: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("Measuring this machine, once:"), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=num_steps)
        yield lambda label: bar.update(task, advance=1, description=label)
