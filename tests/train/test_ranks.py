"""Training over several processes: two ranks on gloo, as torchrun starts them, learn what one learns; their bytes are predicted; they resume."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tradespace.cost.training import activation_peak, fixed_lines, whole_bytes
from tradespace.errors import BudgetError, InputError, UnsupportedError
from tradespace.planner.training import Question, best_plan
from tradespace.spec.device_zoo import find_device
from tradespace.spec.parallel import rows_of, shard_spec, split_refusal, tensor_part
from tradespace.spec.tensors import model_tensors
from tradespace.spec.training import TrainPlan, parse_checkpointing
from tradespace.spec.weights import WeightPlan
from tradespace.spec.zoo import find_model
from tradespace.units import GiB
from train.small import small_spec

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("ranks_worker.py")
pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.xdist_group("torchrun"),  # several at once would wait for each other on few cores
]


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}


def torchrun(arguments: list[str], processes: int, *, ok: bool = True) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def ranks(case: dict, folder: Path, processes: int) -> list[dict]:
    folder.mkdir(parents=True, exist_ok=True)
    if processes == 1:
        done = subprocess.run(
            [sys.executable, str(WORKER), json.dumps(case), str(folder)], env=environment(), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
    else:
        torchrun([str(WORKER), json.dumps(case), str(folder)], processes)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return ranks({"clip": 0.5}, tmp_path_factory.mktemp("alone"), 1)[0]


@pytest.mark.parametrize("case", [{"data": 2, "checkpointing": "selective"}, {"tensor": 2, "checkpointing": "every-2"}], ids=["fsdp", "tensor"])
def test_two_ranks_learn_what_one_learns_and_go_on_bit_for_bit(case, alone, tmp_path):
    case = {**case, "clip": 0.5}
    found = ranks(case, tmp_path / "whole", 2)
    assert found[0]["losses"] == found[1]["losses"]
    assert found[0]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert found[0]["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    # each rank holds a part of the matrices
    assert found[0]["held"]["layers.0.ffn.gate_up.weight"] * 2 == alone["held"]["layers.0.ffn.gate_up.weight"]
    # cut after four of six steps, with a checkpoint at three and at the cut; the later one is damaged
    ranks({**case, "stop": 4}, tmp_path / "cut", 2)
    newest = tmp_path / "cut" / "checkpoint-00000004" / "states-1-of-2.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    again = ranks({**case, "resume": True}, tmp_path / "cut", 2)
    assert again[0]["losses"] == found[0]["losses"]
    assert again[0]["sums"] == found[0]["sums"] == again[1]["sums"]
    log = [json.loads(line)["step"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert log == [1, 2, 3, 4, 5, 6]  # by rank 0 alone


def test_adapters_over_data_ranks(tmp_path):
    case = {"method": "lora", "steps": 4}
    one, two = ranks(case, tmp_path / "one", 1)[0], ranks({**case, "data": 2}, tmp_path / "two", 2)[0]
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-4)


@pytest.mark.parametrize(
    "case",
    [
        {"data": 2, "context": 128, "checkpointing": "full", "spec": {"D": 256, "F": 512, "L": 5, "vocab": 2000}},
        {"data": 2, "context": 32, "checkpointing": "full", "method": "lora", "spec": {"D": 512, "F": 1024, "L": 4, "vocab": 500}},
        {"tensor": 2, "context": 128, "spec": {"D": 256, "F": 1024, "L": 4}},
    ],
    ids=["fsdp", "fsdp-lora", "tensor"],
)
def test_bytes_of_a_rank_are_predicted(case, tmp_path):
    """Weights, gradients and states to the byte, the step within 5%; over data ranks it may be less by one layer: not all is there at once."""
    case = {"method": "full", **case, "measure": True, "steps": 2}
    both = ranks(case, tmp_path, 2)
    found = both[0]
    spec = shard_spec(small_spec(**case["spec"]), case.get("tensor", 1))
    data = case.get("data", 1)
    plan = TrainPlan(
        model="small", method=case["method"], rank=4, weights=WeightPlan(default="fp32"), context=case["context"], micro_batch=4 // data, loss_tokens=40,
        data_parallel=data, checkpointing=parse_checkpointing(case.get("checkpointing", "none"), spec.L),
    )  # fmt: skip
    lines = {line.name: line.bytes.value for line in fixed_lines(spec, plan)}
    assert lines["gradients"] == sum(found["held"].values())
    assert lines["weights"] == lines["gradients"] or case["method"] == "lora"
    assert lines["optimizer"] == found["optimizer"]
    step = activation_peak(spec, plan)[1] + (lines.get("gathered") or 0)
    assert data == 1 or both[0]["peak"] == both[1]["peak"], "what a rank holds is no matter of when gloo's thread lets go"
    assert 0.95 * found["peak"] < step < 1.05 * (found["peak"] + whole_bytes(spec, plan, 0))


TEXT = "Anna sees the river and the boat and the long road home. " * 200
SHAPE = "layers=2,width=64,heads=4,kv-heads=2,ffn=192,vocab=300,context=64"


def train(data: Path, out: Path, *more: str) -> list[str]:
    flags = ["--context", "32", "--batch", "4", "--steps", "6", "--weights", "fp32", "--memory", "1500MiB", "--save-every", "3"]
    return ["-m", "tradespace", "train", SHAPE, "--data", str(data), "-o", str(out), *flags, *more]


def test_the_command_over_two_ranks(tmp_path):
    """The same result as one process, one table, and the checkpoint of other ranks refused."""
    data = tmp_path / "text.txt"
    data.write_text(TEXT)
    shown = torchrun(train(data, tmp_path / "two", "--tensor-parallel", "2"), 2)
    assert shown.count("finished at step 6") == 1 and "rank 1" in shown
    done = subprocess.run([sys.executable, *train(data, tmp_path / "one")], env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    logs = [[json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert logs[1] == pytest.approx(logs[0], abs=1e-5)
    from safetensors.torch import load_file

    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-4)
    shutil.rmtree(tmp_path / "two" / "model")
    refused = torchrun(train(data, tmp_path / "two", "--data-parallel", "2", "--resume", "--steps", "8"), 2, ok=False)
    assert "the run was another one" in refused and "data_parallel: 1 then, 2 now" in refused


def test_ranks_that_torchrun_did_not_start_are_refused(tmp_path, monkeypatch):
    from tradespace.train.ranks import sizes

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert sizes(None, None) == (1, 1)
    with pytest.raises(InputError, match=r"is 4 processes; 1 was started\. Start with: torchrun --nproc-per-node 4"):
        sizes(2, 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert sizes(None, None) == (4, 1) and sizes(None, 2) == (2, 2)
    with pytest.raises(InputError, match="is 3 processes; 4 were started"):
        sizes(None, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are looked at as Linux shows them")
def test_ranks_leave_once_the_threads_of_gloo_sleep():
    """A thread of gloo that drops a tensor while the interpreter ends aborts the process: leaving waits for those at work, and for no others."""
    from tradespace.train.ranks import until_asleep

    named, ended, held = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("a worker (1)")
        named.set()
        hashlib.pbkdf2_hmac("sha256", b"word", b"salt", 400_000)  # without the interpreter's lock
        ended.set()
        held.wait()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        named.wait()
        until_asleep("another", limit_s=60)
        until_asleep("a worker (1)", limit_s=60)
        assert ended.is_set()
    finally:
        held.set()
        worker.join()


def test_what_ranks_cannot_do_is_refused():
    spec, device = find_model("llama-3.2-1b"), find_device("h100-80gb")
    assert split_refusal(spec, 8) is None
    assert "key-value heads" in (split_refusal(spec, 16) or "") and "--tensor-parallel 1 or 2 or 4 or 8" in (split_refusal(spec, 16) or "")
    question = Question(spec, device, 40 * GiB, 2048, batch=8, data_parallel=2, tensor_parallel=2)
    assert best_plan(question).plan.micro_batch * best_plan(question).plan.accumulation == 4
    with pytest.raises(UnsupportedError, match="key-value heads"):
        best_plan(replace(question, tensor_parallel=16))
    with pytest.raises(InputError, match="--batch 8 cannot be shared by 3 data ranks"):
        best_plan(replace(question, data_parallel=3))
    with pytest.raises(InputError, match="qlora over --tensor-parallel 2 ranks is not computed yet"):
        best_plan(replace(question, method="qlora"))
    with pytest.raises(InputError, match="adafactor"):
        best_plan(replace(question, optimizer="adafactor"))
    with pytest.raises(InputError, match="no gradient that could be summed"):
        best_plan(replace(question, fused=True, batch=2))
    # more ranks, fewer bytes of each; what fits on no single device is found over several
    sizes = [best_plan(replace(question, data_parallel=d, tensor_parallel=1, method="full", optimizer="adamw")).ledger for d in (1, 2, 4)]
    held = [sum(ledger.line(name).bytes.require() for name in ("weights", "optimizer")) for ledger in sizes]
    assert held[0] > 1.9 * held[1] > 3.6 * held[2]
    large = Question(find_model("llama-3-8b"), device, 40 * GiB, 2048, batch=8, method="full", optimizer="adamw")
    with pytest.raises(BudgetError):
        best_plan(large)
    assert best_plan(replace(large, data_parallel=8)).fits


def test_parts_make_the_whole():
    spec = small_spec()
    for tensor in model_tensors(spec):
        parts = [tensor_part(spec, tensor, rank, 2) for rank in range(2)]
        if None in parts:
            assert tensor.role in ("norm", "embed", "lm_head")
            continue
        covered = sorted(row for part in parts if part for place in part[1] for row in place)
        assert covered == list(range(tensor.shape[parts[0][0]]))  # type: ignore[index]
    for rows, count in ((10, 4), (3, 4), (8, 2)):
        assert [row for rank in range(count) for row in rows_of(rows, rank, count)] == list(range(rows))
