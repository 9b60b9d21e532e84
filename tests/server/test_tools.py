"""Calls of tools through three families' templates: a server each, driven by OpenAI's client; and how a text is taken apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from server.running import Server
from server.tool_templates import FAMILIES
from tradespace.errors import InputError
from tradespace.server.schema import Tool
from tradespace.server.tools import ToolText, call_grammar, choose_tools

ASKED = [{"role": "user", "content": "count to n"}]
NUMBER = {"type": "integer", "minimum": 0, "maximum": 9}
TOOLS = [
    {
        "type": "function",
        # a reference into the schema itself, as pydantic writes them
        "function": {
            "name": name, "description": f"does {name}",
            "parameters": {"type": "object", "properties": {"n": {"$ref": "#/$defs/digit"}}, "required": ["n"], "$defs": {"digit": NUMBER}},
        },
    }
    for name in ("count", "wait")
]  # fmt: skip
NAMED = {"type": "function", "function": {"name": "wait"}}
WAYS = {"required": "required", "named": NAMED, "subset": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}}
# how each family writes two calls, with text before them where it may
TWO = {
    "llama": '{"name": "count", "parameters": {"n": 1}}; {"name": "wait", "parameters": {"n": 2}}',
    "qwen": 'Let me see.\n<tool_call>\n{"name": "count", "arguments": {"n": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "wait", "arguments": {"n": 2}}\n</tool_call>',
}
TWO["hermes"] = TWO["qwen"]

pytestmark = pytest.mark.xdist_group("tools")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Iterator[tuple[str, Server]]:
    from cli.tiny_model import make_home, save_folder

    folder = save_folder(tmp_path_factory.mktemp(request.param))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": FAMILIES[request.param]}))
    server = Server(folder, make_home(tmp_path_factory.mktemp("home")), "--context", "2048")
    yield request.param, server
    server.close()


def ask(server: Server, **more):
    asked = {"model": "tiny", "messages": ASKED, "tools": TOOLS, "max_tokens": 400, "temperature": 1, "seed": 1}
    return server.client.chat.completions.create(**(asked | more))


def streamed(server: Server, **more) -> tuple[str, list[tuple[str, str]], str]:
    """Text, calls (name, arguments) and finish reason, put together as OpenAI's guide says: by index."""
    text, calls, ids, reason = "", dict[int, list[str]](), set[str](), ""
    for chunk in ask(server, stream=True, **more):
        for choice in chunk.choices:
            text, reason = text + (choice.delta.content or ""), choice.finish_reason or reason
            for part in choice.delta.tool_calls or ():
                call = calls.setdefault(part.index, ["", ""])
                call[0] += part.function.name or ""
                call[1] += part.function.arguments or ""
                ids |= {part.id} if part.id else set()
    assert len(ids) == len(calls) and sorted(calls) == list(range(len(calls)))
    return text, [(name, arguments) for name, arguments in calls.values()], reason


def whole(server: Server, **more) -> tuple[str, list[tuple[str, str]], str]:
    choice = ask(server, **more).choices[0]
    calls = choice.message.tool_calls or []
    assert len({call.id for call in calls}) == len(calls)
    return choice.message.content or "", [(call.function.name, call.function.arguments) for call in calls], choice.finish_reason


@pytest.mark.parametrize("way", WAYS)
def test_a_call_that_must_come_keeps_its_schema(family, way):
    _, server = family
    text, calls, reason = whole(server, tool_choice=WAYS[way], parallel_tool_calls=False)
    assert streamed(server, tool_choice=WAYS[way], parallel_tool_calls=False) == (text, calls, reason)
    ((name, arguments),) = calls
    assert (text, reason) == ("", "tool_calls") and name in (("count", "wait") if way == "required" else ("wait",))
    assert set(json.loads(arguments)) == {"n"} and 0 <= json.loads(arguments)["n"] <= 9


def test_several_calls_in_one_answer(family):
    _, server = family
    found = [whole(server, tool_choice="required", seed=seed) for seed in range(12)]
    assert any(len(calls) > 1 for _, calls, reason in found if reason == "tool_calls")
    assert all(reason == "length" for text, _, reason in found if text)  # a call that was cut off
    for text, calls, reason in found:
        if reason == "tool_calls":  # and not cut off at max_tokens
            assert text == "" and all(name in ("count", "wait") and 0 <= json.loads(arguments)["n"] <= 9 for name, arguments in calls)
    seed, several = next((seed, answer) for seed, answer in enumerate(found) if len(answer[1]) > 1 and answer[2] == "tool_calls")
    assert streamed(server, tool_choice="required", seed=seed) == several
    # n samples of one request are taken apart each for itself
    choices = ask(server, tool_choice="required", seed=seed, n=2, parallel_tool_calls=False).choices
    assert [len(choice.message.tool_calls) for choice in choices] == [1, 1]


