"""What each weight format that runs costs: KL divergence to the same weights in fp32, on WikiText-2 test, with bytes beside it.

Every format is filled by rounding to nearest; what better quantizers make of it is another experiment's question (`quantizers`). A last row runs the file's own
blocks with the native kernels' int8 activations: what those cost by themselves. The planner ranks by these figures: `lab/figures.py` puts them where it reads
them.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tradespace import api
from tradespace.comparing import STORED, Budget
from tradespace.home import cache_folder
from tradespace.lab.common import command_line, data_file, markdown_table
from tradespace.lab.sweep import RTN, Sweep, choose_pairs, measure_points
from tradespace.loading.gguf import read_gguf
from tradespace.loading.resolve import ModelFiles, resolve
from tradespace.loading.tokenizer import Tokenizer
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Record, commit_of, new_record
from tradespace.quality.text import encode_text
from tradespace.spec.tensors import num_parameters
from tradespace.units import format_bytes

MODELS = ("smollm2-135m", "gemma3-270m")
CONTEXT, TOKENS, QUICK_TOKENS = 512, 1024, 512
QUICK_FORMATS = ("bf16", "int8")
REFERENCE, MEMORY = "fp32", "4GiB"


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """Every format on both models (quick: two formats on the first, on a quarter of the text)."""
    rows, said, protocol = [], [], ""
    device = this_machine()
    folder = cache_folder() / f"quality-{commit_of(Path(__file__).parent)[0][:10]}"
    for model in MODELS[:1] if quick else MODELS:
        files = resolve(model)
        spec = api.spec_of_files(files)
        text = encode_text(Tokenizer.from_files(files), data_file("wikitext2", "wiki.test.raw"), context=CONTEXT, tokens=QUICK_TOKENS if quick else TOKENS)
        protocol = f"{CONTEXT} tokens a window, {text.windows.num_scored:,} scored"
        # a commit's points are kept until the record is there: a run that was stopped goes on
        sweep = Sweep(model=model, files=files, text=text, dtype=REFERENCE, device=device, budget=Budget.of(MEMORY, device), folder=folder)
        pairs = choose_pairs(QUICK_FORMATS if quick else None, [RTN], REFERENCE)
        pairs += [(STORED, RTN)] if files.kind == "gguf" and not device.no_native else []
        found, left_out = measure_points(sweep, pairs, lambda what, done, total: None, say)
        said += [f"{spec.name} has no {fmt}: {why}" for (fmt, _), why in left_out.items()]
        for row in found:
            kind = {"kind": "weights"} if row["format"] != STORED else {"kind": "activations", "format": "int8"}
            rows.append({"model": spec.name, "family": spec.family, "parameters": num_parameters(spec), "stored": stored_as(files)} | row | kind)
            say(f"{model} {kind['kind']} {rows[-1]['format']}: KL {row['mean_kl']:.2e} ± {row['kl_error']:.0e} nats a token")
    notes = f"WikiText-2 test, {protocol}; KL to the same weights in fp32 with fp32 activations; formats filled by rounding to nearest, multiplied by fp32 "
    notes += "activations where the plan is native, else by 16-bit ones" + "".join(f"; {line}" for line in said)
    shutil.rmtree(folder)
    return new_record("quality", command=command_line(), device=device, repeats=1, rows=rows, notes=notes)


def stored_as(files: ModelFiles) -> str:
    """The type that holds most of the file's bytes. A format on the same grid as that loses next to nothing more: its figure speaks for such a file alone."""
    if files.kind != "gguf":
        return "safetensors"
    found: Counter[str] = Counter()
    for tensor in read_gguf(files.weights[0]).tensors.values():
        found[tensor.type_name] += tensor.nbytes
    return found.most_common(1)[0][0]


def markdown(record: Record) -> str:
    header = ("model (stored)", "format", "weights", "bits", "mean KL, nats", "99%", "same top token", "perplexity (fp32)")
    rows = [
        (
            f"{r['model']} ({r['stored']})",
            r["format"] if r["kind"] == "weights" else f"as stored, activations {r['format']}",
            format_bytes(r["bytes"]),
            f"{r['bits_per_weight']:.2f}",
            f"{r['mean_kl']:.3g} ± {r['kl_error']:.1g}",
            f"{r['p99_kl']:.3g}",
            f"{r['top1_agreement']:.2%}",
            f"{r['perplexity']:.5g} ({r['reference_perplexity']:.5g})",
        )
        for r in record.rows
    ]
    return markdown_table(header, rows, left=2)
