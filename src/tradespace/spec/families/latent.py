"""Latent attention with routed experts, priced and not yet run: DeepSeek V2, V3, R1, V3.2, Kimi K2, GLM-5.

arXiv:2405.04434, arXiv:2412.19437, arXiv:2507.20534 (Kimi K2). V3.2 and GLM-5 attend sparsely: an index picks `index_topk` tokens per query.
"""

from __future__ import annotations

from dataclasses import replace

from tradespace.spec.families.llama import dense_ffn, rms_model
from tradespace.spec.families.moe import ROUTING, next_token_layers, routed, top_k
from tradespace.spec.families.parts import Sizes, num_experts, read_rope, under_eyes
from tradespace.spec.families.reader import MAX_CONTEXT, MAX_EXPERTS, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, ConfigReader
from tradespace.spec.mixers_latent import LatentAttention, SparseIndex
from tradespace.spec.model import LayerSpec, ModelSpec

LATENT = "latent attention and routed experts have no implementation yet"


def _sizes(config: ConfigReader) -> Sizes:
    """Heads share one latent, so K says nothing; H is what rotates."""
    N = config.integer("num_attention_heads", high=MAX_HEADS)
    config.optional_integer("num_key_value_heads", high=MAX_HEADS)
    config.optional_integer("head_dim")
    return Sizes(
        D=config.integer("hidden_size"),
        L=config.integer("num_hidden_layers", high=MAX_LAYERS),
        V=config.integer("vocab_size", high=MAX_VOCAB),
        N=N,
        K=N,
        H=config.integer("qk_rope_head_dim", default=64),
        context=config.integer("max_position_embeddings", default=4096, high=MAX_CONTEXT),
    )


def latent_attention(config: ConfigReader, sizes: Sizes, *, q_rank: int | None, rotates: bool = True) -> LatentAttention:
    nope = config.integer("qk_nope_head_dim", default=128)
    total = config.optional_integer("qk_head_dim")
    if total is not None and total != nope + sizes.H:
        raise config.wrong("qk_head_dim", f"({total}) is not qk_nope_head_dim + qk_rope_head_dim ({nope} + {sizes.H})")
    interleaved = config.flag("rope_interleave", default=True)
    return LatentAttention(
        N=sizes.N,
        kv_rank=config.integer("kv_lora_rank", default=512),
        nope_H=nope,
        rope_H=sizes.H,
        value_H=config.integer("v_head_dim", default=128),
        # null means a plain projection; a config that is silent has the class's rank
        q_rank=config.optional_integer("q_lora_rank") if "q_lora_rank" in config.values else q_rank,
        rope=read_rope(config, sizes.H, sizes.context, interleaved=interleaved) if rotates else None,
        bias=config.flag("attention_bias", default=False),
    )


def _experts_from(config: ConfigReader, L: int, default: int) -> list[bool]:
    """Per layer whether it is routed: the first `first_k_dense_replace` are dense, or as `mlp_layer_types` says."""
    first = config.integer("first_k_dense_replace", default=default, low=0, high=MAX_LAYERS)
    config.require("moe_layer_freq", 1)
    kinds = config.per_layer("mlp_layer_types", L, str)
    if kinds is None:
        return [i >= first for i in range(L)]
    for kind in kinds:
        if kind not in ("dense", "sparse"):
            raise config.unsupported("mlp_layer_types", kind, "is an unknown kind of feed-forward")
    return [kind == "sparse" for kind in kinds]


