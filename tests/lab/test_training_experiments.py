"""The training experiments on a tiny teacher and a page of text: equal steps within a time limit, kept trainings, and the way back from a cut."""

from __future__ import annotations

import pytest

from cli.tiny_model import make_home, save_folder
from tradespace.errors import BudgetError, EngineError
from tradespace.lab import architecture, distill_student, training_text
from tradespace.lab.distill_student import SCALES

PAGE = "Why is the sky blue? Light is scattered by the air, and what is scattered most is blue. A plan is run, and what was planned is measured. "


@pytest.fixture
def books(tmp_path, monkeypatch):
    """A book of a page, again and again, and a cache folder of its own."""
    text = tmp_path / "book.txt"
    text.write_text(PAGE * 400)
    monkeypatch.setenv("TRADESPACE_HOME", str(make_home(tmp_path / "home")))
    for module in (distill_student, training_text):
        monkeypatch.setattr(module, "data_file", lambda *parts: text)
    return text


def test_a_student_learns_with_and_without_its_teacher_for_equally_long(books, tmp_path, monkeypatch):
    teacher = save_folder(tmp_path / "teacher")
    monkeypatch.setattr(
        distill_student,
        "decode_speeds",
        lambda models, device, context, say: [{"part": "speed", "model": name, "device": device, "not_run": "a test"} for name in models],
    )
    said: list[str] = []
    record = distill_student.run(quick=True, say=said.append, model=str(teacher), time_limit_s=600.0)
    rows = {row["model"]: row for row in record.rows if row["part"] == "quality"}
    assert list(rows) == ["teacher", "taught", "alone", "taught, int4"]
    assert rows["teacher"]["agreement"] == 1.0 and rows["teacher"]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert len(rows["taught"]["last_losses"]) == len(rows["alone"]["last_losses"]) == 20
    assert rows["taught, int4"]["bytes"] < rows["taught"]["bytes"]
    assert abs(rows["taught, int4"]["loss"] - rows["taught"]["loss"]) < 0.5
    assert f"{SCALES['quick'].steps} steps of" in record.notes and "Taught is better on both" in record.notes
    assert "taught did not run" in distill_student.markdown(record).replace(" on cpu", "")

    def never(*arguments):
        raise AssertionError("it was trained again")

    monkeypatch.setattr(distill_student, "_trained", never)
    again = distill_student.run(quick=True, say=said.append, model=str(teacher), time_limit_s=600.0)
    assert [row.get("perplexity") for row in again.rows] == [row.get("perplexity") for row in record.rows]


def test_a_limit_that_holds_no_steps_says_how_long_they_take(books, tmp_path):
    with pytest.raises(BudgetError, match=r"10 steps of each take .*; 20\S* s are allowed\. Give --time-limit \d+s"):
        distill_student.run(quick=True, say=lambda line: None, model=str(save_folder(tmp_path / "teacher")), time_limit_s=20.0)


def test_architecture_is_cut_and_goes_on(books, monkeypatch):
    monkeypatch.setattr(architecture, "WAYS", dict(list(architecture.WAYS.items())[:2]))
    monkeypatch.setattr(architecture, "decode_speeds", lambda *arguments: {})
    monkeypatch.setattr(architecture, "VOCAB", 300)
    said: list[str] = []
    with pytest.raises(EngineError, match="time limit"):
        architecture.run(quick=True, say=said.append, time_limit_s=1e-3)
    record = architecture.run(quick=True, say=said.append)
    assert [row["name"] for row in record.rows] == list(architecture.WAYS)
    count = len(said)
    again = architecture.run(quick=True, say=said.append)
    assert [row["loss"] for row in again.rows] == [row["loss"] for row in record.rows]
    assert not any("step" in line and "tok/s" in line for line in said[count:])  # nothing was trained
