"""These tests compare with llama.cpp, which takes minutes to compile, and rewrite the recorded references: they run only where this folder is named
(`make oracles`, or pytest tests/oracles). Elsewhere each file is one skipped entry, and not even imported.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REASON = "compares with llama.cpp and rewrites the recorded references: run `make oracles`"


class NotAsked(pytest.Module):
    """A test file that says why it was left alone."""

    def collect(self):
        pytest.skip(REASON, allow_module_level=True)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    paths = [(parent.config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in parent.config.args]
    if any(path == HERE or HERE in path.parents for path in paths):
        return None
    return NotAsked.from_parent(parent, path=module_path)
