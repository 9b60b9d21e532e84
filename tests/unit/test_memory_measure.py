"""Memory that is really there: what the kernel's files say, cgroup limits, and the meter over a tree of processes."""

import json
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradespace.measure import memory
from tradespace.measure.bandwidth import at_least_as_fast_as_larger, working_set_sizes
from tradespace.measure.host import (
    CgroupMemory,
    host_memory,
    lowest_memory,
    parse_cgroup_memory,
    parse_cgroup_paths,
    parse_cpu_model,
    parse_cpu_quota,
    parse_instruction_sets,
    parse_limit,
    parse_physical_cores,
    physical_cores,
)
from tradespace.measure.memory import MemoryMeter, parse_kb_fields, process_bytes, pss_of_rollup
from tradespace.units import GiB, KiB, MiB

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
needs_pss = pytest.mark.skipif(memory.memory_method() != "pss", reason="this system tells no proportional set size")

# Recorded on the machines named; shortened.
ROLLUP = """563e33867000-7fffb0a3e000 ---p 00000000 00:00 0                          [rollup]
Rss:                1736 kB
Pss:                 448 kB
Pss_Dirty:           116 kB
Shared_Clean:       1576 kB
Private_Hugetlb:       0 kB
Swap:                  0 kB
SwapPss:               0 kB
"""
EPYC = """processor	: 0
vendor_id	: AuthenticAMD
model name	: AMD EPYC
physical id	: 0
core id		: 0
flags		: fpu sse4_2 avx f16c fma avx2 avx512f avx512_vnni avx512_bf16 amx_unknown

processor	: 1
vendor_id	: AuthenticAMD
model name	: AMD EPYC
physical id	: 0
core id		: 1
flags		: fpu sse4_2
"""
GRAVITON = """processor	: 0
BogoMIPS	: 2100.00
Features	: fp asimd asimdhp asimddp sve i8mm bf16
CPU implementer	: 0x41

processor	: 1
BogoMIPS	: 2100.00
Features	: fp asimd
"""


def two_socket_cpuinfo() -> str:
    """8 logical cores: 2 sockets × 2 cores × 2 threads, numbered as Linux does (siblings half the range apart)."""
    blocks = [f"processor\t: {cpu}\nphysical id\t: {cpu % 4 // 2}\ncore id\t\t: {cpu % 2}\n" for cpu in range(8)]
    return "\n".join(blocks)


def test_rollup_counts_pss_swap_and_huge_pages() -> None:
    assert pss_of_rollup(ROLLUP) == 448 * KiB
    assert pss_of_rollup(ROLLUP.replace("SwapPss:               0", "SwapPss: 100").replace("Hugetlb:       0", "Hugetlb: 2048")) == (448 + 100 + 2048) * KiB


def test_kb_fields_skip_what_is_no_size() -> None:
    fields = parse_kb_fields("MemTotal:       24684084 kB\nMemAvailable:   24279044 kB\nHugePages_Total:       0\nName:\tpython kB\n\n")
    assert fields == {"MemTotal": 24684084 * KiB, "MemAvailable": 24279044 * KiB}


@pytest.mark.parametrize(("text", "limit"), [("max\n", None), ("9223372036854771712\n", None), ("-1", None), ("", None), ("536870912\n", 512 * MiB), ("0", 0)])
def test_cgroup_limits(text: str, limit: int | None) -> None:
    assert parse_limit(text) == limit


def test_cgroup_v2_takes_the_lower_of_max_and_high_and_gives_file_cache_back() -> None:
    stat = "anon 1000\nfile 5000\ninactive_file 3000\nactive_file 1500\nslab_reclaimable 7\n"
    level = parse_cgroup_memory(("10000\n", "8000\n"), "6000\n", stat)
    assert level == CgroupMemory(limit_bytes=8000, used_bytes=6000, reclaimable_bytes=4500)
    assert level.free_bytes == 6500
    assert parse_cgroup_memory(("max\n", "max\n"), "6000\n", stat).free_bytes is None


def test_cgroup_v1_uses_the_sums_over_the_subtree() -> None:
    stat = "cache 1\ninactive_file 10\nactive_file 20\ntotal_cache 9\ntotal_inactive_file 300\ntotal_active_file 400\n"
    assert parse_cgroup_memory(("10000\n",), "9000\n", stat).free_bytes == 1700


def test_the_lowest_limit_counts_for_total_and_for_free_each() -> None:
    roomy_but_full = CgroupMemory(limit_bytes=8 * GiB, used_bytes=7 * GiB, reclaimable_bytes=0)
    tight_but_empty = CgroupMemory(limit_bytes=4 * GiB, used_bytes=0, reclaimable_bytes=0)
    unlimited = CgroupMemory(limit_bytes=None, used_bytes=60 * GiB, reclaimable_bytes=0)
    found = lowest_memory(64 * GiB, 50 * GiB, [("inner", unlimited), ("middle", tight_but_empty), ("outer", roomy_but_full)])
    assert (found.total_bytes, found.free_bytes, found.limit) == (4 * GiB, 1 * GiB, "middle")
    bare = lowest_memory(64 * GiB, 50 * GiB, [("root", unlimited)])
    assert (bare.total_bytes, bare.free_bytes, bare.limit) == (64 * GiB, 50 * GiB, "physical memory")
    above = CgroupMemory(limit_bytes=100 * GiB, used_bytes=200 * GiB, reclaimable_bytes=0)
    assert lowest_memory(64 * GiB, 50 * GiB, [("a", above)]).free_bytes == 0


