"""HTTP/1.1 over asyncio streams, as little of it as timing an answer event by event needs (RFC 9112): one request a connection.

A general client spends more time on an event than our server does; on few cores that would be measured, not the server. About 20 µs an event here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tradespace.errors import InputError

_LINE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens, and the path before its endpoints."""

    host: str
    port: int
    tls: bool
    prefix: str

    @classmethod
    def of(cls, url: str) -> Address:
        """
        >>> Address.of("http://127.0.0.1:8000/v1/")
        Address(host='127.0.0.1', port=8000, tls=False, prefix='')
        """
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError as error:
            raise InputError(f"--url {url}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"--url {url} is no address of a server. Give http://HOST:PORT")
        tls = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if tls else 80), tls, parts.path.rstrip("/").removesuffix("/v1"))


class BadAnswer(Exception):
    """The answer is not HTTP, or ends before it is whole."""


class Exchange:
    """One request on a connection of its own, and its answer as it comes. An async context manager, which closes the connection.

    status     once `begin` has returned
    headers    names in lower case
    """

    def __init__(self, address: Address, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None):
        self.address, self.status, self.headers = address, 0, dict[str, str]()
        name = f"[{address.host}]" if ":" in address.host else address.host
        lines = [f"{method} {address.prefix}{path} HTTP/1.1", f"Host: {name}:{address.port}", "Connection: close", "Accept-Encoding: identity"]
        lines += [f"{key}: {value}" for key, value in (headers or {}).items()]
        if body or method == "POST":
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        self._request = "\r\n".join([*lines, "", ""]).encode("latin-1") + body
        self._reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Exchange:
        await self.begin()
        return self

    async def __aexit__(self, *details: object) -> None:
        self.abandon()

    def abandon(self) -> None:
        """Close the connection at once, whatever it was doing."""
        if self.writer is not None:
            self.writer.transport.abort()
            self.writer = None

    async def begin(self) -> None:
        """Connect, send, read status and headers. Raises OSError, BadAnswer."""
        self._reader, self.writer = await asyncio.open_connection(self.address.host, self.address.port, ssl=self.address.tls or None, limit=_LINE_BYTES)
        try:
            self.writer.write(self._request)
            # a server may refuse a body before it has read it: what it said counts, not that writing failed
            with contextlib.suppress(ConnectionError):
                await self.writer.drain()
            words = (await self._line()).split(maxsplit=2)
            if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
                raise BadAnswer(f"the answer does not begin as HTTP does: {words[:3]}")
            self.status = int(words[1])
            while line := await self._line():
                name, _, value = line.partition(b":")
                self.headers[name.decode("latin-1").strip().lower()] = value.decode("latin-1").strip()
        except BaseException:
            self.abandon()
            raise

    async def _line(self) -> bytes:
        assert self._reader is not None
        try:
            return (await self._reader.readuntil(b"\n")).rstrip(b"\r\n")
        except asyncio.IncompleteReadError as error:
            raise BadAnswer("the connection was closed in the midst of an answer") from error
        except asyncio.LimitOverrunError as error:
            raise BadAnswer(f"a line of more than {_LINE_BYTES} bytes") from error

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body, in the pieces in which it came. Raises BadAnswer where it is cut off."""
        assert self._reader is not None
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while True:
                try:
                    size = int((await self._line()).split(b";")[0], 16)
                except ValueError as error:
                    raise BadAnswer("a chunk without its size") from error
                yield (await self._exactly(size + 2))[:size]
                if not size:
                    return
        elif "content-length" in self.headers:
            yield await self._exactly(int(self.headers["content-length"]))
        else:
            while part := await self._reader.read(1 << 16):
                yield part

    async def _exactly(self, size: int) -> bytes:
        assert self._reader is not None
        try:
            return await self._reader.readexactly(size)
        except asyncio.IncompleteReadError as error:
            raise BadAnswer("the connection was closed in the midst of an answer") from error

    async def read_some(self, size: int) -> bytes:
        """At most `size` bytes of the body as it lies on the wire."""
        assert self._reader is not None
        if part := await self._reader.read(size):
            return part
        raise BadAnswer("the connection was closed in the midst of an answer")

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([part async for part in self.chunks()])

    async def events(self) -> AsyncIterator[bytes]:
        """Data of server-sent events, each as it comes (WHATWG HTML, section 9.2; one data line an event, as OpenAI's servers send them)."""
        held = b""
        async for part in self.chunks():
            held += part
            while (end := held.find(b"\n")) >= 0:
                line, held = held[:end].rstrip(b"\r"), held[end + 1 :]
                if line.startswith(b"data:"):
                    yield line[5:].lstrip()


async def call(address: Address, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None, timeout_s: float = 60.0) -> Any:
    """(status, JSON value or text) of one small exchange. `body`: bytes, or a value for JSON."""
    raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    async with asyncio.timeout(timeout_s), Exchange(address, method, path, raw, headers) as exchange:
        text = await exchange.read()
        kind = exchange.headers.get("content-type", "")
        return exchange.status, json.loads(text) if "json" in kind else text.decode(errors="replace")
