"""The checkpoint that start-up is timed with, and the timing, on the CPU."""

from __future__ import annotations

import sys

import pytest

torch = pytest.importorskip("torch")

from tradespace import api  # noqa: E402
from tradespace.errors import EngineError  # noqa: E402
from tradespace.lab import gpu_start  # noqa: E402
from tradespace.lab.timing import first_byte_s  # noqa: E402
from tradespace.tuning_models import parse_shape  # noqa: E402


def small():
    spec = parse_shape("layers=2,width=64,heads=4,kv-heads=2,ffn=96,vocab=600,context=128")
    assert spec is not None
    return spec


def test_the_checkpoint_is_the_model_under_its_familys_names(tmp_path):
    spec = small()
    nbytes = gpu_start.write_checkpoint(spec, tmp_path, torch.device("cpu"))
    found = api.find_spec(str(tmp_path))
    assert (found.L, found.D, found.V, found.layers[0].mixer) == (spec.L, spec.D, spec.V, spec.layers[0].mixer)
    assert nbytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) - _headers(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == spec.L + 1


def _headers(folder):
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors"))


def test_seconds_of_a_run_of_it(monkeypatch):
    said = []
    rows = list(gpu_start.start_rows(small(), "700MiB", said.append, device="cpu", warm_runs=1))
    assert [row["what"] for row in rows] == ["cold", "warm"] and all(len(row["seconds"]) == 1 and row["seconds"][0] > 0.2 for row in rows)
    assert len(said) == 3


def test_a_command_without_output_is_an_error():
    with pytest.raises(EngineError, match="ended with 3: no such thing"):
        first_byte_s([sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"])
    assert 0 < first_byte_s([sys.executable, "-c", "print('yes')"]) < 60
