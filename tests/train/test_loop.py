"""Optimizers, the loop, what ends it, and runs that go on where they were cut, bit for bit."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tradespace.errors import BudgetError, EngineError, InputError
from tradespace.train import checkpoints
from tradespace.train.coded import Coded
from tradespace.train.loop import Limits
from tradespace.train.optimizer import Hyper, Optimizer
from train.small import small_trainer


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
def test_updates_are_torchs(optimizer):
    torch.manual_seed(0)
    ours = {"w": torch.randn(40, 30), "b": torch.randn(30)}
    theirs = [value.clone().requires_grad_() for value in ours.values()]
    hyper = Hyper(lr=0.01, decay=0.1 if optimizer == "adamw" else 0.0)
    found = Optimizer(optimizer, ours, hyper)
    if optimizer == "adamw":
        oracle = torch.optim.AdamW([{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}], lr=0.01)
    elif optimizer == "sgd":
        oracle = torch.optim.SGD(theirs, lr=0.01)
    else:
        from transformers.optimization import Adafactor

        oracle = Adafactor(theirs, lr=0.01, relative_step=False, scale_parameter=False, warmup_init=False)
    for number in range(1, 6):
        for key, value, other in zip(ours, ours.values(), theirs, strict=True):
            gradient = torch.randn(value.shape)
            other.grad = gradient.clone()
            found.step(key, value, gradient, lr=0.01, number=number)
        oracle.step()
    for value, other in zip(ours.values(), theirs, strict=True):
        torch.testing.assert_close(value, other.detach(), atol=2e-6, rtol=1e-5)


def test_codes_of_moments_are_near():
    torch.manual_seed(0)
    values = torch.randn(10_000) * torch.rand(10_000) ** 4
    for signed, kept in ((True, values), (False, values.square())):
        coded = Coded(torch.zeros(10_000, dtype=torch.uint8), torch.zeros(40), signed=signed)
        coded.write(kept)
        assert (coded.read() - kept).abs().max() < 0.02 * kept.abs().max()
        large = kept.abs() > kept.abs().max() * 1e-2
        assert ((coded.read() - kept).abs()[large] / kept.abs()[large]).median() < 0.03


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor", "sgd"])
@pytest.mark.parametrize("fmt", ["fp32", "bf16"])
def test_every_optimizer_learns_and_fusing_changes_nothing(optimizer, fmt):
    lr = 0.1 if optimizer == "sgd" else 3e-3
    plain, fused = (small_trainer(optimizer, fused=fused, fmt=fmt, lr=lr) for fused in (False, True))
    losses = [plain.advance().loss for _ in range(12)]
    assert losses == [fused.advance().loss for _ in range(12)]
    assert losses[-1] < losses[0] - (0.05 if optimizer == "sgd" else 0.3)
    assert fused.gradient_bytes == 0 and all(parameter.grad is None for parameter in fused.parameters.values())


def test_accumulation_is_the_larger_batch():
    one, other = small_trainer(micro=4), small_trainer(micro=1, accumulation=4)
    for _ in range(3):
        assert one.advance().loss == pytest.approx(other.advance().loss, abs=1e-5)


def test_clipping():
    trainer = small_trainer("sgd", clip=0.01, lr=1.0)
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    assert trainer.advance().grad_norm > 0.01
    moved = math.sqrt(sum(float((parameter.detach() - before[name]).square().sum()) for name, parameter in trainer.parameters.items()))
    assert moved == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(InputError, match="fused step forgets"):
        small_trainer(fused=True, clip=1.0)


def test_a_loss_that_is_no_number_names_the_batch():
    trainer = small_trainer()
    trainer.advance()
    trainer.model.embed.weight.data[:] = float("nan")
    with pytest.raises(EngineError, match=r"the loss is nan at step 2, micro-batch 1: blocks \d+, \d+ of data"):
        trainer.advance()


def _advance(trainer, steps):
    for _ in range(steps):
        trainer.advance()


def test_divergence_stops():
    trainer = small_trainer("sgd", lr=9.0)
    with pytest.raises(EngineError, match=r"diverges|is nan|is inf|no number"):
        _advance(trainer, 60)


def _weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_resumed_bit_for_bit(optimizer, tmp_path):
    whole = small_trainer(optimizer, limits=Limits(steps=12, save_every=100))
    (tmp_path / "whole").mkdir()
    whole.run(tmp_path / "whole")
    first = small_trainer(optimizer, limits=Limits(steps=7, save_every=3))
    first.run(tmp_path)
    assert [folder.name for folder in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-00000006", "checkpoint-00000007"]
    # the newest is damaged: the one before it is used
    (tmp_path / "checkpoint-00000007" / "states.safetensors").write_bytes(b"damaged")
    said: list[str] = []
    found = checkpoints.latest(tmp_path, said.append)
    assert found is not None and found.step == 6 and "does not match its checksum" in said[0]
    second = small_trainer(optimizer, limits=Limits(steps=12, save_every=100))
    second.restore(found)
    second.run(tmp_path)
    assert second.losses == whole.losses
    want = _weights(whole)
    assert all(torch.equal(want[name], value) for name, value in _weights(second).items())
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == list(range(1, 13))


def test_another_runs_checkpoint_is_refused(tmp_path):
    small_trainer(limits=Limits(steps=1)).run(tmp_path)
    other = small_trainer()
    other.settings = {"seed": 1}
    with pytest.raises(InputError, match="seed: 0 then, 1 now"):
        other.restore(checkpoints.latest(tmp_path))


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    trainer = small_trainer(limits=Limits(steps=2))
    trainer.run(tmp_path)

    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_shard", full)
    trainer.step = 3
    with pytest.raises(BudgetError, match="checkpoint-00000002") as caught:
        trainer.save(tmp_path)
    assert caught.value.need_bytes > 0
    assert checkpoints.latest(tmp_path).step == 2
    assert not list(tmp_path.glob(".*partial"))


SCRIPT = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from train.small import small_trainer
from tradespace.train.loop import Limits
trainer = small_trainer(limits=Limits(steps=60, save_every=2))
trainer.run(Path(sys.argv[1]), on_step=lambda report: print(report.step, flush=True))
"""


