"""A tiny random Llama as a user would have it on disk: a Hub folder saved by transformers with a tokenizer trained on the fly, and the same model as GGUF."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import gguf
import torch
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer

from tradespace.loading.gguf import write_gguf
from tradespace.measure import machine

CONTEXT = 8192
# enough for this process with pytest, torch and transformers in it; budgets that matter are tested in processes of their own
ROOMY = "8GiB"
SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>")
TEMPLATE = "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}<|assistant|>"
TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "a budget is stated, a plan is made, the plan is run",
    "why is the sky blue? because light is scattered",
]
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
THETA = 5e4
# timings that no test depends on; a fixed file spares each test session the ten seconds of measuring
TIMINGS = {
    "native": {"int8": 1e12, "bf16": 8e11, "fp32": 2e11},
    "bandwidth": [[2**21, 160e9], [2**30, 40e9]], "matmul": {"fp32": 200e9, "bf16": 900e9, "int8": 1.8e12}, "op_s": 1e-6, "disk": 2e9, "notes": [],
    "busy": False, "runtime_bytes": 250 * 2**20, "runtime_method": "peak resident size", "date": "2026-11-22T19:00:00+00:00", "backend": "torch",
}  # fmt: skip


def make_home(folder: Path) -> Path:
    """A TRADESPACE_HOME whose kept measurement holds for this machine, so that nothing is timed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").write_text(json.dumps({"fingerprint": machine.fingerprint(), **TIMINGS}))
    return folder


def make_tokenizer() -> RustTokenizer:
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in SPECIAL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS * 4, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@cache
def oracle() -> transformers.LlamaForCausalLM:
    """The random model in fp32. Its end token is as good as never the likeliest, so that answers are as long as asked for."""
    torch.manual_seed(7)
    vocabulary = make_tokenizer().get_vocab_size()
    config = transformers.LlamaConfig(vocab_size=vocabulary, rope_parameters={"rope_type": "default", "rope_theta": THETA}, dtype="float32", **SHAPE)
    model = transformers.LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
        # no special token is drawn: every token of an answer is text
        model.lm_head.weight[: len(SPECIAL)] = 0
        model.lm_head.weight[len(SPECIAL) :] *= 3
    return model


def save_folder(folder: Path) -> Path:
    """config.json, model.safetensors, generation_config.json, tokenizer.json, tokenizer_config.json."""
    oracle().save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def gguf_metadata() -> dict:
    state = json.loads(make_tokenizer().to_str())
    vocabulary: dict[str, int] = state["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    return {
        "general.architecture": "llama",
        "llama.block_count": SHAPE["num_hidden_layers"],
        "llama.embedding_length": SHAPE["hidden_size"],
        "llama.feed_forward_length": SHAPE["intermediate_size"],
        "llama.attention.head_count": SHAPE["num_attention_heads"],
        "llama.attention.head_count_kv": SHAPE["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": SHAPE["rms_norm_eps"],
        "llama.context_length": CONTEXT,
        "llama.rope.freq_base": THETA,
        "llama.rope.dimension_count": SHAPE["head_dim"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": TEMPLATE,
    }


def save_gguf(path: Path) -> Path:
    """The same weights in F32 as llama.cpp's converter names and permutes them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, int(SHAPE["num_hidden_layers"]))
    tensors = []
    for name, parameter in oracle().named_parameters():
        stored = names.get_name(name, try_suffixes=(".weight",))
        assert stored is not None, name
        values = parameter.detach()
        if "q_proj" in name or "k_proj" in name:  # rows of a head paired (2i, 2i + 1)
            heads = int(SHAPE["num_attention_heads"] if "q_proj" in name else SHAPE["num_key_value_heads"])
            values = values.view(heads, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
        tensors.append((stored, values.shape, "F32", lambda values=values: values.contiguous().numpy().tobytes()))
    write_gguf(path, gguf_metadata(), tensors)
    return path
