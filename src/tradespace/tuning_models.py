"""What the training commands read and write around a run: shapes, tokenizers, and the folder that other tools open."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer

from tradespace import api
from tradespace.errors import InputError
from tradespace.loading.gguf import read_gguf
from tradespace.loading.names import hugging_face_pieces
from tradespace.loading.resolve import ModelFiles
from tradespace.loading.tokenizer import Tokenizer
from tradespace.model.transformer import Transformer
from tradespace.quantize.hf_config import config_from_spec, write_json, write_tokenizer
from tradespace.quantize.shards import write_shard
from tradespace.spec.families import model_spec_from_config
from tradespace.spec.model import ModelSpec
from tradespace.spec.tensors import model_tensors
from tradespace.train.shards import Shards

# short name → config.json's
SHAPE_KEYS = {
    "layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads", "kv-heads": "num_key_value_heads", "ffn": "intermediate_size",
    "vocab": "vocab_size", "head-size": "head_dim", "context": "max_position_embeddings", "tied": "tie_word_embeddings",
}  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
DEFAULT_VOCAB = 4096
WORDS_CHARS = 4096  # of a text that a vocabulary is made from at once
END = "<|end|>"


def parse_shape(text: str, *, vocab: int | None = None) -> ModelSpec | None:
    """ "layers=6,width=256,heads=4[,kv-heads=2,ffn=768,vocab=4096,tied=1]" → a Llama's spec; None where `text` is no such list. Raises InputError."""
    if "=" not in text:
        return None
    values: dict[str, int] = {}
    for part in text.split(","):
        key, _, number = part.strip().partition("=")
        if key not in SHAPE_KEYS or not number.isdigit():
            raise InputError(f"shape '{text}': '{part}' is not KEY=NUMBER with a key of {', '.join(SHAPE_KEYS)}")
        if key in values:
            raise InputError(f"shape '{text}' says {key} twice")
        values[key] = int(number)
    if missing := {"layers", "width", "heads"} - values.keys():
        raise InputError(f"shape '{text}' lacks {', '.join(sorted(missing))}. Write for example layers=6,width=256,heads=4")
    values = {"kv-heads": values["heads"], "ffn": -(-8 * values["width"] // 3 // 32) * 32, "vocab": DEFAULT_VOCAB, "context": 4096, "tied": 1} | values
    if vocab is not None:
        values["vocab"] = vocab
    config = {SHAPE_KEYS[key]: value for key, value in values.items()} | {"tie_word_embeddings": bool(values["tied"])}
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "hidden_act": "silu"}
    return model_spec_from_config(config, text)


def find_shape(name: str) -> ModelSpec:
    """A shape list, a config.json, a folder, or a name of the zoo."""
    return parse_shape(name) or api.find_spec(name)


def train_tokenizer(paths: Sequence[Path], vocab: int, folder: Path) -> Tokenizer:
    """A byte-level BPE tokenizer of these texts, written to `folder`."""
    from tradespace.train.reading import read_text

    if vocab < 257:
        raise InputError(f"a byte-level tokenizer needs a vocabulary of at least 257, not {vocab}. Give vocab=512 or more, or --tokenizer MODEL")
    texts = [read_text(path) for path in paths]
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[AddedToken(END, special=True)], initial_alphabet=alphabet, show_progress=False)
    # a line of megabytes would be one word of as many letters, or take a hundred times its bytes
    pieces = (line[start : start + WORDS_CHARS] for text in texts for line in text.splitlines(keepends=True) for start in range(0, len(line), WORDS_CHARS))
    tokenizer.train_from_iterator(pieces, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}) + "\n", encoding="utf-8")
    return read_tokenizer(folder)


def read_tokenizer(folder: Path) -> Tokenizer:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")) if (folder / "tokenizer_config.json").exists() else None
    files = ModelFiles(name=str(folder), kind="safetensors", weights=(), folder=folder, tokenizer_json=folder / "tokenizer.json", tokenizer_config=config)
    return Tokenizer.from_files(files)


def copy_tokenizer(files: ModelFiles, folder: Path) -> None:
    """The tokenizer's files of a model, as other tools read them."""
    folder.mkdir(parents=True, exist_ok=True)
    if files.kind == "gguf":
        write_tokenizer(read_gguf(files.weights[0]), folder)
        return
    for name in TOKENIZER_FILES:
        if (files.folder / name).is_file():
            shutil.copyfile(files.folder / name, folder / name)


@torch.no_grad()
def save_model(model: Transformer, folder: Path, *, dtype: torch.dtype, shards: Shards | None = None) -> None:
    """config.json and model.safetensors under the names of the model's family. With `shards` put together from all ranks: all must call, rank 0 writes."""
    spec = model.spec if shards is None else shards.spec
    config = config_from_spec(spec, dtype={torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype])
    held = {tensor.name: model.get_parameter(tensor.name) if shards is None else shards.whole(tensor.name) for tensor in model_tensors(spec)}
    if shards is not None and not shards.ranks.leader:
        return
    found = {}
    for piece in hugging_face_pieces(spec, ()):
        rows = held[piece.target][piece.row_start : piece.row_start + piece.num_rows]
        rows = rows.float() - piece.added if piece.added else rows
        found[piece.source] = rows.detach().cpu().to(dtype).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / "model.safetensors", found)
    write_json(folder / "config.json", config)
