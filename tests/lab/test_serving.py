"""The load client: arrivals, figures, what it takes for an error, and a server of a few lines whose delays are known."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path

import pytest

from tradespace.errors import CorruptFileError, InputError, UnsupportedError
from tradespace.lab.serving.asking import Answer, Ask, Target, send
from tradespace.lab.serving.client import MODES, by_guidellm, draw_asks
from tradespace.lab.serving.client import markdown as client_markdown
from tradespace.lab.serving.command import Load, run_load, thinned
from tradespace.lab.serving.figures import median_interval, summarize
from tradespace.lab.serving.http import Address
from tradespace.lab.serving.load import Run, closed_loop, open_loop, poisson, read_trace
from tradespace.lab.serving.plot import draw_run
from tradespace.lab.serving.prefix import verdict
from tradespace.measure.machine import this_machine
from tradespace.measure.record import Figure, new_record

FIRST_S, NEXT_S = 0.05, 0.02


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text, "finish_reason": None}]}).encode() + b"\n\n"


def chunk(part: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(part), part)


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}}\n\n'


class Fake:
    """A server that answers the same to everybody, and how many it answers at once."""

    def __init__(self, how: str = "well"):
        self.how, self.now, self.most = how, 0, 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
        await reader.readexactly(length)
        self.now += 1
        self.most = max(self.most, self.now)
        if self.how == "full":
            body = b'{"error": {"message": "no room", "code": "queue_full"}}'
            writer.write(b"HTTP/1.1 429 Too Many\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        elif self.how == "silent":
            await asyncio.sleep(30)
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            await asyncio.sleep(FIRST_S)
            whole = event("a")
            writer.write(chunk(whole[:9]))  # an event in two chunks
            writer.write(chunk(whole[9:]))
            for _ in range(3):
                await asyncio.sleep(NEXT_S)
                writer.write(chunk(event("b")))
            if self.how == "error event":
                writer.write(chunk(b'data: {"error": {"message": "lost", "code": "engine_error"}}\n\n'))
            elif self.how != "cut off":
                writer.write(chunk(USAGE) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        self.now -= 1
        writer.close()


async def with_fake(fake: Fake, use):
    listening = await asyncio.start_server(fake.answer, "127.0.0.1", 0)
    async with listening:
        return await use(Target(address=Address("127.0.0.1", listening.sockets[0].getsockname()[1], False, ""), model="fake", timeout_s=5))


def test_an_answer_is_timed_event_by_event():
    answer = asyncio.run(with_fake(Fake(), lambda target: send(target, Ask(prompt=3, output=4), random.Random(0))))
    assert answer.error is None and answer.text == "abbb" and (answer.prompt_tokens, answer.output_tokens) == (7, 4)
    # never earlier than the server sent it; how much later depends on the machine
    assert answer.ttft_s is not None and answer.tpot_s is not None
    assert answer.ttft_s >= FIRST_S and len(answer.itl_s) == 3
    assert answer.tpot_s == pytest.approx(sum(answer.itl_s) / 3)
    assert answer.e2e_s >= FIRST_S + 3 * NEXT_S


@pytest.mark.parametrize(
    ("how", "error"),
    [("full", "429 queue_full"), ("error event", "error event: engine_error"), ("cut off", "the connection was closed in the midst of an answer")],
)
def test_every_bad_end_has_its_name(how, error):
    answer = asyncio.run(with_fake(Fake(how), lambda target: send(target, Ask(prompt=3, output=4), random.Random(0))))
    assert answer.error == error


def test_silence_and_nobody_are_errors_too():
    async def silent(target: Target) -> Answer:
        return await send(Target(address=target.address, timeout_s=0.1), Ask(prompt=1, output=1), random.Random(0))

    assert asyncio.run(with_fake(Fake("silent"), silent)).error == "no end within 0.1 s"
    nobody = Target(address=Address("127.0.0.1", 1, False, ""))
    assert asyncio.run(send(nobody, Ask(prompt=1, output=1), random.Random(0))).error == "connection refused"
    with pytest.raises(UnsupportedError, match="connection refused"):
        run_load(nobody, Load(concurrency=1))


def test_a_closed_loop_keeps_its_number_and_an_open_one_does_not():
    asks = [Ask(prompt=2, output=4, at_s=0.0) for _ in range(9)]
    closed, opened = Fake(), Fake()
    asyncio.run(with_fake(closed, lambda target: closed_loop(target, asks, concurrency=3)))
    run = asyncio.run(with_fake(opened, lambda target: open_loop(target, asks)))
    assert closed.most == 3 and opened.most == 9 and len(run.answers) == 9


def test_arrivals(tmp_path: Path):
    times = [ask.at_s or 0.0 for ask in poisson([Ask(prompt=1, output=1)] * 4000, 8.0, seed=1)]
    assert times == sorted(times) and times[-1] == pytest.approx(500, rel=0.05)
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.6805900,9000,1\n")
    asks = read_trace(trace, speedup=2, max_prompt=512)
    assert [(ask.prompt, ask.output, ask.at_s) for ask in asks] == [(374, 44, 0.0), (512, 1, 2.0)]
    trace.write_text("TIMESTAMP,ContextTokens\n2023-11-16 18:15:46,374\n")
    with pytest.raises(CorruptFileError, match="line 2"):
        read_trace(trace)
    with pytest.raises(InputError, match="--trace"):
        read_trace(tmp_path / "missing.csv")


@pytest.mark.parametrize("given", [{}, {"rate": 1.0, "concurrency": 2}, {"concurrency": 2, "speedup": 3.0}])
def test_one_way_to_arrive_is_said(given):
    with pytest.raises(InputError):
        Load(**given)


def answers() -> list[Answer]:
    found = []
    for number in range(1, 5):
        times = [0.1 * number, 0.1 * number + 0.02, 0.1 * number + 0.04]
        found.append(Answer(ask=Ask(prompt=5, output=3), sent_s=0.0, first_s=times[0], end_s=times[2], event_s=times, prompt_tokens=5, output_tokens=3))
    return [*found, Answer(ask=Ask(prompt=5, output=3), sent_s=0.0, end_s=0.5, error="429 queue_full")]


def test_figures_count_what_was_felt(tmp_path: Path):
    run = Run(answers=tuple(answers()), start_s=0.0, wall_s=2.0, client_cpu_s=0.1)
    row = summarize(run, slo_ttft_s=0.25, slo_tpot_s=0.05)
    assert (row["completed"], row["errors"], row["output_tokens_per_s"]) == (4, {"429 queue_full": 1}, 6.0)
    assert row["ttft_p50_s"] == pytest.approx(0.25) and row["tpot_p99_s"] == pytest.approx(0.02)
    assert (row["within_slo"], row["goodput_per_s"]) == (2, 1.0)
    draw_run(run, {"model": "m", "load": "closed"}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_thinning_keeps_middle_and_ends():
    values = [float(value) for value in range(1001)]
    random.Random(0).shuffle(values)
    few = thinned(values, 101)
    assert len(few) == 101 and (min(few), max(few), sorted(few)[50]) == (0.0, 1000.0, 500.0)


def test_an_interval_holds_the_median_as_often_as_it_says():
    draw = random.Random(0)
    held = 0
    for _ in range(600):
        low, high = median_interval([draw.expovariate(1.0) for _ in range(21)])
        held += low <= 0.6931471805599453 <= high
    assert 0.94 <= held / 600 <= 1.0
    assert median_interval([3.0, 1.0]) == (1.0, 3.0)
    assert (verdict(-0.01, 0.004), verdict(0.02, 0.03), verdict(0.0, 0.02).split(":")[0]) == ("kept", "MISSED", "undecided")


FAKE_GUIDELLM = """#!{python}
import json, sys
if "--version" in sys.argv:
    print("guidellm version: 9.9"); sys.exit()
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
rows = [json.loads(line) for line in open(words["--data"].split("path=")[1])][: int(words["--constraint"].split("count=")[1])]
assert json.loads(words["--backend"])["extras"] == {{"body": {{"temperature": 0}}}}
assert ("relative_timestamp" in rows[0]) == words["--profile"].startswith("kind=replay"), words
good = [{{
    "output_tokens": row["output_tokens_count"], "inter_token_latency_ms": 10.0 + number, "time_to_first_token_ms": 50.0 + number, "request_latency": 2.0,
    "request_start_time": 5.0 + number, "request_end_time": 7.0 + number,
}} for number, row in enumerate(rows)]
json.dump({{"benchmarks": [{{"requests": {{"successful": good[::-1], "errored": [], "incomplete": []}}}}]}}, open(words["--output"].split("path=")[1], "w"))
"""


def test_what_guidellm_states_is_read(tmp_path: Path, monkeypatch):
    class Somewhere:
        port = 1

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="pip install guidellm"):
        by_guidellm(Somewhere(), "closed", [])  # pyright: ignore[reportArgumentType]
    (tmp_path / "guidellm").write_text(FAKE_GUIDELLM.format(python=sys.executable))
    (tmp_path / "guidellm").chmod(0o755)
    for mode in MODES:
        asks = draw_asks(mode, 3, seed=1)
        assert asks == draw_asks(mode, 3, seed=1) and len({ask.body["prompt"] for ask in asks}) == 3
        found = by_guidellm(Somewhere(), mode, asks)  # pyright: ignore[reportArgumentType]
        assert found == pytest.approx({"ttft": 0.051, "itl": 0.011, "e2e": 2.0, "speed": 24.0, "ttft_mean": 0.051, "itl_mean": 0.011})


def test_a_client_that_is_further_apart_than_allowed_is_told():
    units = {"ttft": "s", "itl": "s", "e2e": "s", "speed": "tok/s"}
    figures = {}
    for mode in MODES:
        for metric, unit in units.items():
            figures |= {f"{mode}: {metric}, {client}": Figure.of([2.0], unit) for client in ("ours", "guidellm")}
            figures[f"{mode}: {metric}, ours over guidellm"] = Figure.of([1.04 if metric != "itl" else 0.93], "ratio")
        for name in ("ttft", "itl"):
            figures |= {f"{mode}: {name}_{of}, {client}": Figure.of([2.0], "s") for of in ("mean", "server") for client in ("ours", "guidellm")}
    row = {"plan": "p", "requests": 1, "prompt_words": 1, "tokens": 1, "guidellm": "9.9", "allowed": 0.05}
    lines = client_markdown(new_record("serve-client", command="c", device=this_machine(), repeats=1, figures=figures, rows=[row])).splitlines()
    kept, missed = ([line for line in lines if f"5% ({word})" in line] for word in ("kept", "MISSED"))
    assert len(kept) == 6 and len(missed) == 2 and all("inter-token" in line and "-7.0%" in line for line in missed)
