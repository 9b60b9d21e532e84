"""Does constrained output keep its schema whatever the temperature, and what does it cost? 500 schemas of every kind; a batch of 8 with and without."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tradespace.errors import EngineError, UnsupportedError
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
def endless(string: dict[str, Any]) -> dict[str, Any]:
    person = {"name": string, "age": {"type": "integer", "minimum": 0, "maximum": 150}, "tags": TAGS}
    item = {"type": "object", "properties": person, "required": list(person), "additionalProperties": False}
    return {"type": "array", "minItems": 64, "items": item}


TAGS = {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3}
# the library looks at most tokens anew in each state of a string whose length is bounded: that is told apart
WAYS = {"schema": endless({"type": "string"}), "schema with bounded strings": endless({"type": "string", "minLength": 4, "maxLength": 24})}


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


def cost(server: Server, rounds: int, tokens: int, say: Callable[[str], None]) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """Tokens a second of a batch of 8 without a schema and with one of each kind, in turn; median of paired ratios."""
    target = server.target(endpoint="chat", stream=False)
    bodies: dict[str, dict[str, Any]] = {"free": {"temperature": 1.0}}
    bodies |= {name: {"temperature": 1.0, "ignore_eos": False, "response_format": response_format(schema)} for name, schema in WAYS.items()}
    # the library is loaded and the grammars compiled here
    first_s = {name: batch(target, {**bodies[name], "max_tokens": 1}, 1).answers[0].e2e_s for name in WAYS}
    speeds: dict[str, list[float]] = {name: [] for name in bodies}
    for turn in range(rounds + 1):
        order = [*bodies][turn % len(bodies) :] + [*bodies][: turn % len(bodies)]
        for name in order:
            run = batch(target, {**bodies[name], "seed": turn}, tokens)
            made = [answer.output_tokens for answer in run.answers]
            if made != [tokens] * BATCH:
                raise EngineError(f"{name}: answers of {made} tokens, {tokens} wanted each: {[answer.error for answer in run.answers]}")
            if turn:  # the first round warms up
                speeds[name].append(sum(made) / run.wall_s)
    figures = {f"cost: {name}": Figure.of(values, "tok/s") for name, values in speeds.items()}
    rows = []
    for name in WAYS:
        ratios = [a / b for a, b in zip(speeds[name], speeds["free"], strict=True)]
        figures[f"cost: {name} over free"] = Figure.of(ratios, "ratio")
        rows.append({"part": "cost", "way": name, "batch": BATCH, "tokens": tokens, "rounds": rounds, "first_s": first_s[name], "allowed": MOST_COST})
        say(f"cost, {name}: {statistics.median(ratios):.3f} of the tokens a second without")
    return figures, rows


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
            figures, found = cost(server, 3 if quick else 9, 48 if quick else 128, say)
            rows += found
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
            ratio = record.figures[f"cost: {row['way']} over free"]
            lost = 1 - ratio.median
            verdict = "kept" if lost <= row["allowed"] else "MISSED"
            name = f"tokens/s lost to a {row['way']}, batch of {row['batch']}"
            table.append((name, f"{lost:.1%} [{1 - ratio.max:.1%} – {1 - ratio.min:.1%}]", f"{row['allowed']:.0%}", verdict))
            free, bound = record.figures["cost: free"].median, record.figures[f"cost: {row['way']}"].median
            said.append(f"{row['way'].capitalize()}: {bound:,.0f} tokens/s against {free:,.0f}; the first request with it took {row['first_s']:.2f} s.")
    return markdown_table(("", "measured", "wanted", ""), table) + "\n\n" + " ".join(said)
