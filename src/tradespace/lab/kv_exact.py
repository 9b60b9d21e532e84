"""Do all ways to hold the past that are declared exact give what the full cache gives? Greedy tokens and logits, on real weights in fp32.

Tokens: a ragged batch of eight prompts of WikiText whose outputs end at `LENGTH` tokens, once over the full contiguous cache, then over every exact
combination of layout, store, kernel, size of step and sharing; the batch of two that is rebuilt at every step ends at `REBUILT_LENGTH`. A token may differ
where the full cache's two best logits lie within TIE of each other, as the design states ties; what follows it in that request is then not compared.

Logits: a layer's input and rebuilt keys and values against the full cache, over the same tokens fed one by one, as the largest absolute difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tradespace.lab.common import command_line, markdown_table, read_text
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Record, new_record
from tradespace.spec.kv import KVPlan, Retain, model_refusal, pointless

if TYPE_CHECKING:
    from tradespace.engine.request import Completion
    from tradespace.llm import LLM
    from tradespace.spec.plan import Plan

MODELS = ("smollm2-135m", "gemma3-270m")
LENGTH, REBUILT_LENGTH, OUTPUT, SEQUENCES = 1024, 64, 48, 8
TIE, LOGITS_BAR = 1e-3, 1e-4
FED = 16  # tokens fed one by one after a prompt, whose logits are compared


@dataclass(frozen=True, kw_only=True)
class Way:
    """A combination: the cache, and what of the plan changes with it."""

    name: str
    kv: KVPlan
    attention: str = "sdpa"
    step_tokens: int = 512
    rebuilds: bool = False


def _full(**kv) -> KVPlan:
    return KVPlan(**{"layout": "contiguous", "store": "fp32", **kv})


FULL = Way(name="full, contiguous", kv=_full())
WAYS = (
    Way(name="paged(1)", kv=_full(layout="paged", block_size=1)),
    Way(name="paged(16)", kv=_full(layout="paged", block_size=16)),
    Way(name="paged(256)", kv=_full(layout="paged", block_size=256)),
    Way(name="paged(16), shared prefixes", kv=_full(layout="paged", block_size=16, prefix_sharing=True)),
    Way(name="paged(16), steps of 96", kv=_full(layout="paged", block_size=16), step_tokens=96),
    Way(name="contiguous, chunked", kv=_full(), attention="chunked"),
    Way(name="paged(16), reference", kv=_full(layout="paged", block_size=16), attention="reference"),
    Way(name="layer input, paged(16)", kv=_full(layout="paged", block_size=16, store="x-fp32")),
    Way(name="layer input, contiguous", kv=_full(store="x-fp32")),
)
REBUILT = (
    Way(name="recent 8, rebuilt", kv=_full(retain=Retain(kind="recent", recent=8)), rebuilds=True),
    Way(name="recent 8, rebuilt, paged(16)", kv=_full(layout="paged", block_size=16, retain=Retain(kind="recent", recent=8)), rebuilds=True),
    Way(name="token ids, rebuilt", kv=_full(retain=Retain(kind="recent", recent=0)), rebuilds=True),
)


def refusals(llm: LLM, way: Way) -> str | None:
    """Why the engine refuses a combination for this model: its tokens are then not compared. What is merely pointless still has its logits compared."""
    return model_refusal(llm.spec, way.kv) or pointless(llm.spec, way.kv)


def prompts_of(llm: LLM, sequences: int, length: int, output: int) -> list[list[int]]:
    """Token ids: consecutive passages whose lengths differ, the longest so that its output ends at `length`; the first two share their first half."""
    ids = llm.tokenizer.encode(read_text("wikitext2", "wiki.test.raw")[: 40 * sequences * length], add_special_tokens=False)
    longest, found, at = length - output, [], 0
    for row in range(sequences):
        size = longest - row * longest // (2 * sequences)
        found.append(ids[at : at + size])
        at += size
    if sequences > 1:
        half = len(found[1]) // 2
        found[1] = found[0][:half] + found[1][half:]
    return found


def plan_of(base: Plan, way: Way, sequences: int, length: int) -> Plan:
    """`base` with the cache, kernel and step of `way`, and room for the whole batch."""
    block = way.kv.block_slots(length) if way.kv.layout == "paged" else 1
    slots = sequences * -(-length // block) * block
    changes = {"attention": way.attention, "step_tokens": way.step_tokens, "max_sequences": sequences, "max_context": length, "kv_tokens": slots}
    return replace(base, kv=way.kv, memory_bytes=0, **changes)


def answers(model: str, plan: Plan, prompts: Sequence[Sequence[int]], output: int) -> list[Completion]:
    """Greedy outputs of all prompts together, with the two best logits of every token."""
    import tradespace as ts

    params = ts.SamplingParams(max_tokens=output, temperature=0, ignore_eos=True, logprobs=2)
    with ts.open(model, plan=plan) as llm:
        return llm.generate([list(prompt) for prompt in prompts], [params] * len(prompts))


def gap(completion: Completion, at: int) -> float:
    """Between the two best logits of the token `at`: the difference of their log-probabilities."""
    (_, first), (_, second) = completion.logprobs[at].top[:2]
    return first - second


def compare(full: Sequence[Completion], other: Sequence[Completion]) -> dict[str, int]:
    """Tokens that are equal, requests that end their comparison at a tie, requests that differ where there is none."""
    equal = ties = different = 0
    for a, b in zip(full, other, strict=True):
        first = next((at for at, (x, y) in enumerate(zip(a.output_ids, b.output_ids, strict=True)) if x != y), None)
        equal += len(a.output_ids) if first is None else first
        if first is not None:
            is_tie = gap(a, first) < TIE
            ties, different = ties + is_tie, different + (not is_tie)
    return {"requests": len(full), "equal_tokens": equal, "ties": ties, "different": different}


def logits_error(llm: LLM, kv: KVPlan, prompts: Sequence[Sequence[int]]) -> float:
    """Largest difference of any logit from the full cache's, over the last prompt position and FED - 1 tokens more."""
    from tradespace.lab.kv_quality import Reader

    length = min(len(prompt) for prompt in prompts)
    windows = [list(prompt[:length]) for prompt in prompts]
    readers = [Reader(llm.transformer, held, len(windows), length) for held in (_full(), kv)]
    worst = 0.0
    for start, end in [(0, length - FED), *((at, at + 1) for at in range(length - FED, length))]:
        a, b = (reader.feed([window[start:end] for window in windows]) for reader in readers)
        worst = max(worst, float((a - b).abs().max()))
    return worst


