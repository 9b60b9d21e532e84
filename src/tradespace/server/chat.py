"""/v1/chat/completions: a conversation through the model's chat template, whole or streamed, with calls of tools."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.responses import Response

from tradespace.errors import InputError
from tradespace.server.answering import chat_logprobs, usage
from tradespace.server.asking import check_model, fit_tokens, grammar_of, sampling_of
from tradespace.server.limits import Json
from tradespace.server.schema import ChatRequest
from tradespace.server.service import Service, Waiting, Wanted, new_id, sse, streamed
from tradespace.server.tools import Call, ToolText, call_grammar, choose_tools


async def chat(service: Service, request: Request, body: ChatRequest) -> Response:
    ready = service.ready
    check_model(body.model, service.settings.names)
    if body.top_logprobs is not None and not body.logprobs:
        raise InputError("top_logprobs needs logprobs: true")
    params = sampling_of(body, ready, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
    choice, style = choose_tools(body.tools, body.tool_choice, body.parallel_tool_calls), service.tool_style
    grammar, calls = grammar_of(body), call_grammar(choice, style)
    if grammar is not None and calls is not None:
        raise InputError("a call that must come, or a strict tool, and another grammar exclude each other")
    ids = await service.encode_chat(body.messages, choice.offered)
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    params["max_tokens"] = fit_tokens(ready.limits, len(ids), most)
    waiting = service.submit(
        request, [Wanted(ids, params, grammar or calls)], user=body.client, priority=body.priority, stream=bool(body.stream), timeout_s=body.timeout_s
    )
    head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": body.model or service.name}
    splitters = [ToolText(style, choice.names, several=choice.several) if choice.offered else None for _ in range(params["n"])]
    if body.stream:
        if grammar is not None or calls is not None:
            await waiting.first(request)
        return streamed(_events(service, body, waiting, {**head, "object": "chat.completion.chunk"}, splitters))
    (outputs,) = await service.outputs(request, waiting)
    choices = []
    for index, (output, splitter) in enumerate(zip(outputs, splitters, strict=True)):
        text, calls = output.text, list[Call]()
        if splitter is not None:
            (said, first), (rest, last) = splitter.push(text), splitter.finish()
            text, calls = said + rest, [*first, *last]
        message: dict[str, Any] = {"role": "assistant", "content": text if text.strip() or not calls else None, "refusal": None}
        if calls:
            message["tool_calls"] = [call.to_dict() for call in calls]
        logprobs = chat_logprobs(service.tokenizer, output.logprobs) if body.logprobs else None
        choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": _reason(output.reason, bool(calls))})
    spent = usage(len(ids), sum(len(output.tokens) for output in outputs), outputs[0].num_cached)
    return Json({**head, "object": "chat.completion", "choices": choices, "usage": spent})


def _reason(reason: str | None, called: bool) -> str | None:
    """As OpenAI has it: an answer that was cut off says so, though there were calls in it."""
    return "tool_calls" if called and reason == "stop" else reason


async def _events(service: Service, body: ChatRequest, waiting: Waiting, head: dict[str, Any], splitters: list[ToolText | None]) -> AsyncIterator[bytes]:
    options = body.stream_options
    with_usage, continuous = (options is not None and options.include_usage), (options is not None and options.continuous_usage_stats)
    count = cached = 0
    begun, num_calls = set[int](), [0] * len(splitters)

    def event(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> bytes:
        so_far = usage(len(waiting.jobs[0].prompt_ids), count, cached) if continuous else None
        extra = {"usage": so_far} if with_usage or continuous else {}
        return sse({**head, "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}], **extra})

    async for _, piece in waiting:
        index, text, calls = piece.sample, piece.text, list[Call]()
        count += len(piece.tokens)
        cached = piece.num_cached or cached
        if index not in begun:
            begun.add(index)
            yield event(index, {"role": "assistant", "content": ""})
        splitter = splitters[index]
        if splitter is not None:
            text, calls = splitter.push(text)
            if piece.finish_reason is not None:
                rest, last = splitter.finish()
                text, calls = text + rest, [*calls, *last]
        logprobs = chat_logprobs(service.tokenizer, piece.logprobs) if body.logprobs and piece.logprobs else None
        if text or logprobs:
            yield event(index, {"content": text}, None, logprobs)
        for call in calls:
            yield event(index, {"tool_calls": [{"index": num_calls[index], **call.to_dict()}]})
            num_calls[index] += 1
        if piece.finish_reason is not None:
            yield event(index, {}, _reason(piece.finish_reason, num_calls[index] > 0))
    if with_usage:
        yield sse({**head, "choices": [], "usage": usage(len(waiting.jobs[0].prompt_ids), count, cached)})
    yield b"data: [DONE]\n\n"
