"""Falcon (arXiv:2311.16867): attention and feed-forward in parallel on one norm (7B, one KV head) or two (40B, 180B, grouped KV heads); LayerNorm."""

from __future__ import annotations

from tradespace.spec.families.parts import activation, check_heads, even_split, quantization, read_rope, stored_dtype
from tradespace.spec.families.reader import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, ConfigReader
from tradespace.spec.mixers import Attention
from tradespace.spec.model import Arrangement, DenseFFN, LayerSpec, ModelSpec


def _arrangement(config: ConfigReader, newer: bool) -> Arrangement:
    parallel = config.flag("parallel_attn", default=True)
    norms = config.optional_integer("num_ln_in_parallel_attn", high=2)
    if newer and not parallel:
        raise config.unsupported("parallel_attn", parallel, "contradicts new_decoder_architecture")
    if not newer and norms == 2:
        raise config.unsupported("num_ln_in_parallel_attn", norms, "needs new_decoder_architecture")
    if not parallel:
        return "pre"
    return "parallel2" if newer and norms != 1 else "parallel"


def falcon(config: ConfigReader) -> ModelSpec:
    D = config.integer("hidden_size", "n_embed")
    L = config.integer("num_hidden_layers", "n_layer", high=MAX_LAYERS)
    V = config.integer("vocab_size", high=MAX_VOCAB)
    N = config.integer("num_attention_heads", "n_head", high=MAX_HEADS)
    H = even_split(config, D, N)
    newer = config.flag("new_decoder_architecture", default=False)
    stated = config.integer("num_kv_heads", "n_head_kv", default=N, high=MAX_HEADS)
    shared = config.flag("multi_query", default=True)
    K = stated if newer else 1 if shared else N
    check_heads(config, N, K, "num_kv_heads")
    alibi = config.flag("alibi", default=False)
    context = config.integer("max_position_embeddings", default=2048, high=MAX_CONTEXT)
    bias = config.flag("bias", default=False)
    rope = read_rope(config, H, context)
    mixer = Attention(N=N, K=K, H=H, rope=None if alibi else rope, alibi=alibi, qkv_bias=bias, out_bias=bias)
    F = config.integer("ffn_hidden_size", default=4 * D)
    config.require("apply_residual_connection_post_layernorm", False)
    ffn = DenseFFN(F=F, activation=activation(config, "activation", default="gelu"), gated=False, bias=bias)
    model = ModelSpec(
        name=config.name,
        family=config.family,
        D=D,
        V=V,
        layers=(LayerSpec(mixer=mixer, ffn=ffn, arrangement=_arrangement(config, newer)),) * L,
        max_context=context,
        norm="layer",
        norm_eps=config.number("layer_norm_epsilon", default=1e-5, high=1.0),
        norm_bias=True,
        tied=config.flag("tie_word_embeddings", default=True),
        stored_dtype=stored_dtype(config),
        quantization=quantization(config),
        plan_only="linear position biases (ALiBi) have no kernel yet" if alibi else None,
    )
    config.finish()
    return model
