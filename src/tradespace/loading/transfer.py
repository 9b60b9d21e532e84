"""One file from a URL to the disk: resumable, checked by sha256, bounded by the space that is free.

Bytes go to `NAME.<identity>.partial`, whose identity is a digest of the URL and the expected sha256: a later attempt continues exactly
the same download (HTTP Range, RFC 9110 §14) and never another one's bytes. Nothing else is left behind when a download is interrupted.
"""

import contextlib
import errno
import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from tradespace.errors import DownloadError
from tradespace.units import MiB, format_bytes

CHUNK_BYTES = 1 * MiB
STALL_TIMEOUT_S = 60.0  # a connection that gives nothing for so long is taken for dead
MAX_ATTEMPTS_WITHOUT_PROGRESS = 4
RETRY_PAUSE_S = 0.2  # doubled with each attempt that brought nothing
SPARE_BYTES = 16 * MiB  # what a file system needs beside the bytes themselves: metadata, block rounding

Advance = Callable[[int], None]  # told how many bytes have just become safe on disk


class RefusedError(DownloadError):
    """The server or the connection refused us before any byte came; another client (pip) may know a proxy, a login or a certificate."""


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in bounded chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def partial_path(folder: Path, name: str, url: str, sha256: str | None) -> Path:
    """Where the bytes of this very download are kept until they are complete."""
    identity = hashlib.sha256(f"{url}\n{sha256}".encode()).hexdigest()[:16]
    return folder / f"{name}.{identity}.partial"


def require_free(folder: Path, need_bytes: int, what: str, *, variable: str = "TRADESPACE_HOME") -> None:
    """DownloadError unless the file system of `folder` has `need_bytes` left; `variable` is what moves the folder elsewhere."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    have_bytes = shutil.disk_usage(existing).free
    if have_bytes < need_bytes + SPARE_BYTES:
        raise DownloadError(disk_full_message(folder, what, need_bytes + SPARE_BYTES, have_bytes, variable))


def disk_full_message(folder: Path, what: str, need_bytes: int, have_bytes: int, variable: str = "TRADESPACE_HOME") -> str:
    return (
        f"{what} needs {format_bytes(need_bytes)} ({need_bytes} bytes) of disk; {format_bytes(have_bytes)} ({have_bytes} bytes) free in {folder}. "
        f"Free some space, or set {variable} to a folder on a larger disk"
    )


@contextlib.contextmanager
def disk_errors(folder: Path, what: str, need_bytes: int) -> Iterator[None]:
    """Turn what a file system says while we write into a DownloadError that gives need and have."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DownloadError(disk_full_message(folder, what, need_bytes, shutil.disk_usage(folder).free)) from error
        if error.errno is None:
            raise
        raise DownloadError(f"{what}: {folder} cannot be written ({error.strerror}). Set TRADESPACE_HOME to a folder of yours") from error