@pytest.mark.parametrize("parallel", [None, False])
def test_calls_that_a_model_makes_unasked_are_found(family, parallel):
    name, server = family
    more = {"extra_body": {"grammar": f"root ::= {json.dumps(TWO[name])}"}} | ({} if parallel is None else {"parallel_tool_calls": parallel})
    text, calls, reason = whole(server, **more)
    assert streamed(server, **more) == (text, calls, reason)
    assert reason == "tool_calls" and text.strip() == ("" if name == "llama" else "Let me see.")
    assert calls == [("count", '{"n": 1}'), ("wait", '{"n": 2}')][: 2 if parallel is None else 1]


def test_calls_and_results_go_back_into_the_prompt(family):
    name, server = family
    said = ask(server, tool_choice=NAMED).choices[0].message
    messages = [*ASKED, said.model_dump(exclude_none=True, exclude={"refusal"}), {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "done: 42"}]
    answer = ask(server, messages=messages, max_tokens=4)
    ids = server.http.post("/tokenize", json={"messages": messages, "tools": TOOLS}).json()["tokens"]
    prompt = server.http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert answer.usage.prompt_tokens == len(ids)
    key = "parameters" if name == "llama" else "arguments"
    assert "does count" in prompt and f'{{"name": "wait", "{key}": {said.tool_calls[0].function.arguments}}}' in prompt and "done: 42" in prompt


def test_no_tool_is_shown_or_called_where_none_may_be(family):
    _, server = family
    with_none = ask(server, tool_choice="none", max_tokens=4)
    without = server.client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=4)
    assert with_none.usage.prompt_tokens == without.usage.prompt_tokens < ask(server, max_tokens=4).usage.prompt_tokens
    assert with_none.choices[0].message.tool_calls is None


def test_what_a_template_refuses_is_the_answer(family):
    name, server = family
    call = {"type": "function", "function": {"name": "wait", "arguments": '{"n": 1}'}}
    messages = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [{"id": "a", **call}, {"id": "b", **call}]}]
    if name == "llama":
        with pytest.raises(openai.BadRequestError, match="single tool-calls"):
            ask(server, messages=messages)
    else:
        assert ask(server, messages=messages, max_tokens=2).usage.completion_tokens <= 2


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "sing"}}}, "sing"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "two tools"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "exclude"),
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": True, "parameters": {"not": {}}}}]}, "not"),
        ({"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": 3}}}]}, "tools' schema"),
    ],
)
def test_what_makes_no_sense_is_refused(family, more, match):
    with pytest.raises(openai.BadRequestError, match=match):
        ask(family[1], **more)


