"""Published configs, as their repositories have them, written by hand from the model cards: the samples that the config tests bend and break."""

from __future__ import annotations

from typing import Any

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "bos_token_id": 1,
    "use_cache": True,
}
MISTRAL: dict[str, Any] = LLAMA | {"model_type": "mistral", "num_key_value_heads": 8, "intermediate_size": 14336, "sliding_window": 4096, "architectures": None}
QWEN2: dict[str, Any] = LLAMA | {
    "model_type": "qwen2",
    "num_key_value_heads": 8,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "max_window_layers": 28,
}
QWEN3: dict[str, Any] = QWEN2 | {"model_type": "qwen3", "head_dim": 128, "attention_bias": False, "sliding_window": None}
SMOLLM3: dict[str, Any] = LLAMA | {"model_type": "smollm3", "num_key_value_heads": 4, "rope_theta": 5e6, "no_rope_layer_interval": 4}
GEMMA2: dict[str, Any] = {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "cache_implementation": "hybrid",
}
GEMMA3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "_sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "use_bidirectional_attention": False,
}
PHI3: dict[str, Any] = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    "sliding_window": 262144,
    "rms_norm_eps": 1e-05,
}
FALCON: dict[str, Any] = {
    "model_type": "falcon",
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "num_kv_heads": 71,
    "multi_query": True,
    "parallel_attn": True,
    "new_decoder_architecture": False,
    "alibi": False,
    "bias": False,
    "vocab_size": 65024,
    "apply_residual_connection_post_layernorm": False,
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "n_ctx": 1024, "vocab_size": 50257}
BIGCODE: dict[str, Any] = GPT2 | {"model_type": "gpt_bigcode", "multi_query": True, "attention_softmax_in_fp32": True, "n_inner": 3072}

SAMPLES = {sample["model_type"]: sample for sample in (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, GEMMA2, GEMMA3, PHI3, FALCON, GPT2, BIGCODE)}