def _deepseek(config: ConfigReader, sizes: Sizes, mixers: list[LatentAttention], *, first_dense: int, score_bias: bool) -> ModelSpec:
    F = config.integer("moe_intermediate_size")
    shared = config.integer("n_shared_experts", default=1, low=0, high=MAX_EXPERTS)
    E = num_experts(config, "n_routed_experts", "num_local_experts", "num_experts", default=256)
    moe = routed(config, E=E, top_k=top_k(config, 8), F=F, shared_F=shared * F, score_bias=score_bias)
    config.require("mlp_bias", False)
    dense = dense_ffn(config)
    is_routed = _experts_from(config, sizes.L, first_dense)
    layers = [LayerSpec(mixer=mixer, ffn=moe if flag else dense) for mixer, flag in zip(mixers, is_routed, strict=True)]
    model = rms_model(config, sizes, layers)
    ahead = config.integer("num_nextn_predict_layers", "num_mtp_layers", default=0, low=0, high=64)
    return replace(model, plan_only=LATENT, extra_parameters=next_token_layers(model, ahead))


def deepseek_v2(config: ConfigReader) -> ModelSpec:
    sizes = _sizes(config)
    mixer = latent_attention(config, sizes, q_rank=1536)
    model = _deepseek(config, sizes, [mixer] * sizes.L, first_dense=0, score_bias=False)
    config.finish(harmless=ROUTING)
    return model


def deepseek_v3(config: ConfigReader) -> ModelSpec:
    sizes = _sizes(config)
    mixer = latent_attention(config, sizes, q_rank=1536)
    model = _deepseek(config, sizes, [mixer] * sizes.L, first_dense=3, score_bias=True)
    config.finish(harmless=ROUTING)
    return model


def _sparse_mixers(config: ConfigReader, sizes: Sizes, q_rank: int, index_heads: int) -> list[LatentAttention]:
    """Layers of kind "full" hold an index; "shared" ones use the choice that the layer before made."""
    base = latent_attention(config, sizes, q_rank=q_rank)
    keep = config.integer("index_topk", default=2048, high=MAX_CONTEXT)
    index = SparseIndex(N=config.integer("index_n_heads", default=index_heads, high=MAX_HEADS), H=config.integer("index_head_dim", default=128), top_k=keep)
    full, shared = replace(base, index=index, index_top_k=keep), replace(base, index_top_k=keep)
    for kind in config.per_layer("layer_types", sizes.L, str) or ():
        if kind not in ("indexed_attention", "deepseek_sparse_attention"):
            raise config.unsupported("layer_types", kind, "is an unknown kind of layer")
    kinds = config.per_layer("indexer_types", sizes.L, str)
    frequency = config.integer("index_topk_freq", default=1)
    offset = config.integer("index_skip_topk_offset", default=2, low=0, high=MAX_LAYERS)
    config.require("index_topk_pattern")
    if kinds is None:
        kinds = ["full" if max(i - offset + 1, 0) % frequency == 0 else "shared" for i in range(sizes.L)]
    for kind in kinds:
        if kind not in ("full", "shared"):
            raise config.unsupported("indexer_types", kind, "is an unknown kind of indexer")
    return [full if kind == "full" else shared for kind in kinds]


def deepseek_v32(config: ConfigReader) -> ModelSpec:
    sizes = _sizes(config)
    model = _deepseek(config, sizes, _sparse_mixers(config, sizes, 1536, 64), first_dense=3, score_bias=True)
    config.finish(harmless=ROUTING)
    return model


def glm_moe_dsa(config: ConfigReader) -> ModelSpec:
    sizes = _sizes(config)
    model = _deepseek(config, sizes, _sparse_mixers(config, sizes, 2048, 32), first_dense=3, score_bias=True)
    config.finish(harmless=(*ROUTING, "indexer_rope_interleave", "index_share_for_mtp_iteration"))
    return model


def kimi_k25(config: ConfigReader) -> ModelSpec:
    """Kimi K2.5 and later: K2's decoder under a vision tower."""
    text = config.nested("text_config", family="kimi_k2", harmless=(*ROUTING, "model_type"))
    sizes = _sizes(text)
    mixer = latent_attention(text, sizes, q_rank=1536)
    model = _deepseek(text, sizes, [mixer] * sizes.L, first_dense=3, score_bias=True)
    return under_eyes(config, replace(model, family="kimi_k2"), harmless=("ignore_index", "use_unified_vision_chunk", "video_placeholder"))
