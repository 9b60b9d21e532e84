"""Schemas that the grammar library enforces are let through; those of which it drops a part are refused, each shown with a value that it lets by."""

from __future__ import annotations

import json
import random
from itertools import product

import jsonschema
import numpy as np
import pytest

from tradespace.errors import InputError
from tradespace.lab.serving.schemas import draw_schemas
from tradespace.server.json_schema import MOST_CHARS, bounded, check_enforced, schema_ebnf

# schema, and a value that breaks it though it keeps the library's grammar
DROPPED = [
    ({"type": "number", "multipleOf": 0.5}, "1.3"),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "[1, 1]"),
    ({"not": {"type": "string"}}, '"a"'),
    ({"allOf": [{"type": "integer"}, {"type": "integer", "minimum": 3}]}, "2"),
    ({"if": {"type": "string"}, "then": {"type": "string", "minLength": 3}}, '"a"'),
    ({"type": "string", "pattern": "a", "minLength": 4}, '"a"'),
    ({"type": "string", "format": "date", "maxLength": 3}, '"2020-01-01"'),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "1"),
    ({"anyOf": [{"type": "integer", "minimum": 3}, {"type": "string"}], "type": "integer"}, '"a"'),
    ({"enum": [1, 7], "minimum": 5, "type": "integer"}, "1"),
    ({"const": "a", "type": "integer"}, '"a"'),
    ({"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "properties": {"ab": {"type": "string"}}}, '{"ab": "x"}'),
    ({"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}}, '{"a": 1}'),
    ({"properties": {"a": {"type": "integer"}}, "required": ["a", "zz"]}, '{"a": 1}'),
    ({"minLength": 3}, '"a"'),
    ({"minimum": 3}, "1"),
]


@pytest.mark.parametrize(("schema", "value"), DROPPED)
def test_what_is_dropped_in_silence_is_refused_by_name(schema, value):
    from xgrammar import Grammar
    from xgrammar.testing import _is_grammar_accept_string

    # the reason for refusing it still holds: the library takes a value that breaks the schema
    assert not jsonschema.Draft202012Validator(schema).is_valid(json.loads(value))
    assert _is_grammar_accept_string(Grammar.from_json_schema(json.dumps(schema), any_whitespace=False), value)
    with pytest.raises(InputError, match=r"enforce|describe|does not have"):
        check_enforced({"type": "object", "properties": {"inside": schema}})


@pytest.mark.parametrize(
    "schema",
    [
        {"title": "a", "type": "object", "properties": {"a": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None, "title": "A"}}},
        {"oneOf": [{"type": "object", "properties": {"k": {"const": k}}, "required": ["k"]} for k in "ab"], "discriminator": {"propertyName": "k"}},
        {"$defs": {"n": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}}}, "$ref": "#/$defs/n"},
        {"type": "integer", "multipleOf": 7},
        {"enum": ["a", 1, None], "description": "one of them"},
    ],
)
def test_what_clients_generate_is_let_through(schema):
    check_enforced(schema)


def test_drawn_schemas_are_of_many_kinds_and_all_enforced():
    schemas = draw_schemas(200, seed=3)
    for schema in schemas:
        jsonschema.Draft202012Validator.check_schema(schema)
        check_enforced(schema)
    text = json.dumps(schemas)
    assert all(f'"{word}"' in text for word in ("pattern", "maxLength", "prefixItems", "oneOf", "$ref", "multipleOf", "exclusiveMinimum", "const", "format"))


@pytest.mark.parametrize("lengths", [{"maxLength": 3}, {"minLength": 2, "maxLength": 2}, {"minLength": 2}, {"maxLength": 0}])
def test_lengths_written_as_a_pattern_take_the_same_strings(lengths):
    from xgrammar import Grammar
    from xgrammar.testing import _is_grammar_accept_string

    schema = {"type": "string", **lengths}
    assert "pattern" in bounded(schema)
    plain, written = (Grammar.from_json_schema(json.dumps(each), any_whitespace=False) for each in (schema, bounded(schema)))
    for text in ("".join(letters) for n in range(5) for letters in product('a"\\é\n', repeat=n)):
        taken = _is_grammar_accept_string(written, f'"{text}"')
        assert taken == _is_grammar_accept_string(plain, f'"{text}"'), text
        if taken:
            jsonschema.validate(json.loads(f'"{text}"'), schema)


def _ebnf(schema) -> str:
    from xgrammar import Grammar

    return schema_ebnf(bounded(schema), lambda marked: str(Grammar.from_json_schema(json.dumps(marked), any_whitespace=False)))


LONG = (129, 255, 1000, 5000)


@pytest.mark.parametrize(("least", "most"), [(0, n) for n in LONG] + [(3, 129), (128, 500), (200, 1000), (300, None), (300, 300)])
def test_long_strings_are_counted_to_the_character(least, most):
    from xgrammar import Grammar
    from xgrammar.testing import _is_grammar_accept_string

    schema = {"type": "string"} | ({"minLength": least} if least else {}) | ({} if most is None else {"maxLength": most})
    grammar = Grammar.from_ebnf(_ebnf(schema))
    assert most is None or f"max_chars={most}" in str(grammar)
    for count in sorted({0, 1, least - 1, least, least + 1, 400, *(() if most is None else (most - 1, most, most + 1))} - {-1}):
        for letter in "aé🙂" if count < 600 else "a":  # one character each, of one, two and four bytes
            keeps = least <= count and (most is None or count <= most)
            assert _is_grammar_accept_string(grammar, f'"{letter * count}"') == keeps, (count, letter)


