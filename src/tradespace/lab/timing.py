"""Commands as a user types them, timed from outside."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence

from tradespace.errors import EngineError


def first_byte_s(command: Sequence[str], environment: Mapping[str, str] | None = None) -> float:
    """Seconds from starting the command to the first byte on its standard output. Raises EngineError, with the last it said, where there is none."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.read(1)
        took = time.perf_counter() - start
        process.stdout.read()
        said = process.stderr.read().decode(errors="replace").strip().splitlines()
    if not first:
        raise EngineError(f"{' '.join(command[2:4])} printed nothing and ended with {process.returncode}: {said[-1] if said else 'no reason given'}")
    return took
