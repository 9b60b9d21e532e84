"""What the tests of the command line share: a tiny model on disk, a home without timing, and `tradespace …` in this process or in one of its own."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"


@dataclass(frozen=True)
class Ran:
    """One command: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def failed(self, code: int, *words: str) -> str:
        """Asserts the exit code, one clear line of error that says all of `words`, and no traceback. Returns the error."""
        assert self.code == code, f"exit {self.code} instead of {code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err, self.err
        assert "a bug of ours" not in self.err, self.err
        missing = [word for word in words if word.lower() not in self.err.lower()]
        assert not missing, f"{missing} are not said in: {self.err}"
        return self.err


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cli.tiny_model import make_home

    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a Hub folder. Shared: copy it before changing it."""
    from cli.tiny_model import save_folder

    return save_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as one GGUF file. Shared: copy it before changing it."""
    from cli.tiny_model import save_gguf

    return save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """broken(**settings): a copy of the model's folder with these settings in its config.json (None: taken out)."""

    def copy(**settings: Any) -> Path:
        target = tmp_path / "broken"
        shutil.copytree(folder, target)
        config = json.loads((target / "config.json").read_text())
        config = {name: value for name, value in {**config, **settings}.items() if value is not None}
        (target / "config.json").write_text(json.dumps(config))
        return target

    return copy


@pytest.fixture
def cli(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """cli("run", …, stdin=b"…"): the command in this process, through the same `main` that the console script calls."""
    from tradespace.cli.main import main

    monkeypatch.setenv("TRADESPACE_HOME", str(home))
    monkeypatch.setenv("COLUMNS", "300")  # tables must keep to 100 columns although there is room

    def run(*arguments: object, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr(sys, "argv", ["tradespace", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        seen = capsys.readouterr()
        return Ran(int(code or 0), seen.out, seen.err)

    return run


@pytest.fixture
def environment(home: Path) -> dict[str, str]:
    """The environment of a command in a process of its own."""
    return {**os.environ, "TRADESPACE_HOME": str(home), "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


@pytest.fixture
def shell(environment: dict[str, str]) -> Callable[..., Ran]:
    """shell("run", …): the command in a process of its own."""

    def run(*arguments: object, stdin: bytes = b"", before: str = "") -> Ran:
        code = f"{before}\nfrom tradespace.cli.main import main\nmain()"
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, input=stdin, capture_output=True, check=False, env=environment, timeout=120)
        return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run
