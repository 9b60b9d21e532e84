"""Devices that people own or rent, from their vendors' data sheets: bytes, bytes per second, dense operations per second.

What the columns mean, and the choices behind them:
- Memory in MiB as the vendor's tool (nvidia-smi) shows it on a present-day driver. An "80GB" card is neither 80 GB nor 80 GiB: an H100 shows 81,559 MiB
  (85.5 GB), an A100-40GB shows 40,960 MiB (40 GiB, 42.9 GB), and cards that keep error correction in their main memory show less than their name.
- Rates are dense. Data sheets print the rate with 2:4 sparsity in larger type; it is twice as high and no dense model sees it.
- fp16, bf16 and fp8 are those with fp32 accumulation, which is what PyTorch asks for; on GeForce cards it is half of the advertised rate. fp32 is true
  fp32, not TF32. A type that the chip has no matmul instruction for has no rate: no bf16 before Ampere, no fp8 before Ada and Hopper.
- Links in one direction: data sheets add both directions up (NVLink "900 GB/s" moves 450 GB/s each way). PCIe at its raw rate less encoding.
- What a CUDA process costs on the card and per operation was measured by us on an H100 and is assumed for its relatives.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from tradespace.errors import InputError
from tradespace.spec.device import DeviceSpec
from tradespace.spec.estimate import Estimate
from tradespace.units import GiB, MiB

_PCIE = {3: 15.75, 4: 31.5, 5: 63.0}  # GB/s of 16 lanes, one direction: GT/s · 16 lanes · 128/130 / 8

# Measured 2026-11-22, one H100 80GB HBM3, driver 580.159.04, torch 2.11.0+cu130: 619 MiB for the context, 74 MiB more once a bf16 matmul and attention have
# loaded their kernels, and 480 MiB that the driver holds back from the total it shows. A tiny eager add, started from Python: 12.3 µs, 12.2 to 23.8.
_CUDA_RUNTIME_MIB = 612 + 225  # context; what libraries and kernels take on first use (the step's, lab gpu-speed)
_CUDA_OP_S = 12.3e-6
_H100_MEASURED = "measured on an H100, 2026-11-22"
# Measured 2026-11-22 on an EPYC of the Zen 5 kind, torch 2.13.0+cpu: an add of two 8-element tensors takes 0.96 µs.
_CPU_OP_S = 1e-6
_MPS_OP_S = 10e-6


@dataclass(frozen=True)
class _Card:
    """One row of the NVIDIA table. Rates in TFLOP/s (int8: TOP/s), bandwidths in GB/s; None: the chip has no such instruction."""

    memory_mib: int
    read: float
    fp32: float
    fp16: float
    bf16: float | None
    int8: float | None
    fp8: float | None
    pcie: int
    nvlink: float | None
    source: str


_A100, _H100, _GEFORCE = "NVIDIA A100 data sheet", "NVIDIA H100 data sheet and architecture paper", "NVIDIA GeForce architecture paper"

# fmt: off
_CARDS: dict[str, _Card] = {
    #                         MiB    GB/s   fp32    fp16    bf16    int8     fp8  PCIe NVLink
    "b200":          _Card(183359, 8000.0, 75.0, 2250.0, 2250.0, 4500.0, 4500.0, 5, 900.0, "NVIDIA HGX B200 data sheet"),
    "h200":          _Card(143771, 4800.0, 66.9,  989.4,  989.4, 1978.9, 1978.9, 5, 450.0, "NVIDIA H200 data sheet"),
    "h100-80gb":     _Card( 81559, 3350.0, 66.9,  989.4,  989.4, 1978.9, 1978.9, 5, 450.0, _H100 + " (SXM5)"),
    "h100-pcie":     _Card( 81559, 2000.0, 51.2,  756.0,  756.0, 1513.0, 1513.0, 5, 300.0, _H100 + " (PCIe)"),
    "a100-80gb":     _Card( 81920, 2039.0, 19.5,  312.0,  312.0,  624.0,   None, 4, 300.0, _A100 + " (SXM4)"),
    "a100-80gb-pcie":_Card( 81920, 1935.0, 19.5,  312.0,  312.0,  624.0,   None, 4, 300.0, _A100 + " (PCIe, NVLink bridge)"),
    "a100-40gb":     _Card( 40960, 1555.0, 19.5,  312.0,  312.0,  624.0,   None, 4, 300.0, _A100 + " (PCIe, NVLink bridge)"),
    "l40s":          _Card( 46068,  864.0, 91.6,  362.0,  362.0,  733.0,  733.0, 4,  None, "NVIDIA L40S data sheet"),
    "l4":            _Card( 23034,  300.0, 30.3,  121.0,  121.0,  242.5,  242.5, 4,  None, "NVIDIA L4 data sheet"),
    "a10":           _Card( 23028,  600.0, 31.2,  125.0,  125.0,  250.0,   None, 4,  None, "NVIDIA A10 data sheet"),
    "a10g":          _Card( 23028,  600.0, 35.0,   70.0,   70.0,  140.0,   None, 4,  None, "NVIDIA A10G data sheet (AWS g5)"),
    "t4":            _Card( 15360,  320.0,  8.1,   65.0,   None,  130.0,   None, 3,  None, "NVIDIA T4 product page"),
    "v100-32gb":     _Card( 32768,  900.0, 15.7,  125.0,   None,   None,   None, 3, 150.0, "NVIDIA V100 data sheet (SXM2)"),
    "v100-16gb":     _Card( 16384,  900.0, 15.7,  125.0,   None,   None,   None, 3, 150.0, "NVIDIA V100 data sheet (SXM2)"),
    "rtx-a6000":     _Card( 49140,  768.0, 38.7,  154.8,  154.8,  309.7,   None, 4,  56.2, "NVIDIA RTX A6000 data sheet, GA102 architecture paper"),
    "rtx-5090":      _Card( 32607, 1792.0,104.8,  209.5,  209.5,  838.0,  419.0, 5,  None, _GEFORCE + " (GB202)"),
    "rtx-4090":      _Card( 24564, 1008.0, 82.6,  165.2,  165.2,  660.6,  330.3, 4,  None, _GEFORCE + " (AD102)"),
    "rtx-3090":      _Card( 24576,  936.0, 35.6,   71.0,   71.0,  284.0,   None, 4,  56.2, _GEFORCE + " (GA102)"),
}

# Apple: one pool for the processor and the GPU; the largest memory that the chip was sold with (append a size for yours: m4-max-64gb). Metal lends the GPU
# about three quarters of it unless told otherwise. GPU rates: Apple's own up to the M2; later cores x 128 lanes x 2 x clock. fp16 runs at the rate of fp32.
_M_CHIPS: dict[str, tuple[int, float, float, bool, str]] = {
    #            GiB   GB/s TFLOP/s bf16: native from the M3's GPU on, emulated before
    "m1":       ( 16,  68.3,  2.6, False, "Apple press release"),
    "m1-pro":   ( 32, 200.0,  5.2, False, "Apple press release"),
    "m1-max":   ( 64, 400.0, 10.4, False, "Apple press release"),
    "m1-ultra": (128, 800.0, 20.8, False, "Apple press release"),
    "m2":       ( 24, 100.0,  3.6, False, "Apple press release"),
    "m2-pro":   ( 32, 200.0,  6.8, False, "Apple press release"),
    "m2-max":   ( 96, 400.0, 13.6, False, "Apple press release"),
    "m2-ultra": (192, 800.0, 27.2, False, "Apple press release"),
    "m3":       ( 24, 100.0,  3.5, True, "bandwidth: Apple specifications; rate: 10 cores x 256 x 1.38 GHz"),
    "m3-pro":   ( 36, 150.0,  6.4, True, "bandwidth: Apple specifications; rate: 18 cores x 256 x 1.38 GHz"),
    "m3-max":   (128, 400.0, 14.1, True, "bandwidth: Apple specifications; rate: 40 cores x 256 x 1.38 GHz"),
    "m3-ultra": (512, 819.0, 28.3, True, "bandwidth: Apple specifications; rate: 80 cores x 256 x 1.38 GHz"),
    "m4":       ( 32, 120.0,  3.8, True, "bandwidth: Apple specifications; rate: 10 cores x 256 x 1.47 GHz"),
    "m4-pro":   ( 64, 273.0,  8.1, True, "bandwidth: Apple specifications; rate: 20 cores x 256 x 1.58 GHz"),
    "m4-max":   (128, 546.0, 16.2, True, "bandwidth: Apple specifications; rate: 40 cores x 256 x 1.58 GHz"),
}

_ZEN3, _ZEN4 = ("avx2", "fma", "f16c"), ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16")
_SAPPHIRE = (*_ZEN4, "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
# Processors with all memory channels filled at their rated speed, and a customary amount of it (append yours: epyc-9654-768gb). Rates: cores x operations a
# cycle x base clock, which is a ceiling that no matmul reaches; `--device` left out measures your own.
_CPUS: dict[str, tuple[int, int, float, dict[str, float], tuple[str, ...], str]] = {
    #                  GiB cores  GB/s  TFLOP/s per type
    "ryzen-5600x":    ( 32,  6,  51.2, {"fp32": 0.71}, _ZEN3, "2 x DDR4-3200; 6 cores x 32 x 3.7 GHz"),
    "ryzen-7950x":    ( 64, 16,  83.2, {"fp32": 2.30, "bf16": 4.61, "int8": 9.22}, _ZEN4, "2 x DDR5-5200; 16 cores x 32 x 4.5 GHz"),
    "core-i9-13900k": ( 64, 24,  89.6, {"fp32": 1.33, "int8": 5.32}, ("avx2", "fma", "f16c", "avx_vnni"), "2 x DDR5-5600; 8 x 32 x 3.0 + 16 x 16 x 2.2 GHz"),
    "epyc-7763":      (256, 64, 204.8, {"fp32": 5.02}, _ZEN3, "8 x DDR4-3200; 64 cores x 32 x 2.45 GHz"),
    "epyc-9654":      (384, 96, 460.8, {"fp32": 7.37, "bf16": 14.7, "int8": 29.5}, _ZEN4, "12 x DDR5-4800; 96 cores x 32 x 2.4 GHz"),
    "xeon-8480":      (256, 56, 307.2, {"fp32": 7.17, "fp16": 14.3, "bf16": 229.4, "int8": 458.8}, _SAPPHIRE, "8 x DDR5-4800; 56 x 64 (AMX: 2048) x 2.0 GHz"),
    "raspberry-pi-5": (  8,  4,  17.1, {"fp32": 0.154, "fp16": 0.307, "int8": 0.614}, ("neon", "fphp", "asimdhp", "asimddp"), "LPDDR4X-4267; 4 x 16 x 2.4 GHz"),
}
# fmt: on

# What drivers and people call them.
_ALIASES: dict[str, str] = {
    "a100": "a100-80gb", "a100-sxm4-80gb": "a100-80gb", "a100-pcie-80gb": "a100-80gb-pcie", "a100-pcie-40gb": "a100-40gb", "a100-sxm4-40gb": "a100-40gb",
    "h100": "h100-80gb", "h100-sxm": "h100-80gb", "h100-sxm5": "h100-80gb", "h100-80gb-hbm3": "h100-80gb", "h100-80gb-pcie": "h100-pcie", "h200-141gb": "h200",
    "h100-pcie-80gb": "h100-pcie", "v100": "v100-16gb", "v100-sxm2-16gb": "v100-16gb", "v100-sxm2-32gb": "v100-32gb",
    "4090": "rtx-4090", "3090": "rtx-3090", "5090": "rtx-5090", "a6000": "rtx-a6000", "tesla-t4": "t4",
}  # fmt: skip


def _cited(value: float, source: str) -> Estimate:
    return Estimate(value, f"cited: {source}")


def _card_device(name: str, card: _Card) -> DeviceSpec:
    rates = {"fp32": card.fp32, "fp16": card.fp16, "bf16": card.bf16, "int8": card.int8, "fp8": card.fp8}
    measured = _H100_MEASURED if name == "h100-80gb" else f"assumed: as {_H100_MEASURED}"
    return DeviceSpec(
        name=name,
        kind="cuda",
        memory_bytes=card.memory_mib * MiB,
        free_bytes=card.memory_mib * MiB,
        read_bytes_per_s=_cited(card.read * 1e9, card.source),
        matmul_flops_per_s={dtype: _cited(rate * 1e12, card.source) for dtype, rate in rates.items() if rate is not None},
        op_overhead_s=Estimate(_CUDA_OP_S, measured),
        host_link_bytes_per_s=_cited(_PCIE[card.pcie] * 1e9, f"PCIe {card.pcie}.0, 16 lanes, one direction"),
        # cards without NVLink reach each other through the host's PCIe
        peer_link_bytes_per_s=_cited((card.nvlink or _PCIE[card.pcie]) * 1e9, f"{card.source}: " + ("NVLink" if card.nvlink else "PCIe") + ", one direction"),
        runtime_bytes=Estimate(_CUDA_RUNTIME_MIB * MiB, measured),
        source=card.source,
    )


def _m_device(name: str, row: tuple[int, float, float, bool, str]) -> DeviceSpec:
    memory_gib, read, rate, has_bf16, source = row
    dtypes = ("fp32", "fp16", "bf16") if has_bf16 else ("fp32", "fp16")
    return DeviceSpec(
        name=name,
        kind="mps",
        memory_bytes=memory_gib * GiB,
        free_bytes=memory_gib * GiB,
        read_bytes_per_s=_cited(read * 1e9, source),
        matmul_flops_per_s={dtype: _cited(rate * 1e12, source) for dtype in dtypes},
        op_overhead_s=Estimate(_MPS_OP_S, "assumed: about a CUDA launch; nobody measured it here"),
        source=source,
    )


def _cpu_device(name: str, row: tuple[int, int, float, dict[str, float], tuple[str, ...], str]) -> DeviceSpec:
    memory_gib, cores, read, rates, instruction_sets, source = row
    return DeviceSpec(
        name=name,
        kind="cpu",
        memory_bytes=memory_gib * GiB,
        free_bytes=memory_gib * GiB,
        read_bytes_per_s=_cited(read * 1e9, f"channels x rate: {source}"),
        matmul_flops_per_s={dtype: _cited(rate * 1e12, f"cores x operations a cycle x base clock: {source}") for dtype, rate in rates.items()},
        op_overhead_s=Estimate(_CPU_OP_S, "assumed: as measured on a Zen 5 core, 2026-11-22"),
        cores=cores,
        instruction_sets=instruction_sets,
        source=source,
    )


DEVICES: Mapping[str, DeviceSpec] = MappingProxyType(
    {name: _card_device(name, card) for name, card in _CARDS.items()}
    | {name: _m_device(name, row) for name, row in _M_CHIPS.items()}
    | {name: _cpu_device(name, row) for name, row in _CPUS.items()}
)

_COUNTED = re.compile(r"^\s*(\d+)\s*[x×*]\s*(.+)$", re.IGNORECASE)
_SIZED = re.compile(r"^(.+)-(\d+)(?:gb|gib)$")


def _normal(name: str) -> str:
    return re.sub(r"[\s_\-/]+", "-", name.strip().lower()).strip("-")


def _squeezed(name: str) -> str:
    return name.replace("-", "")


_BY_SQUEEZED = {_squeezed(key): key for key in DEVICES} | {_squeezed(alias): key for alias, key in _ALIASES.items()}


def find_device(name: str, count: int = 1) -> DeviceSpec:
    """The device called `name`, any case, spaces and hyphens at will; "2x a100-40gb" is two of them. `count` multiplies with a count in the name.

    A chip whose memory the buyer chooses (m-series, processors) takes a size at its end: "m4-max-64gb". Raises InputError with the nearest names on a miss.

    >>> find_device("2x A100 40GB").count, find_device("m4-max-64gb").memory_bytes // 2**30
    (2, 64)
    """
    if count < 1:
        raise InputError(f"{count} devices: at least one is needed")
    wanted = name
    if match := _COUNTED.match(name):
        count *= int(match.group(1))
        wanted = match.group(2)
        if count < 1:
            raise InputError(f"'{name}': zero devices; write for example 2x {wanted}")
    wanted = _normal(wanted)
    if key := _BY_SQUEEZED.get(_squeezed(wanted)):
        return replace(DEVICES[key], count=count)
    if (match := _SIZED.match(wanted)) and (key := _BY_SQUEEZED.get(_squeezed(match.group(1)))) and DEVICES[key].kind != "cuda":
        return replace(_resized(DEVICES[key], int(match.group(2))), count=count)
    raise InputError(_miss(name, wanted))


def _resized(device: DeviceSpec, memory_gib: int) -> DeviceSpec:
    if memory_gib < 1:
        raise InputError(f"{device.name} with {memory_gib} GiB: a device has at least 1 GiB")
    if device.kind == "mps" and memory_gib * GiB > device.memory_bytes:
        raise InputError(f"{device.name} was sold with at most {device.memory_bytes // GiB} GiB, not {memory_gib}")
    return replace(device, name=f"{device.name}-{memory_gib}gb", memory_bytes=memory_gib * GiB, free_bytes=memory_gib * GiB)


def _miss(name: str, wanted: str) -> str:
    near = difflib.get_close_matches(_squeezed(wanted), list(_BY_SQUEEZED), n=3, cutoff=0.6)
    guesses = list(dict.fromkeys(_BY_SQUEEZED[guess] for guess in near))
    hint = f"Did you mean {' or '.join(guesses)}? " if guesses else ""
    return f"no device '{name}' in the zoo. {hint}Known: {', '.join(DEVICES)}. Without --device the plan is for this machine"


def match_driver_name(driver_name: str, memory_bytes: int | None = None) -> DeviceSpec | None:
    """The row for what a driver calls a card ("NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090", "Apple M2 Max"), or None if it is not in the zoo.

    A card is never taken for its relative: "RTX 4090 Laptop GPU" is no RTX 4090, nor is a card whose memory, where given, is another size than the row's.

    >>> match_driver_name("NVIDIA H100 80GB HBM3").name, match_driver_name("NVIDIA GeForce RTX 4090 Laptop GPU")
    ('h100-80gb', None)
    """
    short = re.sub(r"^(nvidia|tesla|geforce|apple|-)+", "", _normal(driver_name))
    key = _BY_SQUEEZED.get(_squeezed(short))
    if key is None:
        return None
    device = DEVICES[key]
    # drivers differ by a few percent in what they hold back; unified memory comes in any size
    is_other_size = memory_bytes is not None and device.kind == "cuda" and abs(device.memory_bytes - memory_bytes) > 0.06 * device.memory_bytes
    return None if is_other_size else device
