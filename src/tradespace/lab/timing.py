"""Clocks: commands as a user types them, timed from outside, and a device's work by its own events."""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

from tradespace.errors import EngineError

WARM_UPS = 3


def users_environment() -> dict[str, str]:
    """Ours, in which Python keeps what it has compiled, as it does unless somebody forbids it."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def first_byte_s(command: Sequence[str], environment: Mapping[str, str] | None = None) -> float:
    """Seconds from starting the command to the first byte on its standard output. Raises EngineError, with the last it said, where there is none."""
    environment = users_environment() if environment is None else environment
    start = time.perf_counter()
    # errors go to a file, not a pipe: nobody reads while it runs, and a full pipe would stop it
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, bufsize=0, env=environment) as process,
    ):
        assert process.stdout is not None
        first = process.stdout.read(1)
        took = time.perf_counter() - start
        process.stdout.read()
        status = process.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
    if not first:
        raise EngineError(f"{' '.join(command[2:4])} printed nothing and ended with {status}: {said[-1] if said else 'no reason given'}")
    return took


def device_seconds(run: Callable[[], object], repeats: int = 12) -> float:
    """Median by CUDA events on the current device, after calls that warm up."""
    import torch

    for _ in range(WARM_UPS):
        run()
    taken = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken)
