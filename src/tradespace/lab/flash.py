"""The flash kernels on this machine's GPU: `lab/flash_device.py` run as an experiment, and its table."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tradespace.errors import EngineError, UnsupportedError
from tradespace.lab.common import markdown_table
from tradespace.measure.record import Record, commit_of, read_record


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """A process of its own, so that what it compiles and holds is gone afterwards. Raises UnsupportedError without a CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError("this experiment needs a CUDA device, and torch sees none. The record that is shipped was made on an H100")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flash.json"
        commit, _ = commit_of(Path(__file__).resolve().parent)
        command = [sys.executable, "-m", "tradespace.lab.flash_device", "--output", str(path), "--commit", commit]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        for line in done.stdout.splitlines():
            say(line)
        if not path.is_file():
            raise EngineError(f"the script ended with code {done.returncode} and wrote no record")
        return read_record(path)


def markdown(record: Record) -> str:
    """Speeds beside torch's kernels, how far results lie from the reference, and bytes."""
    found = {(row["kernel"], row["head"], row["length"]): row for row in record.rows if row["kind"] == "speed"}
    kernels = list(dict.fromkeys(kernel for kernel, _, _ in found))
    rows = []
    for head, length in dict.fromkeys((head, length) for _, head, length in found):
        cells = [found[kernel, head, length] for kernel in kernels]
        rows.append((str(head), f"{length:,}", *(_tflops(row, phase) for phase in ("forward", "backward") for row in cells)))
    header = ("head", "tokens", *(f"{phase}: {kernel}" for phase in ("forward", "backward") for kernel in kernels))
    checks = [row for row in record.rows if row["kind"] == "check"]
    worst = max(row.get(key, 0.0) for row in checks for key in ("output", "dq", "dk", "dv"))
    held = ", ".join(f"{row['length']:,} tokens {row['forward_bytes'] // 1024:,} KiB" for row in record.rows if row["kind"] == "memory")
    passed = sum(row["holds"] for row in checks)
    return (
        f"{markdown_table(header, rows)}\n\nTFLOP/s, causal, bf16. {passed} of {len(checks)} cases (all patterns, fp32 and bf16, gradients) within "
        f"their limits, the worst {worst:.1e} of the largest value. Held beside q, k, v and the output, forward, 8 heads of 128: {held}."
    )


def _tflops(row: Mapping[str, Any], phase: str) -> str:
    return f"{row[f'{phase}_tflops']:.0f}" if f"{phase}_tflops" in row else "not run"
