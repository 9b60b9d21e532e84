"""What of JSON Schema the grammar library enforces, and what it passes over in silence: a schema that uses the latter is refused here, with the reason.

The library (xgrammar) drops `not`, `uniqueItems`, conditions and others without an error, and treats `oneOf` as `anyOf`; an answer could then break the schema
that it was promised to keep. Keywords that only describe, and those that the specification (draft 2020-12) makes annotations, are let through.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tradespace.errors import InputError

_DROPPED = (
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef",
    "$recursiveRef",
)  # fmt: skip
_DESCRIBING = frozenset(
    (
        "title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions", "deprecated", "readOnly", "writeOnly",
        "discriminator", "strict", "contentMediaType", "contentEncoding",
    )
)  # fmt: skip
_LENGTHS, _BOUNDS = ("minLength", "maxLength"), ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_NUMBERS = frozenset({"integer", "number"})
# where schemas lie within a schema: by name, in a list, alone
_NAMED, _LISTED = ("properties", "patternProperties", "$defs", "definitions"), ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "propertyNames", "unevaluatedProperties", "unevaluatedItems")
MOST_STATES = 128  # characters that an automaton counts, with a state and 10 ms of compiling for each; beyond, `schema_ebnf` has them counted otherwise
MOST_CHARS = 2**31 - 1  # of the library's counter
_CHARACTER = r'[^"\\\r\n]'
_QUOTED = _CHARACTER.replace("\\", r"\\").replace('"', r"\"")  # as it stands within a string of the library's grammars
_DATE, _TIME = r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,9})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_BOUNDED_FORMATS = {"time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}


def check_enforced(schema: Any) -> None:
    """Raises InputError where an answer could break `schema` though it keeps the grammar made from it. What is malformed is the library's to refuse.

    >>> check_enforced({"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}, "required": ["a"]})
    """
    for where, reason in _unenforced(schema, schema, ""):
        raise InputError(f"the JSON schema at {where or 'its root'} {reason}. Leave it out, or set strict to false to have the rest enforced")


def bounded(schema: Any) -> Any:
    """The schema with two kinds of strings written as patterns: lengths, which the library's automata follow much faster so (strings of the same characters),
    and times, whose fraction of a second would have no last digit otherwise (RFC 3339; here at most nine).

    >>> bounded({"type": "string", "maxLength": 4})
    {'type': 'string', 'pattern': '^[^"\\\\\\\\\\\\r\\\\n]{0,4}$'}
    """
    return _each(schema, _bounded)


def _bounded(schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("format")
    if set(schema) - _DESCRIBING == {"type", "format"} and isinstance(name, str) and name in _BOUNDED_FORMATS:
        return _without(schema, ("format",)) | {"pattern": _BOUNDED_FORMATS[name]}
    if (counts := _counts(schema)) is None or max(counts[0], counts[1] or 0) > MOST_STATES:
        return schema
    return _without(schema, _LENGTHS) | {"pattern": f"^{_CHARACTER}{{{counts[0]},{'' if counts[1] is None else counts[1]}}}$"}


def schema_ebnf(schema: Any, to_ebnf: Callable[[Any], str]) -> str:
    """The library's grammar of a schema, by `to_ebnf`, with strings of more than MOST_STATES characters counted by its matcher, not by an automaton's states:
    compiling takes the same time for any length, and so does a step but for the last 80 characters or so. Raises InputError where a string cannot be so.
    """
    mark, found = f"m{secrets.token_hex(8)}n", list[tuple[int, int | None]]()

    def marked(inner: dict[str, Any]) -> dict[str, Any]:
        if (counts := _counts(inner)) is None or max(counts[0], counts[1] or 0) <= MOST_STATES:
            return inner
        found.append(counts)
        return _without(inner, _LENGTHS) | {"pattern": f"^{mark}{len(found) - 1}e$"}

    def counted(rule: re.Match[str]) -> str:
        least, most = found[int(rule.group(2))]
        words = f"{_CHARACTER}*"
        if least:  # an automaton, as far as it is small
            words = f'Regex("^{_QUOTED}{{{least},}}$", json_string=true)' if least <= MOST_STATES else f"{_CHARACTER}{{{least},}}"
        return f"{rule.group(1)}{'' if most is None else f'[max_chars={most}]'} ::= {words}"

    ebnf = to_ebnf(_each(schema, marked))
    ebnf = re.sub(rf'^(\w+) ::= Regex\("\^{mark}(\d+)e\$", json_string=true\)$', counted, ebnf, flags=re.MULTILINE)
    if mark in ebnf:
        raise InputError(
            f"the JSON schema bounds a string to more than {MOST_STATES} characters where that cannot be enforced. Bound it to fewer, or leave it free"
        )
    return ebnf


def _counts(schema: Mapping[str, Any]) -> tuple[int, int | None] | None:
    """Fewest and most characters of a string of which nothing else is said."""
    keywords = set(schema) - _DESCRIBING - {"type"}
    if schema.get("type") != "string" or not keywords or not keywords <= set(_LENGTHS):
        return None
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    counts = [least] if most is None else [least, most]
    good = all(type(count) is int and 0 <= count <= MOST_CHARS for count in counts) and counts == sorted(counts)
    return (least, most) if good else None


def _without(schema: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if name not in names}


def _each(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A copy with `change` made to every schema in it, from within."""
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for name in _NAMED:
        if isinstance(found.get(name), Mapping):
            found[name] = {key: _each(inner, change) for key, inner in found[name].items()}
    for name in _LISTED:
        if isinstance(found.get(name), list):
            found[name] = [_each(inner, change) for inner in found[name]]
    for name in _SINGLE:
        if name in found:
            found[name] = _each(found[name], change)
    return change(found)


def _unenforced(schema: Any, root: Any, where: str) -> Iterator[tuple[str, str]]:
    if not isinstance(schema, Mapping):
        return
    for keyword in _DROPPED:
        if keyword in schema:
            yield where, f"uses {keyword}, which cannot be enforced"
    if schema.get("uniqueItems"):
        yield where, "uses uniqueItems, which cannot be enforced"
    yield from ((where, reason) for reason in _combined(schema, root))
    yield from ((where, reason) for reason in _typed(schema))
    for name in _NAMED:
        for key, inner in _items(schema.get(name)):
            yield from _unenforced(inner, root, f"{where}/{name}/{key}")
    for name in _LISTED:
        for index, inner in enumerate(_list(schema.get(name))):
            yield from _unenforced(inner, root, f"{where}/{name}/{index}")
    for name in _SINGLE:
        yield from _unenforced(schema.get(name), root, f"{where}/{name}")


def _combined(schema: Mapping[str, Any], root: Any) -> Iterator[str]:
    """Keywords that the library reads alone, dropping what stands beside them."""
    beside = set(schema) - _DESCRIBING
    for keyword in ("$ref", "anyOf", "oneOf", "allOf", "enum", "const"):
        if keyword not in schema:
            continue
        others = sorted(beside - {keyword} - ({"type"} if keyword in ("enum", "const", "allOf") else set()))
        if others:
            yield f"has {', '.join(others)} beside {keyword}, which cannot be enforced together"
    if isinstance(reference := schema.get("$ref"), str) and reference != "#" and not reference.startswith("#/"):
        yield f"refers to {reference[:80]}: only references into the schema itself (#/…) are followed"
    if len(_list(schema.get("allOf"))) > 1:
        yield "combines several schemas with allOf, which cannot be enforced"
    if options := _list(schema.get("oneOf")):
        for index, one in enumerate(options):
            if any(not _disjoint(_resolved(one, root), _resolved(other, root)) for other in options[:index]):
                yield "uses oneOf with options that one value may fit at once, which cannot be enforced. Use anyOf, or tell them apart by a constant property"
                break
    if "type" in schema:
        values = [schema["const"]] if "const" in schema else _list(schema.get("enum"))
        if any(not (_kinds(value) & _types(schema)) for value in values):
            yield "names a type that its enum or const does not have"


def _typed(schema: Mapping[str, Any]) -> Iterator[str]:
    """Keywords that hold only beside a type, or not beside each other."""
    types = _types(schema)
    given = [name for name in (*_LENGTHS, "pattern", *_BOUNDS) if name in schema]
    for name in _LENGTHS:
        if name in schema and (type(schema[name]) is not int or schema[name] < 0):
            yield f"has a {name} that is no count of characters"
    if given and "type" not in schema:
        yield f"has {', '.join(given)} without a type: that cannot be enforced. Say the type"
    if "multipleOf" in schema and "number" in types:
        yield "uses multipleOf of a number, which cannot be enforced (of an integer it can)"
    shapes = [name for name in ("pattern", "format") if name in schema]
    if "string" in types and (len(shapes) > 1 or (shapes and any(name in schema for name in _LENGTHS))):
        yield f"has {' and '.join([*shapes, *(name for name in _LENGTHS if name in schema)])}, which cannot be enforced together"
    if "patternProperties" in schema and ("properties" in schema or "propertyNames" in schema):
        yield "has patternProperties beside properties or propertyNames, which cannot be enforced together"
    absent = [name for name in _list(schema.get("required")) if name not in dict(_items(schema.get("properties")))]
    if absent:
        yield f"requires '{str(absent[0])[:60]}', which its properties do not describe"


def _items(value: Any) -> Sequence[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _types(schema: Mapping[str, Any]) -> frozenset[str]:
    found = schema.get("type")
    return frozenset([found] if isinstance(found, str) else [name for name in _list(found) if isinstance(name, str)])


def _kinds(value: Any) -> frozenset[str]:
    """Names of the types that a value has."""
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return _NUMBERS
    for kind, name in ((float, "number"), (str, "string"), (list, "array"), (dict, "object")):
        if isinstance(value, kind):
            return frozenset({name})
    return frozenset({"null"})


def _resolved(schema: Any, root: Any) -> Any:
    for _ in range(16):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return schema
        schema = root
        for part in reference[2:].split("/"):
            schema = schema.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(schema, Mapping) else None
    return schema


def _disjoint(one: Any, other: Any) -> bool:
    """Whether no value fits both, as far as types and constant properties tell."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return False
    values = [_constants(schema) for schema in (one, other)]
    if values[0] is not None and values[1] is not None:
        return not any(a == b for a in values[0] for b in values[1])
    kinds = [_types(schema) | (_NUMBERS if "number" in _types(schema) else frozenset()) for schema in (one, other)]
    if kinds[0] and kinds[1] and not kinds[0] & kinds[1]:
        return True
    if kinds[0] == kinds[1] == {"object"}:
        shared = set(_list(one.get("required"))) & set(_list(other.get("required")))
        inner = [dict(_items(schema.get("properties"))) for schema in (one, other)]
        return any(_disjoint(inner[0].get(name), inner[1].get(name)) for name in shared)
    return False


def _constants(schema: Mapping[str, Any]) -> list[Any] | None:
    return [schema["const"]] if "const" in schema else _list(schema["enum"]) if "enum" in schema else None
