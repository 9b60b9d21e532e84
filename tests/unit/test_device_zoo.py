"""The device zoo: figures against the vendors' data sheets, names as people write them, and what a chip lacks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tradespace.errors import InputError
from tradespace.spec.device_zoo import DEVICES, find_device, match_driver_name
from tradespace.units import GiB, MiB

# (name, GB/s, dense bf16 TFLOP/s): read off the data sheets by hand, apart from the table
DATA_SHEETS = [
    ("a100-40gb", 1555, 312),
    ("a100-80gb", 2039, 312),
    ("a100-80gb-pcie", 1935, 312),
    ("h100-80gb", 3350, 989.4),
    ("h200", 4800, 989.4),
    ("l4", 300, 121),
    ("rtx-4090", 1008, 165.2),
    ("rtx-3090", 936, 71),
]


@pytest.mark.parametrize(("name", "read", "bf16"), DATA_SHEETS)
def test_figures_are_those_of_the_data_sheet(name: str, read: float, bf16: float) -> None:
    device = DEVICES[name]
    assert device.read_bytes_per_s.require() == read * 1e9
    assert device.flops_per_s("bf16").require() == pytest.approx(bf16 * 1e12)
    assert device.read_bytes_per_s.source.startswith("cited: ")


def test_h100_low_precision_is_twice_bf16_and_dense() -> None:
    device = DEVICES["h100-80gb"]
    assert device.flops_per_s("fp8").require() == device.flops_per_s("int8").require() == pytest.approx(1978.9e12)


def test_memory_is_what_the_driver_shows() -> None:
    assert DEVICES["a100-40gb"].memory_bytes == 40 * GiB
    assert DEVICES["h100-80gb"].memory_bytes == 81_559 * MiB
    assert DEVICES["m4-max"].memory_bytes == 128 * GiB


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("t4", "bf16"), ("v100-16gb", "bf16"), ("v100-16gb", "int8"), ("a100-80gb", "fp8"), ("rtx-3090", "fp8"), ("m1", "bf16")],
)
def test_no_rate_without_an_instruction(name: str, dtype: str) -> None:
    assert not DEVICES[name].flops_per_s(dtype).known


@pytest.mark.parametrize("name", DEVICES)
def test_every_row_is_complete_and_plausible(name: str) -> None:
    device = DEVICES[name]
    assert device.name == name
    assert device.kind in ("cpu", "cuda", "mps")
    assert device.free_bytes == device.memory_bytes >= 8 * GiB
    assert 10e9 < device.read_bytes_per_s.require() < 10e12
    assert device.source
    assert 1e-7 < device.op_overhead_s.require() < 1e-4
    rates = {dtype: rate.require() for dtype, rate in device.matmul_flops_per_s.items()}
    assert rates["fp32"] > 0
    # a narrower type is never slower than the next wider one
    assert rates.get("fp16", rates["fp32"]) >= rates["fp32"]
    assert all(rates.get("int8", rate) >= rate and rates.get("fp8", rate) >= rate for dtype, rate in rates.items() if dtype in ("fp32", "fp16", "bf16"))
    if device.kind == "cuda":
        assert device.host_link_bytes_per_s is not None and device.host_link_bytes_per_s.require() < device.read_bytes_per_s.require()
        assert device.peer_link_bytes_per_s is not None and device.peer_link_bytes_per_s.require() >= device.host_link_bytes_per_s.require()
        assert device.runtime_bytes.require() < 2 * GiB
    else:
        assert device.host_link_bytes_per_s is None  # weights are already where they are computed with


@given(
    st.sampled_from(sorted(DEVICES)),
    st.sampled_from(["-", " ", "_", ""]),
    st.booleans(),
    st.integers(1, 64),
    st.sampled_from(["{n}x {d}", "{n}x{d}", "{n} X {d}", "{n}×{d}"]),
)
def test_names_are_found_as_people_write_them(name: str, separator: str, upper: bool, count: int, form: str) -> None:
    written = name.replace("-", separator)
    written = written.upper() if upper else written
    assert find_device(written) == DEVICES[name]
    found = find_device(form.format(n=count, d=written))
    assert (found.name, found.count) == (name, count)


def test_counts_multiply_and_zero_is_refused() -> None:
    assert find_device("2x l4", count=3).count == 6
    for bad in ("0x l4", "0 x a100-40gb"):
        with pytest.raises(InputError, match="zero devices"):
            find_device(bad)
    with pytest.raises(InputError, match="at least one"):
        find_device("l4", count=0)


def test_a_miss_suggests_the_nearest_and_lists_all() -> None:
    with pytest.raises(InputError, match="Did you mean a100-40gb") as caught:
        find_device("a100-4ogb")
    assert "h200" in str(caught.value)
    for nonsense in ("", "   ", "x", "2x", "🦙"):
        with pytest.raises(InputError, match="no device"):
            find_device(nonsense)


def test_memory_of_chips_sold_in_several_sizes() -> None:
    device = find_device("2x M4 Max 64GB")
    assert (device.memory_bytes, device.free_bytes, device.count) == (64 * GiB, 64 * GiB, 2)
    assert device.read_bytes_per_s == DEVICES["m4-max"].read_bytes_per_s
    assert find_device("epyc-9654-1152gb").memory_bytes == 1152 * GiB
    with pytest.raises(InputError, match="at most 128"):
        find_device("m4-max-256gb")
    with pytest.raises(InputError, match="no device"):  # a card's memory is soldered on
        find_device("l4-48gb")


@pytest.mark.parametrize(
    ("driver_name", "memory_mib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 81559, "h100-80gb"),
        ("NVIDIA A100-SXM4-80GB", 81920, "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", 81251, "a100-80gb-pcie"),
        ("NVIDIA A100-PCIE-40GB", 40536, "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090"),
        ("Tesla T4", 15109, "t4"),
        ("Tesla V100-SXM2-32GB", 32510, "v100-32gb"),
        ("Apple M2 Max", None, "m2-max"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, None),  # another chip under the same number
        ("NVIDIA GeForce RTX 4090", 49140, None),  # a rebuilt card is not the one of the data sheet
        ("AMD Instinct MI300X", 196592, None),
    ],
)
def test_driver_names_find_their_row_or_none(driver_name: str, memory_mib: int | None, name: str | None) -> None:
    found = match_driver_name(driver_name, None if memory_mib is None else memory_mib * MiB)
    assert (found.name if found else None) == name
