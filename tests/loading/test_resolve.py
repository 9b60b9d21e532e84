"""Names to files: what is found, and what is said when something is missing or lies."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tradespace.errors import CorruptFileError, InputError, UnsupportedError
from tradespace.loading import resolve as resolve_module
from tradespace.loading.resolve import read_json_object, resolve

CONFIG = {"model_type": "llama", "hidden_size": 8}


def model_folder(folder: Path, **files: object) -> Path:
    """A folder with config.json, model.safetensors, tokenizer.json, and `files` over them (None: not there)."""
    defaults = {"config.json": CONFIG, "model.safetensors": b"weights", "tokenizer.json": {"version": "1.0"}}
    for name, content in {**defaults, **files}.items():
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def test_a_complete_folder(tmp_path):
    model_folder(tmp_path, **{"tokenizer_config.json": {"chat_template": "T"}, "generation_config.json": {"eos_token_id": 2}})
    files = resolve(str(tmp_path))
    assert (files.kind, files.config, files.weights) == ("safetensors", CONFIG, (tmp_path / "model.safetensors",))
    assert (files.chat_template, files.generation_config, files.tokenizer_json) == ("T", {"eos_token_id": 2}, tmp_path / "tokenizer.json")
    assert files.weight_bytes == len(b"weights")


def test_shards_in_the_order_of_their_names(tmp_path):
    names = [f"model-{number:05d}-of-00003.safetensors" for number in (3, 1, 2)]
    index = {"weight_map": {f"t{number}": name for number, name in enumerate(names)}}
    shards = dict.fromkeys(names, b"w")
    files = resolve(str(model_folder(tmp_path, **{"model.safetensors": None, "model.safetensors.index.json": index, **shards})))
    assert [path.name for path in files.weights] == sorted(names)
    (tmp_path / names[0]).unlink()
    with pytest.raises(InputError, match="lacks 1 of 3 weight files: model-00003-of-00003"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", ""])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, name):
    model_folder(tmp_path, **{"model.safetensors.index.json": {"weight_map": {"t": name}}})
    with pytest.raises((CorruptFileError, InputError)) as raised:
        resolve(str(tmp_path))
    assert "not a file beside it" in str(raised.value) or name == ""


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, "x"])
def test_an_index_without_a_map(tmp_path, weight_map):
    model_folder(tmp_path, **{"model.safetensors.index.json": {"weight_map": weight_map}})
    with pytest.raises(CorruptFileError, match="weight_map"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "not JSON"), (b"[1]", "a JSON list"), (b'{"a":', "not JSON"), (b"\xff\xfe\x00", "not JSON"), (b"[" * 200_000, "not JSON"), (b"null", "NoneType")],
)
def test_a_config_that_is_none(tmp_path, content, message):
    with pytest.raises(CorruptFileError, match=message):
        resolve(str(model_folder(tmp_path, **{"config.json": content})))


def test_a_config_of_absurd_size(tmp_path, monkeypatch):
    monkeypatch.setattr(resolve_module, "MAX_CONFIG_BYTES", 10)
    with pytest.raises(CorruptFileError, match="at most 10"):
        resolve(str(model_folder(tmp_path)))


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_as_json_give_an_object_or_a_clear_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("json") / "config.json"
    path.write_bytes(content)
    try:
        is_object = isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        is_object = False
    if is_object:
        assert isinstance(read_json_object(path), dict)
    else:
        with pytest.raises(CorruptFileError, match=re.escape(str(path))):
            read_json_object(path)


def test_what_a_folder_lacks(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve(str(tmp_path))
    model_folder(tmp_path, **{"model.safetensors": None})
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        resolve(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UnsupportedError, match="can run code"):
        resolve(str(tmp_path))
    (tmp_path / "a.safetensors").write_bytes(b"")
    (tmp_path / "b.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="which belong together"):
        resolve(str(tmp_path))


def test_gguf_files(tmp_path):
    good = tmp_path / "good.gguf"
    good.write_bytes(b"GGUF" + bytes(20))
    for name in (good, tmp_path):  # also a folder with this one file
        files = resolve(str(name))
        assert (files.kind, files.weights, files.config) == ("gguf", (good,), None)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGML")
    with pytest.raises(CorruptFileError, match="not a GGUF file"):
        resolve(str(bad))
    with pytest.raises(InputError, match=r"Name one of them: bad\.gguf, good\.gguf"):
        resolve(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="Give the folder"):
        resolve(str(tmp_path / "model.safetensors"))
    (tmp_path / "notes.txt").write_bytes(b"x")
    with pytest.raises(UnsupportedError, match="neither"):
        resolve(str(tmp_path / "notes.txt"))


def test_close_matches(tmp_path):
    (tmp_path / "model-a.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"Did you mean .*model-a\.gguf"):
        resolve(str(tmp_path / "model-b.gguf"))
    with pytest.raises(InputError, match="Did you mean smollm2-135m"):
        resolve("smolm2-135m")
    with pytest.raises(InputError, match="can be planned"):
        resolve("llama-2-70b")


@pytest.mark.parametrize("name", ["smollm2-135m", "org/name", "org/name:x.gguf"])
def test_not_fetched_and_not_to_be_fetched(tmp_path, monkeypatch, name):
    monkeypatch.setenv("TRADESPACE_HOME", str(tmp_path))
    with pytest.raises(InputError, match=f"tradespace pull {name}"):
        resolve(name, download=False)


@pytest.mark.parametrize("name", ["", "\x00", "a" * 5000, "a/b/c/d", "org/na me", "~nobody-at-all/x", "org/..", "C:x", "\ud800"])
def test_wild_names(name):
    with pytest.raises(InputError):
        resolve(name, download=False)


def test_where_templates_come_from(tmp_path):
    several = [{"name": "tool_use", "template": "X"}, {"name": "default", "template": "D"}]
    model_folder(tmp_path, **{"tokenizer_config.json": {"chat_template": several}})
    assert resolve(str(tmp_path)).chat_template == "D"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert resolve(str(tmp_path)).chat_template == "J"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert resolve(str(tmp_path)).chat_template == "F"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CorruptFileError, match="UTF-8"):
        resolve(str(tmp_path))
