"""Experiment train-gpu: full, LoRA and QLoRA steps on one CUDA device beside transformers + PEFT + bitsandbytes at the same shapes: tokens a second, bytes, and
bytes against the ledger. Weights and tokens are drawn at random; each case is a process of its own.

python -m tradespace.lab.train_gpu --output results/train_gpu.json [--only CASE …] [--tiny]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from tradespace.errors import EngineError, UnsupportedError
from tradespace.lab.common import markdown_table
from tradespace.lab.train_gpu_ours import checked, ours
from tradespace.lab.train_gpu_peers import peer
from tradespace.measure.record import Record, commit_of, read_record
from tradespace.units import GiB

RATE = 790e12  # FLOP/s of a large bf16 product on the H100, the measure of the MFU
T = 2048
# what the issue quotes of the peers, for where bitsandbytes cannot run
QUOTED = {"qlora 1": (4460, 10.0e9), "qlora 4": (5843, 21.2e9), "lora 1": (5483, 20.4e9), "lora 4": (5962, 31.5e9), "full 4": (45_763, 34.5e9)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: who, at which shape, and within which bytes ours is planned."""

    name: str
    who: str  # ours or peer
    model: str
    method: str
    batch: int
    memory_bytes: int = 0
    checkpointing: str | None = None
    steps: int = 6
    by_driver: bool = False  # memory_bytes as the driver counts them, context and all; else as torch allocates, as the peers are counted


