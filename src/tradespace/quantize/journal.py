"""What a quantization has finished, one line of JSON each, so that one that was killed goes on where it stopped.

The first line says what is being done; another job in the same place starts anew. A line is on the disk before anything builds on it, and a line that was cut
short does not count.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """Lines of `path`, of a job that is described by `job` (plain JSON)."""

    def __init__(self, path: Path, job: dict[str, Any]):
        self.path, self.job = path, job
        self.lines: list[dict[str, Any]] = []
        # what went through JSON once compares equal to what is read back
        told = json.loads(json.dumps(job))
        found = _read(path)
        self.resumed = bool(found) and found[0] == told
        if self.resumed:
            self.lines = found[1:]
            self._rewrite([told, *self.lines])  # without the line that was cut short
        else:
            self._rewrite([told])

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        partial = self.path.with_name(self.path.name + ".new")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)

    def add(self, line: dict[str, Any]) -> None:
        """Notes that something is finished; returns once the disk has it."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)

    def find(self, step: str) -> dict[str, Any] | None:
        """The line of this step, or None."""
        return next((line for line in self.lines if line.get("step") == step), None)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:  # what follows the last newline was cut short
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        found.append(line)
    return found
