"""What a request may be before anything looks at it: its size, its nesting, its UTF-8, its key. An ASGI layer around the application."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from hashlib import sha256
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN_PATHS = ("/", "/health", "/ready", "/version", "/metrics", "/openapi.json")  # what carries no prompt and starts no work


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


class Limited:
    """Answers 401, 413 and 400 itself; reads a body whole, and hands it on in one piece."""

    def __init__(self, app: Any, *, keys: ApiKeys, max_body_bytes: int, max_depth: int):
        self.app, self.keys, self.max_body_bytes, self.max_depth = app, keys, max_body_bytes, max_depth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self.keys.any and scope["path"] not in OPEN_PATHS and not self.keys.holds(headers.get(b"authorization", "")):
            body = error_body("a valid API key is needed: Authorization: Bearer KEY", "authentication_error", code="invalid_api_key")
            await _answer(send, 401, body, [(b"www-authenticate", b"Bearer")])
            return
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        stated = headers.get(b"content-length", "0")
        body, more, whole = bytearray(), True, stated.isdigit() and int(stated) <= self.max_body_bytes
        while more and whole:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            whole = len(body) <= self.max_body_bytes
        if not whole:
            text = f"the body has more than the {self.max_body_bytes} bytes that are read (--max-body)"
            await _answer(send, 413, error_body(text, "invalid_request_error", code="body_too_large"), [(b"connection", b"close")])
            return
        # at most so many openings can be so deep: most bodies need no look at each byte
        if body.count(b"[") + body.count(b"{") > self.max_depth and depth_of(bytes(body), self.max_depth) > self.max_depth:
            await _answer(send, 400, error_body(f"the body is nested more than {self.max_depth} deep", "invalid_request_error", code="too_deep"), [])
            return
        given = False

        async def replay() -> MutableMapping[str, Any]:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": bytes(body), "more_body": False}
            return await receive()

        await self.app(scope, replay, send)


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