@pytest.mark.parametrize(
    ("version", "texts", "quota"),
    [
        (2, ("max 100000\n",), None),
        (2, ("150000 100000\n",), 1.5),
        (1, ("-1\n", "100000\n"), None),
        (1, ("400000\n", "100000\n"), 4.0),
        (1, ("400000\n", "0\n"), None),
    ],
)
def test_cpu_quota(version: int, texts: tuple[str, ...], quota: float | None) -> None:
    assert parse_cpu_quota(version, *texts) == quota


def test_cgroup_paths_of_a_hybrid_host() -> None:
    text = "9:name=systemd:/\n4:memory:/process_api/e8:02\n3:cpuset:/\n2:cpu,cpuacct:/x\n0::/\n"
    paths = parse_cgroup_paths(text)
    assert (paths["memory"], paths["cpu"], paths["cpuacct"], paths[""]) == ("/process_api/e8:02", "/x", "/x", "/")


def test_physical_cores_count_siblings_once_and_obey_affinity() -> None:
    text = two_socket_cpuinfo()
    assert parse_physical_cores(text, set(range(8))) == 4
    assert parse_physical_cores(text, {0, 4}) == 1  # two threads of one core
    assert parse_physical_cores(text, {0, 1, 2}) == 3
    assert parse_physical_cores(EPYC, {0, 1}) == 2
    assert parse_physical_cores(GRAVITON, {0, 1}) == 2  # no core ids on ARM
    assert parse_physical_cores(text, set()) == 0


def test_instruction_sets_and_model() -> None:
    assert parse_instruction_sets(EPYC) == ("sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512_vnni", "avx512_bf16")
    assert parse_instruction_sets(GRAVITON) == ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve")
    assert parse_instruction_sets("") == ()
    assert (parse_cpu_model(EPYC), parse_cpu_model(GRAVITON)) == ("AMD EPYC", None)


