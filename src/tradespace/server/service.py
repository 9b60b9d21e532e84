"""What the endpoints share: the engine's link, the tokenizer, the metrics, and how a request waits for its outputs and is given up."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from tradespace.engine.request import SamplingParams
from tradespace.errors import EngineError, InputError, TradespaceError
from tradespace.loading.tokenizer import Tokenizer
from tradespace.server.admission import QueueFull
from tradespace.server.answering import Output
from tradespace.server.asking import UnknownModel, chat_ids, text_size
from tradespace.server.limits import Json, error_body
from tradespace.server.link import DeadlineExceeded, Job, Link, News, Unavailable
from tradespace.server.messages import Grammar, Piece, Ready
from tradespace.server.metrics import Metrics
from tradespace.server.schema import Message, Tool
from tradespace.server.tool_prompt import is_about_tools, shows_tools
from tradespace.server.tools import Style, style_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server is to behave. Seconds and bytes as named."""

    model: str
    names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    max_queue: int = 1024
    max_body_bytes: int = 2 << 20
    max_depth: int = 64
    timeout_s: float | None = None
    grace_s: float = 30.0
    tool_style: str = "auto"
    tool_prompt: bool = False
    metrics_prefix: str = "vllm"
    grammars: bool = True
    front_bytes: int = 0
    grammar_bytes: int = 0

    @property
    def outside_bytes(self) -> int:
        """What of the budget is not the engine's own."""
        return self.front_bytes + self.grammar_bytes


INLINE_CHARS = 4096  # shorter texts are encoded in less time than a thread takes to hand them back
TEXT_THREADS = 2  # long texts at once; others wait their turn, and nobody else for them
_texts = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="texts")  # no thread before the first long text
T = TypeVar("T")


async def off_loop(size: int, work: Callable[..., T], *args: Any) -> T:
    """`work(*args)`, in a thread where what it reads has more than INLINE_CHARS characters: nobody else's events wait for it."""
    return work(*args) if size <= INLINE_CHARS else await asyncio.get_running_loop().run_in_executor(_texts, work, *args)


class ClientGone(Exception):
    """Nobody reads the answer any more."""


@dataclass(frozen=True)
class Wanted:
    """One prompt, and what is wanted of it."""

    prompt_ids: tuple[int, ...]
    params: Mapping[str, Any]
    grammar: Grammar | None = None


