"""JSON records of what was measured: on which device, at which commit, how often, with which spread.

Every figure in the documentation comes from one of these files, so a record that lacks its circumstances is refused on reading, and a
half-written one cannot exist: the bytes go to a temporary file beside the target, are flushed to the disk and then renamed over it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tradespace.errors import CorruptFileError, InputError
from tradespace.measure.timer import median_and_spread
from tradespace.spec.device import DeviceSpec

SCHEMA = 1
_VERSIONED = ("torch", "numpy", "tokenizers", "tradespace")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured quantity: every repeat is kept, the median is what gets quoted, min and max are its spread."""

    median: float
    min: float
    max: float
    values: tuple[float, ...]
    unit: str

    @classmethod
    def of(cls, values: Sequence[float], unit: str) -> Figure:
        median, low, high = median_and_spread(values)
        return cls(median=median, min=low, max=high, values=tuple(float(value) for value in values), unit=unit)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One experiment. `rows` is free-form (a list of flat mappings, the lines of the table that the experiment prints)."""

    experiment: str
    command: str
    commit: str
    dirty: bool
    date: str
    device: Mapping[str, Any]
    versions: Mapping[str, str | None]
    repeats: int
    figures: Mapping[str, Figure] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    notes: str = ""


_FIELDS: dict[str, tuple[type, ...]] = {
    "experiment": (str,),
    "command": (str,),
    "commit": (str,),
    "dirty": (bool,),
    "date": (str,),
    "device": (dict,),
    "versions": (dict,),
    "repeats": (int,),
    "figures": (dict,),
    "rows": (list,),
    "notes": (str,),
}
_FIGURE_FIELDS: dict[str, tuple[type, ...]] = {"median": (int, float), "min": (int, float), "max": (int, float), "values": (list,), "unit": (str,)}


def new_record(
    experiment: str,
    *,
    command: str,
    device: DeviceSpec,
    repeats: int,
    figures: Mapping[str, Figure] | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
    notes: str = "",
    repository: Path | None = None,
) -> Record:
    """A record with commit, date and versions filled in from where this runs. `repository`: whose HEAD counts; default the one this file lies in."""
    commit, dirty = commit_of(repository if repository is not None else Path(__file__).resolve().parent)
    return Record(
        experiment=experiment,
        command=command,
        commit=commit,
        dirty=dirty,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        device=device_summary(device),
        versions=versions(),
        repeats=repeats,
        figures=dict(figures or {}),
        rows=tuple(rows),
        notes=notes,
    )


def commit_of(folder: Path) -> tuple[str, bool]:
    """(HEAD's hash, whether tracked files differ from it) of the git repository around `folder`; ("unknown: why", False) outside of one."""
    try:
        head = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        status = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True, timeout=30
        ).stdout
    except FileNotFoundError:
        return "unknown: no git on this machine", False
    except subprocess.SubprocessError:
        return "unknown: not in a git repository with a commit", False
    return head, bool(status.strip())


def versions() -> dict[str, str | None]:
    """Python's version and that of each package a figure may depend on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def device_summary(device: DeviceSpec) -> dict[str, Any]:
    """The device as plain JSON values: estimates become {"value", "source"}."""
    summary = asdict(device)
    summary["bandwidth_curve"] = [list(point) for point in device.bandwidth_curve]
    summary["instruction_sets"] = list(device.instruction_sets)
    return summary


def write_record(path: Path, record: Record) -> None:
    """Writes `record` as JSON, atomically; folders are made. Raises InputError where a value is not JSON (NaN and infinity included)."""
    body = {"schema": SCHEMA, **asdict(record)}
    try:
        text = json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"record '{record.experiment}' holds a value that JSON cannot: {error}") from error
    write_atomically(path, text)


def write_atomically(path: Path, text: str) -> None:
    """Puts `text` (UTF-8) at `path` whole or not at all: temporary file in the same folder, flush to the disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private; a record is there to be read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_record(path: Path) -> Record:
    """The record at `path`. Raises InputError where there is none, CorruptFileError naming the field where it is not a record of ours."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no record at {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path} is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise CorruptFileError(f"{path}: a record is a JSON object, this is a {type(body).__name__}")
    schema = body.pop("schema", None)
    if schema != SCHEMA:
        raise CorruptFileError(f"{path}: schema {schema!r}, this version reads schema {SCHEMA}")
    _check_fields(body, _FIELDS, f"{path}")
    figures: dict[str, Figure] = {}
    for name, raw in body["figures"].items():
        if not isinstance(raw, dict):
            raise CorruptFileError(f"{path}: figure '{name}' is not an object")
        _check_fields(raw, _FIGURE_FIELDS, f"{path}: figure '{name}'")
        figures[name] = _checked_figure(raw, f"{path}: figure '{name}'")
    return Record(**{**body, "figures": figures, "rows": tuple(body["rows"])})


def _checked_figure(raw: Mapping[str, Any], where: str) -> Figure:
    values = raw["values"]
    if not values or any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        raise CorruptFileError(f"{where}: 'values' must hold at least one number and nothing else")
    figure = Figure.of(values, raw["unit"])
    stated = (raw["median"], raw["min"], raw["max"])
    if stated != (figure.median, figure.min, figure.max):
        raise CorruptFileError(f"{where}: states median, min, max {stated}, but its values give {(figure.median, figure.min, figure.max)}")
    return figure


def _check_fields(body: Mapping[str, Any], fields: Mapping[str, tuple[type, ...]], where: str) -> None:
    missing, unknown = sorted(fields.keys() - body.keys()), sorted(body.keys() - fields.keys())
    if missing or unknown:
        raise CorruptFileError(f"{where}: missing fields {missing or 'none'}, unknown fields {unknown or 'none'}")
    for name, kinds in fields.items():
        value = body[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise CorruptFileError(f"{where}: field '{name}' is {type(value).__name__}, not {' or '.join(kind.__name__ for kind in kinds)}")
