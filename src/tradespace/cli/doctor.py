"""`tradespace doctor`: what this machine offers a plan, measured once and kept with its date."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from tradespace.cli.options import Json, console, print_json
from tradespace.kernels.native.compiler import best_isa, find_compiler, library_path
from tradespace.measure.machine import MachineReport, cache_folder, machine_report
from tradespace.spec.device import DeviceSpec
from tradespace.spec.estimate import Estimate
from tradespace.units import format_bytes, format_rate, format_seconds

_INSTALL_TORCH = "not installed: plans work, models do not run, and rates are numpy's. pip install 'tradespace[engine]'"
# True while no kernel of ours is compiled; with the first one this must name what running without it costs.
_NO_COMPILER = 'none found: models run on torch\'s kernels, slower than the native ones (README, "How fast is it?", has both). pip install ziglang brings one'


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again instead of showing what was measured before. Takes ten seconds.")] = False,
    json: Json = False,
) -> None:
    """Show this machine as plans see it: cores, memory, bandwidth, matmul rates, accelerators.

    Example: tradespace doctor --refresh
    """
    report = doctor_report(refresh)
    if json:
        print_json(report_dict(report))
        return
    out = console()
    for table in (*doctor_tables(report.device), surroundings_table(report)):
        out.print(table)
    for note in report.notes:
        out.print(f"note: {escape(note)}", style="yellow")


def doctor_report(refresh: bool) -> MachineReport:
    """This machine, from the kept measurement or, with `refresh` or where there is none, measured now. Raises EngineError where measuring fails."""
    return machine_report(refresh)


def report_dict(report: MachineReport) -> dict[str, Any]:
    """The report as plain JSON values: estimates are {"value", "source"}, bytes and seconds are numbers."""
    body = asdict(report)
    body["cache"] = str(cache_folder())
    return body


def doctor_tables(device: DeviceSpec) -> list[Table]:
    """The machine's facts and its measured rates as tables of at most 100 columns."""
    return [_facts_table(device), _rates_table(device)]


def _facts(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _facts_table(device: DeviceSpec) -> Table:
    table = _facts(escape(device.name))
    table.add_row("cores", f"{device.cores} physical, that this process may use")
    table.add_row("instruction sets", escape(" ".join(device.instruction_sets)) or "unknown")
    table.add_row("memory", f"{format_bytes(device.free_bytes)} free of {format_bytes(device.memory_bytes)}; free is what counts")
    table.add_row("process baseline", _shown(device.runtime_bytes, lambda value: f"{format_bytes(value)} before any model"))
    table.add_row("start of one op", _shown(device.op_overhead_s, lambda value: f"{value * 1e6:.2f} µs" if value < 1e-4 else format_seconds(value)))
    table.add_row("disk, sequential", _shown(device.disk_bytes_per_s, lambda value: f"{format_rate(value, 'B/s')} (of the cache folder's disk)"))
    return table


def _shown(estimate: Estimate, show: Any) -> str:
    return escape(estimate.source) if estimate.value is None else f"{show(estimate.value)}"


def _rates_table(device: DeviceSpec) -> Table:
    """Two short lists side by side: bandwidth by working set, matmul by type."""
    table = Table(title=f"rates, {escape(device.source)}", title_justify="left")
    for heading in ("read from", "bandwidth", "matmul in", "rate"):
        table.add_column(heading, justify="right", no_wrap=True)
    reads = [(format_bytes(size), format_rate(rate, "B/s")) for size, rate in device.bandwidth_curve]
    if not reads and device.read_bytes_per_s.value is not None:
        reads = [("memory", format_rate(device.read_bytes_per_s.value, "B/s"))]
    unit = {"int8": "OP/s"}
    rates = [
        (f"{dtype}{by}", format_rate(rate.value, unit.get(dtype, "FLOP/s")))
        for by, found in (("", device.matmul_flops_per_s), (", our kernels", device.native_flops_per_s))
        for dtype, rate in sorted(found.items())
        if rate.value is not None
    ]
    for index in range(max(len(reads), len(rates))):
        table.add_row(*(reads[index] if index < len(reads) else ("", "")), *(rates[index] if index < len(rates) else ("", "")))
    return table


def surroundings_table(report: MachineReport) -> Table:
    """What else decides which plans can run here: the limit on memory, cards, compiler, torch, and how old the timings are."""
    table = _facts("around it")
    table.add_row("memory limit", escape(report.memory_limit))
    for card in report.accelerators:
        row = card.as_device()
        known = f"planned for as {row.name}" if row is not None else "not in the zoo: plans take --device NAME of its nearest relative"
        memory = f"{format_bytes(card.free_bytes)} free of {format_bytes(card.memory_bytes)}"
        table.add_row("accelerator", escape(f"{card.name}, {memory}, {card.driver}; {known}"))
    if not report.accelerators:
        table.add_row("accelerator", "none")
    table.add_row("CPU kernels", escape(_kernels()))
    if kernels := _cuda_kernels():
        table.add_row("CUDA kernels", escape(kernels))
    table.add_row("compiler", escape(report.compiler or _NO_COMPILER))
    table.add_row("torch", escape(report.torch_version or _INSTALL_TORCH))
    table.add_row("measured", escape(f"{report.measured_at}, kept in {cache_folder()}; --refresh measures again"))
    return table


def _cuda_kernels() -> str:
    """What kernels torch's first CUDA device gets; empty without one."""
    try:
        import torch
    except ImportError:
        return ""
    if not torch.cuda.is_available():
        return ""
    from tradespace.kernels.cuda_module import describe

    return describe(torch.device("cuda", 0))


def _kernels() -> str:
    """Which native kernels run here, or why torch does their work."""
    compiler = find_compiler()
    if compiler is None:
        return "torch's own: without a compiler the native ones cannot be built, and plans fall back to sdpa"
    isa = best_isa()
    built = "compiled" if library_path(isa, compiler).exists() else "compiled when a model is first opened, in about twenty seconds"
    return f"native for {isa}, {built}"
