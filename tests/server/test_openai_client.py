"""Every feature that the server states, driven by OpenAI's own client."""

from __future__ import annotations

import json
import threading
import time

import openai
import pytest

SKY = [{"role": "user", "content": "why is the sky blue?"}]
FORM = {"type": "object", "required": ["n"], "additionalProperties": False, "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}}

pytestmark = pytest.mark.xdist_group("server")


def _chat(server, **more):
    return server.client.chat.completions.create(**({"model": "tiny", "messages": SKY, "max_tokens": 8, "temperature": 0} | more))


def test_models_are_listed_and_found(server):
    (listed,) = server.client.models.list().data
    assert server.client.models.retrieve("tiny") == listed
    with pytest.raises(openai.NotFoundError, match="tiny"):
        server.client.models.retrieve("other")


def test_n_seed_and_logprobs_of_a_chat(server):
    found, again = (_chat(server, n=2, seed=3, temperature=1, logprobs=True, top_logprobs=4) for _ in range(2))
    assert [choice.message.content for choice in found.choices] == [choice.message.content for choice in again.choices]
    for choice in found.choices:
        for token in choice.logprobs.content:
            assert len(token.top_logprobs) == 4 and token.logprob <= token.top_logprobs[0].logprob + 1e-6
            assert token.token.startswith("bytes:") or bytes(token.bytes).decode() == token.token


@pytest.mark.parametrize("n", [3, 4])
def test_outputs_that_end_in_one_step(server, n):
    asked = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 4, "n": n, "seed": 1, "temperature": 1, "extra_body": {"ignore_eos": True}}
    found = server.client.completions.create(**asked)
    texts = [""] * n
    for part in server.client.completions.create(**asked, stream=True):
        texts[part.choices[0].index] += part.choices[0].text
    assert [choice.text for choice in found.choices] == texts and found.usage.completion_tokens == 4 * n


def test_both_names_of_the_limit(server):
    for name in ("max_tokens", "max_completion_tokens"):
        found = server.client.chat.completions.create(model="tiny", messages=SKY, temperature=0, extra_body={"ignore_eos": True}, **{name: 3})
        assert found.usage.completion_tokens == 3 and found.choices[0].finish_reason == "length"


def test_stop_ends_before_the_text(server):
    whole = server.client.completions.create(model="tiny", prompt="the plan", max_tokens=24, temperature=0).choices[0].text
    stop = whole[len(whole) // 2 :][:2]
    cut = server.client.completions.create(model="tiny", prompt="the plan", max_tokens=24, temperature=0, stop=[stop]).choices[0]
    assert cut.text == whole[: whole.index(stop)] and cut.finish_reason == "stop"


def test_bias_and_penalties_change_what_is_said(server):
    plain = server.client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=8, temperature=0, extra_body={"ignore_eos": True})
    forced = server.client.completions.create(
        model="tiny", prompt=[5, 6, 7], max_tokens=8, temperature=0, logit_bias={"9": 100}, logprobs=0, extra_body={"ignore_eos": True}
    )
    assert len(set(forced.choices[0].logprobs.tokens)) == 1 and forced.choices[0].text != plain.choices[0].text
    freed = server.client.completions.create(
        model="tiny", prompt=[5, 6, 7], max_tokens=8, temperature=0, logit_bias={"9": 2}, frequency_penalty=2, presence_penalty=2, logprobs=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert len(set(freed.choices[0].logprobs.tokens)) > 1


def test_json_object_is_json(server):
    found = _chat(server, response_format={"type": "json_object"}, max_tokens=300, temperature=1, seed=5).choices[0]
    assert found.finish_reason == "length" or isinstance(json.loads(found.message.content), dict)


def test_grammars_are_kept(server):
    found = server.client.completions.create(model="tiny", prompt="a", max_tokens=9, temperature=1, seed=1, extra_body={"grammar": 'root ::= "yes" | "no"'})
    assert found.choices[0].text in ("yes", "no")


def test_responses_answer_as_a_chat_does(server):
    said = _chat(server, max_tokens=12).choices[0].message.content
    whole = server.client.responses.create(model="tiny", input=SKY[0]["content"], max_output_tokens=12, temperature=0)
    assert whole.output_text == said
    with server.client.responses.stream(model="tiny", input=SKY, max_output_tokens=12, temperature=0) as events:
        seen = list(events)
    assert "".join(event.delta for event in seen if event.type == "response.output_text.delta") == said
    assert seen[0].type == "response.created" and seen[-1].type in ("response.completed", "response.incomplete")
    assert seen[-1].response.output_text == said and seen[-1].response.usage == whole.usage
    # an answer goes back as it came, with the next question behind it
    more = server.client.responses.create(model="tiny", input=[*SKY, *whole.output, {"role": "user", "content": "and at night?"}], max_output_tokens=4)
    assert more.usage.input_tokens > whole.usage.input_tokens + whole.usage.output_tokens


def test_responses_keep_a_schema(server):
    form = {"format": {"type": "json_schema", "name": "digit", "schema": FORM}}
    found = server.client.responses.create(model="tiny", input="how many?", max_output_tokens=60, temperature=1.5, text=form)
    assert 0 <= json.loads(found.output_text)["n"] <= 9
    with pytest.raises(openai.BadRequestError, match="schema"):
        server.client.responses.create(model="tiny", input="how many?", text={"format": {"type": "json_schema", "name": "digit"}})


def test_what_clients_send_besides_is_taken(server):
    besides = {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"a": "b"}, "service_tier": "auto", "store": False}
    assert _chat(server, **besides).choices[0].message.role == "assistant"
    assert server.client.responses.create(model="tiny", input="a", max_output_tokens=2, **besides).metadata == {"a": "b"}


def test_a_long_text_is_encoded_beside_what_others_ask(server):
    """While texts of a megabyte are encoded, /health is answered all along."""
    text, slowest, done = "the plan is made. " * 60_000, 0.0, threading.Event()

    def encode() -> None:
        try:
            assert server.http.post("/tokenize", json={"messages": [{"role": "user", "content": text}]}).status_code in (200, 413)
        finally:
            done.set()

    asking = threading.Thread(target=encode)
    began = time.perf_counter()
    asking.start()
    answered = 0
    while not done.is_set():
        start = time.perf_counter()
        assert server.get("/health") == 200
        slowest, answered = max(slowest, time.perf_counter() - start), answered + 1
    asking.join()
    took = time.perf_counter() - began
    assert answered >= 2 and slowest < max(0.5, took / 2)
