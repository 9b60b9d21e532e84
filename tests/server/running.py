"""A running `tradespace serve` on a tiny model, for tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import openai

WAIT_S = 90


class Server:
    """A running `tradespace serve`."""

    def __init__(self, folder: Path, home: Path, *more: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        words = [sys.executable, "-m", "tradespace", "serve", str(folder), "--memory", "1500MiB", "--max-num-seqs", "4", "--context", "512"]
        words += ["--weights", "fp32", "--kv-store", "fp32", *more]
        environment = os.environ | {"TRADESPACE_HOME": str(home)}
        self.process = subprocess.Popen([*words, "--port", str(self.port), "--served-model-name", "tiny"], env=environment, stderr=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=WAIT_S)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=WAIT_S, max_retries=0)
        self.until(lambda: self.get("/ready") == 200, "ready")

    def get(self, path: str) -> int:
        try:
            return self.http.get(path).status_code
        except httpx.TransportError:
            assert self.process.poll() is None, self.process.stderr.read() if self.process.stderr else ""
            return 0

    def until(self, holds, what: str) -> None:
        end = time.monotonic() + WAIT_S
        while not holds():
            assert time.monotonic() < end, f"not {what} within {WAIT_S} s"
            time.sleep(0.05)

    def load(self) -> dict:
        return self.http.get("/status").json()["load"]

    def close(self) -> None:
        self.client.close()
        self.http.close()
        self.process.kill()
        self.process.wait()
