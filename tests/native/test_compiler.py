"""Compiling on first use: once, atomically, with the next compiler where one is missing, and a clear reason where there is none."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time

import psutil
import pytest

from tradespace.errors import EngineError, InputError
from tradespace.kernels.native import compiler, unavailable


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRADESPACE_HOME", str(tmp_path))
    monkeypatch.delenv("TRADESPACE_KERNELS", raising=False)
    compiler.find_compiler.cache_clear()
    yield tmp_path
    compiler.find_compiler.cache_clear()


def _script(path, body: str):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def _fake(tmp_path, counted):
    """A compiler that answers --version and copies its first file to its last argument, noting each link."""
    answer = 'if [ "$1" = "--version" ]; then echo "fake 1.0"; exit 0; fi'
    note = f'case "$*" in *-shared*) echo linked >> {counted};; esac'
    return _script(tmp_path / "fake-cxx", f'{answer}\nfor last; do :; done\n{note}\necho x > "$last"')


def test_one_of_several_first_users_compiles(cache, tmp_path):
    counted = tmp_path / "links"
    environment = os.environ | {"CXX": str(_fake(tmp_path, counted)), "TRADESPACE_HOME": str(cache)}
    code = "from tradespace.kernels.native.compiler import compile_library; print(compile_library('portable'))"
    users = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    paths = {user.communicate()[0].strip() for user in users}
    assert all(user.returncode == 0 for user in users)
    assert len(paths) == 1
    assert counted.read_text().splitlines() == ["linked"]
    assert sorted(path.suffix for path in (cache / "kernels").iterdir()) == ["", ".so"]  # the lock and the library: nothing half-written


def test_a_failing_compiler_says_what_it_said_and_leaves_nothing(cache, tmp_path, monkeypatch):
    failing = _script(tmp_path / "bad-cxx", 'if [ "$1" = "--version" ]; then echo "bad 1.0"; exit 0; fi\necho "no such flag" >&2; exit 1')
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(EngineError, match=r"bad 1\.0 could not compile the CPU kernels: no such flag"):
        compiler.compile_library("portable")
    assert [path.name for path in (cache / "kernels").iterdir()] == ["lock"]


def test_without_a_compiler_the_reason_names_the_remedy(cache, monkeypatch):
    monkeypatch.setattr(compiler, "_candidates", lambda: iter([("/nowhere/c++",)]))
    assert compiler.find_compiler() is None
    with pytest.raises(EngineError, match="pip install ziglang"):
        compiler.compile_library("portable")


def test_another_source_compiler_or_set_has_another_name(cache):
    found = compiler.Compiler(("g++",), "1")
    paths = {
        compiler.library_path("avx2", found),
        compiler.library_path("portable", found),
        compiler.library_path("avx2", compiler.Compiler(("g++",), "2")),
        compiler.library_path("avx2", found, ("-g",)),
    }
    assert len(paths) == 4


def test_an_unknown_instruction_set_is_refused(cache):
    with pytest.raises(InputError, match="avx512"):
        compiler.compile_library("sse9")


@pytest.mark.skipif(compiler.find_compiler() is None, reason="no C++ compiler")
def test_the_kernels_compile_where_there_is_a_compiler():
    """The tests of the native kernels skip where those are not to be had; sources that no longer compile must not pass for that."""
    assert unavailable() is None


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups here")
def test_a_compiler_that_takes_too_long_takes_its_child_with_it(tmp_path, monkeypatch):
    """As g++ has cc1plus, which would otherwise go on for minutes."""
    monkeypatch.setattr(compiler, "COMPILE_TIMEOUT_S", 1.0)
    with pytest.raises(subprocess.TimeoutExpired):
        compiler._run_compiler(["sh", "-c", f"sleep 300 & echo $! > {tmp_path / 'child'}; wait"])
    child = int((tmp_path / "child").read_text())
    deadline_s = time.monotonic() + 30
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s, "the child runs on"
        time.sleep(0.05)
