"""Every constant of the cost model that is not arithmetic, in one place, each with its source and date: what a measurement replaces.

Two kinds: counts of tensors that are live at once in our own engine (bytes), and how much of a device's published or measured rate a phase reaches
(seconds). Until somebody measured, the source says "assumed", and every estimate built on it repeats that.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tradespace.errors import InputError
from tradespace.spec.cuda import FORMATS as CUDA_FORMATS
from tradespace.spec.formats import FORMATS
from tradespace.spec.native import FORMAT_KINDS
from tradespace.units import MiB

ASSUMED_DATE = "2026-11-22"


@dataclass(frozen=True, slots=True)
class Constant:
    """One number and where it comes from: "assumed: why" or "measured: how", with the date of either."""

    value: float
    source: str
    date: str = ASSUMED_DATE


# ---------------------------------------------------------------------------------------------------------------- bytes

# what a process costs before any model, where the device does not say it itself
RUNTIME_BYTES: dict[str, Constant] = {
    "cpu": Constant(220 * MiB, "assumed: interpreter with torch for the CPU, as the issue states it"),
    "cuda": Constant(450 * MiB, "assumed: driver context and library kernels on the device"),
    "mps": Constant(300 * MiB, "assumed: interpreter with torch and its Metal library"),
}
# the host's process where the model computes on a device
HOST_PROCESS_BYTES = Constant(1536 * MiB, "assumed: interpreter with torch for CUDA, libraries mapped and touched")
TOKENIZER_BYTES_PER_ENTRY = Constant(320, "measured: growth of the process by the tokenizers of SmolLM2 and Gemma 3, per vocabulary entry")
STAGING_BYTES = Constant(4 * MiB, "set: build.py, the loader's one bounded buffer, where the budget is the host's")
DEVICE_STAGING_BYTES = Constant(64 * MiB, "set: build_cuda.py, the same in the host beside a device, where each half is a transfer")
RESERVE_BYTES = Constant(32 * MiB, "set: what sampling may miss and an allocator may keep under load; planner and builder leave it free on a CPU")
# what is in no tensor: modules, file headers, and what the allocator keeps between steps of unlike shapes
HEAP_BYTES = Constant(16 * MiB, "measured: peak of the process less all other lines, SmolLM2, 1 to 64 requests")
GRAPH_BYTES = Constant(8 * MiB, "assumed: what one captured step takes on a CUDA device")
DEVICE_SLACK_BYTES = Constant(96 * MiB, "assumed: kernels that a driver loads later, and what an allocator may keep under load, on a CUDA device")
STREAM_BUFFERS = Constant(2, "assumed: one streamed layer computes while the next one arrives")

REFERENCE_WEIGHT_ROWS = Constant(1024, "set: kernels/linear/reference.py: rows of a matrix that are widened to fp32 at a time")
# what sampling holds beside the logits where top-k or top-p cuts them; a whole row's sort, which hardly any row needs, takes up to 48 and is RESERVE's business
SAMPLER_BYTES_PER_LOGIT = Constant(9, "measured: allocations of top-k and top-p sampling")
SAMPLER_LOGITS_AT_ONCE = Constant(2**18, "set: engine/sampler.py: rows are sampled in chunks of so many logits")
# what torch's CPU library keeps for each shape of a bf16 product: compiled code and its descriptors; and for all fp32 products: packing buffers
PRODUCT_KERNEL_BYTES = Constant(0.60 * MiB, "measured: growth of the process over 4 matrices × 18 numbers of rows, torch 2.13, AVX-512")
FP32_PRODUCT_BYTES = Constant(13 * MiB, "measured: growth of the process over 4 matrices × 18 numbers of rows, torch 2.13, two threads")

# ---------------------------------------------------------------------------------------------------------------- seconds

LAYER_OPS = Constant(16, "assumed: eager operations of one layer outside of attention: norms, projections, rotation, activation, sums")
PAGED_LAYER_OPS = Constant(
    1.0, "fitted: 12 µs a layer of a captured step beside its reading, from int4 decode of the Llama-3-8B and Llama-2-70B shapes on an H100"
)
PAGED_MANY_OPS = Constant(1.5, "fitted: as above, what norms and activations that are kernels of their own add in a layer of more than 64 rows")
PAGED_SEVERAL_OPS = Constant(1.3, "fitted: as above, what attention of several sequences takes in a layer beside its reading")
PAGED_SHARE = Constant(0.77, "fitted: of the bandwidth, at which keys and values of 16 to 256 sequences of the Llama-3-8B shape are read on an H100")
PAGED_PREFILL_SHARE = Constant(0.384, "fitted: of the bf16 rate, attention over prompts of 2,048 to 32,256 tokens of the Llama-3-8B shape on an H100")
# what an operation of a layer costs, in starts of a tiny one: on a CPU its own few microseconds do not hide behind the next one's start
OP_STARTS: dict[str, Constant] = {
    "cpu": Constant(14, "measured: 0.22 ms a layer of SmolLM2 beside its products, two cores"),
    "cuda": Constant(1, "assumed: operations overlap the start of the next"),
    "mps": Constant(1, "assumed: as cuda"),
}
STEP_OPS = Constant(30, "assumed: embedding, final norm, logits and sampling of one step")
CAPTURED_STEP_OPS = Constant(5, "assumed: embedding, first norm, sampling and transfers of a captured step: 60 µs on an H100")
# eager operations per sequence and layer in attention: gather keys, gather values, then the kernel
KERNEL_OPS: dict[str, Constant] = {
    "reference": Constant(8, "assumed: cast, product, mask, softmax, product, per sequence"),
    "chunked": Constant(10, "assumed: as reference plus the running maximum and sum, per block of keys"),
    "sdpa": Constant(4, "assumed: mask and one fused call, per sequence"),
    "flash": Constant(1, "assumed: one launch for the whole batch"),
    "native": Constant(0, "set: one call runs all operations of all layers"),
    "paged": Constant(0, "set: a captured step is one launch"),
}
ALL_REDUCE_LATENCY_S = Constant(15e-6, "assumed: one small all-reduce over a peer link")


def staging(kind: str) -> Constant:
    """The loader's buffer beside a device of this kind."""
    return DEVICE_STAGING_BYTES if kind == "cuda" else STAGING_BYTES


