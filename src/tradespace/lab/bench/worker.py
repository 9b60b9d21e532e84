"""A process that holds one engine: `python -m tradespace.lab.bench.worker MODULE`. Reads a JSON object a line, answers with one.

{"open": {task}, "settings": {…}} → {"result": null}, and then {"call": name, "arguments": {…}} → {"result": …}; {"error": "why"} for what failed. What the
engine itself prints goes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from importlib import import_module
from typing import Any

from tradespace.lab.bench.task import Task

_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """On Linux: a process that is stopped would outlive its parent for ever, since it cannot see its standard input end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def main(module: str) -> None:
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if "open" in asked:
                session = import_module(module).Session(Task(**asked["open"]), asked["settings"])
                answer: dict[str, Any] = {"result": None}
            else:
                answer = {"result": getattr(session, asked["call"])(**asked["arguments"])}
        except Exception as error:  # the parent raises it; where it came from is said here
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
