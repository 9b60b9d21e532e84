"""Calls of tools in a model's text, as Hermes and Qwen (`<tool_call>{…}</tool_call>`) and Llama 3 (bare JSON objects with "; " between them, perhaps behind
`<|python_tag|>`) write them; what a model is told of its tools (`tool_prompt.py`) is its chat template's. While a text streams, only what cannot be the
beginning of a call is let through.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tradespace.errors import InputError
from tradespace.server.json_schema import bounded, check_enforced
from tradespace.server.messages import Grammar
from tradespace.server.schema import MAX_GRAMMAR_CHARS, NamedTool, Tool, ToolSubset

Style = Literal["hermes", "llama"]
OPEN, CLOSE, PYTHON_TAG = "<tool_call>", "</tool_call>", "<|python_tag|>"
STYLES: dict[str, Style] = {"hermes": "hermes", "qwen": "hermes", "llama": "llama"}
_DECODER = json.JSONDecoder(strict=False)  # a line end within a string is understood; arguments are written anew
_BETWEEN = re.compile(r"[\s;,]*")
_ESCAPED = re.compile(r"\\.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool; `arguments` is JSON text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a request says of its tools. offered: those that may be called; must: one of them has to be; several: in one answer; any other is refused."""

    offered: tuple[Tool, ...] = ()
    must: bool = False
    several: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tool.function.name for tool in self.offered)


def choose_tools(tools: Sequence[Tool] | None, choice: str | NamedTool | ToolSubset | None, parallel: bool | None = None) -> Choice:
    """What may be called. Raises InputError where the choice names a tool that there is not, or two tools have one name."""
    names = [tool.function.name for tool in tools or ()]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"two tools are named '{min(twice)}'. Give each a name of its own")
    several = parallel is not False
    if choice is None:
        return Choice(offered=tuple(tools or ()), several=several)
    if choice == "none":
        return Choice()
    if not tools:
        raise InputError("tool_choice needs tools")
    if isinstance(choice, str):
        return Choice(offered=tuple(tools), must=choice == "required", several=several)
    subset = isinstance(choice, ToolSubset)
    named = {tool.function.name for tool in choice.allowed_tools.tools} if subset else {choice.function.name}
    if missing := named - set(names):
        raise InputError(f"tool_choice names '{min(missing)}'; the tools are {', '.join(names)}")
    offered = tuple(tool for tool in tools if tool.function.name in named)
    # one that is named is called once, as OpenAI has it
    return Choice(offered=offered, must=not subset or choice.allowed_tools.mode == "required", several=several and subset)


def style_of(template: str | None, asked: str) -> Style:
    """The style of a model: the one asked for, or what its chat template shows (auto)."""
    if asked != "auto":
        return STYLES[asked]
    return "llama" if template is not None and OPEN not in template and ("python_tag" in template or "ipython" in template) else "hermes"


def call_grammar(choice: Choice, style: Style) -> Grammar | None:
    """The grammar of an answer that must hold a call, or whose calls must keep their schemas (`strict`); None where neither is asked for.

    Raises InputError for a strict tool whose schema could not be kept, and for schemas that are too large.
    """
    strict = [tool for tool in choice.offered if tool.function.strict]
    if not choice.must and not strict:
        return None
    for tool in strict:
        check_enforced(tool.function.parameters or {})
    key, begin, end = ("arguments", OPEN + "\n", "\n" + CLOSE) if style == "hermes" else ("parameters", "", "")
    tags = []
    for tool in choice.offered:
        schema = tool.function.parameters if choice.must or tool.function.strict else None
        content = {"type": "json_schema", "json_schema": bounded(schema or {"type": "object"}), "max_whitespace_cnt": 1}
        head = f"{begin}{{{json.dumps('name')}: {json.dumps(tool.function.name)}, {json.dumps(key)}: "
        tags.append({"type": "tag", "begin": head, "content": content, "end": "}" + end})
    calls = {"tags": tags, "stop_after_first": not choice.several}
    shape: dict[str, Any] = {"type": "tags_with_separator", "separator": "\n" if style == "hermes" else "; ", "at_least_one": True, **calls}
    if not choice.must and style == "hermes":
        shape = {"type": "triggered_tags", "triggers": [OPEN], **calls}
    elif not choice.must:  # a text that does not begin as a call does is none
        shape = {"type": "or", "elements": [shape, {"type": "regex", "pattern": r"([^\s{][\s\S]*)?"}]}
    text = json.dumps({"type": "structural_tag", "format": shape})
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InputError(f"the tools' schemas have {len(text)} characters; at most {MAX_GRAMMAR_CHARS} are taken where a call must keep them")
    return Grammar("tool_calls", text)


