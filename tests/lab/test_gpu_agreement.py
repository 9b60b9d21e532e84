"""What the CPU says is asked once; a record's rows without a card: the CPU beside itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tradespace.lab import gpu_agreement
from tradespace.lab.gpu_agreement import Said, compared, said_by_cpu


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    monkeypatch.setenv("TRADESPACE_HOME", str(tmp_path))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    monkeypatch.setattr(gpu_agreement, "resolve", lambda model, **options: type("Files", (), {"weights": (file,)})())
    found: list[tuple[str, str, str]] = []

    def said_by(device: str, model: str, weights: str, store: str, positions: int, tokens: int) -> Said:
        found.append((device, weights, store))
        answers = [[1, 2, 3, 4]] * 4 + [[1, 2, 9, 4] if device == "cuda" else [1, 2, 3, 4]]
        return Said([-2.0, -3.0] if device == "cpu" else [-2.0, -3.02], answers, "2.0")

    monkeypatch.setattr(gpu_agreement, "said_by", said_by)
    return found


def test_what_the_cpu_says_is_asked_once(asked: list[tuple[str, str, str]], tmp_path: Path):
    first = said_by_cpu("model", "int8", "bf16", 8, 4)
    assert said_by_cpu("model", "int8", "bf16", 8, 4) == first and len(asked) == 1
    said_by_cpu("model", "int8", "bf16", 8, 5)
    said_by_cpu("model", "fp8", "bf16", 8, 4)
    (tmp_path / "model.gguf").write_bytes(b"other weights")
    said_by_cpu("model", "int8", "bf16", 8, 4)
    assert len(asked) == 4, "other lengths, formats and files are asked anew"


def test_a_way_says_how_far_apart_they_are(asked: list[tuple[str, str, str]]):
    row = compared("model", "int8", "bf16", 8, 4)
    assert row["same"] == [4, 4, 4, 4, 2] and row["same_tokens"] == 18 and row["tokens"] == 20
    assert row["mean"] == pytest.approx(0.01) and row["worst"] == pytest.approx(0.02)
    assert row["holds"] and row["cpu_torch"] == "2.0" and {device for device, *_ in asked} == {"cuda", "cpu"}
