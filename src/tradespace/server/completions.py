"""/v1/completions: one prompt or several, text or token ids, whole or streamed; echo with log-probabilities scores a prompt."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.responses import Response

from tradespace.errors import InputError
from tradespace.server.answering import Output, completion_logprobs, usage
from tradespace.server.asking import check_model, fit_tokens, grammar_of, prompts_of, sampling_of
from tradespace.server.limits import Json
from tradespace.server.schema import CompletionRequest
from tradespace.server.service import Service, Waiting, Wanted, new_id, off_loop, sse, streamed


async def complete(service: Service, request: Request, body: CompletionRequest) -> Response:
    ready = service.ready
    check_model(body.model, service.settings.names)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InputError(f"best_of {body.best_of} is not offered: outputs are not ranked here. Ask for n and rank by logprobs")
    if body.suffix:
        raise InputError("suffix is not offered: this model continues text, it does not fill it in")
    if body.max_tokens == 0 and not body.echo:
        raise InputError("max_tokens 0 makes sense with echo only")
    params = sampling_of(body, ready, logprobs=body.logprobs)
    if body.echo and body.logprobs is not None:
        params["prompt_logprobs"] = body.logprobs
    grammar, several = grammar_of(body), [body.prompt] if isinstance(body.prompt, str) else body.prompt
    size = sum(len(one) for one in several if isinstance(one, str))
    prompts = await off_loop(size, prompts_of, body, service.tokenizer, ready.limits)
    wanted = [
        Wanted(ids, {**params, "max_tokens": fit_tokens(ready.limits, len(ids), max(1, body.max_tokens) if body.max_tokens is not None else None)}, grammar)
        for ids in prompts
    ]
    waiting = service.submit(request, wanted, user=body.client, priority=body.priority, stream=bool(body.stream), timeout_s=body.timeout_s)
    head = {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()), "model": body.model or service.name}
    echoes = await off_loop(sum(map(len, prompts)) if body.echo else 0, _echoes, service, body, prompts)
    if body.stream:
        if grammar is not None:
            await waiting.first(request)
        return streamed(_events(service, body, waiting, head, echoes))
    outputs = await service.outputs(request, waiting)
    names = sum(len(output.tokens) + len(output.prompt_logprobs) for samples in outputs for output in samples) * ((body.logprobs or 0) + 1)
    choices = await off_loop(names if body.logprobs is not None else 0, _choices, service, body, echoes, prompts, outputs)
    return Json({**head, "choices": choices, "usage": _usage(body, prompts, outputs)})


def _choices(service: Service, body: CompletionRequest, echoes: list[str], prompts: list[tuple[int, ...]], outputs: list[list[Output]]) -> list[dict[str, Any]]:
    several = [(echo, ids, output) for echo, ids, samples in zip(echoes, prompts, outputs, strict=True) for output in samples]
    return [_choice(service, body, index, *one) for index, one in enumerate(several)]


def _echoes(service: Service, body: CompletionRequest, prompts: list[tuple[int, ...]]) -> list[str]:
    return [_echo(service, body, index, ids) for index, ids in enumerate(prompts)]


def _echo(service: Service, body: CompletionRequest, index: int, ids: tuple[int, ...]) -> str:
    if not body.echo:
        return ""
    if isinstance(body.prompt, str):
        return body.prompt
    one = body.prompt[index]
    return one if isinstance(one, str) else service.tokenizer.decode(ids)


def _usage(body: CompletionRequest, prompts: list[tuple[int, ...]], outputs: list[list[Output]]) -> dict[str, Any]:
    generated = 0 if body.max_tokens == 0 else sum(len(output.tokens) for samples in outputs for output in samples)
    return usage(sum(map(len, prompts)), generated, sum(samples[0].num_cached for samples in outputs))


def _choice(service: Service, body: CompletionRequest, index: int, echo: str, ids: tuple[int, ...], output: Output) -> dict[str, Any]:
    scored_only = body.max_tokens == 0
    logprobs = None
    if body.logprobs is not None:
        tokens, entries = ([], []) if scored_only else (output.tokens, list(output.logprobs))
        if body.echo:
            tokens, entries = [*ids, *tokens], [*output.prompt_logprobs, *entries]
        logprobs = completion_logprobs(service.tokenizer, entries, tokens)
    text = echo + ("" if scored_only else output.text)
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": "length" if scored_only else output.reason}


async def _events(service: Service, body: CompletionRequest, waiting: Waiting, head: dict[str, Any], echoes: list[str]) -> AsyncIterator[bytes]:
    n, begun, counts, lengths = body.n or 1, set[int](), [0] * len(echoes), dict[int, int]()
    cached = [0] * len(echoes)
    options = body.stream_options
    with_usage, continuous = (options is not None and options.include_usage), (options is not None and options.continuous_usage_stats)
    async for job, piece in waiting:
        index = job * n + piece.sample
        output = Output()
        output.take(piece)
        echo = echoes[job] if index not in begun else ""
        ids = waiting.jobs[job].prompt_ids if index not in begun else ()
        begun.add(index)
        counts[job] += len(piece.tokens)
        cached[job] = piece.num_cached
        if not (piece.text or piece.finish_reason or piece.logprobs or echo):
            continue
        choice = _choice(service, body, index, echo, ids, output)
        if choice["logprobs"] is not None:
            start = lengths.get(index, 0)
            choice["logprobs"]["text_offset"] = [start + at for at in choice["logprobs"]["text_offset"]]
            lengths[index] = start + sum(map(len, choice["logprobs"]["tokens"]))
        if body.max_tokens == 0 and piece.finish_reason is None:
            choice["finish_reason"] = None
        so_far = usage(len(waiting.jobs[job].prompt_ids), counts[job], cached[job]) if continuous else None
        yield sse({**head, "choices": [choice]} | ({"usage": so_far} if with_usage or continuous else {}))
    if with_usage:
        generated = 0 if body.max_tokens == 0 else sum(counts)
        yield sse({**head, "choices": [], "usage": usage(sum(len(job.prompt_ids) for job in waiting.jobs), generated, sum(cached))})
    yield b"data: [DONE]\n\n"
