"""Records: what is written is read back equal, and what is no record is refused with the reason."""

import json
import math
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradespace.errors import CorruptFileError, InputError
from tradespace.measure.record import Figure, Record, commit_of, new_record, read_record, versions, write_atomically, write_record
from tradespace.measure.timer import Timer, median_and_spread, time_repeats
from tradespace.spec.device_zoo import find_device


def a_record() -> Record:
    return new_record(
        "kv-cache",
        command="tradespace lab run kv-cache",
        device=find_device("l4"),
        repeats=3,
        figures={"decode": Figure.of([3.0, 1.0, 2.0], "tok/s")},
        rows=[{"batch": 1, "kept": "π"}],
    )


def test_a_record_comes_back_equal(tmp_path: Path) -> None:
    record, path = a_record(), tmp_path / "deep" / "kv.json"
    write_record(path, record)
    found = read_record(path)
    assert found.figures["decode"] == Figure(median=2.0, min=1.0, max=3.0, values=(3.0, 1.0, 2.0), unit="tok/s")
    assert (found.experiment, found.repeats, found.rows, found.commit) == ("kv-cache", 3, ({"batch": 1, "kept": "π"},), record.commit)
    assert found.device["name"] == "l4" and found.device["read_bytes_per_s"]["source"].startswith("cited")
    assert [entry.name for entry in path.parent.iterdir()] == ["kv.json"]


@settings(max_examples=50)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=9))
def test_any_finite_figure_survives(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    path = tmp_path_factory.mktemp("record") / "r.json"
    record = Record(**{**a_record().__dict__, "figures": {"x": Figure.of(values, "s")}})
    write_record(path, record)
    assert read_record(path).figures["x"].values == tuple(values)


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), {1, 2}])
def test_what_json_cannot_hold_is_refused_and_leaves_the_old_file(tmp_path: Path, value: object) -> None:
    path = tmp_path / "r.json"
    write_record(path, a_record())
    before = path.read_bytes()
    with pytest.raises(InputError, match="kv-cache"):
        write_record(path, Record(**{**a_record().__dict__, "rows": [{"x": value}]}))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"schema": 99}, "schema 99"),
        ({"schema": None}, "schema None"),
        ({"commit": 7}, "'commit' is int"),
        ({"repeats": True}, "'repeats' is bool"),
        ({"surprise": 1}, "unknown fields \\['surprise'\\]"),
        ({"figures": {"x": 3}}, "'x' is not an object"),
        ({"figures": {"x": {"median": 1, "min": 1, "max": 1, "values": [], "unit": "s"}}}, "at least one number"),
        ({"figures": {"x": {"median": 1, "min": 1, "max": 1, "values": ["1"], "unit": "s"}}}, "at least one number"),
        ({"figures": {"x": {"median": 5, "min": 1, "max": 1, "values": [1], "unit": "s"}}}, "its values give"),
        ({"figures": {"x": {"median": 1, "unit": "s"}}}, "missing fields"),
    ],
)
def test_a_wrong_record_is_refused_by_name(tmp_path: Path, change: dict[str, object], complaint: str) -> None:
    path = tmp_path / "r.json"
    write_record(path, a_record())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CorruptFileError, match=complaint):
        read_record(path)


def test_no_record_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no record"):
        read_record(tmp_path / "none.json")
    for body in (b"", b"{", b"[]", b"\xff\xfe", b"3"):
        (tmp_path / "r.json").write_bytes(body)
        with pytest.raises(CorruptFileError):
            read_record(tmp_path / "r.json")


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_record(path, a_record())
    body = json.loads(path.read_text())
    del body["command"]
    path.write_text(json.dumps(body))
    with pytest.raises(CorruptFileError, match="command"):
        read_record(path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_atomically(path, "old")

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_commit_and_dirty_flag(tmp_path: Path) -> None:
    assert commit_of(tmp_path)[0].startswith("unknown")

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *identity, "-C", str(tmp_path), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "one")
    assert commit_of(tmp_path) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "a").write_text("2")
    assert commit_of(tmp_path)[1]


def test_versions_name_what_is_missing() -> None:
    found = versions()
    assert found["python"] and found["numpy"]
    assert set(found) == {"python", "torch", "numpy", "tokenizers", "tradespace"}


def test_median_and_repeats() -> None:
    assert median_and_spread([4, 1, 3, 2]) == (2.5, 1, 4)
    with pytest.raises(InputError, match="no values"):
        median_and_spread([])
    calls: list[int] = []
    assert len(time_repeats(lambda: calls.append(1), repeats=5, warmup=2)) == 5
    assert len(calls) == 7
    assert len(time_repeats(lambda: None, repeats=5, budget_s=-1)) == 1  # once at least, whatever the budget
    with Timer() as timer:
        assert timer.elapsed_s >= 0
    assert timer.elapsed_s == timer.elapsed_s  # it stands still after the block
