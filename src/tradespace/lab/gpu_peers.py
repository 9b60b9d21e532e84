"""vLLM and gpt-fast at the work of `gpu_speed.py`, on the same card in the same run: each in a process of its own, while we hold none of the card's memory.

Neither is installed with tradespace. vLLM is found where this interpreter has it, or in the folders that TRADESPACE_VLLM names (put first on the module path);
gpt-fast, which is no package, in the folder that GPT_FAST names: its model.py and quantize.py. Random weights: speed does not depend on them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tradespace.lab.timing import users_environment
from tradespace.quantize.hf_config import config_from_spec, write_json
from tradespace.spec.model import ModelSpec

TIMEOUT_S = 560
Request = tuple[list[list[int]], int]  # token ids of prompts that arrive together, tokens that each is answered with


@dataclass(frozen=True, slots=True)
class Peer:
    """What a peer did: its name with version, how it was set up, seconds until it was ready, and an answer of its worker; or why there is none (`absent`)."""

    name: str
    settings: str = ""
    start_up_s: float = 0.0
    answer: Any = None
    absent: str = ""


def vllm(spec: ModelSpec, quantization: str | None, requests: Sequence[Request], *, max_sequences: int, max_context: int) -> Peer:
    """Seconds and tokens generated of each of these requests, one after the other; `answer`: pairs."""
    folders = os.environ.get("TRADESPACE_VLLM", "")
    if not folders and importlib.util.find_spec("vllm") is None:
        return Peer("vLLM", absent="vLLM is not installed; TRADESPACE_VLLM may name a folder that has it")
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        model.mkdir()
        write_json(model / "config.json", config_from_spec(spec))
        given = {"model": str(model), "quantization": quantization, "max_sequences": max_sequences, "max_context": max_context, "requests": requests}
        settings = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
        return _asked("vLLM", "vllm", given, Path(name), folders, settings)


def gpt_fast(shape: str, kind: str, *, prompt: int, tokens: int, rounds: int) -> Peer:
    """tok/s of one sequence in each of `rounds`, from position `prompt` on; kind: "bf16", "int8" or "int4-g128"; shape: a name of its own table."""
    folder = os.environ.get("GPT_FAST", "")
    if not folder:
        return Peer("gpt-fast", absent="GPT_FAST names no folder with gpt-fast's model.py and quantize.py")
    with tempfile.TemporaryDirectory() as name:
        given = {"folder": folder, "shape": shape, "kind": kind, "prompt": prompt, "tokens": tokens, "rounds": rounds}
        return _asked("gpt-fast", "gpt_fast", given, Path(name), "", {})


def _asked(name: str, worker: str, given: Mapping[str, Any], folder: Path, modules: str, settings: Mapping[str, str]) -> Peer:
    question, answer = folder / "question.json", folder / "answer.json"
    question.write_text(json.dumps(given))
    environment = {**users_environment(), **settings}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (modules, environment.get("PYTHONPATH", ""))))
    command = [sys.executable, "-P", "-m", f"tradespace.lab.gpu_peer_{worker}", str(question), str(answer)]
    with (folder / "log").open("w+b") as log:
        # a group of its own: vLLM's engine is a child of the process that we start, and would go on holding the card
        with subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True) as process:
            try:
                how = f"ended with {process.wait(TIMEOUT_S)}"
            except subprocess.TimeoutExpired:
                how = f"had not ended after {TIMEOUT_S} s"
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines()
    if not answer.exists():
        return Peer(name, absent=f"{name} {how}: {said[-1][-300:] if said else 'it said nothing'}")
    return Peer(**json.loads(answer.read_text()))
