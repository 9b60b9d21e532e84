"""One timed request to a completions or chat endpoint: what is sent, when its tokens came, and how it ended."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tradespace.lab.serving.http import Address, BadAnswer, Exchange

# a token each in most vocabularies: a chat's prompt of n tokens is about n of them
TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand part place case week company "
    "system program question work night point home water room mother area money story fact month lot right study book eye job word business"
)
WORDS = TEXT.split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What one request is: tokens of prompt and answer, and when it is to be sent (seconds after the start; None: as soon as there is a place)."""

    prompt: int
    output: int
    at_s: float | None = None
    body: Mapping[str, Any] = field(default_factory=dict)  # more fields, or others


@dataclass(slots=True, kw_only=True)
class Answer:
    """What came of one request. Times are of `time.perf_counter`. `error`: None, or its kind in a few words."""

    ask: Ask
    sent_s: float
    first_s: float | None = None
    end_s: float = 0.0
    event_s: list[float] = field(default_factory=list)  # those that held text
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    finish: str | None = None
    error: str | None = None
    text: str = ""

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token: to the first event that held text."""
        return None if self.first_s is None else self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token: mean over those after the first."""
        return None if self.first_s is None or self.output_tokens < 2 else (self.event_s[-1] - self.first_s) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latencies: between events that held text."""
        return [later - earlier for earlier, later in zip(self.event_s, self.event_s[1:], strict=False)]

    @property
    def e2e_s(self) -> float:
        """From sending to the end of the answer."""
        return self.end_s - self.sent_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Whom to ask, and how. endpoint: "completions" (prompts of random token ids) or "chat" (prompts of common words)."""

    address: Address
    model: str | None = None
    endpoint: str = "completions"
    stream: bool = True
    exact_length: bool = True  # ignore_eos: vLLM's field, which this server and others know
    api_key: str | None = None
    timeout_s: float = 600.0
    vocabulary: tuple[int, int] = (100, 4000)
    body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}

    def body_of(self, ask: Ask, draw: random.Random) -> bytes:
        """The JSON that is sent. Prompts are drawn anew for each request, so that no prefix cache knows them."""
        found: dict[str, Any] = {"max_tokens": ask.output, "temperature": 0, "stream": self.stream}
        if self.model is not None:
            found["model"] = self.model
        if self.stream:
            found["stream_options"] = {"include_usage": True}
        if self.exact_length:
            found["ignore_eos"] = True
        if self.endpoint == "chat":
            found["messages"] = [{"role": "user", "content": " ".join(draw.choices(WORDS, k=ask.prompt))}]
        else:
            low, high = self.vocabulary
            found["prompt"] = [draw.randrange(low, high) for _ in range(ask.prompt)]
        return json.dumps({**found, **self.body, **ask.body}).encode()

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"


async def send(target: Target, ask: Ask, draw: random.Random) -> Answer:
    """One request from its first byte to its end. Never raises for what the server does: an error is part of the answer."""
    body = target.body_of(ask, draw)
    answer = Answer(ask=ask, sent_s=time.perf_counter())
    try:
        async with asyncio.timeout(target.timeout_s), Exchange(target.address, "POST", target.path, body, target.headers) as exchange:
            if exchange.status != 200:
                answer.error = _refusal(exchange.status, await exchange.read())
            elif exchange.headers.get("content-type", "").startswith("text/event-stream"):
                await _stream(exchange, answer)
            else:
                _whole(answer, json.loads(await exchange.read()))
    except TimeoutError:
        answer.error = f"no end within {target.timeout_s:g} s"
    except BadAnswer as error:
        answer.error = str(error)
    except ConnectionRefusedError:
        answer.error = "connection refused"
    except OSError as error:
        answer.error = f"connection lost ({type(error).__name__})"
    except ValueError:
        answer.error = "an answer that is not JSON"
    answer.end_s = time.perf_counter()
    return answer


async def _stream(exchange: Exchange, answer: Answer) -> None:
    done, begun_s, text = False, None, list[str]()
    async for data in exchange.events():
        now_s = time.perf_counter()
        if data == b"[DONE]":
            done = True
            break
        event = json.loads(data)
        if "error" in event:
            answer.error = f"error event: {event['error'].get('code') or event['error'].get('type')}"
            return
        if event.get("usage"):
            _use(answer, event["usage"])
        for choice in event.get("choices", ()):
            begun_s = begun_s or now_s
            piece = choice.get("text") or (choice.get("delta") or {}).get("content")
            if piece:
                text.append(piece)
                answer.event_s.append(now_s)
            answer.finish = choice.get("finish_reason") or answer.finish
    if not done:
        answer.error = "the stream ended without [DONE]"
    answer.first_s = answer.event_s[0] if answer.event_s else begun_s
    if not answer.event_s and begun_s is not None:
        answer.event_s.append(begun_s)
    answer.text = "".join(text)


def _whole(answer: Answer, found: dict[str, Any]) -> None:
    _use(answer, found["usage"])
    choice = found["choices"][0]
    answer.finish = choice["finish_reason"]
    answer.text = choice.get("text") or (choice.get("message") or {}).get("content") or ""


def _use(answer: Answer, usage: dict[str, Any]) -> None:
    answer.prompt_tokens, answer.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _refusal(status: int, raw: bytes) -> str:
    try:
        error = json.loads(raw)["error"]
        return f"{status} {error.get('code') or error.get('type')}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return str(status)
