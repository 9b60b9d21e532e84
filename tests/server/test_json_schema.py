"""Schemas that the grammar library enforces are let through; those of which it drops a part are refused, each shown with a value that it lets by."""

from __future__ import annotations

import json
from itertools import product

import jsonschema
import pytest

from tradespace.errors import InputError
from tradespace.lab.serving.schemas import draw_schemas
from tradespace.server.json_schema import MOST_COUNTED, bounded, check_enforced

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
        {"type": "string", "maxLength": MOST_COUNTED + 1}, {"type": "string", "minLength": 3, "maxLength": 2}, {"type": "string", "maxLength": -1},
        {"type": "string", "maxLength": True}, {"type": "string", "pattern": "a", "maxLength": 3}, {"type": "string", "enum": ["a"], "maxLength": 3},
        {"type": ["string", "null"], "maxLength": 3}, {"type": "string"}, True, {"type": "string", "format": "date"}, {"type": "string", "format": []},
        {"type": {}, "maxLength": 3},
    ):  # fmt: skip
        assert bounded(same) == same
