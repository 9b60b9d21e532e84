"""What no client should send: every bit of it gets an error of OpenAI's shape, and the server goes on."""

from __future__ import annotations

import json
import socket

import pytest

pytestmark = pytest.mark.xdist_group("server")

COMPLETION = {"model": "tiny", "prompt": "a", "max_tokens": 4}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


def form(schema) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}


FIELDS = [
    {"n": 0}, {"n": 10**12}, {"n": 128}, {"n": "2"}, {"n": True}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"999999": 1}}, {"logit_bias": {"5_0": 1}},
    {"logit_bias": {" 5": 1}}, {"logit_bias": {"٣": 1}}, {"logit_bias": {"1": 1000}}, {"stop": ""}, {"stop": [""]}, {"stop": ["a"] * 17}, {"stop": "\ud800"},
    {"seed": 2**64}, {"seed": 1.5}, {"presence_penalty": -2.1}, {"frequency_penalty": 2.1}, {"repetition_penalty": 0}, {"temperature": -0.1}, {"top_p": 0},
    {"top_k": -2}, {"logprobs": 21}, {"max_tokens": -1}, {"max_tokens": 2**40}, {"prompt": ""}, {"prompt": []}, {"prompt": [[1], "a"]}, {"prompt": [10**10]},
    {"prompt": "\ud800"}, {"prompt": ["a"] * 1025}, {"min_tokens": 100}, {"stop_token_ids": [10**9]}, {"timeout_s": 0}, {"priority": 10**9}, {"regex": "\x00"},
    {"regex": "("}, {"grammar": "root ::="}, {"grammar": 'root ::= root "a"'}, {"model": "\ud800"}, form({"type": "strin"}), form({"$ref": "#/nope"}),
    form({"$ref": "#"}), form({"enum": []}), form({"type": "string", "pattern": "("}), form({"type": "string", "minLength": 5, "maxLength": 2}),
    form({"type": "string", "maxLength": -1}), form({"type": "string", "maxLength": 10**30}), form({"properties": 3}), form({"const": "\ud800"}),
]  # fmt: skip


@pytest.mark.parametrize("more", FIELDS, ids=lambda more: ascii(more)[:50])
def test_a_field_out_of_its_range_is_a_400_that_says_so(server, more):
    found = server.http.post("/v1/completions", content=json.dumps({**COMPLETION, **more}), headers={"content-type": "application/json"})
    assert found.status_code == (404 if "model" in more else 400), found.text
    error = found.json()["error"]
    assert error["message"] and error["type"] == "invalid_request_error" and "/project/" not in error["message"]


@pytest.mark.parametrize(
    "more",
    [
        {"messages": []}, {"messages": [{"role": "x", "content": "a"}]}, {"messages": [{"role": "user", "content": "\ud800"}]}, {"top_logprobs": 3},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}, {"modalities": ["audio"]},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]}, {"tools": [{"type": "function", "function": {"name": "a"}}] * 129},
        {"stream_options": {"include_usage": True}}, {"tool_choice": "maybe"}, {"foo": 1},
    ],
    ids=lambda more: ascii(more)[:50],
)  # fmt: skip
def test_a_chat_that_makes_no_sense_is_a_400(server, more):
    found = server.http.post("/v1/chat/completions", content=json.dumps({**CHAT, **more}), headers={"content-type": "application/json"})
    assert found.status_code == 400 and found.json()["error"]["message"], found.text


def spoken(server, sent: bytes, until: bytes = b"") -> bytes:
    """What comes back over a bare socket until it closes, or until so much of it has come."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(sent)
        found = b""
        while part := connection.recv(65536):
            found += part
            if until and until in found:
                break
    return found


@pytest.mark.parametrize(
    "sent",
    [
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n", HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        HEAD + b"Content-Length: -5\r\n\r\n", HEAD + b"Transfer-Encoding: gzip\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n", b"\x00\xff\xfe\r\n\r\n",
    ],
    ids=("chunk", "two lengths", "negative", "coding", "no host", "bytes"),
)  # fmt: skip
def test_what_is_no_http_is_answered_in_json(server, sent):
    head, _, body = spoken(server, sent).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and json.loads(body)["error"]["code"] == "not_http"


def test_pipelined_and_chunked_requests_are_answered(server):
    body = json.dumps(COMPLETION).encode()
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(body[at : at + 5]), body[at : at + 5]) for at in range(0, len(body), 5))
    chunked = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    found = spoken(server, whole + whole + chunked)
    assert found.count(b"HTTP/1.1 200 OK") == 3 and found.count(b'"usage"') == 3


def test_it_has_gone_on(server):
    server.until(lambda: server.load()["running"] == server.load()["used_blocks"] == 0, "idle")
    assert server.client.completions.create(**COMPLETION).usage.completion_tokens <= 4
