"""The peers on a GPU, played by stand-ins: what they are asked, what is made of their answers, and what is said of one that is not there or fails."""

from __future__ import annotations

import psutil
import pytest

pytest.importorskip("torch")

from tradespace.lab import gpu_peers
from tradespace.lab.gpu_speed import Job, peer_fields
from tradespace.spec.zoo import find_model

VLLM = """
from types import SimpleNamespace
__version__ = "0.0"
class SamplingParams:
    def __init__(self, **given): self.given = given
class LLM:
    def __init__(self, **given):
        assert given["quantization"] == "fp8" and given["max_num_seqs"] == 3 and given["max_model_len"] == 64 and not given["enable_prefix_caching"]
    def generate(self, asked, params, use_tqdm):
        assert params.given["ignore_eos"] and params.given["min_tokens"] == params.given["max_tokens"] and not use_tqdm
        tokens = range(params.given["max_tokens"])
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)]) for each in asked if each["prompt_token_ids"]]
"""
GPT_FAST = """
import torch
from torch import nn
class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.output = nn.Linear(8, 16, bias=False)
    @classmethod
    def from_name(cls, name):
        assert name == "tiny"
        return cls()
    def setup_caches(self, batch, length):
        self.register_buffer("seen", torch.zeros(length))
    def forward(self, idx, input_pos):
        return self.output(torch.ones(1, 1, 8, dtype=torch.bfloat16) * (1 + input_pos))
"""


@pytest.fixture
def no_peers(monkeypatch):
    for name in ("TRADESPACE_VLLM", "GPT_FAST"):
        monkeypatch.delenv(name, raising=False)


def asked_of_vllm() -> gpu_peers.Peer:
    return gpu_peers.vllm(find_model("llama-3-8b"), "fp8", [([[1, 2], [3]], 4), ([[5]], 2)], max_sequences=3, max_context=64)


@pytest.mark.usefixtures("no_peers")
def test_a_peer_that_is_not_installed_is_named_with_what_would_find_it():
    assert "TRADESPACE_VLLM" in asked_of_vllm().absent
    assert "GPT_FAST" in gpu_peers.gpt_fast("tiny", "bf16", prompt=1, tokens=1, rounds=1).absent


@pytest.mark.usefixtures("no_peers")
def test_vllm_gets_every_request_and_its_answers_come_back(monkeypatch, tmp_path):
    (tmp_path / "vllm.py").write_text(VLLM)
    monkeypatch.setenv("TRADESPACE_VLLM", str(tmp_path))
    peer = asked_of_vllm()
    assert peer.absent == ""
    assert peer.name == "vLLM 0.0"
    assert [tokens for _, tokens in peer.answer] == [8, 2]
    assert all(seconds > 0 for seconds, _ in peer.answer)


@pytest.mark.usefixtures("no_peers")
def test_a_peer_that_fails_says_why_in_one_line(monkeypatch, tmp_path):
    (tmp_path / "vllm.py").write_text("raise RuntimeError('no card of ours')")
    monkeypatch.setenv("TRADESPACE_VLLM", str(tmp_path))
    assert asked_of_vllm().absent == "vLLM ended with 1: RuntimeError: no card of ours"


@pytest.mark.usefixtures("no_peers")
def test_a_peer_that_does_not_end_is_ended_with_what_it_started(monkeypatch, tmp_path):
    child = tmp_path / "child"
    (tmp_path / "vllm.py").write_text(f"""
import pathlib, subprocess, sys, time
started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({str(child)!r}).write_text(str(started.pid))
time.sleep(600)
""")
    monkeypatch.setenv("TRADESPACE_VLLM", str(tmp_path))
    monkeypatch.setattr(gpu_peers, "TIMEOUT_S", 10)
    assert "had not ended after 10 s" in asked_of_vllm().absent
    process = psutil.Process(int(child.read_text())) if psutil.pid_exists(int(child.read_text())) else None
    assert process is None or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.usefixtures("no_peers")
def test_gpt_fast_steps_its_model(monkeypatch, tmp_path):
    (tmp_path / "model.py").write_text(GPT_FAST)
    monkeypatch.setenv("GPT_FAST", str(tmp_path))
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    peer = gpu_peers.gpt_fast("tiny", "bf16", prompt=8, tokens=5, rounds=3)
    assert peer.absent == ""
    assert len(peer.answer) == 3
    assert min(peer.answer) > 0


def test_speeds_are_what_the_longer_answer_takes_beyond_the_shorter():
    job = Job("decode", "tok/s", [[([[1]], 8), ([[1]], 136)]] * 3)
    assert job.speeds([(1.0, 8), (3.0, 136), (1.0, 8), (2.0, 136), (0.5, 8), (1.0, 136)]) == [128.0, 256.0]
    prompts = Job("prefill", "tok/s", [[([[1] * 50, [1] * 30], 1)]] * 2, counts_prompts=True)
    assert prompts.speeds([(1.0, 2), (4.0, 2)]) == [20.0]
    mix = Job("mix", "out tok/s", [[([[1], [2]], 4)]], untimed=0)
    assert mix.speeds([(2.0, 8)]) == [4.0]


def test_a_row_says_what_its_peer_did():
    there = peer_fields(gpu_peers.Peer("vLLM 1", settings="bf16"), [3.0, 1.0, 2.0])
    assert there == {"peer": "vLLM 1", "peer_settings": "bf16", "peer_value": 2.0, "peer_values": [3.0, 1.0, 2.0]}
    assert peer_fields(gpu_peers.Peer("vLLM", absent="not here"), []) == {"peer_absent": "not here"}