CASES = {
    case.name: case
    for case in (
        Case(name="peer qlora 1", who="peer", model="llama-3-8b", method="qlora", batch=1, checkpointing="full"),
        Case(name="ours qlora 1", who="ours", model="llama-3-8b", method="qlora", batch=1, memory_bytes=int(7.5 * GiB), by_driver=True),
        Case(name="peer qlora 4", who="peer", model="llama-3-8b", method="qlora", batch=4, checkpointing="full", steps=4),
        Case(name="ours qlora 4", who="ours", model="llama-3-8b", method="qlora", batch=4, memory_bytes=int(21.2e9), steps=4),
        Case(name="peer lora 1", who="peer", model="llama-3-8b", method="lora", batch=1, checkpointing="full"),
        Case(name="ours lora 1", who="ours", model="llama-3-8b", method="lora", batch=1, memory_bytes=int(20.4e9)),
        Case(name="peer lora 4", who="peer", model="llama-3-8b", method="lora", batch=4, checkpointing="full", steps=4),
        Case(name="ours lora 4", who="ours", model="llama-3-8b", method="lora", batch=4, memory_bytes=int(31.5e9), steps=4),
        Case(name="peer full 4", who="peer", model="llama-3.2-1b", method="full", batch=4, checkpointing="none"),
        Case(name="ours full 4", who="ours", model="llama-3.2-1b", method="full", batch=4, memory_bytes=int(34.5e9)),
        Case(name="ours full 16GiB", who="ours", model="llama-3.2-1b", method="full", batch=4, memory_bytes=16 * GiB, by_driver=True),
        Case(name="ours qlora 70b", who="ours", model="llama-2-70b", method="qlora", batch=1, memory_bytes=46 * GiB, steps=3),
    )
}


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """As an experiment: a process of its own. Raises UnsupportedError without a CUDA device."""
    import tempfile

    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError("this experiment needs a CUDA device, and torch sees none. The record that is shipped was made on an H100")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        commit, _ = commit_of(Path(__file__).resolve().parent)
        command = [sys.executable, "-m", "tradespace.lab.train_gpu", "--output", str(path), "--commit", commit, *(["--tiny"] if quick else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        for line in done.stdout.splitlines():
            say(line)
        if not path.is_file():
            raise EngineError(f"the script ended with code {done.returncode} and wrote no record")
        return read_record(path)


def one(case: Case, tiny: bool) -> dict[str, Any]:
    """Runs a case in this process: seconds of each step, bytes at the peak, and what was planned."""
    began = time.perf_counter()
    found = ours(case, T, tiny) if case.who == "ours" else peer(case, T, tiny)
    tokens = case.batch * (64 if tiny else T)
    seconds = median(found["seconds"])
    found |= {"case": case.name, "model": case.model, "method": case.method, "batch": case.batch, "tokens_per_s": tokens / seconds}
    found["mfu"] = found.pop("flops_per_token") * found["tokens_per_s"] / RATE
    found["setup_s"] = time.perf_counter() - began - sum(found["seconds"])
    return found


def main(arguments: list[str]) -> int:
    """Runs the cases one after the other and writes the record after each."""
    parser = argparse.ArgumentParser(description="training on one CUDA device beside transformers, PEFT and bitsandbytes")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--tiny", action="store_true", help="shapes of a few thousand parameters, on any device: to see that it works")
    parser.add_argument("--commit", default="unknown: no repository on this machine")
    parser.add_argument("--case", help="this one alone, in this process, as JSON on standard output")
    parser.add_argument("--check", action="store_true", help="gradients on the device against the CPU's, and no more")
    options = parser.parse_args(arguments)
    if options.check:
        print("CHECK " + json.dumps(checked()), flush=True)
        return 0
    if options.case:
        print("RESULT " + json.dumps(one(CASES[options.case], options.tiny)), flush=True)
        return 0
    rows: list[dict[str, Any]] = []
    for name in options.only:
        command = [sys.executable, "-m", "tradespace.lab.train_gpu", "--case", name, *(["--tiny"] if options.tiny else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        row = json.loads(line[7:]) if line else {"case": name, "error": "\n".join((done.stderr or done.stdout).strip().splitlines()[-4:])}
        rows.append(row)
        print({key: value for key, value in row.items() if key not in ("ledger", "seconds")}, flush=True)
        if options.output:
            _write(options.output, rows, options.commit, options.tiny)
    return 0 if all("error" not in row for row in rows) else 1


def _write(path: Path, rows: list[dict[str, Any]], commit: str, tiny: bool) -> None:
    import torch

    device: dict[str, Any] = {"name": "cpu", "kind": "cpu"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = {"name": properties.name, "kind": "cuda", "memory_bytes": properties.total_memory}
    figures = {}
    for row in rows:
        if "error" not in row:
            speeds = sorted(row["batch"] * (64 if tiny else T) / each for each in row["seconds"])
            figures[row["case"]] = {"median": median(speeds), "min": speeds[0], "max": speeds[-1], "values": speeds, "unit": "tok/s"}
    record = {
        "schema": 1, "experiment": "train-gpu", "command": "python -m tradespace.lab.train_gpu --output results/train_gpu.json", "commit": commit,
        "dirty": False, "date": datetime.now(UTC).isoformat(timespec="seconds"), "device": device,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__}, "repeats": max((len(row.get("seconds", ())) for row in rows), default=0),
        "figures": figures, "rows": rows,
        "notes": f"random weights and tokens, {T} tokens a sequence, bf16, rank 16 on all linears; peak bytes as torch allocated them; MFU against 790 TFLOP/s",
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def markdown(record: Record) -> str:
    """Ours beside the peer at the same shape and batch."""
    rows = {row["case"]: row for row in record.rows if "error" not in row}
    table = []
    for name, row in rows.items():
        if not name.startswith("ours"):
            continue
        key = name.removeprefix("ours ")
        other = rows.get(f"peer {key}")
        quoted = QUOTED.get(key)
        theirs = (other["tokens_per_s"], other["peak_bytes"], "") if other else (*quoted, " (quoted)") if quoted else None
        table.append(
            (
                f"{row['model']}, {row['method']}, {row['batch']} × {T}",
                f"{row['tokens_per_s']:,.0f}",
                "" if theirs is None else f"{theirs[0]:,.0f}{theirs[2]}",
                "" if theirs is None else f"{row['tokens_per_s'] / theirs[0]:.2f}×",
                f"{row['mfu']:.0%}",
                f"{row['peak_bytes'] / 1e9:.1f}",
                "" if theirs is None else f"{theirs[1] / 1e9:.1f}",
                f"{row['predicted_bytes'] / row['peak_bytes'] - 1:+.1%}",
            )
        )
    header = ("step", "tok/s", "peer's", "ratio", "MFU", "GB", "peer's", "predicted")
    return markdown_table(header, table) + f"\n\n{record.notes}."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
