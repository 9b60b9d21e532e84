"""Our own server as an experiment starts it: `tradespace serve` in a process of its own, watched from outside."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import psutil

from tradespace.errors import EngineError
from tradespace.lab.serving.asking import Target
from tradespace.lab.serving.http import Address, BadAnswer, call
from tradespace.measure.memory import child_pids

START_S = 600.0  # the native kernels may have to be compiled
MODEL = "smollm2-135m"


class Server:
    """A running server. A context manager: leaving it kills what is left of it.

    words    arguments behind `tradespace serve MODEL`
    log      where its standard error goes; default: a temporary file, whose end is in the error when it fails to start
    """

    def __init__(self, *words: str, model: str = MODEL, log: Path | None = None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.words, self.model = words, model
        self._folder = tempfile.TemporaryDirectory(prefix="tradespace-serve-") if log is None else None
        self.log = Path(self._folder.name) / "log" if self._folder is not None else log or Path(os.devnull)
        self.address = Address("127.0.0.1", self.port, False, "")
        self._stream = self.log.open("wb")
        command = [sys.executable, "-m", "tradespace", "serve", model, "--port", str(self.port), "--served-model-name", model, *words]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._stream, stderr=self._stream)

    def __enter__(self) -> Self:
        try:
            self.until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *details: object) -> None:
        pids = child_pids(self.process.pid)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pid in pids:  # the engine's process ends by itself when its front has gone; a frozen one would not
            end_s = time.monotonic() + 10
            while Path(f"/proc/{pid}").exists() and time.monotonic() < end_s:
                time.sleep(0.05)
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        self._stream.close()
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def pid(self) -> int:
        return self.process.pid

    def until_ready(self) -> None:
        """Wait until it can answer. Raises EngineError with what it said where it ends instead."""
        end_s = time.monotonic() + START_S
        while True:
            if self.process.poll() is not None:
                said = self.log.read_text(errors="replace").strip().splitlines() if self.log.is_file() else []
                raise EngineError(f"the server ended with code {self.process.returncode} instead of starting: {' | '.join(said[-4:])}")
            if time.monotonic() > end_s:
                raise EngineError(f"the server was not ready within {START_S:g} s")
            if self.get("/ready")[0] == 200:
                return
            time.sleep(0.2)

    def get(self, path: str, *, timeout_s: float = 120.0) -> tuple[int, Any]:
        """(status, value) of a path; (0, None) where nobody listens."""
        try:
            return asyncio.run(call(self.address, "GET", path, timeout_s=timeout_s))
        except (OSError, BadAnswer):
            return 0, None

    def status(self) -> dict[str, Any]:
        """What `/status` says. Raises EngineError where it says nothing."""
        status, found = self.get("/status")
        if status != 200:
            raise EngineError(f"/status answered {status}: {json.dumps(found)[:300]}")
        return found

    def until_idle(self, *, within_s: float = 120.0) -> dict[str, Any]:
        """Wait until nothing runs, waits or holds a block; returns the status then. Raises EngineError where that takes too long: a request hangs."""
        end_s = time.monotonic() + within_s
        while True:
            found = self.status()
            load = found["load"]
            if load["running"] == load["waiting"] == load["used_blocks"] == 0:
                return found
            if time.monotonic() > end_s:
                raise EngineError(f"not idle {within_s:g} s after the last request: {load}")
            time.sleep(0.1)

    def resident_bytes(self) -> int:
        """Their resident sizes, summed: what both map counts twice, but nothing depends on what processes outside share with them."""
        return sum(psutil.Process(pid).memory_info().rss for pid in (self.pid, *child_pids(self.pid)))

    def target(self, **more: Any) -> Target:
        return Target(address=self.address, model=self.model, **more)


def blocks_kept(status: dict[str, Any]) -> dict[str, int]:
    """Blocks of the cache in `status`: all, in use, free (those that still hold a finished prefix count as free), and the sum of references."""
    blocks, load = status["blocks"], status["load"]
    used = sum(1 for count in blocks["references"] if count)
    return {"total": load["num_blocks"], "used": load["used_blocks"], "free": len(blocks["references"]) - used, "references": sum(blocks["references"])}
