"""/v1/responses, in its text subset: input text or messages, instructions, whole or streamed as typed events. Nothing is stored."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.responses import Response

from tradespace.server.asking import check_model, fit_tokens, format_grammar, text_of
from tradespace.server.limits import Json
from tradespace.server.schema import Message, ResponsesRequest, TextFormat
from tradespace.server.service import Service, Waiting, Wanted, new_id, sse, streamed


async def respond(service: Service, request: Request, body: ResponsesRequest) -> Response:
    ready = service.ready
    check_model(body.model, service.settings.names)
    messages = [Message(role="system", content=body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        messages.append(Message(role="user", content=body.input))
    else:
        messages += [Message(role=message.role, content=text_of(message.content)) for message in body.input]
    wanted = (body.text and body.text.format) or TextFormat()
    grammar = next(iter(format_grammar(wanted.type, wanted.schema_, wanted.strict)), None)
    ids = await service.encode_chat(messages)
    params = {**ready.defaults, "n": 1, "max_tokens": fit_tokens(ready.limits, len(ids), body.max_output_tokens)}
    params |= {name: value for name in ("temperature", "top_p") if (value := getattr(body, name)) is not None}
    waiting = service.submit(request, [Wanted(ids, params, grammar)], user=body.client, stream=bool(body.stream))
    head = {
        "id": new_id("resp"), "object": "response", "created_at": int(time.time()), "model": body.model or service.name, "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens, "temperature": params["temperature"], "top_p": params["top_p"], "error": None,
        "metadata": body.metadata or {}, "parallel_tool_calls": False, "tool_choice": "none", "tools": [], "store": False, "truncation": "disabled",
        "text": {"format": wanted.model_dump(by_alias=True, include=None if wanted.type == "json_schema" else {"type"})},
    }  # fmt: skip
    item = new_id("msg")
    if body.stream:
        if grammar is not None:
            await waiting.first(request)
        return streamed(_events(waiting, head, item))
    ((output,),) = await service.outputs(request, waiting)
    return Json(_whole(head, item, output.text, output.reason, len(ids), len(output.tokens), output.num_cached))


def _message(item: str, text: str, status: str) -> dict[str, Any]:
    return {"id": item, "type": "message", "role": "assistant", "status": status, "content": [_part(text)]}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _whole(head: dict[str, Any], item: str, text: str, reason: str | None, num_prompt: int, num_outputs: int, num_cached: int) -> dict[str, Any]:
    status = "completed" if reason == "stop" else "incomplete"
    spent = {
        "input_tokens": num_prompt, "input_tokens_details": {"cached_tokens": num_cached}, "output_tokens": num_outputs,
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": num_prompt + num_outputs,
    }  # fmt: skip
    cut = None if status == "completed" else {"reason": "max_output_tokens"}
    return {**head, "status": status, "incomplete_details": cut, "output": [_message(item, text, status)], "usage": spent}


async def _events(waiting: Waiting, head: dict[str, Any], item: str) -> AsyncIterator[bytes]:
    number, text, count, cached, reason = 0, "", 0, 0, None

    def event(kind: str, **fields: Any) -> bytes:
        nonlocal number
        number += 1
        return f"event: {kind}\n".encode() + sse({"type": kind, "sequence_number": number - 1, **fields})

    place = {"item_id": item, "output_index": 0, "content_index": 0}
    begun = {**head, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
    yield event("response.created", response=begun)
    yield event("response.in_progress", response=begun)
    yield event("response.output_item.added", output_index=0, item={**_message(item, "", "in_progress"), "content": []})
    yield event("response.content_part.added", **place, part=_part(""))
    async for _, piece in waiting:
        text, count, cached, reason = text + piece.text, count + len(piece.tokens), piece.num_cached, piece.finish_reason
        if piece.text:
            yield event("response.output_text.delta", **place, delta=piece.text, logprobs=[])
    whole = _whole(head, item, text, reason, len(waiting.jobs[0].prompt_ids), count, cached)
    yield event("response.output_text.done", **place, text=text, logprobs=[])
    yield event("response.content_part.done", **place, part=_part(text))
    yield event("response.output_item.done", output_index=0, item=whole["output"][0])
    yield event(f"response.{whole['status']}", response=whole)
