"""What each weight format that runs costs: KL divergence to the same weights in fp32, on WikiText-2 test, with bytes beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tradespace.lab.common import command_line, markdown_table, read_text
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Record, new_record
from tradespace.spec.weights import FORMATS
from tradespace.units import format_bytes

MODELS = ("smollm2-135m", "gemma3-270m")
CONTEXT, WINDOWS = 512, 8
REFERENCE = "fp32"


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    import tradespace as ts
    from tradespace.quality.divergence import compare, next_token_logprobs, windows

    rows = []
    text = read_text("wikitext2", "wiki.test.raw")
    for model in MODELS[:1] if quick else MODELS:
        with ts.open(model, memory="8GiB", weights=REFERENCE, concurrency=1, context=CONTEXT) as reference:
            ids = reference.tokenizer.encode(text[: 200_000 if quick else 600_000], add_special_tokens=False)
            begins = reference.tokenizer.encode("a")[0] == reference.tokenizer.bos_id  # only where the model itself begins its texts so
            texts = windows(ids, CONTEXT, bos_id=reference.tokenizer.bos_id if begins else None, count=2 if quick else WINDOWS)
            base = partial(next_token_logprobs, reference.transformer)
            for name in (name for name, fmt in FORMATS.items() if fmt.runs_since and name != REFERENCE):
                with ts.open(model, memory="8GiB", weights=name, concurrency=1, context=CONTEXT) as llm:
                    found = compare(base, partial(next_token_logprobs, llm.transformer), texts)
                    size = sum(llm.weight_bytes().values())
                row = {"model": model, "format": name, "bytes": size} | {key: getattr(found, key) for key in found.__dataclass_fields__}
                rows.append(row)
                say(f"{model} {name}: KL {found.mean_kl:.2e} nats a token")
    notes = f"windows of {CONTEXT} tokens that do not overlap, WikiText-2 test; KL to the same weights in fp32 with fp32 activations"
    return new_record("quality", command=command_line(), device=this_machine(), repeats=1, rows=rows, notes=notes)


def markdown(record: Record) -> str:
    header = ("model", "format", "weights", "mean KL, nats", "99%", "same top token", "perplexity (fp32)")
    rows = [
        (
            r["model"],
            r["format"],
            format_bytes(r["bytes"]),
            f"{r['mean_kl']:.2e}",
            f"{r['p99_kl']:.2e}",
            f"{r['top1_agreement']:.2%}",
            f"{r['perplexity']:.3f} ({r['reference_perplexity']:.3f})",
        )
        for r in record.rows
    ]
    return markdown_table(header, rows, left=2)
