"""The architecture that the design promises: planning without torch, and imports that go down only."""

import subprocess
import sys
from pathlib import Path

import pytest

PURE = ["tradespace", "tradespace.units", "tradespace.errors"]
ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"

BLOCK_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked here")
sys.meta_path.insert(0, Blocked())
"""


def pure_modules() -> list[str]:
    """Every module of the half that must import without torch."""
    found = list(PURE)
    for package in ("spec", "cost", "planner"):
        for path in sorted((SOURCE / "tradespace" / package).rglob("*.py")):
            parts = path.relative_to(SOURCE).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def run_blocked(code: str, blocked: tuple[str, ...] = ("torch", "tokenizers")) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", BLOCK_TORCH.format(blocked=blocked) + code], capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_pure_half_imports_without_torch():
    result = run_blocked("import importlib\n" + "\n".join(f"importlib.import_module({name!r})" for name in pure_modules()))
    assert result.returncode == 0, result.stderr


def test_planning_works_without_torch():
    result = run_blocked(
        "import tradespace as ts, sys\n"
        "frontier = ts.plan('llama-2-70b', memory='40GB', device='a100-40gb')\n"
        "assert frontier.candidates\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert result.returncode == 0, result.stderr


def test_the_command_line_plans_without_torch():
    arguments = ["tradespace", "plan", "llama-2-70b", "--memory", "40GB", "--device", "a100-40gb"]
    result = run_blocked(f"import sys\nsys.argv = {arguments!r}\nfrom tradespace.cli.main import main\nmain()\n")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["tradespace.kernels.view", "tradespace.model.transformer"])
def test_the_block_itself_can_fail(module):
    """The blocker must really block: a module of the torch half does not import under it."""
    result = run_blocked(f"import {module}")
    assert result.returncode != 0
    assert "is blocked here" in result.stderr


def test_no_file_names_a_machine_path_or_a_registry():
    """What we commit names no path of the machine that it was written on."""
    bad = []
    for path in [*SOURCE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), ROOT / "Makefile", ROOT / "README.md", ROOT / "pyproject.toml"]:
        text = path.read_text(encoding="utf-8")
        bad += [f"{path.name}: {word}" for word in ("/" + "work/", "/" + "opt/pypi", "pypi" + ".org", "files.python" + "hosted") if word in text]
    assert not bad
