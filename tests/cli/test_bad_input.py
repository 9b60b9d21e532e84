"""Whatever is wrong with a model's files, a prompt or a number: one clear line that names it, the exit code that goes with it, nothing left behind."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.tiny_model import ROOMY

PROMPT = "why is the sky blue?"


@pytest.fixture
def run(cli):
    return lambda model, *arguments, stdin=b"": cli("run", model, *(arguments or (PROMPT,)), "-n", 2, "--memory", ROOMY, stdin=stdin)


def rewrite(model: Path, change) -> Path:
    """The model with `change` done to its weights."""
    tensors = {name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, model / "model.safetensors")
    return model


# --- safetensors


@pytest.mark.parametrize("keep", [0, 4, 7, 8, 100, 0.5, -1])
def test_truncated_safetensors(run, broken, keep):
    model = broken()
    path = model / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    run(model).failed(2, "model.safetensors")


def with_header(path: Path, change) -> None:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header[NORM].update(shape=[33]),
        lambda header: header[NORM].update(shape=[2**62]),
        lambda header: header[NORM].update(shape=[-32]),
        lambda header: header[NORM].update(dtype="F13"),
        lambda header: header[NORM].update(data_offsets=[0, 2**60]),
        lambda header: header[NORM].update(data_offsets=[128, 0]),
        lambda header: header.update({NORM: "no tensor"}),
    ],
)
def test_safetensors_of_wrong_sizes(run, broken, change):
    model = broken()
    with_header(model / "model.safetensors", change)
    run(model).failed(2, NORM)


def test_a_header_bomb(run, broken):
    model = broken()
    path = model / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])
    run(model).failed(2, "model.safetensors", "header")


def test_nan_weights_are_named_and_nothing_is_generated(run, broken):
    model = rewrite(broken(), lambda tensors: tensors["model.layers.0.mlp.down_proj.weight"].fill_(float("nan")))
    done = run(model)
    assert done.code in (1, 2)
    done.failed(done.code, "down_proj", "NaN")
    assert not done.out.strip()


def test_a_missing_tensor_and_one_of_another_shape(run, broken):
    model = rewrite(broken(), lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    run(model).failed(2, "k_proj")
    rewrite(model, lambda tensors: tensors.update({"model.layers.1.self_attn.k_proj.weight": torch.ones(5, 32)}))
    run(model).failed(2, "k_proj")


# --- configurations that lie


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_key_value_heads": 3}, ("3", "4")),
        ({"num_attention_heads": 5, "head_dim": None}, ("5",)),
        ({"num_attention_heads": 0}, ("num_attention_heads",)),
        ({"num_attention_heads": 8, "num_key_value_heads": 8}, ("proj",)),
        ({"num_hidden_layers": 3}, ("layers.2",)),
        ({"num_hidden_layers": 1}, ("layers.1",)),
        ({"num_hidden_layers": 10**9}, ("num_hidden_layers",)),
        ({"num_hidden_layers": "two"}, ("num_hidden_layers",)),
        ({"vocab_size": 100_000}, ("embed", "100000")),
        ({"vocab_size": 100}, ("embed", "100")),
        ({"hidden_size": 48}, ("48",)),
        ({"hidden_size": -32}, ("hidden_size",)),
        ({"intermediate_size": 65}, ("65",)),
        ({"head_dim": 16}, ("proj",)),
        ({"rms_norm_eps": "small"}, ("rms_norm_eps",)),
        ({"max_position_embeddings": 0}, ("max_position_embeddings",)),
        ({"model_type": "no_such_family"}, ("no_such_family",)),
        ({"hidden_act": "no_such_activation"}, ("no_such_activation",)),
        ({"rope_parameters": {"rope_type": "no_such_rope", "rope_theta": 1e4}}, ("no_such_rope",)),
        ({"mathematics_changer": 7}, ("mathematics_changer",)),
        ({"hidden_size": None}, ("hidden_size",)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_config_that_lies(run, broken, settings, words):
    run(broken(**settings)).failed(2, *words)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_config_that_is_no_json(run, broken, text):
    model = broken()
    (model / "config.json").write_bytes(text)
    run(model).failed(2, "config.json")


def test_a_folder_without_config(run, tmp_path):
    run(tmp_path).failed(2, "config.json")


def test_a_folder_without_weights(run, broken):
    model = broken()
    (model / "model.safetensors").unlink()
    run(model).failed(2, "safetensors")


# --- tokenizers


def test_a_missing_tokenizer(run, broken):
    model = broken()
    (model / "tokenizer.json").unlink()
    run(model).failed(2, "tokenizer.json")


def test_a_corrupt_tokenizer(run, broken):
    model = broken()
    (model / "tokenizer.json").write_text('{"version": "1.0"')
    run(model).failed(2, "tokenizer.json")


def test_a_tokenizer_with_more_tokens_than_the_embedding(run, broken):
    model = broken()
    state = json.loads((model / "tokenizer.json").read_text())
    state["added_tokens"].append({**state["added_tokens"][0], "id": 320, "content": "<|extra|>"})
    (model / "tokenizer.json").write_text(json.dumps(state))
    assert run(model, "plain").code == 0
    run(model, "plain <|extra|>").failed(2, "320", "319")


@pytest.mark.parametrize(("template", "word"), [("{% for", "template"), ("{{ raise_exception('not this') }}", "not this"), ("{{ 1 / 0 }}", "template")])
def test_a_chat_template_that_fails(run, broken, template, word):
    model = broken()
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    run(model).failed(2, word)
    assert run(model, PROMPT, "--raw").code == 0


def test_a_model_without_chat_template_takes_the_prompt_as_it_stands(cli, run, broken):
    model = broken()
    (model / "tokenizer_config.json").write_text("{}")
    assert run(model).code == 0
    cli("chat", model, "--memory", ROOMY, stdin=b"hello\n").failed(0, "no chat template")


# --- GGUF


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 1000, 0.5, -1])
def test_a_truncated_gguf(run, gguf_file, tmp_path, keep):
    path = tmp_path / "cut.gguf"
    data = gguf_file.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    run(path).failed(2, "cut.gguf")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llama.block_count": 3}, ("blk.2",)),
        ({"llama.attention.head_count": 5}, ("head",)),
        ({"llama.attention.head_count_kv": 3}, ("head",)),
        ({"llama.embedding_length": 48}, ("48",)),
        ({"general.architecture": "no-such"}, ("no-such",)),
        ({"tokenizer.ggml.model": "no-such"}, ("no-such",)),
        ({"tokenizer.ggml.model": None}, ("tokenizer",)),
        ({"tokenizer.ggml.eos_token_id": 9999}, ("eos_token_id", "9999")),
        ({"llama.context_length": 0}, ("context_length",)),
    ],
    ids=str,
)
def test_gguf_metadata_that_lies(run, gguf_file, tmp_path, changes, words):
    from tradespace.loading.gguf import read_gguf, write_gguf

    file, data = read_gguf(gguf_file), gguf_file.read_bytes()
    metadata = {name: value for name, value in {**file.metadata, **changes}.items() if value is not None}
    tensors = [
        (name, tensor.shape, tensor.type_name, lambda tensor=tensor: data[tensor.offset_bytes : tensor.offset_bytes + tensor.nbytes])
        for name, tensor in file.tensors.items()
    ]
    path = tmp_path / "lies.gguf"
    write_gguf(path, metadata, tensors)
    run(path).failed(2, *words)


# --- prompts


def test_empty_prompts(run, folder, tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    for arguments in (("",), ("hello", ""), ("-f", tmp_path / "empty"), ("-",)):
        run(folder, *arguments).failed(2, "empty")


def test_prompts_that_are_not_utf8(run, folder, tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    run(folder, "-f", tmp_path / "latin").failed(2, "latin", "not UTF-8", "0xe9", "offset 3")
    run(folder, "-", stdin=b"\xff\xfeh").failed(2, "standard input", "not UTF-8", "0xff")
    run(folder, "caf\udce9").failed(2, "not UTF-8", "0xe9")


def test_prompt_files_that_cannot_be_read(run, folder, tmp_path):
    run(folder, "-f", tmp_path / "none").failed(2, "none", "No such file")
    run(folder, "-f", tmp_path).failed(2, "is a directory")


def test_a_prompt_over_the_context(run, folder):
    done = run(folder, "word " * 100, "--raw", "--context", 64)
    done.failed(2, "context", "64", "Shorten")
    assert done.out == ""


# --- numbers


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--memory", "banana"), ("banana", "700MiB")),
        (("--memory", ""), ("size",)),
        (("--memory", "-3GiB"), ("-3GiB",)),
        (("--memory", "nan"), ("nan",)),
        (("--memory", "1e400GiB"), ("1e400GiB",)),
        (("--context", "0"), ("--context",)),
        (("--context", "1000000000"), ("1000000000", "8192")),
        (("--context", "many"), ("--context",)),
        (("--max-tokens", "0"), ("--max-tokens",)),
        (("--max-tokens", "100000"), ("100000", "context")),
        (("--temperature", "-1"), ("--temperature",)),
        (("--temperature", "nan"), ("temperature",)),
        (("--temperature", "0.00001"), ("temperature",)),
        (("--top-p", "1.5"), ("--top-p",)),
        (("--top-p", "0"), ("top_p",)),
        (("--repetition-penalty", "0"), ("repetition_penalty",)),
        (("--seed", str(2**70)), ("seed",)),
        (("--stop", ""), ("stop",)),
        (("--weights", "int5"), ("int5", "int8")),
        (("--weights", "int5"), ("unknown weight format", "int5")),
        (("--attention", "flash"), ("flash", "CUDA")),
        (("--plan", "no-such.yaml"), ("no-such.yaml", "--save")),
    ],
    ids=" ".join,
)
def test_wrong_flags(cli, folder, flags, words):
    before = sorted(folder.iterdir())
    cli("run", folder, PROMPT, *flags).failed(2, *words)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("model", ["smollm2-153m", "no-such-model", "no/such/folder", "./nowhere.gguf", "", "a\nb", "llama-2-7b"])
def test_unknown_models(cli, model):
    error = cli("run", model, PROMPT, "--memory", ROOMY, "--offline").failed(2)
    if model == "smollm2-153m":
        assert "Did you mean smollm2-135m" in error


def test_one_mebibyte(cli, folder):
    done = cli("run", folder, PROMPT, "--memory", "1MiB")
    done.failed(3, "needs at least", "1.00 MiB", "--memory")
    assert done.out == ""


def test_a_folder_that_may_not_be_read_and_a_link_to_nowhere(run, tmp_path, folder):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    run(tmp_path / "link").failed(2, "link")
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "model.safetensors").mkdir()
    run(tmp_path / "model").failed(2, "safetensors")
