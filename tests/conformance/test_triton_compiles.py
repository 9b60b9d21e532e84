"""Triton kernels through the real compiler, down to an H100's machine code. No card is needed, but ptxas, which comes with Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_kernels_of_a_step_compile_for_an_h100(tmp_path):
    """In a process of its own: here the interpreter has taken the compiler's place."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    worker = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, str(worker)], env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"after {done.stdout.splitlines()[-1:]}: {done.stderr[-2000:]}"
    assert len(done.stdout.splitlines()) == 25
