"""What only a process of its own can show: tight budgets, Ctrl-C, a reader that goes away, a machine without torch."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROMPT = "why is the sky blue?"
LONG = ("--raw", "-n", "7900", "--context", "8100", "--memory", "1GiB")
WITHOUT_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "tokenizers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def test_the_least_budget_that_an_error_names_is_kept(shell, folder):
    refused = shell("run", folder, PROMPT, "--memory", "200MiB", "--json")
    refused.failed(3, "needs at least", "200 MiB")
    remedy = re.search(r"--memory (\d+MiB)", refused.err)
    assert remedy
    done = shell("run", folder, PROMPT, "-n", 8, "--memory", remedy.group(1), "--json")
    assert done.code == 0, done.err
    lines = {line["name"]: line for line in done.json["report"]["lines"]}
    assert lines["peak of the process"]["measured"] <= int(remedy.group(1).removesuffix("MiB")) * 2**20
    assert done.json["report"]["facts"]["budget"].endswith("(kept)")
    assert refused.json["need_bytes"] <= int(remedy.group(1).removesuffix("MiB")) * 2**20


def test_a_budget_a_little_too_small_names_a_context_that_fits(shell, folder):
    """At 8,192 tokens the cache is larger than what is left, at fewer it is not."""
    need = shell("plan", folder, "--memory", "1MiB", "--context", 8192, "--runnable", "--json").json["need_bytes"]
    budget = f"{need - 3 * 2**16}B"
    refused = shell("run", folder, PROMPT, "--memory", budget, "--context", 8192)
    refused.failed(3, "needs at least", "--context")
    fits = re.search(r"--context (\d+)", refused.err)
    assert fits
    done = shell("run", folder, PROMPT, "-n", 4, "--memory", budget, "--context", fits.group(1))
    assert done.code == 0, done.err


def interrupted(arguments: list[str], environment: dict[str, str], at: str, after_s: float = 0.0) -> tuple[int, str, str]:
    """Sends SIGINT `after_s` seconds after the command has written `at` on standard error (or "out:…" on standard output)."""
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert child.stdout and child.stderr
    stream = child.stdout if at.startswith("out:") else child.stderr
    seen = b""
    try:
        while at.removeprefix("out:").encode() not in seen:
            chunk = os.read(stream.fileno(), 4096)
            assert chunk, f"ended before {at!r}: {seen!r}"
            seen += chunk
        time.sleep(after_s)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
        return child.returncode, out.decode(errors="replace"), err.decode(errors="replace")
    finally:
        child.kill()
        child.wait()


MOMENTS = {"planning": ("budget:", 0.0), "loading": ("plan:", 0.05), "building": ("plan:", 0.3), "generating": ("out: ", 0.5)}


@pytest.mark.parametrize(("at", "after_s"), MOMENTS.values(), ids=MOMENTS)
def test_ctrl_c_at_any_moment(folder, environment, at, after_s):
    before = sorted(folder.iterdir()), sorted(Path(environment["TRADESPACE_HOME"]).rglob("*"))
    command = [sys.executable, "-m", "tradespace.cli.main", "run", str(folder), "why is the sky", *LONG]
    code, _, err = interrupted(command, environment, at, after_s)
    assert code == 130, err
    assert "Traceback" not in err
    assert err.rstrip().endswith("interrupted")
    assert (sorted(folder.iterdir()), sorted(Path(environment["TRADESPACE_HOME"]).rglob("*"))) == before


# prints "up" and waits where the import of a module begins: a moment that comes on machines of any speed
LOADING = """
import sys, time

class Waiting:
    def find_spec(self, name, path=None, target=None):
        if name == MODULE:
            print("up", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Waiting())
from tradespace.__main__ import main
sys.argv[0] = "tradespace"
main()
"""


@pytest.mark.parametrize("module", ["typer", "tradespace.cli.options", "numpy", "tradespace.planner.search", "tradespace.spec.families.llama"])
def test_ctrl_c_while_the_program_itself_loads(environment, module):
    """Not within the interpreter's own start, which answers by itself."""
    source = LOADING.replace("MODULE", repr(module))
    child = subprocess.Popen(
        [sys.executable, "-c", source, "plan", "llama-2-70b", "--memory", "1MiB", "--device", "a100-40gb"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    assert child.stdout and child.stdout.readline() == b"up\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err.decode().strip()) == (130, "interrupted")


def test_ctrl_c_while_many_prompts_are_answered(folder, environment):
    command = [sys.executable, "-m", "tradespace.cli.main", "run", str(folder), *("once upon a time" for _ in range(24)), *LONG]
    code, out, err = interrupted(command, environment, "plan:", 4.0)
    assert code == 130, err
    assert "Traceback" not in err
    assert out == ""


def test_a_reader_that_goes_away(folder, environment):
    """`tradespace … | head -1`: no traceback, and the exit code of a failure."""
    for arguments in (["plan", "gpt-2", "--memory", "4GiB", "--device", "rtx-4090", "--json"], ["run", str(folder), "sky", *LONG]):
        child = subprocess.Popen([sys.executable, "-m", "tradespace.cli.main", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        assert child.stdout and child.stderr
        child.stdout.read(1)
        child.stdout.close()
        err = child.stderr.read().decode()
        assert child.wait(60) in (0, 1)
        assert "Traceback" not in err
        assert "Exception ignored" not in err
        child.stderr.close()


def test_without_torch_plans_work_and_run_says_what_to_install(shell, folder, gguf_file):
    planned = shell("plan", folder, "--memory", "4GiB", "--device", "rtx-4090", "--json", before=WITHOUT_TORCH)
    assert planned.code == 0, planned.err
    assert json.loads(planned.out)["best"]
    ran = shell("run", gguf_file, PROMPT, "--memory", "1GiB", "--json", before=WITHOUT_TORCH)
    ran.failed(1, "torch", "pip install 'tradespace[engine]'")
    assert ran.json["exit_code"] == 1


def test_a_home_that_may_not_be_written(shell, environment, tmp_path, folder):
    (tmp_path / "file").write_text("")
    environment["TRADESPACE_HOME"] = str(tmp_path / "file" / "home")
    shell("doctor").failed(1, "Not a directory")