@given(st.integers(1, 2**42), st.none() | st.integers(1, 2**32))
def test_working_sets_ascend_and_stay_small(free_bytes: int, last_cache_bytes: int | None) -> None:
    sizes = working_set_sizes(free_bytes, last_cache_bytes)
    assert sizes[0] == 2 * MiB
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] <= max(2 * MiB, free_bytes // 8)


@given(st.lists(st.floats(1, 1e12), min_size=1, max_size=8))
def test_smaller_sets_are_never_slower(rates: list[float]) -> None:
    curve = at_least_as_fast_as_larger(list(enumerate(rates)))
    found = [rate for _, rate in curve]
    assert found == sorted(found, reverse=True)
    assert all(after >= before for after, before in zip(found, rates, strict=True)) and found[-1] == rates[-1]


def test_this_host_answers() -> None:
    found = host_memory()
    assert 0 < found.free_bytes <= found.total_bytes
    assert physical_cores() >= 1


# ---------------------------------------------------------------------------------------------------------------- the meter


def in_fresh_process(script: str) -> dict[str, int]:
    """What a script prints as JSON, run apart so that pytest's own memory does not blur it."""
    prelude = "import json, os, sys, time\nfrom tradespace.measure.memory import *\nMiB = 2**20\n"
    run = subprocess.run([sys.executable, "-c", prelude + script], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_meter_sees_what_is_allocated_in_each_phase() -> None:
    found = in_fresh_process("""
with MemoryMeter() as meter:
    before = process_bytes()
    block = bytearray(96 * MiB)
    meter.mark("high")
    del block
    meter.mark("release")   # the phase still begins with the block
    meter.mark("low")
print(json.dumps({"before": before, "peak": meter.peak_bytes, "samples": meter.samples, **meter.marks}))
""")
    # a page shared with a process that starts or ends meanwhile changes its share: hence the tolerance below
    assert found["before"] + 95 * MiB <= found["high"] <= found["before"] + 100 * MiB
    assert found["peak"] >= found["high"]
    assert found["low"] <= found["before"] + 4 * MiB
    assert found["samples"] >= 5


@on_linux
def test_a_spike_between_two_samples_is_not_lost() -> None:
    found = in_fresh_process("""
with MemoryMeter(period_s=3600) as meter:   # no sample but the first and the last
    before = process_bytes()
    block = bytearray(128 * MiB)
    del block
    after = process_bytes()
print(json.dumps({"before": before, "after": after, "peak": meter.peak_bytes}))
""")
    assert found["after"] < found["before"] + 8 * MiB, "the block must be gone before the last sample, or the test shows nothing"
    assert found["before"] + 128 * MiB - MiB <= found["peak"] <= found["before"] + 136 * MiB


@on_linux
@needs_pss
def test_shared_pages_count_once_over_the_tree() -> None:
    found = in_fresh_process("""
block = bytearray(128 * MiB)
before = process_bytes()
read_end, write_end = os.pipe()
with MemoryMeter() as meter:
    child = os.fork()
    if child == 0:
        os.read(read_end, 1)
        os._exit(0)
    time.sleep(0.2)
    meter.mark("forked")
    os.write(write_end, b"x")
    os.waitpid(child, 0)
rss = sum(meter.peak_rss_by_pid.values())
print(json.dumps({"before": before, "forked": meter.marks["forked"], "rss": rss, "pids": len(meter.peak_rss_by_pid)}))
""")
    assert found["pids"] == 2
    assert found["rss"] > 256 * MiB  # resident sizes count the block twice
    assert found["forked"] < found["before"] + 16 * MiB  # proportional ones do not


@on_linux
def test_children_of_children_count() -> None:
    found = in_fresh_process("""
import subprocess
grandchild = "import sys; b = bytearray(64 * 2**20); print(1, flush=True); sys.stdin.read()"
child = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {grandchild!r}], stdin=subprocess.PIPE); sys.stdin.read(); p.communicate()"
before = process_bytes()
with MemoryMeter() as meter:
    p = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    p.stdout.readline()          # the grandchild holds its block now
    meter.mark("tree")
    p.communicate()
    meter.mark("ending")
    meter.mark("alone")
print(json.dumps({"before": before, "pids": len(meter.peak_rss_by_pid), **meter.marks}))
""")
    assert found["pids"] >= 3
    assert found["tree"] >= found["before"] + 64 * MiB
    assert found["alone"] < found["before"] + 16 * MiB


@on_linux
def test_limit_heap_growth_returns_staging_buffers() -> None:
    script = """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
limited = LIMIT and limit_heap_growth()
before, pins = process_bytes(), []
for _ in range(4):                                    # a staging buffer, again and again, with something small and lasting above it
    buffer = libc.malloc(16 * MiB)
    ctypes.memset(buffer, 1, 16 * MiB)
    pins.append(libc.malloc(100_000))
    libc.free(buffer)
kept = process_bytes() - before
return_freed_memory()
print(json.dumps({"kept": kept, "after_trim": process_bytes() - before, "limited": bool(limited)}))
"""
    limited = in_fresh_process(script.replace("LIMIT", "True"))
    if not limited["limited"]:
        pytest.skip("the C library is not glibc")
    free_running = in_fresh_process(script.replace("LIMIT", "False"))
    assert limited["kept"] < 4 * MiB
    assert free_running["kept"] > 12 * MiB, "glibc keeps the buffer by itself: otherwise the call under test would be for nothing"
    assert free_running["after_trim"] < 4 * MiB


@on_linux
def test_reset_peak_starts_the_high_water_mark_over() -> None:
    found = in_fresh_process("""
block = bytearray(64 * MiB)
del block
high = peak_rss_bytes()
done = reset_peak()
print(json.dumps({"high": high, "low": peak_rss_bytes(), "done": done}))
""")
    if not found["done"]:
        pytest.skip("the kernel does not let this process reset its mark")
    assert found["high"] - found["low"] > 56 * MiB


def test_a_process_that_has_ended_costs_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    assert process_bytes(child.pid) == 0
    assert memory.peak_rss_bytes(child.pid) == 0
    assert memory.child_pids(child.pid) == []


def test_a_meter_that_failed_reports_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = MemoryMeter(period_s=0.001)
    meter.__enter__()

    def gone(pid: int) -> list[int]:
        raise OSError("gone")

    monkeypatch.setattr(memory, "child_pids", gone)
    deadline = time.monotonic() + 10
    while meter._failure is None and time.monotonic() < deadline:
        time.sleep(0.001)
    with pytest.raises(OSError, match="gone"):
        meter.__exit__(None, None, None)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4000), st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 4000), st.booleans(), st.booleans()), max_size=12))
def test_the_peak_is_an_upper_bound(start_mib: int, steps: list[tuple[int, int, bool, bool]]) -> None:
    """Private memory only (PSS = RSS), walks forced, allowed or held off at random: no moment, sampled or not, was higher than the peak says."""
    meter, reading = MemoryMeter(), memory._ProcessReading()
    meter.method = "pss"
    high_mib = said = 0
    with pytest.MonkeyPatch.context() as patch:
        for between_mib, now_mib, may_walk, must_walk in [(start_mib, start_mib, True, True), *steps]:
            high_mib = max(high_mib, between_mib, now_mib)
            patch.setattr(memory, "_rss_and_high_water", lambda pid, found=(now_mib * MiB, high_mib * MiB): found)
            patch.setattr(memory, "process_bytes", lambda pid, found=now_mib * MiB: found)
            reading.next_walk_s = 0.0 if may_walk else float("inf")
            said = max(said, meter._process_now(1, reading, walk=must_walk))
            assert said == high_mib * MiB  # and with nothing shared it is exact
