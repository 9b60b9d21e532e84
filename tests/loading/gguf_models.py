"""Tiny Hugging Face folders with a tokenizer of their own, and their weights as our own tensors: what is exported to GGUF in tests."""

from __future__ import annotations

import json
import random
from itertools import count
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from loading.quantized_models import tiny_config, tiny_model
from model.family_configs import FAMILIES
from tradespace.errors import UnsupportedError
from tradespace.formats import Codes
from tradespace.loading.gguf_export import write_model
from tradespace.loading.gguf_metadata import outline
from tradespace.loading.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_from_gguf
from tradespace.loading.resolve import ModelFiles, resolve
from tradespace.loading.safetensors import read_sharded
from tradespace.quantize.rtn import round_to_nearest
from tradespace.quantize.source import StoredWeights
from tradespace.spec.families import model_spec_from_config
from tradespace.spec.model import ModelSpec

TEXTS = [
    "The quick brown fox jumps over 12 lazy dogs.",
    "  leading spaces\n\nand 1234567 lines\t",
    "naïve café, 日本語 and émigrés; don't — you'll",
    "<|end|> a b<|begin|>",
]


def train_tokenizer(folder: Path, pre: str = "smollm", *, bos: bool = False, size: int = 320) -> None:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE that cuts text as `pre` does."""
    known = PRE_TOKENIZERS[pre]
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=known.ignore_merges))
    splits: list[Any] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in known.splits]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|begin|>", "<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, "the lazy dog and the quick fox " * 4] * 4, trainer)
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}, "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def hugging_face_folder(folder: Path, family: str = "llama", *, pre: str = "smollm", bos: bool = False, **changes: Any) -> ModelFiles:
    """A random model with 330 embedding rows and 320 tokens."""
    config = tiny_config(family, width=256, hidden=512, vocab=330)
    for key, value in changes.items():
        setattr(config, key, value)
    tiny_model(config, seed=3).save_pretrained(folder)
    train_tokenizer(folder, pre, bos=bos)
    return resolve(str(folder), download=False)


def spec_of(files: ModelFiles) -> ModelSpec:
    assert files.config is not None
    return model_spec_from_config(files.config, "tiny")


def export(path: Path, files: ModelFiles, spec: ModelSpec, source: Any, fmt: str) -> dict[str, Codes]:
    """Writes every matrix in `fmt`; returns its codes by canonical name."""
    weights, codes, vectors = StoredWeights(source, spec), {}, {}

    def rows(name: str, start: int, stop: int) -> Codes | Tensor:
        if name not in codes and name not in vectors:
            values = weights.read(name)
            if values.dim() < 2:
                vectors[name] = values
            else:
                codes[name] = Codes(values) if fmt in ("fp32", "fp16", "bf16") else round_to_nearest(fmt, values)
        return vectors[name][start:stop] if name in vectors else codes[name][start:stop]

    # whose pairs are halves, whatever the source has
    write_model(path, weights.spec, files, format_of=lambda _: fmt, rows=rows)
    return codes


def source_of(files: ModelFiles) -> Any:
    return read_sharded(files.folder)


def tokens_of(length: int = 64, vocabulary: int = 320) -> Tensor:
    return torch.arange(length) * 37 % vocabulary


def family_folder(folder: Path, family: str, *, skip: int = 0) -> tuple[ModelFiles, transformers.PreTrainedModel]:
    """A random model of any family (tests/model/family_configs.py) with 330 embedding rows: of those that GGUF can say, the `skip`-th in order of seeds."""
    for seed in count():
        config = FAMILIES[family](random.Random(f"{family} {seed}"))
        config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id = 330, 0, 1, None
        try:
            outline(model_spec_from_config(json.loads(config.to_json_string(use_diff=False)), "tiny"))
        except UnsupportedError:
            continue
        if skip == 0:
            break
        skip -= 1
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    oracle = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in name or "ln_" in name:
                parameter.mul_(0.5).add_(1.0 if name.endswith("weight") and "gemma" not in family else 0.0)
    oracle.save_pretrained(folder)
    train_tokenizer(folder)
    return resolve(str(folder), download=False), oracle


def sentence_piece_tokenizer(folder: Path, *, prefix: bool = True, size: int = 330) -> None:
    """tokenizer.json of SentencePiece's kind, with every cut of every piece as a merge, as transformers converts tokenizer.model."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")  # type: ignore[assignment]
    # few characters, so that others fall back to bytes
    trained.train_from_iterator(["the lazy dog and  the quick fox jumps over " * 4] * 4, trainers.BpeTrainer(vocab_size=size - 261, show_progress=False))
    special = ["<unk>", "<s>", "</s>"]
    learned = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    tokens = [*pieces[: size - 2], "▁▁▁", "<turn>"]
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(token_id) for token_id in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 260), 4],
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert len(ids) == len(tokens) == len(metadata["tokenizer.ggml.token_type"])
    tokenizer_from_gguf(metadata, "made").tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
