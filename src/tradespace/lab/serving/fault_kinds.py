"""What goes wrong with clients, one function each: every one returns what came of it, by kind. They run beside a probe that must be answered all along."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from typing import Any

from tradespace.lab.serving.asking import Ask, Target, send
from tradespace.lab.serving.http import Address, BadAnswer, Exchange, call

Found = dict[str, int]
WAIT_S = 300.0
BIG_BYTES = 100 * 10**6


async def killed(target: Target, count: int) -> Found:
    """Clients that go away at random: before the head of the answer, or after some of its events."""
    draw, found, gate = random.Random(1), Counter[str](), asyncio.Semaphore(25)

    async def one(patience: int) -> None:
        body = target.body_of(Ask(prompt=draw.randint(8, 64), output=64), draw)
        exchange = Exchange(target.address, "POST", target.path, body)
        async with gate:
            begin = asyncio.create_task(exchange.begin())
            try:
                await asyncio.wait((begin,), timeout=0.02 if patience < 3 else WAIT_S)
                if not begin.done():
                    found["before the answer"] += 1
                    return
                begin.result()
                seen = 0
                async for _ in exchange.events():
                    seen += 1
                    if seen >= patience:
                        found["in the midst"] += 1
                        return
                found["ended before it was killed"] += 1
            except (OSError, BadAnswer) as error:
                found[f"LOST: {type(error).__name__}"] += 1
            finally:
                begin.cancel()
                exchange.abandon()

    await asyncio.gather(*(one(draw.randint(0, 24)) for _ in range(count)))
    return dict(found)


async def slow(target: Target, count: int, seconds: float) -> Found:
    """Readers that take a few bytes a second of answers that carry much."""
    draw = random.Random(2)

    async def one() -> str:
        body = target.body_of(Ask(prompt=8, output=256, body={"logprobs": 5}), draw)
        exchange = Exchange(target.address, "POST", target.path, body)
        try:
            await exchange.begin()
            for _ in range(round(seconds)):
                await asyncio.wait_for(exchange.read_some(16), WAIT_S)
                await asyncio.sleep(1)
            return "read on slowly"
        except (OSError, BadAnswer):
            return "was cut off"
        finally:
            exchange.abandon()

    return dict(Counter(await asyncio.gather(*(one() for _ in range(count)))))


async def half_open(address: Address, count: int, seconds: float) -> Found:
    """Connections that begin a request and never end it: nothing at all, half a head, half a body. The server must close them itself, or answer 408."""
    beginnings = (
        b"",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-Half: ",
        b'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\n{"prompt"',
    )

    async def one(beginning: bytes) -> str:
        reader, writer = await asyncio.open_connection(address.host, address.port)
        try:
            writer.write(beginning)
            answer = await asyncio.wait_for(reader.read(64), seconds)
            return f"answered {answer[9:12].decode()}" if answer else "closed by the server"
        except TimeoutError:
            return f"LOST: still open after {seconds:g} s"
        except OSError:
            return "closed by the server"
        finally:
            writer.transport.abort()

    return dict(Counter(await asyncio.gather(*(one(beginnings[index % 3]) for index in range(count)))))


def malformed_bodies() -> dict[str, bytes]:
    """Bodies that are no request, each in its own way."""
    prompt = b'{"model": null, "prompt": '
    return {
        "empty": b"", "half an object": b'{"prompt": "a', "no JSON": b"hello", "invalid UTF-8": prompt + b'"\xff\xfe\xc3("}',
        "overlong UTF-8": prompt + b'"\xc0\xaf"}', "lone surrogate": prompt + b'"\\ud800"}', "NUL": prompt + b'"a\x00b"}',
        "UTF-16": '{"prompt": "a"}'.encode("utf-16"), "a list": b"[1, 2]", "null": b"null", "a number": b"7",
        "NaN": b'{"prompt": "a", "temperature": NaN}', "infinity": b'{"prompt": "a", "temperature": 1e999}',
        "huge number": b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", "negative token": prompt + b"[-1]}",
        "huge token": prompt + b"[99999999999999999999]}", "nested 10,000 arrays": b"[" * 10_000 + b"]" * 10_000,
        "nested 100,000 objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "empty prompt": prompt + b'""}',
        "unknown field": b'{"prompt": "a", "temprature": 1}', "100,000 stops": json.dumps({"prompt": "a", "stop": ["x"] * 100_000}).encode(),
        "long stop": json.dumps({"prompt": "a", "stop": "x" * 1_000_000}).encode(), "wrong types": b'{"prompt": {"a": 1}, "max_tokens": "many"}',
        "duplicate keys": b'{"prompt": "a", "prompt": 7}',
    }  # fmt: skip


async def malformed(address: Address) -> Found:
    """Every one must be answered with a 4xx that says what is wrong, and none with tokens."""
    found = Counter[str]()
    for name, body in malformed_bodies().items():
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
            try:
                status, answer = await call(address, "POST", path, body, timeout_s=WAIT_S)
            except (OSError, BadAnswer, TimeoutError) as error:
                found[f"LOST: {name} at {path}: {type(error).__name__}"] += 1
                continue
            clear = isinstance(answer, dict) and bool(answer.get("error", {}).get("message"))
            fine = (400 <= status < 500 and clear) or (status == 200 and path == "/tokenize")
            found[str(status) if fine else f"LOST: {name} at {path}: {status}"] += 1
    return dict(found)


async def big_bodies(address: Address, count: int) -> Found:
    """100 MB: with its length stated, in chunks without, and behind a false length."""
    heads = (
        f"Content-Length: {BIG_BYTES}\r\n\r\n".encode(),
        b"Transfer-Encoding: chunked\r\n\r\n",
        b"Content-Length: 100\r\n\r\n",
    )  # fmt: skip

    async def one(which: int) -> str:
        reader, writer = await asyncio.open_connection(address.host, address.port)
        part = b"a" * 65536
        try:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n" + heads[which])

            async def pour() -> None:
                with contextlib.suppress(OSError):
                    for _ in range(BIG_BYTES // len(part)):
                        writer.write(b"%x\r\n%b\r\n" % (len(part), part) if which == 1 else part)
                        await writer.drain()

            pouring = asyncio.create_task(pour())
            try:
                answer = await asyncio.wait_for(reader.read(64), WAIT_S)
            finally:
                pouring.cancel()
            return f"answered {answer[9:12].decode()}" if answer else "closed by the server"
        except TimeoutError:
            return "LOST: no answer"
        except OSError:
            return "closed by the server"
        finally:
            writer.transport.abort()

    return dict(Counter(await asyncio.gather(*(one(index % 3) for index in range(count)))))


HOSTILE: tuple[dict[str, Any], ...] = (
    {"regex": "(a+)+$"}, {"regex": "(a|a)*b"}, {"regex": "((a{0,100}){0,100}){0,100}"}, {"regex": ".*" * 200 + "x"}, {"regex": ".{0,9999}x"},
    {"regex": "(" * 4000 + "a" + ")" * 4000}, {"regex": "[" * 1000}, {"regex": "a{999999999}"}, {"regex": "(?=a)b"}, {"regex": "\\"},
    {"grammar": 'root ::= root root root | "a" | ""'}, {"grammar": 'root ::= root "a" | "b"'}, {"grammar": "root ::= missing"}, {"grammar": "root ::="},
    {"grammar": "root ::= " + "(" * 3000 + '"a"' + ")" * 3000},
    {"grammar": "root ::= a0\n" + "\n".join(f"a{i} ::= a{i + 1} a{i + 1}" for i in range(40)) + '\na40 ::= "x"'},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "string", "maxLength": 10**9}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "array", "items": {"type": "array"}, "minItems": 10**6}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"properties": {f"p{i}": {"type": "string"} for i in range(800)}}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object", "not": {}}}}},
)  # fmt: skip


async def hostile(target: Target) -> Found:
    """Regexes, grammars and schemas that are made to take for ever, all at once: each ends in tokens or in a 400 that says why."""
    draw = random.Random(3)
    free = Target(address=target.address, model=target.model, exact_length=False, stream=False, timeout_s=WAIT_S)
    answers = await asyncio.gather(*(send(free, Ask(prompt=4, output=8, body=body), draw) for body in HOSTILE))
    return dict(Counter("tokens" if a.error is None else a.error if a.error.startswith("400") else f"LOST: {a.error}" for a in answers))
