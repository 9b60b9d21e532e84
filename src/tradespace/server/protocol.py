"""uvicorn's HTTP/1.1 with what it lacks: an end for those who never finish asking, for those who never read, and a bound on how many may be connected.

Each of them holds memory that others' requests need: a connection about 32 KiB with its request, a stream that nobody reads all its events.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tradespace.server.limits import error_body

ASK_S = 30.0  # from the first byte that may come to the whole head of a request
READ_S = 60.0  # that a client may let a full send buffer stand
LEAVE_S = 5.0  # for one that was sent away to read why
MANY = 4  # times the bound: from there on connections are closed without a word


class Guarded(H11Protocol):
    """One connection. `most` (a class attribute, set by `guarded`): beyond so many at once a new one is answered 503, whatever it asks."""

    most = 1 << 30
    _sent_away: bool | None = None  # None: it may ask; False: it will be sent away; True: it has been
    _asking: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MANY * self.most:
            transport.abort()
            return
        if len(self.connections) > self.most:
            self._sent_away = False
        self._expect()

    def data_received(self, data: bytes) -> None:
        if self._sent_away is not None:
            self._send_away()
            return
        super().data_received(data)
        if self._asking is not None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._asking.cancel()
                self._asking = None
        elif self.cycle is None or self.cycle.response_complete:
            self._expect()  # the beginning of another request on the same connection

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._asking, self._reading):
            if timer is not None:
                timer.cancel()
        self._asking = self._reading = None
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._reading is None:
            self._reading = self.loop.call_later(READ_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is answered as everything else is, unless an answer to an earlier request is under way."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error_body(msg, "invalid_request_error", code="not_http")).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
            for event in (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _send_away(self) -> None:
        """Say why, once, and drop what else comes: closing at once would take the answer back before it is read."""
        if self._sent_away:
            return
        self._sent_away = True
        body = json.dumps(error_body(f"{self.most} connections are open, as many as may. Try again later", "server_error", code="too_many_connections"))
        head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\nConnection: close\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        self.transport.write_eof()
        if self._asking is not None:
            self._asking.cancel()
        self._asking = self.loop.call_later(LEAVE_S, self._give_up)

    def _expect(self) -> None:
        self._asking = self.loop.call_later(ASK_S, self._give_up)

    def _give_up(self) -> None:
        self._asking = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def guarded(most: int) -> type[Any]:
    """The protocol's class for a server of at most `most` connections."""
    return type("Guarded", (Guarded,), {"most": most})