@contextlib.contextmanager
def exclusive(lock: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold `lock` against other processes and threads; `on_wait` is called once if somebody else has it.

    flock where there is one (the kernel drops it when its holder dies). Elsewhere the file's existence is the lock, and a lock
    older than an hour is taken for abandoned.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        with _exclusive_by_existence(lock, on_wait):
            yield
        return
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases it; the empty file stays, for removing it would let two holders in


@contextlib.contextmanager
def _exclusive_by_existence(lock: Path, on_wait: Callable[[], None], *, abandoned_s: float = 3600.0, poll_s: float = 0.5) -> Iterator[None]:
    told = False
    while True:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            if not told:
                on_wait()
                told = True
            with contextlib.suppress(FileNotFoundError):  # its holder may just have released it
                if time.time() - lock.stat().st_mtime > abandoned_s:
                    lock.unlink()
            time.sleep(poll_s)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def download(url: str, *, folder: Path, name: str, sha256: str | None, need_bytes: int, advance: Advance) -> Path:
    """Fetch `url` and return the path of its bytes, complete and checked: a `.partial` in `folder`, or a `file:` URL's own file.

    Resumes where an earlier attempt at the same URL and sha256 stopped, and within one call when a connection breaks. Without a sha256
    to check the whole by, it starts again from nothing. Raises DownloadError (RefusedError if nothing at all could be fetched).
    """
    scheme = urllib.parse.urlsplit(url).scheme
    if scheme == "file":
        return _local_file(url, sha256, advance)
    if scheme not in ("http", "https"):
        raise DownloadError(f"{name}: cannot download from a '{scheme}:' address. Use an index that serves https or files")
    partial = partial_path(folder, name, url, sha256)
    if sha256 is None:
        partial.unlink(missing_ok=True)
    for is_last in (False, True):
        with disk_errors(folder, name, need_bytes):
            resumed = partial.exists()
            digest = _fetch_all(url, partial, name, advance)
        if sha256 is None or digest == sha256:
            return partial
        partial.unlink()
        if is_last or not resumed:
            raise DownloadError(f"{name}: sha256 is {digest}, the index says {sha256}. The file was deleted; try again, or use another index or mirror")
        # what lay on disk may have been damaged there: once more from nothing
    raise AssertionError("unreachable")


def _local_file(url: str, sha256: str | None, advance: Advance) -> Path:
    path = Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
    if not path.is_file():
        raise DownloadError(f"the package index names {path}, which does not exist. Repair the index (pip config list shows it)")
    if sha256 is not None and (digest := sha256_of(path)) != sha256:
        raise DownloadError(f"{path}: sha256 is {digest}, the index says {sha256}. Repair the index")
    advance(path.stat().st_size)
    return path


def _fetch_all(url: str, partial: Path, name: str, advance: Advance) -> str:
    """Append to `partial` until it is complete, over as many connections as make progress. Returns the sha256 of the whole."""
    failures = 0
    digest, have_bytes = hashlib.sha256(), 0
    if partial.exists():
        with partial.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                have_bytes += len(chunk)
        advance(have_bytes)
    while True:
        start_bytes = have_bytes
        try:
            with _open_from(url, have_bytes) as response:
                if response.status == 200 and have_bytes:  # the server knows no ranges
                    advance(-have_bytes)
                    digest, have_bytes = hashlib.sha256(), 0
                total_bytes = _total_bytes(response, have_bytes)
                with partial.open("r+b" if have_bytes else "wb") as file:
                    file.seek(have_bytes)
                    while chunk := response.read(CHUNK_BYTES):
                        file.write(chunk)
                        digest.update(chunk)
                        have_bytes += len(chunk)
                        advance(len(chunk))
            if total_bytes is None or have_bytes >= total_bytes:
                return digest.hexdigest()
            reason = f"the connection closed after {have_bytes} of {total_bytes} bytes"
        except urllib.error.HTTPError as error:
            if error.code == 416 and have_bytes:  # nothing beyond what we have: complete, or not this file; the checksum decides
                return digest.hexdigest()
            if error.code < 500 and error.code != 429:
                raise RefusedError(f"{name}: the server answered {error.code} {error.reason}") from error
            reason = f"the server answered {error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(getattr(error, "reason", None) or error or type(error).__name__)
        failures = 0 if have_bytes > start_bytes else failures + 1
        if failures >= MAX_ATTEMPTS_WITHOUT_PROGRESS:
            kind = DownloadError if have_bytes else RefusedError
            raise kind(f"{name}: {reason}; {have_bytes} bytes are kept. Check the network, then run the same command again: it resumes")
        time.sleep(min(RETRY_PAUSE_S * 2**failures, 5.0))


def _open_from(url: str, start_bytes: int) -> http.client.HTTPResponse:
    # identity: a proxy that compresses on the way would change the bytes that the checksum is of
    headers = {"Accept-Encoding": "identity", "User-Agent": "tradespace"}
    if start_bytes:
        headers["Range"] = f"bytes={start_bytes}-"
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=STALL_TIMEOUT_S)


def _total_bytes(response: http.client.HTTPResponse, start_bytes: int) -> int | None:
    """Size of the whole file as the answer states it; HTTPException if a partial answer is not the part that was asked for."""
    if response.status == 206:
        content_range = response.headers.get("Content-Range", "")
        first, _, total = content_range.removeprefix("bytes ").partition("/")
        if first.partition("-")[0] != str(start_bytes):
            raise http.client.HTTPException(f"asked for bytes from {start_bytes}, got '{content_range}'")
        return int(total) if total.isdigit() else None
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


@contextlib.contextmanager
def progress_bar(label: str, total_bytes: int, *, show: bool) -> Iterator[Advance]:
    """A bar with bytes, rate and time left on stderr; silent unless stderr is a terminal and `show`."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (show and console.is_terminal), transient=False) as bar:
        task = bar.add_task(label, total=total_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)