class Service:
    """The server without HTTP's paths."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer, link: Link, metrics: Metrics):
        self.settings, self.tokenizer, self.link, self.metrics = settings, tokenizer, link, metrics
        self.shows_tools = shows_tools(tokenizer)
        self.draining = False
        self.started = int(time.time())

    @property
    def name(self) -> str:
        return self.settings.names[0]

    @property
    def tool_style(self) -> Style:
        """How the model writes calls."""
        return style_of(self.tokenizer.tool_template or self.tokenizer.chat_template, self.settings.tool_style)

    @property
    def ready(self) -> Ready:
        """Raises Unavailable where no request can be taken."""
        if self.draining:
            raise Unavailable("the server is about to stop and takes no more requests")
        if self.link.ready is None:
            raise Unavailable(self.link.failure or "the engine is starting")
        return self.link.ready

    async def encode_chat(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> tuple[int, ...]:
        """Token ids of a conversation. Raises InputError where it is about tools and the model would not see them."""
        about_tools = bool(tools) or any(is_about_tools(message) for message in messages)
        if about_tools and not self.shows_tools and not self.settings.tool_prompt:
            raise InputError(
                "this model's chat template shows it no tools: it would call what it has never seen. Leave tools and messages about them away (or say "
                "tool_choice none), serve a model whose template shows them, or start the server with --tool-prompt, which tells them in a system message"
            )
        encode = partial(chat_ids, self.tokenizer, messages, tools, prompted=about_tools and not self.shows_tools)
        return await off_loop(text_size(messages, tools), encode)

    def key_of(self, request: Request, user: str | None) -> str:
        """Who asks, for fairness: the API key, else the address; and the user that the request names."""
        authorization = request.headers.get("authorization")
        who = sha256(authorization.encode()).hexdigest()[:16] if authorization else (request.client.host if request.client else "")
        return f"{who}/{user or ''}"

    def submit(
        self, request: Request, wanted: Sequence[Wanted], *, user: str | None, priority: int = 0, stream: bool = False, timeout_s: float | None = None
    ) -> Waiting:
        """Queue all of them, or none. Raises InputError, Unavailable, QueueFull."""
        _ = self.ready
        for one in wanted:
            SamplingParams(**one.params)  # says what is wrong
            if one.grammar is not None and not self.settings.grammars:
                raise InputError(f"this server binds no output to a {one.grammar.what}: it was started with --no-grammars")
        jobs: list[Job] = []
        news: asyncio.Queue[News] = asyncio.Queue()
        key = self.key_of(request, user)
        try:
            for one in wanted:
                jobs.append(self.link.submit(one.prompt_ids, one.params, key=key, news=news, priority=priority, stream=stream, grammar=one.grammar))
        except BaseException:
            for job in jobs:
                self.link.abort(job)
            raise
        limit_s = min((limit for limit in (timeout_s, self.settings.timeout_s) if limit is not None), default=None)
        return Waiting(self.link, jobs, news, limit_s)

    async def outputs(self, request: Request, waiting: Waiting) -> list[list[Output]]:
        """All outputs of all jobs, once they have ended. Raises ClientGone as soon as the client has gone, whose requests then end."""
        found = [[Output() for _ in range(job.outputs)] for job in waiting.jobs]

        async def gather() -> None:
            async for index, piece in waiting:
                found[index][piece.sample].take(piece)

        await waiting.beside(request, gather())
        return found


class Waiting:
    """The pieces of several jobs as they come: an async iterator of (index of the job, piece). Leaving it, for whatever reason, ends them all."""

    def __init__(self, link: Link, jobs: Sequence[Job], news: asyncio.Queue[News], limit_s: float | None):
        self.link, self.jobs, self._news = link, jobs, news
        self._index = {job.id: index for index, job in enumerate(jobs)}
        self._left = sum(job.outputs for job in jobs)
        self._put_back: list[News] = []
        self._timer = None if limit_s is None else asyncio.get_running_loop().call_later(limit_s, self._expire, limit_s)

    def _expire(self, limit_s: float) -> None:
        for job in self.jobs:
            self.link.abort(job, DeadlineExceeded(f"the request took longer than its {limit_s:g} s"))

    async def first(self, request: Request) -> None:
        """Wait for the first news, and raise it here where it is an error: nothing has been answered yet."""

        async def look() -> None:
            news = await self._news.get()
            if isinstance(news, Exception):
                raise news
            self._put_back.append(news)

        await self.beside(request, look())

    async def beside(self, request: Request, work: Any) -> None:
        """Do `work`; end it, and all jobs, when the client goes. Raises ClientGone then."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
        done = False
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGone
            task.result()
            done = True
        finally:
            for other in (task, gone):
                other.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)
            if not done:
                self.close()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for job in self.jobs:
            self.link.abort(job)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        try:
            while self._left:
                news = self._put_back.pop() if self._put_back else await self._news.get()
                if isinstance(news, Exception):
                    raise news
                if news.finish_reason is not None:
                    if news.finish_reason in ("error", "abort"):
                        raise EngineError(news.error or "the request was ended")
                    self._left -= 1
                yield self._index[news.id], news
        finally:
            self.close()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# ---------------------------------------------------------------------------------------------------------------- answers

_STATUS: tuple[tuple[type[Exception], int, str], ...] = (
    (UnknownModel, 404, "model_not_found"),
    (InputError, 400, "invalid_request"),
    (QueueFull, 429, "queue_full"),
    (DeadlineExceeded, 504, "deadline_exceeded"),
    (Unavailable, 503, "unavailable"),
    (EngineError, 500, "engine_error"),
)


def described(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body of an error that a client may see."""
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            what = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
            return status, error_body(str(error), what, code=code)
    return 500, error_body("a bug of ours; the server's log has more", "server_error", code="internal")


def error_response(error: Exception) -> Response:
    status, body = described(error)
    headers = {"retry-after": str(error.retry_s)} if isinstance(error, QueueFull) else {"retry-after": "5"} if status == 503 else None
    return Json(body, status, headers=headers)


def sse(event: Any) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode(errors="replace") + b"\n\n"


async def _guarded(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Errors in the midst of a stream become its last event."""
    try:
        async for event in events:
            yield event
    except (TradespaceError, QueueFull) as error:
        yield sse(described(error)[1])


def streamed(events: AsyncIterator[bytes]) -> Response:
    return StreamingResponse(_guarded(events), media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"})


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"
