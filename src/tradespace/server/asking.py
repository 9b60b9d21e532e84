"""A request as it came → what the engine is asked: token ids, sampling parameters, a grammar. Raises InputError, which becomes a 400."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tradespace.errors import InputError
from tradespace.loading.tokenizer import Tokenizer
from tradespace.server.json_schema import bounded, check_enforced
from tradespace.server.messages import Grammar, Limits, Ready
from tradespace.server.schema import MAX_GRAMMAR_CHARS, CompletionRequest, Message, Sampling, TextPart, Tool
from tradespace.server.tool_prompt import with_tools

_COPIED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")


def check_model(asked: str | None, served: Sequence[str]) -> None:
    """Raises UnknownModel where another model is asked for."""
    if asked is not None and asked not in served:
        raise UnknownModel(f"the model '{asked[:100]}' is not served here; there is {', '.join(served)}")


class UnknownModel(InputError):
    """A model that this server does not have: 404."""


def sampling_of(body: Sampling, ready: Ready, *, logprobs: int | None = None) -> dict[str, Any]:
    """Sampling parameters but for max_tokens; what is not said is the model's own."""
    params: dict[str, Any] = dict(ready.defaults)
    params |= {name: value for name in _COPIED if (value := getattr(body, name)) is not None}
    params |= {"ignore_eos": body.ignore_eos, "min_tokens": body.min_tokens, "n": body.n or 1, "logprobs": logprobs}
    params["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    params["stop_token_ids"] = tuple(body.stop_token_ids or ())
    if body.logit_bias:
        if strange := next((token for token in body.logit_bias if not (token.isascii() and token.isdigit()) or len(token) > 10), None):
            raise InputError(f"logit_bias is a map from token ids to numbers; '{strange[:32]}' is no token id")
        params["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    if (n := params["n"]) > ready.limits.max_sequences:
        raise InputError(f"n is {n}; at most {ready.limits.max_sequences} run at once (--max-num-seqs)")
    if body.stream_options is not None and not body.stream:
        raise InputError("stream_options is for streams only. Set stream to true")
    return params


def fit_tokens(limits: Limits, num_prompt: int, wanted: int | None) -> int:
    """Most tokens of the answer. Raises InputError where prompt and answer can never fit."""
    room = limits.room(num_prompt)
    if room < 1:
        raise InputError(
            f"the prompt has {num_prompt} tokens; context {limits.max_context} and cache ({limits.num_blocks * limits.block_size} slots) leave no token for an "
            f"answer. Shorten the prompt by at least {1 - room} tokens, or serve with a larger --max-model-len or --memory"
        )
    if wanted is None:
        return room
    if wanted > room:
        raise InputError(f"the prompt has {num_prompt} tokens and {wanted} are asked for; at most {room} fit behind it. Ask for at most {room}")
    return wanted


def grammar_of(body: Sampling) -> Grammar | None:
    """The grammar that an answer must obey. Raises InputError for two at once, or one too large."""
    found: list[Grammar] = []
    if body.response_format is not None:
        wanted = body.response_format.json_schema
        if body.response_format.type == "json_schema" and wanted is None:
            raise InputError("response_format of type json_schema needs json_schema: {name, schema}")
        schema, strict = (None, None) if wanted is None else (wanted.schema_, wanted.strict)
        found += format_grammar(body.response_format.type, schema, strict)
    if body.regex is not None:
        found.append(Grammar("regex", body.regex))
    if body.grammar is not None:
        found.append(Grammar("grammar", body.grammar))
    if len(found) > 1:
        raise InputError(f"an answer obeys one grammar; {' and '.join(grammar.kind for grammar in found)} were given")
    if found and body.ignore_eos:
        raise InputError("ignore_eos and a grammar exclude each other: a grammar ends with the model's end token")
    return found[0] if found else None


def format_grammar(kind: str, schema: Mapping[str, Any] | None, strict: bool | None) -> list[Grammar]:
    """The grammar of a text format (text, json_object, json_schema), if it has one. Raises InputError for a schema that could not be kept."""
    if kind == "json_object":
        return [Grammar("json_object")]
    if kind != "json_schema":
        return []
    if schema is None:
        raise InputError("a format of type json_schema needs its schema")
    if strict is not False:
        check_enforced(schema)
    return [schema_grammar(schema)]


def schema_grammar(schema: Mapping[str, Any]) -> Grammar:
    text = json.dumps(schema)
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InputError(f"the JSON schema has {len(text)} characters; at most {MAX_GRAMMAR_CHARS} are taken")
    return Grammar("json_schema", json.dumps(bounded(schema)))


def prompts_of(body: CompletionRequest, tokenizer: Tokenizer, limits: Limits) -> list[tuple[int, ...]]:
    """Token ids of each prompt."""
    prompt = body.prompt
    several: list[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)
    found = []
    for one in several:
        ids = tokenizer.encode(one, body.add_special_tokens) if isinstance(one, str) else one
        strange = next((token for token in ids if not 0 <= token < limits.vocab_size), None)
        if strange is not None:
            raise InputError(f"the prompt holds token {strange}; the vocabulary has 0 … {limits.vocab_size - 1}")
        found.append(tuple(ids))
    return found


def text_of(content: str | Sequence[TextPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates want them: text as one string, arguments of tool calls as values."""
    found = []
    for message in messages:
        entry: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": text_of(message.content)}
        if message.name is not None:
            entry["name"] = message.name
        if message.tool_call_id is not None:
            entry["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            entry["tool_calls"] = [_template_call(call.id, call.function.name, call.function.arguments) for call in message.tool_calls]
        found.append(entry)
    return found


def _template_call(id: str, name: str, arguments: str) -> dict[str, Any]:
    try:
        values = json.loads(arguments)
    except ValueError as error:
        raise InputError(f"the arguments of the tool call {id[:64]} are not JSON: {error}") from error
    return {"id": id, "type": "function", "function": {"name": name, "arguments": values}}


def text_size(messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> int:
    """About how many characters a conversation has: whether it is long to encode."""
    said = sum(len(text_of(message.content)) + sum(len(call.function.arguments) for call in message.tool_calls or ()) for message in messages)
    return said + sum(len(str(tool.function.parameters)) + len(tool.function.description or "") for tool in tools or ())


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] | None = None, *, prompted: bool = False) -> tuple[int, ...]:
    """Token ids of a conversation through the model's template; `prompted`: the tools are told in its messages, as the template has no place for them."""
    told = template_messages(messages)
    plain_tools = None if not tools else [tool.model_dump(exclude_none=True) for tool in tools]
    if prompted:
        told, plain_tools = with_tools(told, plain_tools or []), None
    text = tokenizer.apply_chat_template(told, tools=plain_tools)
    return tuple(tokenizer.encode(text, add_special_tokens=False))
