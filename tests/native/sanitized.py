"""A pytest plugin (`-p native.sanitized`) under which the native tests run on a library built with address and undefined-behaviour sanitizers.

The sanitizer's runtime has to be in the process before anything else, so `test_sanitized` sets LD_PRELOAD. It draws fewer examples: every access is checked.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import torch

from tradespace.errors import EngineError
from tradespace.kernels import native, pages
from tradespace.kernels.native.compiler import SANITIZERS, best_isa, compile_library, find_compiler
from tradespace.kernels.native.library import Library

ISA = "TRADESPACE_SANITIZED_ISA"  # the instruction set; unset: the best here


def runtime() -> Path | None:
    """The sanitizer's runtime that belongs to the compiler; None where there is none."""
    compiler = find_compiler()
    if compiler is None:
        return None
    found = Path(subprocess.run([*compiler.command, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip())
    return found if found.is_absolute() and found.exists() else None


def build(isa: str | None = None) -> Path:
    """The library for an instruction set (None: the best here), compiled if need be. Not in the sanitized process: a compiler would run sanitized, too."""
    if runtime() is None:
        raise EngineError("the compiler has no address sanitizer")
    return compile_library(isa, extra=SANITIZERS)


@lru_cache(maxsize=1)
def _load(isa: str | None = None) -> Library:
    return Library(os.environ.get(ISA) or best_isa(), str(compile_library(os.environ.get(ISA), extra=SANITIZERS)))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu", *, purpose: str) -> torch.Tensor:
    """Each tensor in an allocation of its own, between the sanitizer's guards."""
    return torch.zeros(shape, dtype=dtype, device=device)


def pytest_configure() -> None:
    native.load = _load  # what formats.native and model.recorded import
    pages.huge_zeros = _zeros


def examples(count: int) -> int:
    """Examples that hypothesis draws for a test: a sixth of `count` where every access is checked."""
    return max(4, count // 6) if __name__ in sys.modules and native.load is _load else count
