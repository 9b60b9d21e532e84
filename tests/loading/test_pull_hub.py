"""Pulls from a hub, against a small one of our own: what is fetched, what never is, and what each refusal says."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest

from tradespace.errors import DownloadError
from tradespace.loading import transfer
from tradespace.loading.hub import HubName, fetch_from_hub, parse_hub_name, wanted_files
from tradespace.loading.pull import describe_pull, list_models, pull
from tradespace.loading.resolve import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"chat_template": "T"}',
    "generation_config.json": b"{}",
    "model.safetensors": b"weights" * 100,
    "pytorch_model.bin": b"a pickle",
    "modeling_evil.py": b"raise SystemExit('remote code ran')",
    "onnx/model.onnx": b"onnx",
    "README.md": b"# readme",
    "small.Q4_0.gguf": b"GGUF" + bytes(16),
}


class Hub(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.files = dict(FILES)
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.fetched: list[str] = []
        self.tokens: set[str | None] = set()


class Answers(http.server.BaseHTTPRequestHandler):
    """The three kinds of request that huggingface_hub makes: model info, HEAD and GET of a file."""

    server: Hub

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refusal is not None:
            return self.send(hub.refusal[0], b"{}", hub.refusal[1], with_body)
        if path.startswith("/api/models/org/name"):
            revision = path.rpartition("/revision/")[2] if "/revision/" in path else "main"
            if revision not in ("main", COMMIT):
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, with_body)
            if "/tree/" in path:
                entries = [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for name, data in hub.files.items()]
                return self.send(200, json.dumps(entries).encode(), {}, with_body)
            siblings = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
            info = {"id": "org/name", "modelId": "org/name", "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0, "likes": 0}
            return self.send(200, json.dumps(info).encode(), {}, with_body)
        name = path.partition(f"/resolve/{COMMIT}/")[2] or path.partition("/resolve/main/")[2]
        if name not in hub.files:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound" if name else "RepoNotFound", "X-Error-Message": "no"}, with_body)
        if with_body:
            hub.fetched.append(name)
        etag = hashlib.sha1(hub.files[name]).hexdigest()
        return self.send(200, hub.files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, with_body)

    def send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    cache = str(tmp_path / "hub")
    # huggingface_hub reads its environment once, at import
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True, raising=False)
    here = {"endpoint": endpoint}

    class Api(huggingface_hub.HfApi):
        def __init__(self):
            super().__init__(endpoint=endpoint)

    snapshot, single, lookup, scan = (
        huggingface_hub.snapshot_download,
        huggingface_hub.hf_hub_download,
        huggingface_hub.try_to_load_from_cache,
        huggingface_hub.scan_cache_dir,
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: snapshot(*a, cache_dir=cache, **here, **k))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: single(*a, cache_dir=cache, **here, **k))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: lookup(*a, cache_dir=cache, **k))
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: scan(cache))
    yield server
    server.shutdown()
    server.server_close()


def test_a_repository_without_its_code_and_pickles(hub):
    plan = describe_pull("org/name")
    folder = pull("org/name", progress=False)
    wanted = {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"}
    assert set(hub.fetched) == wanted == {path.name for path in folder.iterdir()} == {file.name for file in plan.files}
    assert plan.download_bytes == sum(len(FILES[name]) for name in wanted)
    assert describe_pull("org/name").download_bytes == 0
    assert resolve("org/name", progress=False).chat_template == "T"


def test_offline_after_a_pull_and_before(hub, tmp_path):
    with pytest.raises(DownloadError, match="tradespace pull org/name"):
        pull("org/name", offline=True)
    assert hub.fetched == []
    online = pull("org/name", progress=False)
    asked = len(hub.fetched)
    assert pull("org/name", offline=True) == online
    assert resolve("org/name", download=False).kind == "safetensors"
    assert len(hub.fetched) == asked
    assert [entry.name for entry in list_models(tmp_path)][-1] == "org/name"


def test_one_gguf_file(hub):
    path = pull("org/name:small.Q4_0.gguf", progress=False)
    assert path.read_bytes() == FILES["small.Q4_0.gguf"]
    assert set(hub.fetched) == {"small.Q4_0.gguf"}
    with pytest.raises(DownloadError, match=r"has no big\.gguf\. GGUF files there: small"):
        pull("org/name:big.gguf", progress=False)


def test_revisions(hub):
    assert pull("org/name", revision=COMMIT, progress=False).name == COMMIT
    with pytest.raises(DownloadError, match="no revision 'v9'"):
        pull("org/name", revision="v9", progress=False)


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, "accept a licence.*HF_TOKEN"),
        (401, {"X-Error-Code": "RepoNotFound"}, "knows no model org/name.*HF_TOKEN"),
        (404, {"X-Error-Code": "RepoNotFound"}, "knows no model org/name.*spelling"),
        (403, {}, "answered 403.*HF_TOKEN"),
        (418, {}, "answered 418"),
    ],
)
def test_refusals_name_the_remedy(hub, status, headers, message):
    hub.refusal = (status, headers)
    with pytest.raises(DownloadError, match=f"(?s){message}"):
        pull("org/name", progress=False)


def test_nobody_answers(hub, monkeypatch):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(DownloadError, match="cannot be reached"):
        fetch_from_hub(HubName(repo="org/name"), revision=None, offline=False, progress=False)


def test_a_full_disk_is_seen_before_the_download(hub, monkeypatch):
    monkeypatch.setattr(transfer, "SPARE_BYTES", 2**60)
    with pytest.raises(DownloadError, match=r"needs .* set HF_HOME"):
        pull("org/name", progress=False)
    assert hub.fetched == []


def test_the_token_is_sent(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
    pull("org/name", progress=False)
    assert "Bearer hf_of_the_tests" in hub.tokens


def test_the_environment_can_forbid_the_network(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="offline"):
        pull("org/name", progress=False)
    assert hub.fetched == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["config.json", "pytorch_model.bin"], "only pickled weights"),
        (["config.json"], "holds no weights"),
        (["a.gguf", "config.json"], "org/name:a.gguf"),
    ],
)
def test_repositories_that_hold_nothing_for_us(names, message):
    with pytest.raises(DownloadError, match=message):
        wanted_files(names, HubName(repo="org/name"))


def test_only_the_shards_that_belong_together():
    names = ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "consolidated.safetensors", "config.json"]
    assert set(wanted_files(names, HubName(repo="org/name"))) == set(names) - {"consolidated.safetensors"}


@pytest.mark.parametrize("name", ["org", "org/na me", "../x", "/abs/x", "org/name:file.bin", "org/name:../x.gguf", "a/b/c", "org/name:", "-x/y"])
def test_names_that_are_no_hub_names(name):
    assert parse_hub_name(name) is None


def test_cache_is_where_it_says(hub):
    path = pull("org/name", progress=False)
    assert Path(huggingface_hub.constants.HF_HUB_CACHE) in path.parents
