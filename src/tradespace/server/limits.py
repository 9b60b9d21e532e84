"""What a request may be before anything looks at it: its size, its nesting, its UTF-8, its key. An ASGI layer around the application."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from hashlib import sha256
from typing import Any

from starlette.responses import JSONResponse

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN_PATHS = ("/", "/health", "/ready", "/version", "/metrics", "/openapi.json")  # what carries no prompt and starts no work


class Json(JSONResponse):
    """JSON that can be sent whatever it repeats of a request: a lone surrogate, which JSON can write and UTF-8 cannot, becomes a question mark."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(errors="replace")


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI writes it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def depth_of(body: bytes, most: int) -> int:
    """How deep arrays and objects are nested; stops counting beyond `most`.

    >>> depth_of(b'{"a": ["[[", 1]}', 64)
    2
    """
    deepest = depth = 0
    in_text = escaped = False
    for byte in body:
        if in_text:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                in_text = False
        elif byte == 0x22:
            in_text = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
            if depth > most:
                return deepest
        elif byte in b"]}":
            depth -= 1
    return deepest


class ApiKeys:
    """Keys are compared by their digests, in a time that says nothing about them."""

    def __init__(self, keys: tuple[str, ...]):
        self._digests = tuple(sha256(key.encode()).digest() for key in keys)

    @property
    def any(self) -> bool:
        return bool(self._digests)

    def holds(self, authorization: str) -> bool:
        kind, _, key = authorization.partition(" ")
        given = sha256(key.strip().encode(errors="surrogateescape")).digest()
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(digest, given)
        return found and kind.lower() == "bearer"


# What a request holds of this process, beyond a connection's share, for each byte of its body: the bytes, their values, their tokens (a token takes 4 to 5
# bytes of JSON and, as an integer in two lists, 44 of memory).
HELD_PER_BYTE = 16
FREE_BODY_BYTES = 1024  # that a connection's own share covers
BODY_S = 60.0  # to send a whole body


class Limited:
    """Answers 401, 408, 413, 429 and 400 itself; reads a body whole, and hands it on in one piece.

    held_bytes   most that all requests together may hold of this process, estimated from their bodies; one more is answered 429 until others have ended
    """

    def __init__(self, app: Any, *, keys: ApiKeys, max_body_bytes: int, max_depth: int, held_bytes: int):
        self.app, self.keys, self.max_body_bytes, self.max_depth = app, keys, max_body_bytes, max_depth
        self.most_held_bytes, self._held_bytes = max(held_bytes, HELD_PER_BYTE * max_body_bytes), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self.keys.any and scope["path"] not in OPEN_PATHS and not self.keys.holds(headers.get(b"authorization", "")):
            error = error_body("a valid API key is needed: Authorization: Bearer KEY", "authentication_error", code="invalid_api_key")
            await _answer(send, 401, error, [(b"www-authenticate", b"Bearer")])
            return
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        stated = headers.get(b"content-length", "0")
        held = _Held(self)
        try:
            if not stated.isdigit() or int(stated) > self.max_body_bytes:
                raise _Refused(413, self._too_large(), "body_too_large", [(b"connection", b"close")])
            body = await self._read(receive, held)
            if body is None:
                return
            # at most so many openings can be so deep: most bodies need no look at each byte
            if body.count(b"[") + body.count(b"{") > self.max_depth and depth_of(body, self.max_depth) > self.max_depth:
                raise _Refused(400, f"the body is nested more than {self.max_depth} deep", "too_deep", [])
            try:
                body.decode()
            except UnicodeDecodeError as error:
                raise _Refused(400, f"the body is not UTF-8 at byte {error.start}", "not_utf8", []) from None
            await self.app(scope, _replay(body, receive), send)
        except _Refused as refused:
            kind = "rate_limit_error" if refused.status == 429 else "invalid_request_error"
            await _answer(send, refused.status, error_body(refused.message, kind, code=refused.code), refused.headers)
        finally:
            held.release()

    async def _read(self, receive: Receive, held: _Held) -> bytes | None:
        """The whole body; None: the client has gone. Raises _Refused."""
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(BODY_S):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.max_body_bytes:
                        raise _Refused(413, self._too_large(), "body_too_large", [(b"connection", b"close")])
                    if not held.grow(HELD_PER_BYTE * max(0, len(body) - FREE_BODY_BYTES)):
                        text = "requests that are under way hold as much memory as they may. Try again later, or with a shorter prompt"
                        raise _Refused(429, text, "queue_full", [(b"retry-after", b"2"), (b"connection", b"close")])
        except TimeoutError:
            raise _Refused(408, f"the body did not come within {BODY_S:g} s", "body_too_slow", [(b"connection", b"close")]) from None
        return bytes(body)

    def _too_large(self) -> str:
        return f"the body has more than the {self.max_body_bytes} bytes that are read (--max-body)"


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str, headers: list[tuple[bytes, bytes]]):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


class _Held:
    """One request's share of what all may hold."""

    def __init__(self, limited: Limited):
        self._limited, self._bytes = limited, 0

    def grow(self, size_bytes: int) -> bool:
        """Hold so much altogether. False: there is no room for it."""
        more = size_bytes - self._bytes
        if self._limited._held_bytes + more > self._limited.most_held_bytes:
            return False
        self._limited._held_bytes += more
        self._bytes = size_bytes
        return True

    def release(self) -> None:
        self._limited._held_bytes -= self._bytes
        self._bytes = 0


def _replay(body: bytes, receive: Receive) -> Receive:
    """Says the body once, then what comes."""
    left = [body]

    async def replay() -> MutableMapping[str, Any]:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return replay


async def _answer(send: Send, status: int, body: dict[str, Any], headers: list[tuple[bytes, bytes]]) -> None:
    raw = json.dumps(body).encode()
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode()), *headers],
        }
    )
    await send({"type": "http.response.body", "body": raw})