def test_killed_in_the_middle_it_goes_on(tmp_path):
    """SIGKILL while checkpoints are written every other step."""
    paths = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "src")]
    child = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), *paths], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 5:
            break
    time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    found = checkpoints.latest(tmp_path)
    assert found is not None and found.step >= 4
    whole, cut = (small_trainer(limits=Limits(steps=14, save_every=100)) for _ in range(2))
    cut.restore(found)
    cut.limits = Limits(steps=max(14, found.step), save_every=100)
    cut.run(tmp_path)
    while whole.step < cut.step:
        whole.advance()
    assert cut.losses == whole.losses
    want = _weights(whole)
    assert all(torch.equal(want[name], value) for name, value in _weights(cut).items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0.0}, "--epochs 0.0"),
        ({"epochs": math.inf}, "--epochs inf"),
        ({"epochs": math.nan}, "--epochs nan"),
        ({"lr": 0.0}, "--lr 0.0"),
        ({"lr": math.nan}, "--lr nan"),
        ({"steps": 0}, "--steps 0: at least 1"),
        ({"save_every": 0}, "--save-every 0"),
        ({"context": 1}, "--context 1: at least 2"),
        ({"schedule": "stairs"}, "stairs"),
        ({"fused": True, "clip": 1.0}, "--clip needs all gradients at once"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_runs(settings, message):
    from tradespace.tuning_job import Settings

    with pytest.raises(InputError, match=message):
        Settings(**settings)


def test_what_fails_before_its_first_checkpoint_leaves_nothing(tmp_path):
    """A tokenizer made from bad data would be taken for the next run's."""
    from tradespace.tuning import train
    from tradespace.tuning_job import Settings

    data = tmp_path / "line.txt"
    data.write_text("one line")
    for there in (False, True):
        if there:
            (tmp_path / "run").mkdir()
        with pytest.raises(InputError, match="Give more text"):
            train("layers=1,width=32,heads=2,vocab=300", [data], tmp_path / "run", settings=Settings(context=64))
        assert (tmp_path / "run").exists() == there and (not there or not any((tmp_path / "run").iterdir()))


def test_a_card_that_is_not_there_is_refused(tmp_path):
    from tradespace.tuning import train
    from tradespace.tuning_job import Settings

    with pytest.raises(InputError, match=r"device cuda:7: this machine has \d CUDA devices\. Use --device cpu"):
        train("layers=1,width=32,heads=2,vocab=300", [tmp_path / "text.txt"], tmp_path / "run", settings=Settings(device="cuda:7"))
    with pytest.raises(InputError, match="takes at most 16 tokens"):
        train("layers=1,width=32,heads=2,context=16", [tmp_path / "text.txt"], tmp_path / "run", settings=Settings(device="cpu", context=32))
    assert not (tmp_path / "run").exists()


def test_a_student_of_no_number_is_refused(tmp_path):
    from tradespace.tuning import distill

    with pytest.raises(InputError, match="--student drop:x: write drop:N"):
        distill("smollm2-135m", "drop:x", [tmp_path / "text.txt"], tmp_path / "run")
