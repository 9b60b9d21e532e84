"""`tradespace doctor`, and the kept measurement behind it: nothing here depends on how fast the machine is."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tradespace.cli import doctor
from tradespace.errors import EngineError
from tradespace.kernels.native.compiler import find_compiler
from tradespace.measure import machine
from tradespace.measure.accelerators import Accelerator, parse_nvidia_smi
from tradespace.measure.machine import machine_report, this_machine
from tradespace.units import GiB, MiB

RATES: dict[str, Any] = {
    "bandwidth": [[2 * MiB, 160e9], [GiB, 47e9]],
    "matmul": {"fp32": 200e9, "bf16": 900e9, "int8": 1.8e12},
    "native": {"int8": 1e12, "bf16": 8e11, "fp32": 2e11},
    "op_s": 1e-6,
    "disk": 2e9,
    "runtime_bytes": 240 * MiB,
    "runtime_method": "peak proportional set size",
    "date": "2026-11-22T19:00:00+00:00",
    "backend": "torch",
    "notes": [],
    "busy": False,
}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """A cache folder of its own, and a measurement that takes no time; the list grows with each one taken."""
    monkeypatch.setenv("TRADESPACE_HOME", str(tmp_path / "home"))
    taken: list[int] = []

    def measure(cores: int) -> dict[str, Any]:
        taken.append(cores)
        return dict(RATES)

    monkeypatch.setattr(machine, "measure", measure)
    monkeypatch.setattr(machine, "find_accelerators", lambda: ())
    return taken


def run_doctor(*arguments: str) -> str:
    app = typer.Typer()
    app.callback()(lambda: None)  # as in the real command line: doctor is a command among others
    doctor.register(app)
    result = CliRunner().invoke(app, ["doctor", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def card(name: str, memory_bytes: int) -> Accelerator:
    return Accelerator(name=name, kind="cuda", memory_bytes=memory_bytes, free_bytes=memory_bytes, driver="NVIDIA 580.159.04", found_by="nvidia-smi")


def cache_file(tmp_path: Path) -> Path:
    return tmp_path / "home" / "machine.json"


def test_measures_once_and_again_on_refresh(timed: list[int], tmp_path: Path) -> None:
    first, second = this_machine(), this_machine()
    assert len(timed) == 1
    assert replace(first, free_bytes=0) == replace(second, free_bytes=0)
    assert first.read_bytes_per_s.require() == 47e9 and first.read_bytes_per_s.is_measured
    assert first.bandwidth_at(MiB).require() == 160e9
    assert first.runtime_bytes.require() == 240 * MiB
    this_machine(refresh=True)
    assert len(timed) == 2
    assert [path.name for path in cache_file(tmp_path).parent.iterdir()] == ["machine.json"]  # nothing half-written is left


def test_free_memory_is_read_afresh(timed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    before = this_machine()
    now = machine.host.HostMemory(total_bytes=8 * GiB, free_bytes=123 * MiB, limit="cgroup v2 /box")
    monkeypatch.setattr(machine.host, "host_memory", lambda: now)
    after = this_machine()
    assert (after.memory_bytes, after.free_bytes) == (8 * GiB, 123 * MiB) != (before.memory_bytes, before.free_bytes)
    assert machine_report().memory_limit == "cgroup v2 /box"
    assert len(timed) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: '"machine"',
        lambda text: "\udcff".encode("utf-8", "surrogateescape"),
        lambda text: text.replace('"backend"', '"banana"'),
        lambda text: text.replace("200000000000.0", "NaN"),
        lambda text: text.replace("200000000000.0", "-1"),
        lambda text: text.replace("200000000000.0", '"fast"'),
        lambda text: text.replace('"bandwidth": [', '"bandwidth": [[4, true],'),
        lambda text: json.dumps(json.loads(text) | {"bandwidth": []}),
        lambda text: json.dumps(json.loads(text) | {"native": None}),
        lambda text: json.dumps(json.loads(text) | {"native": {"int8": 0}}),
        lambda text: json.dumps(json.loads(text) | {"fingerprint": {}}),
    ],
)
def test_a_damaged_or_stale_cache_is_measured_again(timed: list[int], tmp_path: Path, damage: Any) -> None:
    whole = this_machine()
    path = cache_file(tmp_path)
    damaged = damage(path.read_text())
    assert damaged != path.read_text(), "the damage must do something"
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    assert replace(this_machine(), free_bytes=0) == replace(whole, free_bytes=0)
    assert len(timed) == 2
    this_machine()
    assert len(timed) == 2


@pytest.mark.parametrize("changed", ["cpu", "cores", "torch", "tradespace", "schema", "kernels"])
def test_what_the_rates_depend_on_makes_them_stale(timed: list[int], monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    this_machine()
    known = machine.fingerprint()
    monkeypatch.setattr(machine, "fingerprint", lambda: {**known, changed: 99})
    this_machine()
    assert len(timed) == 2


def test_rates_taken_beside_other_work_serve_until_the_machine_is_idle(timed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "measure", lambda cores: timed.append(cores) or {**RATES, "busy": True})
    monkeypatch.setattr(machine, "is_busy", lambda: True)
    this_machine()
    assert "other processes were running" in " ".join(run_doctor().split())
    assert len(timed) == 1
    monkeypatch.setattr(machine, "is_busy", lambda: False)
    this_machine()
    assert len(timed) == 2


def test_tables_say_it_all_within_100_columns(timed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    cards = (
        Accelerator(
            name="NVIDIA H100 80GB HBM3", kind="cuda", memory_bytes=81559 * MiB, free_bytes=81079 * MiB, driver="NVIDIA 580.159.04", found_by="nvidia-smi"
        ),
        Accelerator(name="Unheard-of [bold]Card", kind="cuda", memory_bytes=GiB, free_bytes=GiB, driver="NVIDIA 1", found_by="nvidia-smi"),
    )
    monkeypatch.setattr(machine, "find_accelerators", lambda: cards)
    monkeypatch.setattr(machine.host, "find_compiler", lambda: None)
    text = run_doctor()
    assert max(len(line) for line in text.splitlines()) <= 100
    flat = " ".join(text.split())
    for fact in (
        "2.00 MiB",
        "160 GB/s",
        "47.0 GB/s",
        "200 GFLOP/s",
        "1.80 TOP/s",
        "bf16, our kernels",
        "800 GFLOP/s",
        "240 MiB",
        "1.00 µs",
        "free is what counts",
        "planned for as h100-80gb",
    ):
        assert fact in flat
    assert "Unheard-of [bold]Card" in flat and "not in the zoo" in flat
    assert "none found" in flat and "ziglang" in flat
    assert "2026-11-22T19:00:00+00:00" in flat


def test_without_torch_the_doctor_says_what_to_install(timed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {**RATES, "backend": "numpy", "op_s": None, "disk": None, "matmul": {"fp32": 1e11}, "native": {}}
    monkeypatch.setattr(machine, "measure", lambda cores: measured)
    monkeypatch.setattr(machine, "versions", lambda: {"torch": None, "numpy": "2", "tradespace": "0"})
    assert not this_machine().op_overhead_s.known  # unknown, never zero
    assert not this_machine().flops_per_s("bf16").known
    assert "pip install 'tradespace[engine]'" in " ".join(run_doctor().split())


def test_json_is_one_document_with_sources(timed: list[int]) -> None:
    body = json.loads(run_doctor("--json"))
    assert body["device"]["kind"] == "cpu"
    assert body["device"]["matmul_flops_per_s"]["bf16"] == {"value": 900e9, "source": "measured 2026-11-22 with torch"}
    assert body["device"]["native_flops_per_s"]["int8"] == {"value": 1e12, "source": "measured 2026-11-22"}
    assert body["device"]["bandwidth_curve"] == [[2 * MiB, 160e9], [GiB, 47e9]]
    assert body["measured_at"] == RATES["date"]


def test_help_shows_an_example(timed: list[int]) -> None:
    assert "tradespace doctor --refresh" in run_doctor("--help")
    assert timed == []


@pytest.mark.parametrize(
    ("pss_mib", "rss_mib", "method", "expected"),
    [
        (228, 235, "pss", (228 * MiB, "peak proportional set size")),
        (150, 235, "pss", (235 * MiB, "peak resident size")),  # another process has the libraries loaded too
        (235, 235, "rss", (235 * MiB, "peak resident size")),
    ],
)
def test_the_baseline_does_not_lean_on_other_processes(pss_mib: int, rss_mib: int, method: str, expected: tuple[int, str]) -> None:
    line = {"step": "baseline", "pss_bytes": pss_mib * MiB, "rss_bytes": rss_mib * MiB, "method": method}
    assert machine._baseline_bytes(line) == expected


def test_nvidia_smi_output() -> None:
    text = "NVIDIA H100 80GB HBM3, 580.159.04, 81559, 81079\nNVIDIA L4, 580.159.04, 23034, 22563\nNVIDIA Thor, 580.0, [N/A], [N/A]\nNo devices were found\n"
    cards = parse_nvidia_smi(text)
    assert [(card.name, card.memory_bytes // MiB, card.free_bytes // MiB) for card in cards] == [
        ("NVIDIA H100 80GB HBM3", 81559, 81079),
        ("NVIDIA L4", 23034, 22563),
    ]
    device = cards[1].as_device()
    assert device is not None
    assert (device.name, device.memory_bytes, device.free_bytes) == ("l4", 23034 * MiB, 22563 * MiB)


def test_a_probe_that_fails_is_our_error_with_its_complaint() -> None:
    with pytest.raises(EngineError, match="unknown probe 'nonsense'"):
        list(machine._probe("nonsense"))


def test_asking_for_the_machine_loads_neither_torch_nor_numpy(timed: list[int], tmp_path: Path) -> None:
    this_machine()
    script = "import sys; from tradespace.measure.machine import this_machine; this_machine(); print([m for m in ('torch', 'numpy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": source_folder()})
    assert run.stdout.strip() == "[]"


def source_folder() -> str:
    return str(Path(machine.__file__).resolve().parents[2])


def test_the_real_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole way once, in earnest: every figure is there and positive, and the second call is served from the cache."""
    monkeypatch.setenv("TRADESPACE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "is_busy", lambda: False)  # what is measured beside other tests would be measured again once they are through
    body = json.loads(run_doctor("--refresh", "--json"))
    device = body["device"]
    assert device["cores"] >= 1 and device["name"]
    assert device["bandwidth_curve"][0][0] == 2 * MiB
    rates = [rate for _, rate in device["bandwidth_curve"]]
    assert rates == sorted(rates, reverse=True) and rates[-1] == device["read_bytes_per_s"]["value"] > 0
    assert device["matmul_flops_per_s"]["fp32"]["value"] > 0
    native = device["native_flops_per_s"]
    assert set(native) == ({"int8", "bf16", "fp32"} if find_compiler() else set()) and all(rate["value"] > 0 for rate in native.values())
    assert 20 * MiB < device["runtime_bytes"]["value"] < 2 * GiB
    assert json.loads(run_doctor("--json"))["measured_at"] == body["measured_at"]
