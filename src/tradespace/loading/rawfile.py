"""Opening a weight file that nobody vouches for: only regular files, and every OS failure as an error that names the file."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from tradespace.errors import CorruptFileError, InputError

MAX_SHOWN_CHARS = 80


def shown(value: object) -> str:
    """A value from an untrusted file as a message may carry it: escaped, and short whatever its size."""
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= MAX_SHOWN_CHARS else repr(value[:MAX_SHOWN_CHARS]) + "…"
    if isinstance(value, bool | int | float):
        return f"about 2**{value.bit_length()}" if isinstance(value, int) and abs(value) >= 2**64 else repr(value)
    return f"a {type(value).__name__}"


@contextmanager
def open_weight_file(path: str | os.PathLike[str], *, buffering: int = -1) -> Iterator[tuple[BinaryIO, int]]:
    """The open file and its size in bytes. Raises InputError where there is no regular, readable file.

    With `buffering=0` reads go straight to the caller's buffer.
    """
    try:
        status = os.stat(path)
        # a pipe or a device would block, or never end
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: not a regular file, so not a weight file")
        file = open(path, "rb", buffering=buffering)  # noqa: SIM115 (closed below; only opening may raise InputError)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be opened: {error}") from error
    with file:
        yield file, os.fstat(file.fileno()).st_size  # type: ignore[misc]  # buffering=0 gives a FileIO, which reads alike


def read_exactly(file: BinaryIO, buffer: memoryview, offset_bytes: int, what: str) -> None:
    """Fills `buffer` from `offset_bytes` on. Raises CorruptFileError, with `what` in front, where the file ends before."""
    file.seek(offset_bytes)
    have_bytes = 0
    while have_bytes < len(buffer):
        try:
            got_bytes = file.readinto(buffer[have_bytes:])  # type: ignore[attr-defined]
        except OSError as error:
            raise InputError(f"{what}: reading failed at byte {offset_bytes + have_bytes}: {error}") from error
        if not got_bytes:
            raise CorruptFileError(f"{what}: needs {len(buffer)} bytes from byte {offset_bytes} on, has {have_bytes}: the file ends there. Fetch it again")
        have_bytes += got_bytes
