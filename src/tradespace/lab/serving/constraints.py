"""Does constrained output keep its schema whatever the temperature, and what does it cost? 500 schemas of every kind; a batch of 8 with and without."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tradespace.errors import UnsupportedError
from tradespace.lab.common import command_line, markdown_table
from tradespace.lab.serving.asking import Ask, Target
from tradespace.lab.serving.load import Run, closed_loop
from tradespace.lab.serving.process import MODEL, Server
from tradespace.lab.serving.schemas import draw_schemas
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Figure, Record, new_record

TEMPERATURE, BATCH, MOST_COST = 1.5, 8, 0.10
WORDS = ("--memory", "1GiB", "--max-num-seqs", str(BATCH), "--context", "2048")
# an array long enough that max_tokens ends it: both ways then make the same number of tokens
ENDLESS = {
    "type": "array", "minItems": 64,
    "items": {
        "type": "object", "required": ["name", "age", "tags"], "additionalProperties": False,
        "properties": {
            "name": {"type": "string", "minLength": 4, "maxLength": 24}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
        },
    },
}  # fmt: skip


def response_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def fault_of(text: str, schema: Any) -> str | None:
    """Why an answer does not keep its schema, or None. By the jsonschema package, which has no part in making the answer."""
    try:
        from jsonschema import Draft202012Validator
    except ModuleNotFoundError as error:
        raise UnsupportedError("this experiment checks answers with jsonschema. Run: pip install 'tradespace[lab]'") from error
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"not JSON: {error}"
    broken = next(Draft202012Validator(schema).iter_errors(value), None)
    return None if broken is None else broken.message[:200]


def valid(server: Server, count: int, say: Callable[[str], None]) -> dict[str, Any]:
    """`count` schemas, each asked for once at the temperature."""
    schemas = draw_schemas(count)
    target = server.target(endpoint="chat", exact_length=False, stream=False, timeout_s=3600)
    asks = [
        Ask(prompt=12, output=1024, body={"temperature": TEMPERATURE, "seed": index, "response_format": response_format(s)}) for index, s in enumerate(schemas)
    ]
    found = asyncio.run(closed_loop(target, asks, concurrency=BATCH))
    faults: list[dict[str, Any]] = []
    kept = 0
    for answer in found.answers:
        schema = answer.ask.body["response_format"]["json_schema"]["schema"]
        fault = answer.error or ("cut off at max_tokens" if answer.finish == "length" else fault_of(answer.text, schema))
        kept += fault is None
        if fault is not None:
            faults.append({"schema": schema, "text": answer.text[:500], "fault": fault})
    say(f"valid: {kept} of {count} at temperature {TEMPERATURE}")
    used = Counter(word for schema in schemas for word in _keywords(schema))
    return {
        "part": "valid", "asked": count, "kept": kept, "temperature": TEMPERATURE, "faults": faults, "keywords": dict(used.most_common()),
        "output_tokens": sum(answer.output_tokens for answer in found.answers), "wall_s": found.wall_s,
    }  # fmt: skip


def _keywords(value: Any) -> list[str]:
    """Keywords of a schema, without the names of its properties."""
    found: list[str] = []
    if isinstance(value, dict):
        for key, inner in value.items():
            found.append(key)
            named = key in ("properties", "$defs") and isinstance(inner, dict)
            found += [word for part in (inner.values() if named else [inner] if key not in ("const", "enum") else []) for word in _keywords(part)]
    elif isinstance(value, list):
        found += [word for part in value for word in _keywords(part)]
    return found


def cost(server: Server, rounds: int, tokens: int, say: Callable[[str], None]) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Tokens a second of a batch of 8 with and without a schema, in turn; median of paired ratios."""
    target = server.target(endpoint="chat", stream=False)
    plain, bound = {"temperature": 1.0}, {"temperature": 1.0, "ignore_eos": False, "response_format": response_format(ENDLESS)}
    speeds: dict[str, list[float]] = {"free": [], "constrained": []}
    first_s = batch(target, {**bound, "max_tokens": 1}, 1).answers[0].e2e_s  # the library is loaded and the grammar compiled here
    for turn in range(rounds + 1):
        for name in ("free", "constrained") if turn % 2 else ("constrained", "free"):
            run = batch(target, {**(plain if name == "free" else bound), "seed": turn}, tokens)
            made = [answer.output_tokens for answer in run.answers]
            assert made == [tokens] * BATCH, f"{name}: answers of {made} tokens, {tokens} wanted; {[answer.error for answer in run.answers]}"
            if turn:  # the first round warms up
                speeds[name].append(sum(made) / run.wall_s)
    ratios = [a / b for a, b in zip(speeds["constrained"], speeds["free"], strict=True)]
    say(f"cost: constrained at {statistics.median(ratios):.3f} of the tokens a second without")
    figures = {f"cost: {name}": Figure.of(values, "tok/s") for name, values in speeds.items()} | {"cost: constrained over free": Figure.of(ratios, "ratio")}
    return figures, {"part": "cost", "batch": BATCH, "tokens": tokens, "rounds": rounds, "first_s": first_s, "allowed": MOST_COST}


def batch(target: Target, body: dict[str, Any], tokens: int) -> Run:
    """One batch of 8, all at once."""
    asks = [Ask(prompt=32, output=tokens, body={**body, "seed": 100 * body.get("seed", 0) + row}) for row in range(BATCH)]
    return asyncio.run(closed_loop(target, asks, concurrency=BATCH))


def run(*, quick: bool, say: Callable[[str], None], only: Sequence[str]) -> Record:
    """Both parts, or those asked for, on one server."""
    figures: dict[str, Figure] = {}
    rows: list[dict[str, Any]] = []
    with Server(*WORDS) as server:
        if "valid" in only:
            rows.append(valid(server, 40 if quick else 500, say))
        if "cost" in only:
            found, row = cost(server, 3 if quick else 11, 48 if quick else 128, say)
            figures |= found
            rows.append(row)
    notes = f"{MODEL} over HTTP, chat, not streamed; answers checked with jsonschema (draft 2020-12)"
    repeats = max(row.get("asked", 0) or row.get("rounds", 0) for row in rows)
    return new_record("serve-constraints", command=command_line(), device=this_machine(), repeats=repeats, figures=figures, rows=rows, notes=notes)


def markdown(record: Record) -> str:
    table, said = [], list[str]()
    for row in record.rows:
        if row["part"] == "valid":
            verdict = "kept" if row["kept"] == row["asked"] else "MISSED"
            table.append((f"answers that keep their schema at temperature {row['temperature']:g}", f"{row['kept']} of {row['asked']}", "all", verdict))
            said.append(f"{len(row['keywords'])} keywords of JSON Schema occur in the {row['asked']} schemas.")
        else:
            ratio = record.figures["cost: constrained over free"]
            lost = 1 - ratio.median
            verdict = "kept" if lost <= row["allowed"] else "MISSED"
            table.append(
                (
                    f"tokens/s lost to a schema, batch of {row['batch']}",
                    f"{lost:.1%} [{1 - ratio.max:.1%}–{1 - ratio.min:.1%}]",
                    f"{row['allowed']:.0%}",
                    verdict,
                )
            )
            free, bound = (record.figures[f"cost: {name}"].median for name in ("free", "constrained"))
            said.append(f"{bound:,.0f} tokens/s against {free:,.0f}; the first request with a new schema took {row['first_s']:.2f} s, which compiles it.")
    return markdown_table(("", "measured", "wanted", ""), table) + "\n\n" + " ".join(said)
