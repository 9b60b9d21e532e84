"""C++ → a shared library in the cache, once per source, compiler, flags and instruction set. Takes ten to twenty-five seconds on two cores, then none.

The name of the file is a hash of all that went into it, it is written under another name and renamed, and a lock lets one of several first users compile while
the others wait. Compilers are tried in this order: $CXX, g++, c++, clang++, and the `ziglang` package (`pip install ziglang`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tradespace.errors import EngineError, InputError
from tradespace.home import cache_folder

SOURCE = Path(__file__).parent / "source"
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=default", "-ffp-contract=fast", "-fno-math-errno", "-w")
# the instruction sets that there are kernels for, best first: what the CPU must have, and what the compiler is told
ISAS: dict[str, tuple[frozenset[str], tuple[str, ...]]] = {
    "avx512": (
        frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16", "f16c", "fma"}),
        ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16", "-mavx2", "-mfma", "-mf16c", "-mbmi2"),
    ),
    "avx512-vnni": (
        frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "f16c", "fma"}),
        ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx2", "-mfma", "-mf16c", "-mbmi2"),
    ),
    "avx2-vnni": (frozenset({"avx2", "fma", "f16c", "avx_vnni"}), ("-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mavxvnni")),
    "avx2": (frozenset({"avx2", "fma", "f16c"}), ("-mavx2", "-mfma", "-mf16c", "-mbmi2")),
    "portable": (frozenset(), ()),
}
# for tests: an access outside of an allocation, or undefined behaviour, ends the process with a report. -O1 spares the compiler minutes
SANITIZERS = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
COMPILE_TIMEOUT_S = 900  # on a machine that others keep busy
LOCK_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler: the command that runs it, and what it says about itself."""

    command: tuple[str, ...]
    version: str


def cpu_flags() -> frozenset[str]:
    """Instruction sets of this CPU as Linux names them; empty where the platform does not say."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def best_isa() -> str:
    """The best instruction set that there are kernels for and this CPU has."""
    have = cpu_flags()
    return next(name for name, (need, _) in ISAS.items() if need <= have)


def _candidates() -> Iterator[tuple[str, ...]]:
    if stated := os.environ.get("CXX"):
        yield tuple(shlex.split(stated))
    for name in ("g++", "c++", "clang++"):
        if found := shutil.which(name):
            yield (found,)
    if importlib.util.find_spec("ziglang") is not None:
        yield (sys.executable, "-m", "ziglang", "c++")


@lru_cache(maxsize=1)
def find_compiler() -> Compiler | None:
    """The first compiler that answers, or None."""
    for command in _candidates():
        try:
            shown = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        return Compiler(command, shown.strip().splitlines()[0] if shown.strip() else command[0])
    return None


def _sources() -> list[Path]:
    return sorted(SOURCE.glob("*.cpp"))


def _key(compiler: Compiler, isa: str, extra: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCE.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(repr((compiler.command, compiler.version, FLAGS, ISAS[isa][1], extra, platform.machine())).encode())
    return digest.hexdigest()[:20]


def kernels_folder() -> Path:
    """Where compiled libraries are kept: TRADESPACE_KERNELS, for caches that several homes share, else beside our other files."""
    return Path(os.environ["TRADESPACE_KERNELS"]).expanduser() if os.environ.get("TRADESPACE_KERNELS") else cache_folder() / "kernels"


def library_path(isa: str, compiler: Compiler, extra: tuple[str, ...] = ()) -> Path:
    """Where the compiled library lies, or will."""
    return kernels_folder() / f"native-{isa}-{_key(compiler, isa, extra)}.so"


def is_compiled() -> bool:
    """Whether the best library for this machine lies in the cache."""
    compiler = find_compiler()
    return compiler is not None and library_path(best_isa(), compiler).exists()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One compiler at a time. The lock ends with the process that holds it, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows: two compile, the last rename wins, and both are the same
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_library(isa: str | None = None, *, extra: tuple[str, ...] = ()) -> Path:
    """The library for `isa` (default: the best that this CPU has), compiled if it is not in the cache. `extra` flags are for tests (sanitizers).

    Raises InputError for an unknown name, EngineError where no compiler is found or it fails, with what it said.
    """
    isa = isa or best_isa()
    if isa not in ISAS:
        raise InputError(f"unknown instruction set '{isa}'. Known: {', '.join(ISAS)}")
    compiler = find_compiler()
    if compiler is None:
        raise EngineError("no C++ compiler found (looked for $CXX, g++, c++, clang++, and the ziglang package). Install one, or: pip install ziglang")
    path = library_path(isa, compiler, extra)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.parent / "lock"):
            if not path.exists():
                _compile(compiler, (*FLAGS, *ISAS[isa][1], *extra), path)
    except OSError as error:
        raise EngineError(f"the compiled kernels cannot be kept in {path.parent} ({error.strerror}). Set TRADESPACE_KERNELS to a folder of yours") from error
    return path


def _run_compiler(command: list[str]) -> tuple[int, str]:
    """(exit code, what it said on standard error). A driver such as g++ runs the compiler proper as a child of its own: whatever ends the wait (the time limit,
    Ctrl-C) ends both. Raises subprocess.TimeoutExpired after COMPILE_TIMEOUT_S."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            _, said = process.communicate(timeout=COMPILE_TIMEOUT_S)
        except BaseException:
            if hasattr(os, "killpg"):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            raise
    return process.returncode, said


def _compile(compiler: Compiler, flags: tuple[str, ...], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:

        def build(arguments: list[str]) -> None:
            code, said = _run_compiler([*compiler.command, *arguments])
            if code:
                raise EngineError(f"{compiler.version} could not compile the CPU kernels: {said.strip()[-800:]}")

        sources = _sources()
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        with ThreadPoolExecutor(min(len(sources), os.cpu_count() or 1)) as workers:
            # the longest first, so that no core waits for it alone
            jobs = sorted(zip(sources, objects, strict=True), key=lambda job: -job[0].stat().st_size)
            try:
                list(workers.map(lambda job: build([*flags, "-c", str(job[0]), "-o", job[1]]), jobs))
            except (OSError, subprocess.TimeoutExpired) as error:
                raise EngineError(f"{compiler.version} could not compile the CPU kernels: {error}") from error
        linked = Path(folder) / "native.so"
        build([*flags, "-shared", "-pthread", *objects, "-o", str(linked)])
        with linked.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(linked, path)