def parse_calls(text: str, names: Sequence[str]) -> list[Call] | None:
    """JSON objects {name, arguments | parameters}, one after the other or in an array, as calls; None where any is not one of a known tool."""
    found: list[Any] = []
    at = _skip(text, 0)
    while at < len(text):
        try:
            value, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        found += value if isinstance(value, list) else [value]
        at = _skip(text, at)
    calls = [_call(value, names) for value in found]
    return [call for call in calls if call is not None] if calls and all(calls) else None


def _skip(text: str, at: int) -> int:
    found = _BETWEEN.match(text, at)
    assert found is not None, "an expression that takes nothing, too"
    return found.end()


def _call(found: Any, names: Sequence[str]) -> Call | None:
    if not isinstance(found, dict):
        return None
    found = found["function"] if isinstance(found.get("function"), dict) else found
    name, arguments = found.get("name"), found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = _DECODER.decode(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return Call(name, json.dumps(arguments, ensure_ascii=False))


class ToolText:
    """Splits a growing text into what is said and what is called. several: more than one call is handed on; else those behind the first are dropped."""

    def __init__(self, style: Style, names: Sequence[str], *, several: bool = True):
        self.style, self.names, self.several = style, tuple(names), several
        self._held = ""
        self._said_any = False
        self._called = 0

    def push(self, text: str) -> tuple[str, list[Call]]:
        """The text that is certain now, and the calls that are complete."""
        self._held += text
        return self._push_llama() if self.style == "llama" else self._push_hermes()

    def finish(self) -> tuple[str, list[Call]]:
        """What was held back: the output has ended."""
        held, self._held = self._held, ""
        inner = held.strip().removeprefix(PYTHON_TAG if self.style == "llama" else OPEN)
        calls = None if self._said_any and self.style == "llama" else parse_calls(inner, self.names)
        if calls is not None and (self.style == "llama" or held.lstrip().startswith(OPEN)):
            return "", self._few(calls)
        return ("" if self._called and not held.strip() else held), []

    def _push_llama(self) -> tuple[str, list[Call]]:
        # a call is all of the output: once it begins otherwise, there is none
        start = self._held.lstrip()
        if self._said_any or (start and start[0] not in "{[" and not PYTHON_TAG.startswith(start) and not start.startswith(PYTHON_TAG)):
            self._said_any = True
            said, self._held = self._held, ""
            return said, []
        return "", []

    def _push_hermes(self) -> tuple[str, list[Call]]:
        said, calls = "", list[Call]()
        while True:
            at = self._held.find(OPEN)
            if at < 0:
                keep = next((size for size in range(min(len(OPEN) - 1, len(self._held)), 0, -1) if OPEN.startswith(self._held[-size:])), 0)
                cut = len(self._held) - keep
                if self._called and not self._held[:cut].strip():
                    return said, calls  # between calls: nothing, unless text follows
                said, self._held = said + self._held[:cut], self._held[cut:]
                return said, calls
            before, self._held = self._held[:at], self._held[at:]
            said += "" if self._called and not before.strip() else before
            end = self._end_of_call()
            if end < 0:
                return said, calls
            found = parse_calls(self._held[len(OPEN) : end], self.names)
            if found is None:
                said += self._held[: end + len(CLOSE)]
            else:
                calls += self._few(found)
            self._held = self._held[end + len(CLOSE) :]

    def _end_of_call(self) -> int:
        """Where the first call's CLOSE begins, which is none that stands within a string; -1: it has not come."""
        end = self._held.find(CLOSE)
        while end >= 0 and _ESCAPED.sub("", self._held[:end]).count('"') % 2:
            end = self._held.find(CLOSE, end + 1)
        return end

    def _few(self, calls: list[Call]) -> list[Call]:
        kept = calls if self.several else calls[: max(0, 1 - self._called)]
        self._called += len(calls)
        return kept
