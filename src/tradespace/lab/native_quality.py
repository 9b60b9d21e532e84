"""Does the native path predict as well as the torch path? Perplexity on WikiText-2 through both, for every kind of packed weight.

The same weights, rounded to nearest in the same format as they are loaded, on the same tokens; the native kernels multiply integer codes by activations
rounded to int8. What is compared is the mean of the same tokens' nats, so a small text says more of the difference than of either value. Formats whose blocks
of 256 do not divide every width of the model hold its down projections, the others being q8_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from tradespace import api
from tradespace.comparing import forward_of
from tradespace.lab.common import command_line, data_file, markdown_table
from tradespace.loading.resolve import ModelFiles, resolve
from tradespace.loading.tokenizer import Tokenizer
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Record, new_record
from tradespace.quality.divergence import standard_error
from tradespace.quality.perplexity import token_nats
from tradespace.quality.text import Text, encode_text
from tradespace.spec import native
from tradespace.spec.formats import FORMATS, refusal
from tradespace.spec.model import ModelSpec
from tradespace.spec.plan import Plan

MODEL = "smollm2-135m"
CONTEXT, TOKENS, QUICK_TOKENS = 512, 6144, 1024
QUICK_KINDS = ("q4", "bf16")
MEMORY = "6GiB"
BAR = 0.003  # of the torch path's perplexity
BESIDE = "q8_0"  # what holds the rest where a format holds the down projections alone


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """A format for each of the native kinds (quick: two of them, on a sixth of the text)."""
    files = resolve(MODEL)
    spec = api.spec_of_files(files)
    text = encode_text(Tokenizer.from_files(files), data_file("wikitext2", "wiki.test.raw"), context=CONTEXT, tokens=QUICK_TOKENS if quick else TOKENS)
    rows: list[dict[str, Any]] = []
    for kind in QUICK_KINDS if quick else native.KINDS:
        name = next(name for name, (held, _) in native.FORMAT_KINDS.items() if held == kind)
        whole = all(refusal(FORMATS[name], width) is None for width in _widths(spec))
        ours, theirs = (_nats(_plan(spec, files, name, attention, whole=whole), text) for attention in ("native", "sdpa"))
        difference = ours - theirs
        row = {"kind": kind, "format": name, "holds_what": "everything" if whole else f"down projections; the rest {BESIDE}", "num_tokens": len(ours)}
        row |= {"native": math.exp(float(ours.mean())), "torch": math.exp(float(theirs.mean())), "change": math.expm1(float(difference.mean()))}
        row |= {"change_error": standard_error(difference), "holds": abs(math.expm1(float(difference.mean()))) <= BAR}
        say(f"{kind} ({name}): {row['native']:.4f} native, {row['torch']:.4f} torch: {row['change']:+.3%} ± {row['change_error']:.3%}")
        rows.append(row)
    notes = f"{MODEL}, WikiText-2 test, {CONTEXT} tokens a window, {text.windows.num_scored:,} scored; keys and values in fp32"
    return new_record("native-quality", command=command_line(), device=this_machine(), repeats=1, rows=rows, notes=notes)


def _widths(spec: ModelSpec) -> set[int]:
    from tradespace.spec.tensors import model_tensors

    return {tensor.shape[-1] for tensor in model_tensors(spec) if len(tensor.shape) > 1}


def _plan(spec: ModelSpec, files: ModelFiles, name: str, attention: str, *, whole: bool) -> Plan:
    pins = {"weights": name if whole else BESIDE, "attention": attention, "kv_store": "fp32", "layout": "paged", "block_size": "16"}
    best = api.plan(spec, memory=MEMORY, context=CONTEXT, concurrency=8, runnable_only=True, pins=pins, stored=api.stored_weights(files, spec)).best
    assert best is not None, f"{MEMORY} hold it"
    return best.plan if whole else replace(best.plan, weights=replace(best.plan.weights, exceptions={**best.plan.weights.exceptions, "down": name}))


def _nats(plan: Plan, text: Text) -> Tensor:
    import tradespace as ts

    with ts.open(MODEL, plan=plan, memory=MEMORY) as llm:
        return token_nats(forward_of(llm, rows=64).logprobs, text.windows)


def markdown(record: Record) -> str:
    header = ("kind", "format", "holds", "perplexity, native", "torch", "change")
    rows = [
        (r["kind"], r["format"], r["holds_what"], f"{r['native']:.5g}", f"{r['torch']:.5g}", f"{r['change']:+.3%} ± {r['change_error']:.3%}")
        for r in record.rows
    ]
    missed = [r["kind"] for r in record.rows if not r["holds"]]
    verdict = "holds everywhere" if not missed else f"DOES NOT hold for {', '.join(missed)}"
    return f"{markdown_table(header, rows, left=3)}\n\n{record.notes}. Bar: within {BAR:.1%} of the torch path: it {verdict}."
