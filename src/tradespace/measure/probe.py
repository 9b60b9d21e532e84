"""What has to be timed or weighed in a process of its own: `python -m tradespace.measure.probe speeds|baseline THREADS …` prints JSON lines.

A child, because a gigabyte read for the bandwidth curve and the libraries loaded for a rate must not count in the process that has a budget to keep,
and because the baseline of a run is only to be seen in a process that has done nothing else.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tradespace.errors import EngineError
from tradespace.measure.bandwidth import bandwidth_curve
from tradespace.measure.host import has_torch
from tradespace.measure.memory import MemoryMeter, limit_heap_growth, peak_rss_bytes, reset_peak
from tradespace.measure.timer import median_and_spread, time_repeats
from tradespace.units import MiB

_MATMUL_SIZES = (256, 512, 1024)
_RATE_BUDGET_S = 0.6  # for each type
_LONGEST_PRODUCT_S = 0.3
_OPS_PER_TIMING = 500
_DISK_BYTES = 128 * MiB
# What a run loads besides torch: the tokenizer, the template engine, the readers of weights, the command line.
_ENGINE_IMPORTS = ("numpy", "tokenizers", "jinja2", "safetensors", "yaml", "typer", "rich.progress", "tradespace")


def _say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def speeds(threads: int, sizes: tuple[int, ...], folder: Path) -> None:
    """Prints one line for each figure: {"step": "bandwidth", "size": …, "value": …}, {"step": "matmul", "dtype": …, "value": …}, "native", "op", "disk"."""
    torch_here = has_torch()
    if torch_here:
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
    for size, bytes_per_s in bandwidth_curve(sizes, threads, backend="torch" if torch_here else "numpy"):
        _say(step="bandwidth", size=size, value=bytes_per_s)
    for dtype, product in (torch_products() if torch_here else {"fp32": _numpy_product}).items():
        try:
            _say(step="matmul", dtype=dtype, value=matmul_rate(product))
        except RuntimeError as error:  # torch has no product of this type on this processor: the rate is unknown, and the line says why
            _say(step="matmul", dtype=dtype, value=None, why=str(error))
    if torch_here:
        native_rates(threads)
    _say(step="op", value=_op_overhead_s() if torch_here else None)
    _say(step="disk", value=_disk_rate(folder))


def native_rates(threads: int) -> None:
    """Prints the rate of our own products for each form of the activations; compiles the kernels, which any run needs, where nobody has."""
    from tradespace.measure.native_rates import WEIGHTS, product_rate

    for form in WEIGHTS:
        try:
            _say(step="native", dtype=form, value=product_rate(form, threads))
        except EngineError as error:  # no compiler, or one that fails: it would again
            _say(step="native", dtype=form, value=None, why=str(error))
            return


def matmul_rate(product: Callable[[int], Callable[[], object]]) -> float:
    """Operations a second, best of several, at the largest size that the fastest one so far says will take under 0.3 s: a type that the processor has no
    instructions for is a thousand times slower than one that it has."""
    rate = 0.0
    for n in _MATMUL_SIZES:
        work = 2 * n**3
        if rate and work / rate > _LONGEST_PRODUCT_S:
            break
        rate = max(rate, work / min(time_repeats(product(n), repeats=20, budget_s=_RATE_BUDGET_S / len(_MATMUL_SIZES))))
    return rate


def torch_products() -> dict[str, Callable[[int], Callable[[], object]]]:
    import torch

    def floating(dtype: torch.dtype) -> Callable[[int], Callable[[], object]]:
        def prepare(n: int) -> Callable[[], object]:
            rows, weight = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
            return lambda: torch.nn.functional.linear(rows, weight)

        return prepare

    def integer(n: int) -> Callable[[], object]:
        rows, weight = (torch.randint(-100, 100, (n, n), dtype=torch.int8) for _ in range(2))
        return lambda: torch.ops.aten._int_mm(rows, weight.t())

    return {"fp32": floating(torch.float32), "bf16": floating(torch.bfloat16), "fp16": floating(torch.float16), "int8": integer}


def _numpy_product(n: int) -> Callable[[], object]:
    import numpy as np

    rows, weight = (np.random.default_rng(seed).standard_normal((n, n), dtype=np.float32) for seed in (0, 1))
    return lambda: rows @ weight


def _op_overhead_s() -> float:
    """Median seconds of an add of two 8-element tensors, started from Python."""
    import torch

    left, right = torch.ones(8), torch.ones(8)

    def some() -> None:
        for _ in range(_OPS_PER_TIMING):
            left.add(right)

    return median_and_spread(time_repeats(some, repeats=50, budget_s=0.3))[0] / _OPS_PER_TIMING


def _disk_rate(folder: Path) -> float | None:
    """Bytes/s of a sequential read of a file just written to `folder`, dropped from the page cache first. None where the system cannot drop it, or the disk
    has no room: a read out of the page cache would say nothing about the disk."""
    if not hasattr(os, "posix_fadvise"):
        return None
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as stream:
            block = os.urandom(4 * MiB)  # compressible bytes would flatter a compressing disk
            for _ in range(_DISK_BYTES // len(block)):
                stream.write(block)
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            stream.seek(0)
            into = bytearray(len(block))
            start = time.perf_counter()
            num_read = 0
            while count := stream.readinto(into):
                num_read += count
            return num_read / (time.perf_counter() - start)
    except OSError:
        return None


def baseline(threads: int) -> None:
    """Prints {"step": "baseline", "pss_bytes", "rss_bytes"}: the peak of a process that has loaded what a run loads and made one small step of each kind."""
    limit_heap_growth()
    reset_peak()
    with MemoryMeter(period_s=0.005) as meter:
        for name in _ENGINE_IMPORTS:
            if importlib.util.find_spec(name.partition(".")[0]) is not None:
                importlib.import_module(name)
        if has_torch():
            _small_step(threads)
    _say(step="baseline", pss_bytes=meter.peak_bytes, rss_bytes=peak_rss_bytes(), method=meter.method)


def _small_step(threads: int) -> None:
    """Linear, attention and softmax in fp32 and bf16: so that thread pools, generated kernels and scratch memory exist, as they will in any run."""
    import torch

    torch.set_num_threads(threads)
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            rows, weight = torch.ones(16, 128, dtype=dtype), torch.ones(128, 128, dtype=dtype)
            heads = torch.nn.functional.linear(rows, weight).view(1, 16, 2, 64).transpose(1, 2)
            torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
            torch.softmax(rows.float(), dim=-1)


def main(arguments: list[str]) -> None:
    """The child's entry: `speeds THREADS FOLDER SIZE…` or `baseline THREADS`."""
    if arguments[0] == "speeds":
        speeds(int(arguments[1]), tuple(int(size) for size in arguments[3:]), Path(arguments[2]))
    elif arguments[0] == "baseline":
        baseline(int(arguments[1]))
    else:
        raise SystemExit(f"unknown probe '{arguments[0]}'")


if __name__ == "__main__":
    main(sys.argv[1:])
