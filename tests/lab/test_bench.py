"""The benchmark: processes of their own that answer over pipes and rest between, peers that are named when absent, counted bytes, bars; and the command."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tradespace.errors import EngineError, InputError
from tradespace.lab import cpu_speed
from tradespace.lab.bench.command import check_peers, record_of
from tradespace.lab.bench.models import prepare, write_random
from tradespace.lab.bench.peers import PEERS
from tradespace.lab.bench.process import Worker
from tradespace.lab.bench.rounds import Cell, Engine
from tradespace.lab.bench.tables import cell_table, notes_of
from tradespace.lab.bench.task import Task
from tradespace.lab.bench.work import Work, work_of
from tradespace.lab.experiments import EXPERIMENTS
from tradespace.measure.record import read_record, write_record
from tradespace.spec.device import DeviceSpec
from tradespace.spec.estimate import Estimate

PEER = """
import os, time
def variants(task): return {"only": {}}
class Session:
    def __init__(self, task, settings):
        if settings.get("refuse"): raise RuntimeError("it refuses")
        print("noise on standard output")
        os.write(1, b"more of it\\n")
    def measure(self, prompts, tokens): return {"prefill_s": len(prompts[0]) / 100, "decode_s": tokens / 10}
    def facts(self): return {"pid": os.getpid()}
    def die(self): os._exit(3)
