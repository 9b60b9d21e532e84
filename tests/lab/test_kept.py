"""Experiments that keep what is finished: nothing is done twice, other settings are other results, and a cut training goes on bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cli.tiny_model import make_home
from tradespace.errors import EngineError, InputError
from tradespace.lab import kept as module
from tradespace.lab.experiments import EXPERIMENTS
from tradespace.lab.kept import Clock, folder_of, go_on, kept, settings_of
from tradespace.train import checkpoints
from tradespace.train.loop import Limits
from train.small import small_trainer


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TRADESPACE_HOME", str(make_home(tmp_path / "home")))
    return tmp_path / "home"


def test_a_result_is_worked_out_once(home):
    calls: list[Path] = []

    def work(folder: Path) -> dict:
        calls.append(folder)
        (folder / "weights.bin").write_bytes(b"1")
        (folder / f"{checkpoints.PREFIX}00000001").mkdir()
        return {"loss": 1.5}

    settings = settings_of(seed=0)
    assert kept("some", settings, work) == kept("some", settings, work) == {"loss": 1.5}
    assert len(calls) == 1 and calls[0] == folder_of("some", settings) and home in calls[0].parents
    # what a run leaves stays, its checkpoints do not
    assert sorted(path.name for path in calls[0].iterdir()) == ["result.json", "weights.bin"]
    assert json.loads((calls[0] / "result.json").read_text())["settings"]["seed"] == 0


def test_other_settings_are_other_results(monkeypatch):
    for number, settings in enumerate((settings_of(seed=0), settings_of(seed=1), settings_of(seed=0, steps=5))):
        assert kept("some", settings, lambda folder, number=number: {"number": number}) == {"number": number}
    assert kept("other", settings_of(seed=0), lambda folder: {"number": 9}) == {"number": 9}
    monkeypatch.setattr(module, "RECIPE", 99)  # what training computes has changed
    assert kept("some", settings_of(seed=0), lambda folder: {"number": 10}) == {"number": 10}


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"settings": {}}', '{"result": 3}'])
def test_a_damaged_result_counts_as_none(damage):
    settings = settings_of(seed=0)
    kept("some", settings, lambda folder: {"loss": 1.0})
    (folder_of("some", settings) / "result.json").write_text(damage)
    assert kept("some", settings, lambda folder: {"loss": 2.0}) == {"loss": 2.0}


def test_work_that_fails_keeps_nothing_as_its_result():
    def work(folder: Path) -> dict:
        raise EngineError("it diverged")

    with pytest.raises(EngineError):
        kept("some", settings_of(seed=0), work)
    assert kept("some", settings_of(seed=0), lambda folder: {"loss": 2.0}) == {"loss": 2.0}


def test_a_cut_training_goes_on_bit_for_bit(tmp_path):
    limits = Limits(steps=8, save_every=3)
    whole = small_trainer(limits=limits)
    assert go_on(whole, tmp_path / "whole", print_nothing) == 0

    class Late(Clock):
        """Time is up when the fourth step is done."""

        @property
        def left_s(self) -> float | None:
            return 0.25

    (tmp_path / "cut").mkdir()
    cut, steps = small_trainer(limits=limits), []
    advance = cut.advance

    def slow():
        steps.append(0)
        if len(steps) == 4:
            import time

            time.sleep(0.3)
        return advance()

    cut.advance = slow  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=r"time limit came at step \d of 8.*same command goes on"):
        go_on(cut, tmp_path / "cut", print_nothing, Late())
    said: list[str] = []
    again = small_trainer(limits=limits)
    first = go_on(again, tmp_path / "cut", said.append, every=4)
    assert first == cut.step < 8 and any("goes on from step" in line for line in said)
    assert any("step 8/8" in line and "tok/s" in line for line in said)
    assert again.losses == whole.losses
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, again.parameters[name])


def print_nothing(line: str) -> None:
    pass


@pytest.fixture(autouse=True)
def folders(tmp_path):
    (tmp_path / "whole").mkdir()


def test_a_clock_ends_at_nothing():
    assert Clock().left_s is None
    clock = Clock(100.0)
    clock.began -= 250
    assert clock.left_s == 0.0 and clock.spent_s >= 250


@pytest.mark.parametrize(("name", "option"), [("memory", {"time_limit_s": 10.0}), ("memory", {"device": "cuda"}), ("architecture", {"model": "smollm2-135m"})])
def test_options_that_an_experiment_does_not_take_are_refused(name, option):
    with pytest.raises(InputError, match=r"takes none\. These do: \w"):
        EXPERIMENTS[name].run(quick=True, say=print_nothing, **option)


def test_the_ledger_experiment_measures_every_line():
    """On its smallest grid: weights, gradients and states to the byte, the rest within the bar; and it is cut by its time limit, not silently."""
    from tradespace.lab import train_ledger

    record = train_ledger.run(quick=True, say=print_nothing)
    for row in record.rows:
        for line in train_ledger.EXACT:
            assert row["predicted"][line] == row["measured"][line], (row["model"], line)
        assert abs(row["predicted"]["activations"] / row["measured"]["activations"] - 1) <= train_ledger.BAR
        assert abs(row["predicted"]["total"] / row["measured"]["total"] - 1) <= train_ledger.BAR
    assert {row["policy"] for row in record.rows} == set(train_ledger.POLICIES)
    assert "to the byte" in record.notes and "predicted against measured" in train_ledger.markdown(record)
