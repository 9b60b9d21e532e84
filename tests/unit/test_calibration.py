"""Constants that call themselves measured are those of the record."""

from pathlib import Path

import pytest

from tradespace.cost import calibration
from tradespace.cost.calibration import Constant
from tradespace.measure.record import read_record

pytest.importorskip("torch", reason="the experiment that calibrates belongs to the torch half")

from tradespace.lab.calibrate import stated

RECORD = Path(__file__).resolve().parents[2] / "results" / "calibration.json"
# bytes repeat; seconds depend on the day, and the cost model states them with two digits
TOLERANCE = {"bytes": 0.25, "of the rate": 0.25}
# the leftover of a process: a small difference of large figures, held to what it may err the total by
TOLERANCE_BYTES = {"HEAP_BYTES": 12 * 2**20, "SAMPLER_BYTES_PER_LOGIT": 1.0}


@pytest.fixture(scope="module")
def record():
    return read_record(RECORD)


def test_what_is_stated_was_measured(record):
    for name, figure in record.figures.items():
        allowed = TOLERANCE_BYTES.get(name, TOLERANCE[figure.unit] * figure.median)
        assert abs(stated(name) - figure.median) <= allowed, f"{name}: {stated(name):.4g} stated, {figure.median:.4g} measured"


def test_every_constant_that_calls_itself_measured_has_a_figure(record):
    """Bytes; and where the record has them (they need a quiet machine) the shares of the rates."""
    names = [name for name, held in vars(calibration).items() if isinstance(held, Constant) and held.source.startswith("measured")]
    assert names
    assert not set(names) - set(record.figures)
    if any(figure.unit == "of the rate" for figure in record.figures.values()):
        shares = [" ".join(key) for key, held in calibration.EFFICIENCY.items() if held.source.startswith("measured")]
        assert not set(shares) - set(record.figures)
