"""Does `quantize` keep its promises? Its peak below a budget that is below the bf16 model; killed at any moment, its output absent or whole and then the same
bytes; and a running int4 model without a bf16 copy of itself, its peak what the ledger says. Each case is a fresh process, because a peak never falls.

A process that has torch in it takes some 300 MiB before it reads a weight, as much as SmolLM2 in bf16. So memory is measured on a random Llama of 1 GB, and
the budget is less than that model in bf16 with everything that the process itself takes counted in.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from tradespace.errors import EngineError
from tradespace.home import cache_folder
from tradespace.lab.common import SEED, command_line, data_file, markdown_table
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Record, new_record
from tradespace.units import MiB, format_bytes

MODEL = "smollm2-135m"
BUDGET_BYTES = 768 * MiB
MEMORY_METHODS = ("rtn", "gptq")
KILL_METHODS = ("rtn-search", "gptq")
HOW = ["--samples", "4", "--context", "256"]
KILLS = 24
BAR = 0.05
# a Llama of about 1 GB in bf16, of many small layers: a layer and a method's statistics fit beside torch
SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 49152}


def write_random_model(folder: Path, tokenizer_of: Path) -> int:
    """A Hugging Face folder with random weights in bf16, a shard a layer; returns their bytes. Its tokenizer is that of the GGUF file `tokenizer_of`."""
    import torch

    from tradespace.loading.gguf import read_gguf
    from tradespace.quantize.hf_config import write_json, write_tokenizer
    from tradespace.quantize.shards import write_shard

    draw, weight_map, total = torch.Generator().manual_seed(SEED), {}, 0
    D, F, V = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    attention = {f"self_attn.{part}_proj": (D, D) for part in "qkvo"}
    layer = attention | {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F), "input_layernorm": (D,), "post_attention_layernorm": (D,)}
    shards = [{f"model.layers.{index}.{name}": shape for name, shape in layer.items()} for index in range(SHAPE["num_hidden_layers"])]
    shards += [{"model.embed_tokens": (V, D)}, {"lm_head": (V, D), "model.norm": (D,)}]
    for number, shapes in enumerate(shards):
        values = {}
        for name, shape in shapes.items():
            values[f"{name}.weight"] = (torch.randn(shape, generator=draw).mul_(0.02) if len(shape) > 1 else torch.ones(shape)).bfloat16()
        write_shard(folder / f"model-{number:05d}.safetensors", values)
        weight_map |= dict.fromkeys(values, f"model-{number:05d}.safetensors")
        total += sum(tensor.nbytes for tensor in values.values())
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": D // SHAPE["num_attention_heads"], "max_position_embeddings": 2048}
    config |= {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu"}
    write_json(folder / "config.json", config | SHAPE)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_tokenizer(read_gguf(tokenizer_of), folder)
    return total


def command(model: str, out: Path, method: str, *more: str) -> list[str]:
    text = [] if method.startswith("rtn") else ["--calibrate", str(data_file("wikitext2", "wiki.valid.raw")), *HOW]
    return [sys.executable, "-m", "tradespace", "quantize", model, "-o", str(out), "--format", "int4", "--group-size", "64", "--method", method, *text, *more]


def run_watched(arguments: list[str]) -> tuple[dict[str, Any], int]:
    """A command's JSON, and the kernel's own high-water mark of its resident size."""
    with TemporaryFile("w+") as out, TemporaryFile("w+") as error:  # files, not pipes: nobody reads while it runs, and a full pipe would stop it
        with subprocess.Popen(arguments, stdout=out, stderr=error, text=True) as process:
            peak_bytes, status = 0, Path(f"/proc/{process.pid}/status")
            while process.poll() is None:
                try:
                    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
                    peak_bytes = max(peak_bytes, 1024 * int(line.split()[1]))
                except (OSError, StopIteration):
                    pass  # it has just ended
                time.sleep(0.02)
        out.seek(0)
        error.seek(0)
        if process.returncode:
            raise EngineError(f"{' '.join(arguments[2:5])} failed: {error.read().strip().splitlines()[-1:] or process.returncode}")
        return json.loads(out.read()), peak_bytes


def memory_rows(folder: Path, tokenizer_of: Path, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    model = folder / "random"
    model.mkdir()
    bf16_bytes = write_random_model(model, tokenizer_of)
    for method in MEMORY_METHODS:
        found, resident_bytes = run_watched([*command(str(model), folder / method, method), "--memory", str(BUDGET_BYTES), "--json"])
        row = {"part": "memory", "method": method, "bf16_bytes": bf16_bytes, "budget_bytes": BUDGET_BYTES, "measured_bytes": found["peak_bytes"]}
        row |= {"resident_bytes": resident_bytes, "written_bytes": found["stored_bytes"], "seconds": found["seconds"]}
        row["holds"] = max(found["peak_bytes"], resident_bytes) < BUDGET_BYTES < bf16_bytes
        say(f"quantize by {method}: {format_bytes(resident_bytes)} resident of {format_bytes(BUDGET_BYTES)}; the model {format_bytes(bf16_bytes)}")
        yield row


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def kill_row(folder: Path, method: str, kills: int, say: Callable[[str], None]) -> dict[str, Any]:
    """SIGKILL at moments drawn over a whole run's length, each run going on from what the last one left, until `kills` of them have met a running process."""
    whole, out, draw = folder / f"whole-{method}", folder / f"killed-{method}", random.Random(SEED)
    began = time.monotonic()
    run_watched([*command(MODEL, whole, method), "--json"])
    duration_s, expected = time.monotonic() - began, digests(whole)
    met = finished = wrong = 0
    while met < kills:
        process = subprocess.Popen(command(MODEL, out, method, "--json"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=draw.uniform(0.0, duration_s))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            met += 1
        if out.exists():  # whole, then: compared to the byte, and the next run begins anew
            finished += 1
            wrong += digests(out) != expected
            for path in out.iterdir():
                path.unlink()
            os.rmdir(out)
    if not out.exists():
        run_watched([*command(MODEL, out, method), "--json"])
        finished, wrong = finished + 1, wrong + (digests(out) != expected)
    say(f"{met} kills by SIGKILL ({method}): {finished} outputs, {wrong} of them not the same bytes")
    return {"part": "kill", "method": method, "kills": met, "outputs": finished, "different": wrong, "run_s": duration_s, "holds": not wrong}


def running_case(model: str, attention: str) -> dict[str, Any]:
    """Runs a quantized folder in this process: predicted and measured peak, and which weights it holds."""
    import tradespace as ts

    with ts.open(model, memory="2GiB", context=512, concurrency=4, weights="stored", attention=attention) as llm:
        params = ts.SamplingParams(max_tokens=96, temperature=0, ignore_eos=True)
        llm.generate([[(31 * row + 7 * column) % 4000 + 20 for column in range(384)] for row in range(4)], [params] * 4)
        report, weights = llm.report(), llm.plan.weights
        peak = report.line("peak of the process")
        held = {"weights": weights.describe(), "layout": weights.layout, "weight_bytes": report.line("weights").measured}
        return held | {"predicted_bytes": peak.predicted.value, "measured_bytes": peak.measured, "resident_bytes": report.line("peak resident size").measured}


def running_rows(folder: Path, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The random model of `memory_rows`, as it was written in int4, with torch and with the native kernels."""
    for attention in ("sdpa", "native"):
        arguments = [sys.executable, "-m", "tradespace.lab.quantizing", json.dumps([str(folder / MEMORY_METHODS[0]), attention])]
        found, _ = run_watched(arguments)
        error = found["measured_bytes"] / found["predicted_bytes"] - 1
        say(f"int4, {attention}: {format_bytes(found['measured_bytes'])} measured, {error:+.1%} off the ledger")
        yield {"part": "running", "method": attention, **found, "error": error, "holds": abs(error) <= BAR}


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """quick: one method, four kills."""
    from tradespace.loading.resolve import resolve

    rows: list[dict[str, Any]] = []
    cache_folder().mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="quantizing-", dir=cache_folder()) as name:
        folder = Path(name)
        rows += memory_rows(folder, resolve(MODEL).weights[0], say)
        rows += running_rows(folder, say)
        rows += [kill_row(folder, method, 4 if quick else KILLS, say) for method in KILL_METHODS[: 1 if quick else None]]
    notes = "resident: the kernel's high-water mark of the whole process, torch included; kills at moments drawn evenly over a run's length"
    return new_record("quantize_safety", command=command_line(), device=this_machine(), repeats=1, rows=rows, notes=notes)


def markdown(record: Record) -> str:
    header = ("method", "the model in bf16", "budget", "sampled peak", "resident peak", "written", "kept")
    keys = ("bf16_bytes", "budget_bytes", "measured_bytes", "resident_bytes", "written_bytes")
    rows = [(row["method"], *(format_bytes(row[key]) for key in keys), "yes" if row["holds"] else "NO") for row in record.rows if row["part"] == "memory"]
    running = [row for row in record.rows if row["part"] == "running"]
    ran = [
        (row["method"], row["weights"], *(format_bytes(row[key]) for key in ("predicted_bytes", "measured_bytes")), f"{row['error']:+.1%}") for row in running
    ]
    second = markdown_table(("attention", "weights", "ledger's peak", "measured peak", "difference"), ran, left=2)
    kills = [row for row in record.rows if row["part"] == "kill"]
    told = "; ".join(f"{row['method']}: killed {row['kills']} times, {row['outputs']} outputs, {row['different']} with other bytes" for row in kills)
    return f"{markdown_table(header, rows)}\n\n{second}\n\n{told}."


if __name__ == "__main__":
    print(json.dumps(running_case(*json.loads(sys.argv[1]))))
