"""The older line with LayerNorm and biases: GPT-2 and GPT-BigCode (StarCoder) with learned positions, OPT, BLOOM with linear position biases.

GPT-3 is GPT-2's mathematics with some layers banded (arXiv:2005.14165); arXiv:2305.06161 (StarCoder), arXiv:2205.01068 (OPT), arXiv:2211.05100 (BLOOM).
"""

from __future__ import annotations

from tradespace.spec.families.parts import activation, even_split, quantization, stored_dtype
from tradespace.spec.families.reader import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, ConfigReader
from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN, LayerSpec, ModelSpec

_GPT2_SUMMARY = ("summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout", "summary_proj_to_labels")


def _learned_positions(config: ConfigReader, *, act: str, shared_head: bool) -> ModelSpec:
    """GPT-2's decoder; `shared_head`: one head of keys and values for all queries."""
    # the names of transformers, its own synonyms, and those of short sheets (num_layers, hidden_dim, ffn_embed_dim, max_seq_len) that go round
    D = config.integer("n_embd", "hidden_size", "hidden_dim")
    L = config.integer("n_layer", "num_hidden_layers", "num_layers", high=MAX_LAYERS)
    N = config.integer("n_head", "num_attention_heads", high=MAX_HEADS)
    context = config.integer("n_positions", "max_position_embeddings", "max_seq_len", default=1024, high=MAX_VOCAB)
    scaled = config.flag("scale_attn_weights", default=True)
    mixer = Attention(N=N, K=1 if shared_head else N, H=even_split(config, D, N, "n_head"), scale=None if scaled else 1.0, qkv_bias=True, out_bias=True)
    F = config.integer("n_inner", "ffn_embed_dim", default=4 * D)
    ffn = DenseFFN(F=F, activation=activation(config, "activation_function", default=act), gated=False, bias=True)
    return ModelSpec(
        name=config.name,
        family=config.family,
        D=D,
        V=config.integer("vocab_size", high=MAX_VOCAB),
        layers=(LayerSpec(mixer=mixer, ffn=ffn),) * L,
        max_context=context,
        norm="layer",
        norm_eps=config.number("layer_norm_epsilon", default=1e-5, high=1.0),
        norm_bias=True,
        learned_positions=context,
        tied=config.flag("tie_word_embeddings", default=True),
        stored_dtype=stored_dtype(config, "fp32"),
        quantization=quantization(config),
    )


def gpt2(config: ConfigReader) -> ModelSpec:
    config.require("scale_attn_by_inverse_layer_idx", False)
    model = _learned_positions(config, act="gelu_new", shared_head=False)
    # n_ctx repeats n_positions; reorder_and_upcast_attn only changes the order of one multiplication
    config.finish(harmless=("n_ctx", "name", "reorder_and_upcast_attn", *_GPT2_SUMMARY))
    return model


def gpt_bigcode(config: ConfigReader) -> ModelSpec:
    """Multi-query by `multi_query`; transformers 5 writes the resulting number of KV heads beside it, which must then agree."""
    model = _learned_positions(config, act="gelu_pytorch_tanh", shared_head=config.flag("multi_query", default=True))
    mixer = model.layers[0].mixer
    assert isinstance(mixer, Attention), "a GPT layer attends"
    stated = config.optional_integer("num_key_value_heads", high=MAX_HEADS)
    if stated not in (None, mixer.K):
        raise config.wrong("num_key_value_heads", f"is {stated}, but multi_query says {mixer.K}")
    harmless = ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length")
    config.finish(harmless=("n_ctx", "pre_allocate_kv_cache", "validate_runner_input", *harmless, *_GPT2_SUMMARY))
    return model


def opt(config: ConfigReader) -> ModelSpec:
    """The 350M's narrower embeddings with their projections and its norms behind the blocks are refused: no other published OPT has them."""
    D = config.integer("hidden_size")
    L = config.integer("num_hidden_layers", high=MAX_LAYERS)
    N = config.integer("num_attention_heads", high=MAX_HEADS)
    context = config.integer("max_position_embeddings", default=2048, high=MAX_CONTEXT)
    config.require("word_embed_proj_dim", D)
    config.require("do_layer_norm_before", True)
    config.require("_remove_final_layer_norm", False)
    config.require("layer_norm_elementwise_affine", True)
    bias = config.flag("enable_bias", default=True)
    mixer = Attention(N=N, K=N, H=even_split(config, D, N), qkv_bias=bias, out_bias=bias)
    ffn = DenseFFN(F=config.integer("ffn_dim"), activation=activation(config, "activation_function", default="relu"), gated=False, bias=bias)
    model = ModelSpec(
        name=config.name,
        family=config.family,
        D=D,
        V=config.integer("vocab_size", high=MAX_VOCAB),
        layers=(LayerSpec(mixer=mixer, ffn=ffn),) * L,
        max_context=context,
        norm="layer",
        norm_bias=True,
        learned_positions=context + 2,
        position_offset=2,
        tied=config.flag("tie_word_embeddings", default=True),
        stored_dtype=stored_dtype(config, "fp16"),
        quantization=quantization(config),
        plan_only="OPT's loader is not written yet",
    )
    config.finish()
    return model


def bloom(config: ConfigReader) -> ModelSpec:
    D = config.integer("hidden_size", "n_embed")
    L = config.integer("n_layer", "num_hidden_layers", high=MAX_LAYERS)
    N = config.integer("n_head", "num_attention_heads", high=MAX_HEADS)
    config.require("apply_residual_connection_post_layernorm", False)
    mixer = Attention(N=N, K=N, H=even_split(config, D, N, "n_head"), alibi=True, qkv_bias=True, out_bias=True)
    ffn = DenseFFN(F=4 * D, activation="gelu_tanh", gated=False, bias=True)
    model = ModelSpec(
        name=config.name,
        family=config.family,
        D=D,
        V=config.integer("vocab_size", high=MAX_VOCAB),
        layers=(LayerSpec(mixer=mixer, ffn=ffn),) * L,
        max_context=config.integer("seq_length", default=2048, high=MAX_CONTEXT),
        norm="layer",
        norm_eps=config.number("layer_norm_epsilon", default=1e-5, high=1.0),
        norm_bias=True,
        embed_norm=True,
        tied=config.flag("tie_word_embeddings", default=True),
        stored_dtype=stored_dtype(config),
        quantization=quantization(config),
        plan_only="linear position biases (ALiBi) have no kernel yet",
    )
    harmless = ("slow_but_exact", "masked_softmax_fusion", "bias_dropout_fusion", "offset_alibi", "attention_softmax_in_fp32", "skip_bias_add")
    config.finish(harmless=(*harmless, "skip_bias_add_qkv", "unk_token_id"))
    return model