@dataclass(frozen=True, slots=True)
class Calibration:
    """The share of a rate that a phase reaches: bandwidth in decode, dense matmul rate in prefill."""

    efficiency: float
    source: str
    date: str

    @property
    def label(self) -> str:
        """How an estimate names it: "roofline × 0.60 assumed 2026-11-22"."""
        return f"roofline × {self.efficiency:.2f} {self.source} {self.date}"


_DENSE = ("fp32", "bf16", "fp16")
_ASSUMED = {
    # (kind, phase): (dense formats, formats that are dequantized on the way)
    ("cpu", "decode"): (0.6, 0.4),
    ("cpu", "prefill"): (0.6, 0.5),
    ("cuda", "decode"): (0.7, 0.6),
    ("cuda", "prefill"): (0.5, 0.4),
    ("mps", "decode"): (0.6, 0.5),
    ("mps", "prefill"): (0.5, 0.4),
}
_ASSUMED |= {(kind, "few rows"): shares for (kind, phase), shares in _ASSUMED.items() if phase == "prefill"}

# (device kind, weight format, phase) → what was measured; assumed entries give way to measured ones by the update below
EFFICIENCY: dict[tuple[str, str, str], Calibration] = {
    (kind, name, phase): Calibration(dense if name in _DENSE else quantized, "assumed", ASSUMED_DATE)
    for (kind, phase), (dense, quantized) in _ASSUMED.items()
    for name in FORMATS
}
# "few rows": the matmul rate in a decode step of several sequences, where torch's library reads weights that it did not pack
MEASURED: dict[tuple[str, str, str], Calibration] = {
    ("cpu", name, phase): Calibration(efficiency, "measured on SmolLM2, AVX-512, two cores", "2026-11-28")
    for name, efficiencies in {
        "fp32": {"decode": 0.185, "few rows": 0.20, "prefill": 0.61},
        "bf16": {"decode": 0.196, "few rows": 0.185, "prefill": 0.49},
        "int8": {"decode": 0.178, "few rows": 0.072, "prefill": 0.28},
    }.items()
    for phase, efficiency in efficiencies.items()
}
EFFICIENCY.update(MEASURED)
# The native kernels, of what their products by many tokens reach with activations in int8, bf16 or fp32: measured on this machine, or for a chip that is only
# described a share of its own rate, which is another on each family of chips (NATIVE_OF_MATMUL: Zen 4's). Formats that were not measured themselves have the
# shares of the one whose kernel is theirs but for how codes are unpacked.
NATIVE_MEASURED = {
    "fp32": {"decode": 0.67, "few rows": 0.82, "prefill": 1.02},
    "bf16": {"decode": 0.76, "few rows": 0.65, "prefill": 0.92},
    "int8": {"decode": 0.62, "few rows": 0.80, "prefill": 0.97},
    "q4_0": {"decode": 0.74, "few rows": 0.82, "prefill": 0.89},
}
NATIVE_OF_MATMUL = {
    form: Constant(share, "measured: our products' rate by torch's, AVX-512, two cores", "2026-11-28")
    for form, share in {"int8": 0.67, "bf16": 0.92, "fp32": 0.89}.items()
}
# The same with AVX2 alone where our products' rates were not measured, all of the fp32 rate: torch's own in int8 and bf16 say nothing there, as it has none
# that suit.
NATIVE_AVX2_MEASURED = {
    "fp32": {"decode": 1.0, "few rows": 0.46, "prefill": 0.77},
    "bf16": {"decode": 0.88, "few rows": 0.47, "prefill": 0.53},
    "int8": {"decode": 0.86, "few rows": 0.71, "prefill": 0.81},
    "q4_0": {"decode": 0.95, "few rows": 1.05, "prefill": 1.35},
}


