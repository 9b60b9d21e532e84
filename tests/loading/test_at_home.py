"""What ollama, llama.cpp and LM Studio have on this machine is found, named, and used without a copy or a network."""

import hashlib
import json
import shutil

import pytest

from cli.tiny_model import save_gguf
from tradespace import api
from tradespace.errors import CorruptFileError, InputError
from tradespace.loading.at_home import find_ollama, list_at_home
from tradespace.loading.pull import describe_pull, find_fetched, list_models, pull


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for variable in ("OLLAMA_MODELS", "LLAMA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def put_ollama(root, weights, name="library/tiny/latest", host="registry.ollama.ai"):
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    shutil.copy(weights, root / "blobs" / f"sha256-{digest}")
    manifest = root / "manifests" / host / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:" + "0" * 64, "size": 1},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}", "size": weights.stat().st_size},
    ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return manifest


def test_ollama(home, weights, monkeypatch):
    root = home / ".ollama" / "models"
    put_ollama(root, weights)
    put_ollama(root, weights, "library/tiny/3b")
    put_ollama(root, weights, "somebody/other/latest")
    assert [found.name for found in list_at_home()] == ["ollama:tiny:3b", "ollama:tiny", "ollama:somebody/other"]
    for found in list_at_home():
        path = pull(found.name)
        assert path.read_bytes() == weights.read_bytes() and path == found.path == find_fetched(found.name)
    assert describe_pull("ollama:tiny").fetched
    plan = api.plan("ollama:tiny", memory="1GB", device="ryzen-7950x", context=64)
    assert plan.best is not None and plan.question.model.L == api.find_spec(weights).L
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "elsewhere"))
    with pytest.raises(InputError, match=r"no models in .*elsewhere.*ollama pull tiny"):
        pull("ollama:tiny")


@pytest.mark.parametrize("name", ["ollama:", "ollama:../x", "ollama:a/../b", "ollama:x:..", "ollama:a/b/c/d", "ollama:/etc/passwd", "ollama:a\\b"])
def test_names_do_not_lead_out(home, name):
    with pytest.raises(InputError):
        find_ollama(name)


@pytest.mark.parametrize("change", ["not json", "{}", '{"layers": []}', '{"layers": 3}', '{"layers": [{"mediaType": "application/vnd.ollama.image.model"}]}'])
def test_a_broken_manifest_is_named(home, weights, change):
    manifest = put_ollama(home / ".ollama" / "models", weights)
    manifest.write_text(change)
    with pytest.raises(CorruptFileError, match="names no model file"):
        find_ollama("ollama:tiny")
    assert list_at_home() == []


@pytest.mark.parametrize("digest", ["sha256:../../../etc/passwd", "sha256:12", "sha256:" + "1" * 64])
def test_a_digest_that_is_none_or_leads_nowhere(home, weights, digest):
    manifest = put_ollama(home / ".ollama" / "models", weights)
    manifest.write_text(json.dumps({"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": digest}]}))
    with pytest.raises(CorruptFileError):
        find_ollama("ollama:tiny")


def test_llama_cpp_and_lm_studio(home, weights, monkeypatch):
    said: list[str] = []
    monkeypatch.setenv("LLAMA_CACHE", str(home / "cache"))
    (home / "cache").mkdir()
    shutil.copy(weights, home / "cache" / "org_name_tiny.Q8_0.gguf")
    assert pull("org/name:tiny.Q8_0.gguf", say=said.append) == home / "cache" / "org_name_tiny.Q8_0.gguf"
    assert "llama.cpp" in said[0] and "nothing is downloaded" in said[0]
    folder = home / ".lmstudio" / "models" / "org" / "other"
    folder.mkdir(parents=True)
    shutil.copy(weights, folder / "tiny.gguf")
    assert find_fetched("org/other:tiny.gguf") == folder / "tiny.gguf"
    kinds = {entry.kind: entry.name for entry in list_models()}
    assert kinds["LM Studio"] == "org/other:tiny.gguf" and kinds["llama.cpp"].endswith("tiny.Q8_0.gguf")
    assert find_fetched("org/name:absent.gguf") is None
