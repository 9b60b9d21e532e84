"""The documents' own code runs: the page about your own technique, the notebooks, and the site itself, built strictly."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_the_page_about_your_own_technique_runs(capsys):
    text = (ROOT / "docs" / "howto" / "own-technique.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "own-technique.md", "exec"), names)
    assert "none of the protected lost" in capsys.readouterr().out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebooks_run(path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not committed: they go stale"
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()


def test_there_are_three_notebooks():
    assert len(NOTEBOOKS) == 3


def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("material")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    questions = (tmp_path / "site" / "questions.html").read_text()
    assert questions.count("<h2") == 11 and questions.count("$ tradespace") >= 11 and "run: plan" not in questions
    assert len(list((tmp_path / "site" / "techniques").glob("*.html"))) > 50
    assert "Every plan for" in (tmp_path / "site" / "reference.html").read_text()
