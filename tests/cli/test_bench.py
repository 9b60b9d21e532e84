"""`tradespace bench` as a user meets it, on a tiny model and without peers; the peers themselves are run by hand and by `lab run cpu-speed`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cli.conftest import SOURCE


@pytest.fixture(autouse=True)
def _workers_find_the_sources(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")]))


def test_decode_and_its_record(cli, gguf_file: Path, tmp_path: Path):
    out = tmp_path / "results" / "bench.json"
    few = ("--against", "none", "--rounds", "2", "--tokens", "4", "--prompt", "8", "--threads", "1", "--memory", "8GiB")
    ran = cli("bench", "decode", gguf_file, *few, "--json", "-o", out)
    assert ran.code == 0, ran.err
    record = json.loads(out.read_text())
    assert ran.json["figures"] == record["figures"]
    (row,) = record["rows"]
    assert row["engine"] == "tradespace" and row["startup_s"] > 0 and row["peak_bytes"] > 1 << 20 and row["facts"]["kv_bytes"] > 0
    assert len(record["figures"]["decode at 8: tradespace"]["values"]) == 2


def test_batches_and_tables(cli, gguf_file: Path):
    ran = cli("bench", "batch", gguf_file, "-s", "3", "--against", "none", "--rounds", "1", "-n", "3", "--prompt", "5", "-m", "8GiB")
    assert ran.code == 0, ran.err
    assert "3 sequences at 5" in ran.out and "MBU" in ran.out
    assert max(map(len, ran.out.splitlines()[:6])) <= 100


def test_unknown_peers_and_help(cli, gguf_file: Path):
    cli("bench", "decode", gguf_file, "--against", "nobody").failed(2, "llama.cpp")
    for command in ("decode", "prefill", "batch"):
        assert "Example: tradespace bench" in cli("bench", command, "--help").out
