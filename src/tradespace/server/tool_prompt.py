"""Tools in messages, for models whose chat template has no place for them (`--tool-prompt`): a system message lists them, and calls and their results stand in
the messages' text, in the form of Hermes 2 Pro (NousResearch/Hermes-Function-Calling), which Qwen 2.5 learned, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tradespace.errors import InputError
from tradespace.loading.tokenizer import Tokenizer
from tradespace.server.schema import Message

_PROBE = {"type": "function", "function": {"name": "probe_whether_shown", "description": "", "parameters": {"type": "object", "properties": {}}}}
_TELL = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML "
    "tags:\n<tools>\n{tools}\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\n<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)


def shows_tools(tokenizer: Tokenizer) -> bool:
    """Whether the chat template puts tools that it is given into the prompt: most ignore them without a word."""
    if tokenizer.chat_template is None and tokenizer.tool_template is None:
        return False
    try:
        return _PROBE["function"]["name"] in tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tools=[_PROBE])
    except InputError:
        return False


def is_about_tools(message: Message) -> bool:
    return message.role == "tool" or bool(message.tool_calls)


def with_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation in the three roles that every template has: tools in the system message, calls in the assistant's text, results in the user's.

    >>> with_tools([{"role": "tool", "content": "4", "tool_call_id": "a"}], [])
    [{'role': 'user', 'content': '<tool_response>\\n4\\n</tool_response>'}]
    """
    found: list[dict[str, Any]] = []
    for message in messages:
        role, text = message["role"], message["content"]
        if role == "tool":
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
        calls = [_written(call["function"]) for call in message.get("tool_calls", ())]
        text = "\n".join([*([text] if text or not calls else []), *calls])
        if role == "user" and message["role"] == "tool" and found and found[-1].get("results"):
            found[-1]["content"] += f"\n{text}"  # results of several calls are one turn
            continue
        found.append({"role": role, "content": text} | ({"results": True} if message["role"] == "tool" else {}))
    for message in found:
        message.pop("results", None)
    if tools:
        told = _TELL.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if found and found[0]["role"] == "system":
            found[0]["content"] += f"\n\n{told}"
        else:
            found.insert(0, {"role": "system", "content": told})
    return found


def _written(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