def _native_calibrations(kind: str, measured: dict[str, dict[str, float]], where: str, date: str) -> dict[tuple[str, str, str], Calibration]:
    found = {}
    for name in FORMAT_KINDS:
        like = name if name in measured else "fp32" if name == "fp16" else "q4_0"
        source = f"measured on SmolLM2, {where}, two cores" if like == name else f"as {like}, measured on SmolLM2, {where}, two cores"
        found |= {(kind, name, phase): Calibration(share, source, date) for phase, share in measured[like].items()}
    return found


EFFICIENCY.update(_native_calibrations("native", NATIVE_MEASURED, "AVX-512", "2026-11-28"))
EFFICIENCY.update(_native_calibrations("native-avx2", NATIVE_AVX2_MEASURED, "AVX2", "2026-11-28"))


def native_kind(instruction_sets: Collection[str]) -> str:
    """What the native kernels are calibrated as on a CPU with these instruction sets (none: not known): by whether it has products of bytes."""
    return "native-avx2" if "avx2" in instruction_sets and not {"avx512f", "avx_vnni"} & set(instruction_sets) else "native"


# the CUDA step on an H100 80GB, Llama-3-8B shape: "decode" is a share of the data sheet's bandwidth, the others of its dense matmul rate: of codes that up to
# 64 rows meet in registers ("several"), or up to 384 ("coded"), and of all else ("prefill"). Formats that were not measured have the shares of the one whose
# kernel is theirs but for how codes are unpacked.
CUDA_STEP_MEASURED = {
    "bf16": {"decode": 0.89, "prefill": 0.655},
    "int8": {"decode": 0.93, "several": 0.2, "coded": 0.41, "prefill": 0.59},
    "fp8": {"decode": 0.92, "several": 0.2, "coded": 0.41, "prefill": 0.59},
    "fp8-a8": {"decode": 0.737, "prefill": 0.97},
    "int4-g128": {"decode": 0.83, "several": 0.205, "coded": 0.39, "prefill": 0.67},
}


def _cuda_step_calibrations() -> dict[tuple[str, str, str], Calibration]:
    found = {}
    for name, layout in CUDA_FORMATS.items():
        like = name if name in CUDA_STEP_MEASURED else {"w8a8": "int8", "int8": "int8", "fp8": "fp8"}.get(layout.kind, "int4-g128")
        source = "measured on an H100" if like == name else f"as {like}, measured on an H100"
        held = CUDA_STEP_MEASURED[like]
        shares = {"few rows": held.get("several", held["prefill"])} | held
        found |= {("cuda step", name, phase): Calibration(share, source, "2026-11-28") for phase, share in shares.items()}
    return found


EFFICIENCY.update(_cuda_step_calibrations())


def find_calibration(kind: str, format_name: str, phase: str) -> Calibration:
    """The efficiency of `format_name` on devices of `kind`: of the bandwidth in "decode"; of the matmul rate with "few rows", in "prefill" or, of the CUDA
    step, "several" or "coded".

    Raises InputError for what is not known.
    """
    found = EFFICIENCY.get((kind, format_name, phase))
    if found is None:
        known = ", ".join(sorted({key[0] for key in EFFICIENCY}))
        raise InputError(
            f"no calibration for device kind '{kind}', format '{format_name}', phase '{phase}'. Known kinds: {known}; phases: decode, few rows, prefill"
        )
    return found
