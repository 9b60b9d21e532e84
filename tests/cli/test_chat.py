"""`tradespace chat`: the commands, the history, and Ctrl-C, which stops an answer and not the program."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from cli.tiny_model import ROOMY
from tradespace.llm import LLM


@pytest.fixture
def chat(cli, folder):
    """chat("line", "/command", …): a conversation of these lines; the end of the input is Ctrl-D."""

    def run(*lines: str, flags: tuple = ()):
        return cli("chat", folder, "--memory", ROOMY, "-n", 6, *flags, stdin="".join(f"{line}\n" for line in lines).encode())

    return run


@pytest.fixture
def asked(monkeypatch):
    """The conversations that reached the model; its answers are "answer 1", "answer 2" … with the seed where one is set."""
    seen: list[list[dict]] = []

    def stream_chat(self, messages, params=None):
        seen.append([dict(message) for message in messages])
        yield f"answer {len(seen)}"
        if params.seed is not None:
            yield f" seed {params.seed}"

    monkeypatch.setattr(LLM, "stream_chat", stream_chat)
    return seen


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def test_answers_of_the_model_and_the_end_of_input(chat):
    done = chat("hello", "and then?", flags=("--json",))
    assert done.code == 0, done.err
    messages = done.json["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert all(message["content"] for message in messages)
    assert done.json["report"]["lines"]
    plain = chat("hello", "and then?")
    assert plain.code == 0
    assert plain.out == f"{messages[1]['content']}\n{messages[3]['content']}\n"


def test_the_history_goes_along(chat, asked):
    chat("one", "two", "three")
    assert asked[2] == talk("one", "answer 1", "two", "answer 2", "three")


def test_system_and_clear(chat, asked):
    chat("one", "/clear", "two", "/system be brief", "three", "/clear", "four", "/system", "five", flags=("--system", "be kind"))
    kind, brief = ({"role": "system", "content": f"be {how}"} for how in ("kind", "brief"))
    assert asked == [[kind, *talk("one")], [kind, *talk("two")], [brief, *talk("three")], [brief, *talk("four")], talk("five")]


def test_undo_and_retry(chat, asked):
    done = chat("/undo", "one", "two", "/undo", "three", "/retry", "/retry", "four")
    assert "nothing has been asked yet" in done.err
    assert asked[2] == asked[3] == asked[4] == talk("one", "answer 1", "three")
    assert asked[5] == talk("one", "answer 1", "three", "answer 5 seed 2", "four")
    assert "answer 4 seed 1" in done.out


def test_set_and_its_mistakes(chat, asked):
    done = chat("/set seed 7", "one", "/set seed x", "/set height 3", "/set top_p 9", "/set", "two")
    assert done.code == 0
    assert "answer 2 seed 7" in done.out
    for words in ("'x' is not a number", "/set knows", "top_p is 9"):
        assert words in done.err


def test_save_and_where_it_cannot(chat, asked, tmp_path):
    path = tmp_path / "talk.json"
    done = chat("one", f"/save {path}", "/save", f"/save {tmp_path}", "/save /proc/none/talk.json", "two")
    assert done.code == 0, done.err
    assert json.loads(path.read_text()) == talk("one", "answer 1")
    assert list(tmp_path.iterdir()) == [path]
    for words in ("needs a file name", "is a folder", "cannot write"):
        assert words in done.err
    assert len(asked) == 2


def test_help_report_and_unknown_commands(chat, asked):
    done = chat("/help", "/hlep", "/report", "", "  ", "/exit", "never asked")
    assert done.code == 0
    assert "/retry" in done.err
    assert "unknown command /hlep" in done.err
    assert "peak of the process" in done.err
    assert asked == []


def test_a_conversation_over_the_context_goes_on(chat):
    done = chat("word " * 200, "hi", flags=("--context", 64, "--json"))
    assert done.code == 0, done.err
    assert "context" in done.err
    assert done.json["messages"][0]["content"] == "hi"


def test_invalid_utf8_ends_neither_the_program_nor_the_conversation(cli, folder, asked):
    done = cli("chat", folder, "--memory", ROOMY, stdin=b"caf\xe9\nhello\n")
    assert done.code == 0, done.err
    assert "not UTF-8" in done.err
    assert asked == [talk("hello")]


def test_ctrl_c_during_an_answer_keeps_what_came(chat, monkeypatch):
    real, calls = LLM.stream_chat, []

    def interrupted(self, messages, params=None):
        calls.append([dict(message) for message in messages])
        for count, piece in enumerate(real(self, messages, params)):
            if len(calls) == 1 and count == 2:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(LLM, "stream_chat", interrupted)
    done = chat("one", "two", flags=("--json",))
    assert done.code == 0
    assert "(stopped)" in done.err
    messages = done.json["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert calls[1] == messages[:3]


def read_until(terminal: int, pattern: str, seen: str = "", timeout_s: float = 60) -> str:
    """What a terminal shows, up to and including `pattern` after what was `seen` before."""
    text, end = "", time.monotonic() + timeout_s
    while not re.search(pattern, text):
        left = end - time.monotonic()
        assert left > 0, f"no {pattern!r} within {timeout_s} s: {seen + text!r}"
        if select.select([terminal], [], [], left)[0]:
            try:
                chunk = os.read(terminal, 65536)
            except OSError:  # the other side has closed
                chunk = b""
            assert chunk, f"ended without {pattern!r}: {seen + text!r}"
            text += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", chunk.decode(errors="replace"))
    return text


def test_ctrl_c_and_ctrl_d_on_a_terminal(folder, environment):
    """Ctrl-C at the prompt, Ctrl-C in an answer of thousands of tokens, another question, Ctrl-D."""
    terminal, side = pty.openpty()
    command = [sys.executable, "-m", "tradespace.cli.main", "chat", str(folder), "--memory", "1GiB", "-n", "7000", "--context", "8000"]
    child = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True)
    os.close(side)
    try:
        read_until(terminal, r"Ctrl-D leaves\s+.*> $")
        time.sleep(0.5)  # readline shows its prompt a moment before it begins to listen
        os.kill(child.pid, signal.SIGINT)
        read_until(terminal, r"\(Ctrl-D or /exit leaves\)\s+> $")
        os.write(terminal, b"hello\n")
        read_until(terminal, r"hello\r\n.{20}")
        os.kill(child.pid, signal.SIGINT)
        read_until(terminal, r"\(stopped\)\s+> $")
        os.write(terminal, b"/set max_tokens 3\n/undo\nagain\n")
        read_until(terminal, r"again\r\n(.|\n)+> $")
        os.write(terminal, b"\x04")
        assert child.wait(30) == 0
    finally:
        child.kill()
        child.wait()
        os.close(terminal)
