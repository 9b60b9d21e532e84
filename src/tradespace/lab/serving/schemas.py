"""JSON schemas of every kind that a server enforces, drawn at random: what a test of constrained output is worth depends on their variety."""

from __future__ import annotations

import random
from typing import Any

NAMES = ("name", "age", "city", "tags", "score", "active", "kind", "items", "note", "when", "price", "unit", "id", "parent", "état", "a b")
PATTERNS = ("[a-z]{2,5}", "^[A-Z][0-9]{3}$", "^(red|green|blue)$", "[0-9]{4}-[0-9]{2}", "^[^ ]{1,8}$", "^\\w{1,6}@\\w{1,4}\\.(com|org)$")


def draw_schema(draw: random.Random, depth: int = 2) -> dict[str, Any]:
    """One schema: scalars with bounds, patterns, lengths, enums and constants, arrays, tuples, objects, unions, references. Its answers are short."""
    kinds = ["string", "pattern", "enum", "const", "integer", "number", "multiple", "boolean", "nullable", "format"]
    if depth:
        kinds += ["object"] * 5 + ["array", "array", "tuple", "union", "tagged", "reference"]
    return _KINDS[draw.choice(kinds)](draw, depth)


def root_schema(draw: random.Random) -> dict[str, Any]:
    """An object, as most clients ask for."""
    return _object(draw, 2) if draw.random() < 0.8 else draw_schema(draw, 2)


def _string(draw: random.Random, depth: int) -> dict[str, Any]:
    least = draw.randint(0, 3)
    more = draw.randint(130, 300) if draw.random() < 0.1 else draw.randint(1, 8)  # long ones are counted otherwise (`server/json_schema.py`)
    return {"type": "string", "minLength": least, "maxLength": least + more}


def _integer(draw: random.Random, depth: int) -> dict[str, Any]:
    low = draw.choice((-100, -1, 0, 1, 17, 1000))
    bounds = {draw.choice(("minimum", "exclusiveMinimum")): low, draw.choice(("maximum", "exclusiveMaximum")): low + draw.choice((2, 9, 100, 12345))}
    return {"type": "integer", **bounds}


def _number(draw: random.Random, depth: int) -> dict[str, Any]:
    low = draw.choice((-2.5, 0, 0.25, 10))
    return {"type": "number", "minimum": low, "maximum": low + draw.choice((0.5, 1, 40))}


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(NAMES, draw.randint(1, 4))
    properties = {name: draw_schema(draw, max(0, depth - 1)) for name in names}
    required = draw.sample(names, draw.randint(0, len(names)))
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(draw: random.Random, depth: int) -> dict[str, Any]:
    least = draw.randint(0, 2)
    return {"type": "array", "items": draw_schema(draw, depth - 1), "minItems": least, "maxItems": least + draw.randint(0, 2)}


def _tuple(draw: random.Random, depth: int) -> dict[str, Any]:
    parts = [draw_schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}


def _tagged(draw: random.Random, depth: int) -> dict[str, Any]:
    def option(tag: str) -> dict[str, Any]:
        properties = {"kind": {"const": tag}, "value": draw_schema(draw, depth - 1)}
        return {"type": "object", "properties": properties, "required": ["kind", "value"], "additionalProperties": False}

    return {"oneOf": [option(tag) for tag in ("circle", "square", "line")[: draw.randint(2, 3)]]}


def _reference(draw: random.Random, depth: int) -> dict[str, Any]:
    return {
        "type": "object", "properties": {"first": {"$ref": "#/$defs/part"}, "second": {"anyOf": [{"$ref": "#/$defs/part"}, {"type": "null"}]}},
        "required": ["first", "second"], "additionalProperties": False, "$defs": {"part": draw_schema(draw, 0)},
    }  # fmt: skip


_KINDS = {
    "string": _string,
    "pattern": lambda draw, depth: {"type": "string", "pattern": draw.choice(PATTERNS)},
    "enum": lambda draw, depth: {"enum": draw.sample(["red", "grün", "blue", 3, 4.5, True, None, "a \"quoted\" one"], draw.randint(1, 4))},
    "const": lambda draw, depth: {"const": draw.choice(["v1", 7, False])},
    "integer": _integer,
    "number": _number,
    "multiple": lambda draw, depth: {"type": "integer", "multipleOf": draw.choice((2, 5, 7)), "minimum": 0, "maximum": draw.choice((50, 1000))},
    "boolean": lambda draw, depth: {"type": "boolean"},
    "nullable": lambda draw, depth: {"type": ["integer", "null"], "minimum": 0, "maximum": 10**6},
    "format": lambda draw, depth: {"type": "string", "format": draw.choice(("date", "time", "uuid", "ipv4"))},
    "object": _object,
    "array": _array,
    "tuple": _tuple,
    "union": lambda draw, depth: {"anyOf": [draw_schema(draw, depth - 1) for _ in range(draw.randint(2, 3))]},
    "tagged": _tagged,
    "reference": _reference,
}  # fmt: skip


def without_nested_definitions(schema: dict[str, Any]) -> bool:
    """Whether references in it resolve: their definitions stand at the root alone."""

    def nested(value: Any, root: bool) -> bool:
        if isinstance(value, dict):
            return ("$defs" in value and not root) or any(nested(inner, False) for inner in value.values())
        return isinstance(value, list) and any(nested(inner, False) for inner in value)

    return not nested(schema, True)


def draw_schemas(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """`count` schemas, no two alike."""
    draw, found, seen = random.Random(seed), list[dict[str, Any]](), set[str]()
    while len(found) < count:
        schema = root_schema(draw)
        if without_nested_definitions(schema) and repr(schema) not in seen:
            seen.add(repr(schema))
            found.append(schema)
    return found
