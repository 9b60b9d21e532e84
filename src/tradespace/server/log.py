"""Standard error that cannot bring the server down: what a full disk or a closed pipe does not take is dropped, and the next line is tried again."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, TextIO


class Log:
    """A text stream around another one, without its OSErrors."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect_log() -> None:
    """From now on `sys.stderr` is such a stream."""
    if not isinstance(sys.stderr, Log):
        sys.stderr = Log(sys.stderr)  # pyright: ignore[reportAttributeAccessIssue]
