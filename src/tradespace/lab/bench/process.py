"""An engine in a process of its own, asked over pipes. It is stopped by signal while others work: some engines' threads spin on for a while."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from tradespace.errors import EngineError
from tradespace.lab.bench.task import Task
from tradespace.lab.timing import users_environment
from tradespace.measure.memory import peak_rss_bytes

TIMEOUT_S = 300
_SETTLE_S = 0.005  # after waking up, before work is asked for


class Worker:
    """A context manager. `ask` raises EngineError with what the engine said."""

    def __init__(self, name: str, module: str):
        self.name = name
        self.started_s = time.perf_counter()
        self._log = tempfile.TemporaryFile(mode="w+b")  # noqa: SIM115 (closed at exit)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tradespace.lab.bench.worker", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**users_environment(), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._resting = False

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")  # it has ended

    def open(self, task: Task, settings: dict[str, Any]) -> None:
        self._exchange({"open": asdict(task), "settings": settings})

    def ask(self, call: str, **arguments: Any) -> Any:
        """The result of a method of its session; the process runs only while it works on that."""
        return self._exchange({"call": call, "arguments": arguments})

    def _exchange(self, message: dict[str, Any]) -> Any:
        self._wake()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=TIMEOUT_S)
        except (OSError, queue.Empty):
            line = ""
        if not line:
            raise EngineError(f"{self.name} ended or gave no answer in {TIMEOUT_S} s: {self._last_words()}")
        answer = json.loads(line)
        self._rest()
        if "error" in answer:
            raise EngineError(f"{self.name}: {answer['error'][:500]}")
        return answer["result"]

    def _last_words(self) -> str:
        self._log.seek(0)
        return self._log.read()[-300:].decode(errors="replace").strip() or "it said nothing"

    @property
    def peak_bytes(self) -> int:
        """The most that the process has had resident."""
        return peak_rss_bytes(self._process.pid)

    def _rest(self) -> None:
        if hasattr(signal, "SIGSTOP"):
            self._process.send_signal(signal.SIGSTOP)
            self._resting = True

    def _wake(self) -> None:
        if self._resting:
            self._process.send_signal(signal.SIGCONT)
            self._resting = False
            time.sleep(_SETTLE_S)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *details: object) -> None:
        self._process.kill()  # also one that is stopped
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with suppress(OSError):  # what was still to be written has no reader any more
                    stream.close()
