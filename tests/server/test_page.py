"""The page at / in Chromium, as Qt WebEngine brings it from PyPI: a chat by keyboard, and beside it what the engine does."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.xdist_group("server"),
    pytest.mark.skipif(
        not any(importlib.util.find_spec(name) and importlib.util.find_spec(f"{name}.QtWebEngineWidgets") for name in ("PySide6", "PyQt6")),
        reason="no Chromium for Python here: pip install PySide6 (or PyQt6-WebEngine)",
    ),
]


def test_a_chat_by_keyboard_beside_the_ledger(server, tmp_path):
    picture = tmp_path / "page.png"
    words = [sys.executable, str(Path(__file__).with_name("page_driver.py")), f"{server.url}/", "why is the sky blue", str(picture)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    seen = found["done"]
    (user, question), (assistant, answer) = seen["said"]
    assert (user, assistant) == ("said user", "said assistant") and question == "why is the sky blue" and answer
    assert seen["model"] == "tiny" and "fp32" in seen["plan"] and seen["down"] == "" and seen["focus"] == "text"
    # a line for each part of the memory, and as many parts in the bar
    assert seen["bar"] == len(seen["ledger"]) >= 3 and any(row[0] == "HTTP" for row in seen["ledger"])
    assert "MiB now" in seen["told"] and "of 1.46 GiB" in seen["told"] and seen["blocks"] > 0 and " of 128 in use" in seen["held"]
    assert found["hosts"] == ["127.0.0.1"] and found["console"] == []
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 10_000