def test_a_template_that_shows_no_tools_is_said_so(server):
    with pytest.raises(openai.BadRequestError, match="--tool-prompt"):
        ask(server)
    with pytest.raises(openai.BadRequestError, match="--tool-prompt"):
        ask(server, tool_choice="required")
    call = {"id": "a", "type": "function", "function": {"name": "wait", "arguments": '{"n": 1}'}}
    with pytest.raises(openai.BadRequestError, match="--tool-prompt"):
        server.client.chat.completions.create(model="tiny", messages=[*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert ask(server, tool_choice="none", max_tokens=2).choices[0].message.tool_calls is None
    with pytest.raises(openai.BadRequestError, match="needs tools"):
        server.client.chat.completions.create(model="tiny", messages=ASKED, tool_choice="required")


def test_tools_told_in_a_message_on_request(places: tuple[Path, Path]):
    server = Server(*places, "--context", "2048", "--tool-prompt")
    try:
        said = ask(server, tool_choice="required", parallel_tool_calls=False).choices[0].message
        ((call),) = said.tool_calls
        back = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
        messages = [{"role": "system", "content": "be brief"}, *ASKED, back, {"role": "tool", "tool_call_id": call.id, "content": "done: 42"}]
        ids = server.http.post("/tokenize", json={"messages": messages, "tools": TOOLS}).json()["tokens"]
        prompt = server.http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
        assert (
            prompt.index("be brief") < prompt.index('"does count"') < prompt.index(f'<tool_call>\n{{"name": "{call.function.name}"') < prompt.index("done: 42")
        )
        assert "<|tool|>" not in prompt and ask(server, messages=messages, max_tokens=2).usage.prompt_tokens == len(ids)
    finally:
        server.close()


# -------------------------------------------------------------------------------------------------------------- without HTTP


def split(style, text: str, size: int, several: bool = True) -> tuple[str, list[tuple[str, str]]]:
    """What `ToolText` makes of a text that comes in pieces of `size`."""
    splitter = ToolText(style, ["count", "wait"], several=several)
    parts = [splitter.push(text[at : at + size]) for at in range(0, len(text), size)] + [splitter.finish()]
    return "".join(said for said, _ in parts), [(call.name, call.arguments) for _, calls in parts for call in calls]


CALL = '<tool_call>\n{"name": "count", "arguments": {"s": %s}}\n</tool_call>'


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("style", "text", "said", "calls"),
    [
        ("hermes", "Let me see " + CALL % 1 + "!", "Let me see !", [("count", '{"s": 1}')]),
        ("hermes", CALL % 1 + "\n\n" + CALL % 2 + "\n", "", [("count", '{"s": 1}'), ("count", '{"s": 2}')]),
        ("hermes", CALL % '"a </tool_call> b"', "", [("count", '{"s": "a </tool_call> b"}')]),
        ("hermes", (CALL % '"two\nlines"').removesuffix("\n</tool_call>"), "", [("count", '{"s": "two\\nlines"}')]),
        ("hermes", "<tool_call>{}</tool_call> <tool", "<tool_call>{}</tool_call> <tool", []),
        ("hermes", CALL.replace("count", "sing") % 1, CALL.replace("count", "sing") % 1, []),
        ("llama", '{"name": "count", "parameters": {"s": "a; b"}}', "", [("count", '{"s": "a; b"}')]),
        ("llama", TWO["llama"], "", [("count", '{"n": 1}'), ("wait", '{"n": 2}')]),
        ("llama", '<|python_tag|>{"name": "wait", "parameters": {}}', "", [("wait", "{}")]),
        ("llama", '[{"name": "wait", "parameters": {}}]', "", [("wait", "{}")]),
        ("llama", '{"name": "unknown"}', '{"name": "unknown"}', []),
        ("llama", '{"name": "wait", "parameters": {}} is what I would call', '{"name": "wait", "parameters": {}} is what I would call', []),
        ("llama", "No: " + TWO["llama"], "No: " + TWO["llama"], []),
    ],
)
def test_a_text_is_taken_apart_whatever_its_pieces(style, text, said, calls, size):
    assert split(style, text, size) == (said, calls)
    assert split(style, text, size, several=False) == (said, calls[:1])


STRICT = {"type": "object", "properties": {"n": NUMBER}, "required": ["n"], "additionalProperties": False}


@pytest.mark.parametrize("style", ["hermes", "llama"])
def test_a_strict_tool_is_called_by_its_schema_or_not_at_all(style):
    from xgrammar import Grammar
    from xgrammar.testing import _is_grammar_accept_string

    from tradespace.server.constraints import _counted_tags

    tools = [Tool.model_validate({"type": "function", "function": {"name": "wait", "strict": True, "parameters": STRICT}})]
    found = call_grammar(choose_tools(tools, "auto"), style)
    assert found is not None
    import xgrammar

    grammar = Grammar.from_structural_tag(_counted_tags(xgrammar, found.text))
    forms = {"hermes": '<tool_call>\n{"name": "wait", "arguments": %s}\n</tool_call>', "llama": '{"name": "wait", "parameters": %s}'}
    for text, good in (
        ("just text, with { braces }", True), (forms[style] % '{"n": 3}', True), (forms[style] % '{"n": 33}', False), (forms[style] % "{}", False),
        (forms[style].replace("wait", "sing") % '{"n": 3}', False), ("", True),
    ):  # fmt: skip
        assert _is_grammar_accept_string(grammar, text) == good, text
    if style == "hermes":
        assert _is_grammar_accept_string(grammar, "I call: " + forms[style] % '{"n": 3}' + " and " + forms[style] % '{"n": 4}')
    broken = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tools = [Tool.model_validate({"type": "function", "function": {"name": "a", "strict": True, "parameters": broken}})]
    with pytest.raises(InputError, match="uniqueItems"):
        call_grammar(choose_tools(tools, "auto"), style)
