"""The native tests once more with every access and every operation checked by the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from native import sanitized
from tradespace.kernels.native import unavailable
from tradespace.kernels.native.compiler import cpu_flags, find_compiler

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CHECKED = ("test_packed_weights.py", "test_recorded.py", "test_stores.py", "test_exact_mode.py", "test_sample.py")
# of the families those that use an operation, or a flag of one, that the others do not; what compares instruction sets or counts bytes touches nothing new
FAMILIES = ("falcon", "gpt2", "gemma2", "gemma3_text", "qwen3")
LEFT_OUT = f"instruction_sets or bytes_are_the_specs or (logits_are_transformers and not ({' or '.join(f'0-{name}' for name in FAMILIES)}))"
TIMEOUT_S = 900  # minutes, on a machine that others keep busy


# gcc 12 counts the places of what needs 64 bytes of alignment from the end of a frame that may have, say, 672 bytes. On the stacks that asan keeps to find uses
# after return, frames begin at such places instead, and the first aligned store crashes. So AVX-512 is checked without them, and AVX2 with them beside it.
WIDE = "avx512f" in cpu_flags()
VARIANTS = ((None, 0), ("avx2", 1)) if WIDE else ((None, 1),)  # instruction set, whether uses after return are found


def _sanitized(*arguments: str, isa: str | None = None, returned: int = 0) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({} if isa is None else {sanitized.ISA: isa})
    environment |= {
        "LD_PRELOAD": str(sanitized.runtime()),
        # Python's own leaks are not ours; a finding ends the process
        "ASAN_OPTIONS": f"detect_leaks=0:halt_on_error=1:detect_stack_use_after_return={returned}",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def library() -> Path:
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    assert unavailable() is None, "a compiler that cannot compile the kernels is a failure, not a reason to skip"
    if sanitized.runtime() is None:
        pytest.skip("the compiler has no address sanitizer (libasan)")
    first, *_ = [sanitized.build(isa) for isa, _ in VARIANTS]
    return first


@pytest.mark.parametrize(("isa", "returned"), VARIANTS)
@pytest.mark.parametrize("name", CHECKED)
def test_the_native_tests_are_clean(name, isa, returned, library):
    options = ("-q", "-x", "-s", "-p", "native.sanitized", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", f"not ({LEFT_OUT})")
    done = _sanitized("-m", "pytest", *options, str(HERE / name), isa=isa, returned=returned)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert " passed" in done.stdout


def test_a_read_past_the_end_is_found(library):
    """The check above would say nothing if the library were not watched."""
    code = f"""
import ctypes, torch
from tradespace.kernels.native.library import Library, Matrix
library = Library("sanitized", {str(library)!r})
short, ids, out = torch.zeros(64, dtype=torch.uint8), torch.tensor([15]), torch.empty(32)
library.ts_unpack_rows(ctypes.byref(Matrix(short.data_ptr(), 16, 32, 0, 1, 2048)), ids.data_ptr(), 1, out.data_ptr())
"""
    done = _sanitized("-c", code)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
