"""transformers' models written as GGUF the way llama.cpp's converter does it (names from the `gguf` package), loaded by us: the logits stay."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from model.family_configs import CONTEXT, V
from model.family_models import FP32, packed_logits
from tradespace.loading.gguf import read_gguf, write_gguf
from tradespace.loading.weights import load_weights
from tradespace.model.transformer import Transformer
from tradespace.quantize.rtn import fill_rtn
from tradespace.spec.gguf_config import model_spec_from_gguf

SHAPE = {
    "vocab_size": V, "hidden_size": 36, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": CONTEXT,
}  # fmt: skip
THETA = {"rope_type": "default", "rope_theta": 5e4}
PHI_SHAPE = {key: value for key, value in SHAPE.items() if key != "head_dim"}
FULL_AND_SLIDING = ["sliding_attention"] * 5 + ["full_attention"]
GEMMA_ROPES = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
GPT = {"vocab_size": V, "n_positions": CONTEXT, "n_embd": 36, "n_layer": 2, "n_head": 3, "n_inner": 50}
# architecture in GGUF → config there, and metadata that it alone has
CASES: dict[str, tuple[transformers.PreTrainedConfig, dict]] = {
    "llama": (transformers.LlamaConfig(**SHAPE, rope_parameters=THETA), {}),
    "qwen3": (transformers.Qwen3Config(**SHAPE, rope_parameters=THETA, tie_word_embeddings=True), {}),
    "gemma3": (
        transformers.Gemma3TextConfig(
            **SHAPE | {"num_hidden_layers": 6}, layer_types=FULL_AND_SLIDING, sliding_window=6, query_pre_attn_scalar=8, rope_parameters=GEMMA_ROPES
        ),
        {"attention.sliding_window": 6, "rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
    "phi3": (transformers.Phi3Config(**PHI_SHAPE, sliding_window=7, pad_token_id=0, rope_parameters=THETA), {"attention.sliding_window": 7}),
    "falcon": (
        transformers.FalconConfig(
            vocab_size=V, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_kv_heads=2, new_decoder_architecture=True, alibi=False
        ),
        {"feed_forward_length": 192, "attention.head_count_kv": 2, "rope.freq_base": 1e4, "context_length": CONTEXT},
    ),
    "gpt2": (transformers.GPT2Config(**GPT), {}),
    "starcoder": (transformers.GPTBigCodeConfig(**GPT, multi_query=True), {"attention.head_count_kv": 1}),
}


def _metadata(architecture: str, config: transformers.PreTrainedConfig, own: dict) -> dict:
    rms = hasattr(config, "rms_norm_eps")
    common = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", None) or getattr(config, "n_inner", 0) or 0,
        "attention.head_count": config.num_attention_heads,
        "context_length": CONTEXT,
        f"attention.layer_norm_{'rms_' if rms else ''}epsilon": config.rms_norm_eps if rms else config.layer_norm_epsilon,
    }
    if hasattr(config, "intermediate_size"):
        common |= {"attention.head_count_kv": config.num_key_value_heads, "rope.freq_base": 5e4}
    if getattr(config, "head_dim", None) and architecture not in ("falcon", "phi3"):
        common |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in {**common, **own}.items()}


def _converted(architecture: str, name: str, tensor: Tensor, config: transformers.PreTrainedConfig) -> Tensor:
    """What the converter does to a tensor beside renaming it."""
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):  # rows of a head paired (2i, 2i + 1)
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        return tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return tensor + 1
    if architecture == "gpt2" and any(part in name for part in ("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return tensor.T
    if architecture == "falcon" and "query_key_value" in name:  # each KV head's queries, key, value → all queries, all keys, all values
        K, G, H = config.num_kv_heads, config.num_attention_heads // config.num_kv_heads, config.head_dim
        grouped = tensor.view(K, G + 2, H, tensor.shape[1])
        return torch.cat([part.reshape(-1, tensor.shape[1]) for part in (grouped[:, :-2], grouped[:, -2], grouped[:, -1])])
    return tensor


@pytest.mark.parametrize("architecture", sorted(CASES))
def test_logits_of_a_converted_model(architecture, tmp_path):
    config, own = CASES[architecture]
    torch.manual_seed(1)
    oracle = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    enum = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(enum, config.num_hidden_layers)
    stored: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            parameter.normal_(std=0.2)
            theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert theirs is not None, name
            stored[theirs] = _converted(architecture, name, parameter, config).contiguous().numpy()
    path = tmp_path / "model.gguf"
    tensors = [(name, values.shape, "F32", lambda values=values: values.tobytes()) for name, values in stored.items()]
    write_gguf(path, _metadata(architecture, config, own), tensors)
    file = read_gguf(path)
    spec = model_spec_from_gguf(file.metadata, {name: tensor.shape for name, tensor in file.tensors.items()}, "tiny")
    model = Transformer(spec, FP32, max_context=CONTEXT)
    load_weights(model, file, spec, fill=fill_rtn, staging_bytes=4096)
    tokens_T = torch.randint(0, V, (40,))
    with torch.inference_mode():
        torch.testing.assert_close(packed_logits(model, [tokens_T])[0], oracle(tokens_T[None]).logits[0], atol=1e-4, rtol=0)
