"""The server as its clients meet it: a process of its own on a tiny model, driven by OpenAI's client, by raw sockets, by signals, and by schemathesis."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest

from server.running import WAIT_S, Server

SCHEMA = {
    "type": "object", "required": ["name", "age"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
}  # fmt: skip

pytestmark = pytest.mark.xdist_group("server")


def test_chat_streams_what_it_answers(server):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "why is the sky blue?"}], "max_tokens": 12, "temperature": 0}
    whole = server.client.chat.completions.create(**asked)
    parts = list(server.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole.choices[0].message.content
    assert parts[-1].usage == whole.usage or parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.usage.completion_tokens <= 12
    assert whole.choices[0].finish_reason in ("length", "stop")


def test_completions_take_token_ids_batches_and_n(server):
    found = server.client.completions.create(model="tiny", prompt=[[5, 6, 7], [8, 9]], max_tokens=5, n=2, logprobs=3, temperature=0.8, seed=4, echo=True)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    logprobs = found.choices[0].logprobs
    assert len(logprobs.tokens) == 3 + 5 or found.choices[0].finish_reason == "stop"
    assert logprobs.token_logprobs[0] is None  # nothing foretells the first token
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    again = server.client.completions.create(model="tiny", prompt=[[5, 6, 7], [8, 9]], max_tokens=5, n=2, logprobs=3, temperature=0.8, seed=4, echo=True)
    assert [choice.text for choice in again.choices] == [choice.text for choice in found.choices]


def test_prompt_logprobs_are_those_of_the_oracle(server):
    import torch

    from cli.tiny_model import oracle

    ids = [5, 6, 7, 8, 9, 10]
    found = server.client.completions.create(model="tiny", prompt=ids, max_tokens=1, logprobs=0, temperature=0, echo=True)
    with torch.inference_mode():
        expected = oracle()(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = [float(expected[at, token]) for at, token in enumerate(ids[1:])]
    assert found.choices[0].logprobs.token_logprobs[1 : len(ids)] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_is_kept_at_any_temperature(server, seed):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    found = server.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "who?"}], max_tokens=120, temperature=1.5, seed=seed, response_format=form
    )
    value = json.loads(found.choices[0].message.content)
    assert set(value) == {"name", "age"} and 0 <= value["age"] <= 99 and len(value["name"]) <= 6


def test_a_regular_expression_is_kept(server):
    found = server.client.completions.create(model="tiny", prompt="a", max_tokens=20, temperature=1.0, seed=1, extra_body={"regex": "[0-9]{3}-[0-9]{2}"})
    assert found.choices[0].text[3] == "-" and found.choices[0].text.replace("-", "").isdigit()


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"model": "other", "prompt": "a"}, 404, "tiny"),
        ({"model": "tiny", "prompt": "a", "temperatur": 1}, 400, "temperatur"),
        ({"model": "tiny", "prompt": "a", "max_tokens": 10**6}, 400, "at most"),
        ({"model": "tiny", "prompt": [1] * 600}, 400, "Shorten"),
        ({"model": "tiny", "prompt": "a", "best_of": 3}, 400, "best_of"),
        ({"model": "tiny", "prompt": "a", "regex": "("}, 400, "regex"),
        ({"model": "tiny", "prompt": [10**9]}, 400, ""),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server, body, status, word):
    found = server.http.post("/v1/completions", json=body)
    assert found.status_code == status, found.text
    assert word in found.json()["error"]["message"]


@pytest.mark.parametrize(
    "raw", [b"{", b"\xff\xfe", '{"prompt": "a"}'.encode("utf-16"), b"[" * 10_000, b'{"model": "tiny", "prompt": "' + b"a" * (5 * 2**20) + b'"}']
)
def test_no_bytes_bring_it_down(server, raw):
    found = server.http.post("/v1/completions", content=raw, headers={"Content-Type": "application/json"})
    assert 400 <= found.status_code < 500
    assert found.json()["error"]["message"]
    assert server.get("/health") == 200


def test_a_client_that_goes_away_frees_its_blocks(server):
    with server.http.stream("POST", "/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True}) as found:
        next(found.iter_lines())
    server.until(lambda: server.load()["running"] == 0 and server.load()["used_blocks"] == 0, "free again")


def test_a_client_with_200_long_prompts_does_not_starve_one_with_a_short_one(server):
    """Round robin by key, and prompts in chunks: the short one is answered while nearly all of the others still wait."""
    long = {"model": "tiny", "prompt": [7] * 400, "max_tokens": 40, "ignore_eos": True, "user": "many"}

    async def both() -> tuple[int, int]:
        done = 0
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=httpx.Limits(max_connections=None)) as http:

            async def one() -> None:
                nonlocal done
                assert (await http.post("/v1/completions", json=long)).status_code == 200
                done += 1

            others = [asyncio.create_task(one()) for _ in range(200)]
            while done < 4:  # they are all there, and the first have been served
                await asyncio.sleep(0.01)
            before = done
            short = await http.post("/v1/completions", json={"model": "tiny", "prompt": [5], "max_tokens": 4, "ignore_eos": True, "user": "one"})
            assert short.status_code == 200
            between = done - before
            await asyncio.gather(*others)
        return between, done

    between, done = asyncio.run(both())
    # at most those that ran already (4), those handed to the engine beforehand (1), and as many again that end while it takes its own turn
    assert between <= 16 and done == 200


def test_metrics_have_the_names_that_dashboards_know(server):
    text = server.http.get("/metrics").text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "time_to_first_token_seconds_bucket", "request_success_total"):
        assert f"vllm:{name}" in text


def test_the_page_needs_nobody_else(server):
    page = server.http.get("/").text
    assert "<textarea" in page and "http://" not in page and "https://" not in page


def test_no_generated_request_breaks_its_own_description(server):
    words = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json", "--max-examples", "6", "--phases", "fuzzing"]
    words += ["-c", "not_a_server_error,response_schema_conformance,status_code_conformance", "--request-timeout", "60", "--seed", "1"]
    words += ["--suppress-health-check", "too_slow"]  # says how busy the machine is, not what the server answers
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    server.until(lambda: server.load()["running"] == 0, "idle")


def test_keys_are_asked_for_and_a_drain_lets_requests_end(places):
    server = Server(*places, "--api-key", "secret", "--grace", "20")
    try:
        assert server.http.get("/v1/models").status_code == 401
        assert server.http.get("/health").status_code == 200
        head = {"Authorization": "Bearer secret"}
        asked = {"model": "tiny", "prompt": "a", "max_tokens": 300, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=asked, headers=head) as found:
            lines = found.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"length"' in rest[-2]
        assert server.process.wait(timeout=WAIT_S) == 0
    finally:
        server.close()


def test_an_engine_that_dies_ends_its_requests_and_comes_back_once(places):
    server = Server(*places)
    try:
        engine = max(psutil.Process(server.process.pid).children(recursive=True), key=lambda child: child.memory_info().rss)
        asked = {"model": "tiny", "prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=asked) as found:
            lines = found.iter_lines()
            next(lines)
            engine.kill()
            rest = "\n".join(lines)
        assert '"error"' in rest
        server.until(lambda: server.get("/ready") == 200, "ready again")
        done = server.client.completions.create(model="tiny", prompt="a", max_tokens=3)
        assert done.usage.completion_tokens <= 3
    finally:
        server.close()
