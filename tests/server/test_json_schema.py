"""Schemas that the grammar library enforces are let through; those of which it drops a part are refused, each shown with a value that it lets by."""

from __future__ import annotations

import json

import jsonschema
import pytest

from tradespace.errors import InputError
from tradespace.lab.serving.schemas import draw_schemas
from tradespace.server.json_schema import check_enforced

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