def with_long_strings(schema, draw: random.Random):
    """The schema with some of its strings' bounds far apart, or far away."""
    if isinstance(schema, list):
        return [with_long_strings(inner, draw) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: inner if name in ("enum", "const") else with_long_strings(inner, draw) for name, inner in schema.items()}
    if found.get("type") == "string" and "maxLength" in found:
        found["maxLength"] += draw.choice((0, 130, 251, 700))
    return found


# characters, parts of them, and several with a string's end among them
BYTES = [bytes([byte]) for byte in (*range(0x20, 0x7F), *range(0x80, 0xC0), 0xC3, 0xE6)]
BYTES += [b'", "', b"the quick brown fox", b'"}', b"\xc3\xa9", b"\xe6\x97", "日本🙂".encode()]


def walk(compiled, draw: random.Random, most: int = 6000) -> str | None:
    """A text by drawing tokens that the matcher allows; None: it has no end yet."""
    import torch
    from xgrammar import GrammarMatcher

    matcher, bitmask, text = GrammarMatcher(compiled), torch.empty(1, (len(BYTES) + 32) // 32, dtype=torch.int32), b""
    for _ in range(most):
        matcher.fill_next_token_bitmask(bitmask)
        allowed = np.flatnonzero(np.unpackbits(bitmask.numpy().view(np.uint8)[0], bitorder="little")[: len(BYTES) + 1])
        token = int(allowed[-1] if allowed[-1] == len(BYTES) else draw.choice(allowed))
        assert matcher.accept_token(token)
        if token == len(BYTES):
            return text.decode()
        text += BYTES[token]
    return None


COUNT = 25


@pytest.mark.parametrize("part", range(4))
def test_drawn_schemas_with_long_strings_are_kept_and_lose_nothing(part):
    """What the counted grammar makes keeps the schema (by jsonschema) and the library's own grammar; what the library's own makes is taken, too."""
    import xgrammar
    from xgrammar.testing import _is_grammar_accept_string

    info = xgrammar.TokenizerInfo([*BYTES, b"</s>"], xgrammar.VocabType.RAW, stop_token_ids=[len(BYTES)])
    compiler, draw = xgrammar.GrammarCompiler(info, max_threads=1), random.Random(part)
    schemas = [with_long_strings(schema, draw) for schema in draw_schemas(8 * COUNT, seed=20 + part)]
    # times are not those of the library: `bounded` narrows them
    schemas = [schema for schema in schemas if "[max_chars=" in _ebnf(schema) and '"time"' not in json.dumps(schema)][:COUNT]
    assert len(schemas) == COUNT
    for schema in schemas:
        library = xgrammar.Grammar.from_json_schema(json.dumps(schema), any_whitespace=False)
        counted = xgrammar.Grammar.from_ebnf(_ebnf(schema))
        for made, other in ((counted, library), (library, counted)):
            text = walk(compiler.compile_grammar(made), draw)
            assert text is not None, schema
            assert _is_grammar_accept_string(other, text), (schema, text)
            jsonschema.validate(json.loads(text), schema)


def test_a_time_ends():
    from xgrammar import Grammar
    from xgrammar.testing import _is_grammar_accept_string

    for name, before in (("time", ""), ("date-time", "2024-02-29T")):
        grammar = Grammar.from_json_schema(json.dumps(bounded({"type": "string", "format": name})), any_whitespace=False)
        for rest, good in (("23:59:59Z", True), ("00:00:00.123456789+05:30", True), ("00:00:00.1234567890Z", False), ("24:00:00Z", False), ("12:00:00", False)):
            assert _is_grammar_accept_string(grammar, f'"{before}{rest}"') == good


def test_only_schemas_are_written_anew():
    """Values that look like schemas, and strings that ask for more, stay; what is malformed is the library's to refuse."""
    schema = {
        "type": "object",
        "properties": {"format": {"type": "string", "format": "time"}, "a": {"type": "array", "items": {"type": "string", "maxLength": 2}}},
        "enum": [{"type": "string", "maxLength": 2}],
        "default": {"type": "string", "maxLength": 2},
    }
    found = bounded(schema)
    assert "pattern" in found["properties"]["format"] and "pattern" in found["properties"]["a"]["items"]
    assert {name: found[name] for name in ("type", "enum", "default")} == {name: schema[name] for name in ("type", "enum", "default")}
    for same in (
        {"type": "string", "maxLength": MOST_CHARS + 1}, {"type": "string", "minLength": 3, "maxLength": 2}, {"type": "string", "maxLength": -1},
        {"type": "string", "maxLength": True}, {"type": "string", "pattern": "a", "maxLength": 3}, {"type": "string", "enum": ["a"], "maxLength": 3},
        {"type": ["string", "null"], "maxLength": 3}, {"type": "string"}, True, {"type": "string", "format": "date"}, {"type": "string", "format": []},
        {"type": {}, "maxLength": 3},
    ):  # fmt: skip
        assert bounded(same) == same
