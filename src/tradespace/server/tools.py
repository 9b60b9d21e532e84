"""Calls of tools in a model's text, as Hermes and Qwen (`<tool_call>{…}</tool_call>`) and Llama 3 (a bare JSON object, with or without `<|python_tag|>`) write
them. While a text streams, only what cannot be the beginning of a call is let through.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tradespace.errors import InputError
from tradespace.server.schema import NamedTool, Tool, ToolSubset

Style = Literal["hermes", "llama"]
OPEN, CLOSE, PYTHON_TAG = "<tool_call>", "</tool_call>", "<|python_tag|>"
STYLES: dict[str, Style] = {"hermes": "hermes", "qwen": "hermes", "llama": "llama"}


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool; `arguments` is JSON text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def style_of(template: str | None, asked: str) -> Style:
    """The style of a model: the one asked for, or what its chat template shows (auto)."""
    if asked != "auto":
        return STYLES[asked]
    return "llama" if template is not None and ("python_tag" in template or "ipython" in template) else "hermes"


def parse_call(text: str, names: Sequence[str]) -> Call | None:
    """One JSON object {name, arguments | parameters} as a call, where it is one of a known tool."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    found = found.get("function", found) if isinstance(found.get("function"), dict) else found
    name, arguments = found.get("name"), found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return Call(name, json.dumps(arguments, ensure_ascii=False))


class ToolText:
    """Splits a growing text into what is said and what is called. bare: the whole output is one call (it was constrained to be)."""

    def __init__(self, style: Style, names: Sequence[str], *, bare: bool = False):
        self.style, self.names, self.bare = style, tuple(names), bare
        self._held = ""
        self._said_any = False

    def push(self, text: str) -> tuple[str, list[Call]]:
        """The text that is certain now, and the calls that are complete."""
        self._held += text
        if self.bare:
            return "", []
        if self.style == "llama":
            # a call is all of the output: once it begins otherwise, there is none
            start = self._held.lstrip()
            if self._said_any or (start and not start.startswith("{") and not PYTHON_TAG.startswith(start) and not start.startswith(PYTHON_TAG)):
                self._said_any = True
                said, self._held = self._held, ""
                return said, []
            return "", []
        said, calls = "", []
        while True:
            at = self._held.find(OPEN)
            if at < 0:
                keep = next((size for size in range(min(len(OPEN) - 1, len(self._held)), 0, -1) if OPEN.startswith(self._held[-size:])), 0)
                cut = len(self._held) - keep
                said, self._held = said + self._held[:cut], self._held[cut:]
                return said, calls
            said, self._held = said + self._held[:at], self._held[at:]
            end = self._held.find(CLOSE)
            if end < 0:
                return said, calls
            inner, whole = self._held[len(OPEN) : end], self._held[: end + len(CLOSE)]
            call = parse_call(inner, self.names)
            if call is None:
                said += whole
            else:
                calls.append(call)
            self._held = self._held[end + len(CLOSE) :]

    def finish(self) -> tuple[str, list[Call]]:
        """What was held back: the output has ended."""
        held, self._held = self._held, ""
        if self.bare or self.style == "llama":
            parts = held.strip().removeprefix(PYTHON_TAG).split(";") if self.style == "llama" and ";" in held else [held.strip().removeprefix(PYTHON_TAG)]
            whole = parse_call(held.strip().removeprefix(PYTHON_TAG), self.names)
            calls = [whole] if whole is not None else [parse_call(part, self.names) for part in parts]
            return ("", [call for call in calls if call is not None]) if all(calls) else (held, [])
        call = parse_call(held.removeprefix(OPEN), self.names)
        return ("", [call]) if call is not None else (held, [])


def choose_tools(tools: Sequence[Tool] | None, choice: str | NamedTool | ToolSubset | None) -> tuple[Sequence[Tool], bool]:
    """The tools that may be called, and whether one of them must be. Raises InputError where the choice names one that there is not."""
    if choice in (None, "none"):
        return (tools or (), False) if choice is None else ((), False)
    if not tools:
        raise InputError("tool_choice needs tools")
    if isinstance(choice, str):
        return tools, choice == "required"
    subset = isinstance(choice, ToolSubset)
    named = {tool.function.name for tool in choice.allowed_tools.tools} if subset else {choice.function.name}
    if missing := named - {tool.function.name for tool in tools}:
        raise InputError(f"tool_choice names '{min(missing)}'; the tools are {', '.join(tool.function.name for tool in tools)}")
    return [tool for tool in tools if tool.function.name in named], not subset or choice.allowed_tools.mode == "required"


def forced_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """The schema of one call of one of these."""
    options = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": tool.function.parameters or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return options[0] if len(options) == 1 else {"anyOf": options}