"""
TASK = Task(kind="decode", path="model.gguf", prompt=8, tokens=4)
DEVICE = DeviceSpec(name="test", kind="cpu", memory_bytes=1, free_bytes=1, read_bytes_per_s=Estimate(1.0, "test"), op_overhead_s=Estimate(1.0, "test"), cores=2)


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_peer.py").write_text(PEER)
    import os

    source = Path(__file__).resolve().parents[2] / "src"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(source)]))
    return "a_peer"


def test_a_worker_answers_rests_and_says_what_failed(peer):
    with Worker("peer", peer) as worker:
        worker.open(TASK, {})
        assert worker.ask("measure", prompts=[[1, 2]], tokens=3) == {"prefill_s": 0.02, "decode_s": 0.3}
        pid = worker.ask("facts")["pid"]
        if sys.platform == "linux":
            deadline = time.monotonic() + 5
            while psutil.Process(pid).status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
                time.sleep(0.01)
            assert psutil.Process(pid).status() == psutil.STATUS_STOPPED, "it may spin while others are timed"
        assert worker.peak_bytes > 1 << 20
        with pytest.raises(EngineError, match=r"peer: AttributeError.*no_such"):
            worker.ask("no_such")
        with pytest.raises(EngineError, match="peer ended"):
            worker.ask("die")
    assert not psutil.pid_exists(pid)
    with Worker("peer", peer) as worker, pytest.raises(EngineError, match="it refuses"):
        worker.open(TASK, {"refuse": True})


def test_peers_that_cannot_take_part_say_why():
    llama = PEERS["llama.cpp"]
    assert "pip install llama-cpp-python" in (replace(llama, needs="no_such_module").absent(TASK) or "")
    assert "safetensors" in (replace(llama, needs="json").absent(replace(TASK, path="folder")) or "")
    assert replace(llama, needs="json").absent(TASK) is None
    assert check_peers(None) == list(PEERS) and check_peers(["none"]) == [] and check_peers(["openvino", "openvino"]) == ["openvino"]
    with pytest.raises(InputError, match=r"llama\.cpp, openvino, transformers"):
        check_peers(["vllm2"])


@pytest.fixture(scope="module")
def random_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random") / "model.gguf"
    write_random("smollm2-135m", "q4_0", path)
    return path


def test_a_random_model_is_a_model_with_the_shape_and_bytes_of_the_real_one(random_file):
    """Q4_0 with its embedding in Q8_0: 18 and 34 bytes of 32 weights, and the norms in fp32. That much is read for a token, and the cache."""
    embed, body, norms = 49152 * 576, 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536), 61 * 576 * 4
    work = work_of(replace(TASK, path=str(random_file)))
    assert work.weight_bytes == embed * 34 // 32 + body * 18 // 32 + norms
    assert work.bytes_per_token == work.weight_bytes + 10 * 30 * 2 * 3 * 64 * 2  # after 8 tokens and half of 4
    batch = work_of(replace(TASK, kind="batch", path=str(random_file), sequences=4))
    assert batch.bytes_per_token == pytest.approx(work.weight_bytes / 4 + 10 * 30 * 2 * 3 * 64 * 2)
    prefill = work_of(replace(TASK, kind="prefill", path=str(random_file), prompt=512, tokens=0))
    assert prefill.flops_per_token == pytest.approx(2 * body + 30 * 4 * 9 * 64 * 513 / 2 + (2 * embed + 2 * norms / 4 * 512) / 512, rel=1e-3)
    assert (work.dtype, work.vocabulary) == ("int8", 49152)


def test_what_cannot_be_made_is_refused(tmp_path):
    with pytest.raises(InputError, match="q4_0 or q8_0"):
        prepare("random:smollm2-135m", file_format="q6_k")
    with pytest.raises(InputError, match="no-such-model"):
        prepare("random:no-such-model")


def _cell(ours: list[float], theirs: list[float], *, bytes_per_s: float = 1000.0) -> Cell:
    work = Work(weight_bytes=10, read_bytes=10.0, tokens_per_read=1, flops_per_token=2.0, dtype="int8", vocabulary=100)
    cell = Cell(TASK, work, [Engine("tradespace", "1", "planned", {}, "int8"), Engine("llama.cpp", "2", "fast", {"fast": 3.0, "slow": 1.0}, "int8")], {})
    cell.engines[0].tokens_per_s, cell.engines[1].tokens_per_s = ours, theirs
    cell.read_bytes_per_s, cell.absent = [bytes_per_s] * len(ours), {"openvino": "not installed"}
    return cell


def test_a_bar_is_the_smaller_of_a_ratio_and_of_what_reading_allows():
    """100 tokens/s could be read: 88 of them are enough, whatever the ratio."""
    said: list[str] = []
    for ours, held in (([60.0, 60.0], False), ([90.0, 90.0], True)):
        found = cpu_speed.Found({}, [])
        found.take("decode", cpu_speed.Q4_0, _cell(ours, [50.0, 50.0]), {"llama.cpp": 2.2, "openvino": 1.0}, said.append)
        bars = [row for row in found.rows if "bar" in row]
        assert bars[0]["held"] is held and bars[0]["limit"] == pytest.approx(0.88 * 100 / 50)
        assert "held" not in bars[1] and bars[1]["absent"] == "not installed"
    assert "NOT held" in said[0] and len(said) == 2


def test_ratios_are_paired_and_the_record_can_be_read_back(tmp_path):
    cell = _cell([10.0, 30.0, 20.0], [10.0, 10.0, 10.0])
    record = record_of([cell], "bench-decode", "a model", None, DEVICE, 3)
    assert record.figures["decode at 8: tradespace / llama.cpp"].median == 2.0
    assert [row["engine"] for row in record.rows] == ["tradespace", "llama.cpp", "openvino"]
    assert record.rows[0]["share"] == pytest.approx(0.2)
    write_record(tmp_path / "r.json", record)
    assert read_record(tmp_path / "r.json").figures == record.figures
    assert cell_table(cell).row_count == 2
    assert any("openvino takes no part" in line for line in notes_of(cell)) and any("slow 1" in line for line in notes_of(cell))


def test_parts_are_joined():
    experiment = EXPERIMENTS["cpu-speed"]
    whole = [{"part": part, "commit": "a", "value": 1} for part in experiment.parts]
    record = record_of([], "cpu-speed", "", None, DEVICE, 1)
    now = replace(record, rows=({"part": "prefill", "commit": "b", "value": 2},))
    joined = experiment.joined(replace(record, rows=tuple(whole)), now, ["prefill"])
    assert [(row["part"], row["value"]) for row in joined.rows] == [("decode", 1), ("prefill", 2), ("batch", 1), ("start", 1)]
    with pytest.raises(InputError, match="decode, prefill, batch, start"):
        experiment.run(quick=True, say=print, only=["nothing"])