def rows_of(model: str, ways: Sequence[Way], sequences: int, length: int, output: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row a combination; the full cache's answers are computed once for all of them."""
    import tradespace as ts

    with ts.open(model, memory="6GiB", concurrency=sequences, context=length, weights="fp32", attention="sdpa", kv_store="fp32") as llm:
        base, prompts = llm.plan, prompts_of(llm, sequences, length, output)
        refused = {way.name: refusals(llm, way) for way in ways}
        errors = {way.name: logits_error(llm, way.kv, prompts[:2]) for way in ways if way.rebuilds or way.kv.of_input}
    full = answers(model, plan_of(base, FULL, sequences, length), prompts, output)
    rows = []
    for way in ways:
        row: dict[str, Any] = {"model": model, "way": way.name, "length": length, "sequences": sequences, "output": output, "refused": refused[way.name] or ""}
        row["logits_error"] = errors.get(way.name)
        told = "" if row["logits_error"] is None else f", logits within {row['logits_error']:.1e}"
        if not row["refused"]:
            row |= compare(full, answers(model, plan_of(base, way, sequences, length), prompts, output))
            told = f" {row['equal_tokens']} of {sequences * output} tokens equal, {row['ties']} ties, {row['different']} differ{told}"
        row["holds"] = not row.get("different") and (errors.get(way.name) or 0.0) <= LOGITS_BAR
        say(f"{model}, {way.name}:{told}")
        rows.append(row)
    return rows


def run(*, quick: bool, say: Callable[[str], None]) -> Record:
    """quick: SmolLM2 alone, four sequences to 256 tokens, three ways of each kind."""
    rows: list[dict[str, Any]] = []
    for model in MODELS[:1] if quick else MODELS:
        rows += rows_of(model, WAYS[1::3] if quick else WAYS, 4 if quick else SEQUENCES, 256 if quick else LENGTH, 16 if quick else OUTPUT, say)
        rows += rows_of(model, REBUILT, 2, REBUILT_LENGTH, 16 if quick else 32, say)
    notes = f"fp32 weights and activations, greedy; a tie: the full cache's two best logits within {TIE:g}; logits compared over {FED + 1} positions"
    return new_record("kv_exact", command=command_line(), device=this_machine(), repeats=1, rows=rows, notes=notes)


def markdown(record: Record) -> str:
    header = ("model", "cache", "batch", "tokens", "equal", "ended at a tie", "differ", "logits within", "holds")
    table = []
    for row in record.rows:
        batch = f"{row['sequences']} × {row['length']:,}"
        error = "" if row["logits_error"] is None else f"{row['logits_error']:.1e}"
        counts = ("not run",) * 3 if row["refused"] else (f"{row['equal_tokens']:,}", str(row["ties"]), str(row["different"]))
        figures = (f"{row['sequences'] * row['output']:,}", *counts, error)
        table.append((row["model"], row["way"], batch, *figures, "yes" if row["holds"] else "NO"))
    refused = {f"{row['model']}, {row['way']}: {row['refused']}" for row in record.rows if row["refused"]}
    told = "".join(f"\n\nTokens not compared, as the engine refuses it: {reason}." for reason in sorted(refused))
    return (
        f"{markdown_table(header, table, left=2)}\n\nGreedy tokens against the full contiguous cache in fp32. Equal: tokens before a request's first "
        f"difference; a request ends at a tie where the two best logits lie within {TIE:g}. Logits of rebuilt and rematerialised caches: bar {LOGITS_BAR:g}."
        f"{told}"
    )
