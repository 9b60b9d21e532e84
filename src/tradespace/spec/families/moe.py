"""Mixtures of experts over softmax attention, priced and not yet run: Mixtral, Qwen 2 and 3 MoE, gpt-oss, Llama 4, MiniMax M2, GLM-4.5, MiMo.

How a router scores, scales and normalizes its choice changes no byte; those keys are listed as such in ROUTING and will be read when the engine routes.
arXiv:2401.04088 (Mixtral), arXiv:2508.10925 (gpt-oss), arXiv:2508.06471 (GLM-4.5), arXiv:2505.07608 (MiMo).
"""

from __future__ import annotations

from dataclasses import replace

from tradespace.spec.families.llama import dense_ffn, rms_model
from tradespace.spec.families.parts import activation, layer_windows, num_experts, read_rope, read_sizes, sliding_window, under_eyes
from tradespace.spec.families.reader import MAX_CONTEXT, MAX_EXPERTS, MAX_LAYERS, ConfigReader
from tradespace.spec.mixers import Attention
from tradespace.spec.model import DenseFFN, LayerSpec, ModelSpec, RoutedFFN
from tradespace.spec.tensors import layer_tensors

ROUTED = "routed experts have no implementation yet"
# how experts are chosen and weighted: no bytes
ROUTING = (
    "norm_topk_prob",
    "scoring_func",
    "topk_method",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "moe_router_dtype",
    "swiglu_limit",
    "swiglu_alpha",
)


def routed(config: ConfigReader, *, E: int, top_k: int, F: int, **shape: bool | int) -> RoutedFFN:
    """A routed feed-forward with the family's activation; `top_k` beyond E is an error."""
    if top_k > E:
        raise config.wrong("num_experts_per_tok", f"({top_k}) is more than the {E} experts")
    return RoutedFFN(E=E, top_k=top_k, F=F, activation=activation(config, "hidden_act", default="silu"), **shape)  # pyright: ignore[reportArgumentType]


def top_k(config: ConfigReader, default: int | None = None) -> int:
    return config.integer("num_experts_per_tok", "experts_per_token", default=default, high=MAX_EXPERTS)


def next_token_layers(model: ModelSpec, count: int) -> tuple[tuple[str, int], ...]:
    """Parameters of `count` multi-token-prediction modules as DeepSeek-V3 builds them: the last layer again, a product from 2 D to D, three norms."""
    if not count:
        return ()
    layer = sum(tensor.num_elements for tensor in layer_tensors(model, model.L - 1))
    return ((f"{count} multi-token prediction module{'s' if count > 1 else ''}", count * (layer + 2 * model.D**2 + 3 * model.D)),)


def mixtral(config: ConfigReader) -> ModelSpec:
    sizes = read_sizes(config, context=131_072, kv_heads=8)
    ffn = routed(config, E=num_experts(config, "num_local_experts", "num_experts", default=8), top_k=top_k(config, 2), F=config.integer("intermediate_size"))
    mixer = Attention(N=sizes.N, K=sizes.K, H=sizes.H, rope=read_rope(config, sizes.H, sizes.context, theta=1e6), window=sliding_window(config))
    model = rms_model(config, sizes, [LayerSpec(mixer=mixer, ffn=ffn)] * sizes.L, eps=1e-5)
    config.finish()
    return replace(model, plan_only=ROUTED)


def _qwen_ffns(config: ConfigReader, L: int, moe: RoutedFFN) -> list[DenseFFN | RoutedFFN]:
    """Every `decoder_sparse_step`-th layer is routed, but for those in `mlp_only_layers`."""
    step = config.integer("decoder_sparse_step", default=1)
    dense_layers = config.raw("mlp_only_layers") or []
    if not isinstance(dense_layers, list) or any(not isinstance(i, int) for i in dense_layers):
        raise config.wrong("mlp_only_layers", "must be a list of layer numbers")
    is_routed = [i not in dense_layers and (i + 1) % step == 0 for i in range(L)]
    dense = dense_ffn(config) if not all(is_routed) or "intermediate_size" in config.values else None
    return [moe if flag or dense is None else dense for flag in is_routed]


def qwen_moe(config: ConfigReader) -> ModelSpec:
    """Qwen2-MoE (shared expert under a gate, biases) and Qwen3-MoE (head norms, no shared expert)."""
    newer = config.family.startswith("qwen3")
    sizes = read_sizes(config, context=32_768, kv_heads=4 if newer else 16)
    moe = routed(
        config,
        E=num_experts(config, "num_experts", "num_local_experts", default=128 if newer else 60),
        top_k=top_k(config, 8 if newer else 4),
        F=config.integer("moe_intermediate_size", default=768 if newer else 1408),
        shared_F=0 if newer else config.integer("shared_expert_intermediate_size", default=5632),
        shared_gate=not newer,
    )
    windowed = config.flag("use_sliding_window", default=False)
    if windowed:
        raise config.unsupported("use_sliding_window", True, "is not priced for this family")
    bias = config.flag("attention_bias", default=False) if newer else config.flag("qkv_bias", default=True)
    if newer:
        config.require("qkv_bias", bias)
        config.require("shared_expert_intermediate_size", 0)
        config.require("use_qk_norm", True)
    rope = read_rope(config, sizes.H, sizes.context)
    mixer = Attention(N=sizes.N, K=sizes.K, H=sizes.H, rope=rope, qkv_bias=bias, out_bias=bias and newer, qk_norm="head" if newer else "none")
    layers = [LayerSpec(mixer=mixer, ffn=ffn) for ffn in _qwen_ffns(config, sizes.L, moe)]
    model = rms_model(config, sizes, layers)
    config.finish(harmless=(*ROUTING, "sliding_window", "max_window_layers"))
    return replace(model, plan_only=ROUTED)


# the class's own default, for a config that is silent
_GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096}


def gpt_oss(config: ConfigReader) -> ModelSpec:
    sizes = read_sizes(config, context=131_072, kv_heads=8, head_size=64)
    window = sliding_window(config) if "sliding_window" in config.values else 128
    windows = layer_windows(config, sizes.L, window, lambda i: i % 2 == 0)
    if not config.values.get("rope_scaling") and not config.values.get("rope_parameters"):
        config = ConfigReader({**config.values, "rope_scaling": _GPT_OSS_ROPE}, name=config.name, family=config.family)
        return gpt_oss(config)
    rope = read_rope(config, sizes.H, sizes.context, theta=150_000.0)
    bias = config.flag("attention_bias", default=True)
    F = config.integer("intermediate_size")
    ffn = routed(config, E=num_experts(config, "num_local_experts", default=128), top_k=top_k(config, 4), F=F, bias=True, router_bias=True)
    layers = [
        LayerSpec(mixer=Attention(N=sizes.N, K=sizes.K, H=sizes.H, rope=rope, window=w, qkv_bias=bias, out_bias=bias, sinks=True), ffn=ffn) for w in windows
    ]
    model = rms_model(config, sizes, layers, eps=1e-5)
    config.finish(harmless=(*ROUTING, "initial_context_length"))
    return replace(model, plan_only=ROUTED)


def minimax_m2(config: ConfigReader) -> ModelSpec:
    sizes = read_sizes(config, context=196_608, kv_heads=8, head_size=128)
    rotary = config.optional_integer("rotary_dim")
    partial = 1.0 if rotary is None else min(1.0, rotary / sizes.H)
    rope = read_rope(config, sizes.H, sizes.context, theta=5e6, partial=partial)
    config.require("use_qk_norm", True)
    config.require("qk_norm_type", "per_layer")
    config.require("shared_intermediate_size", 0)
    score_bias = config.flag("use_routing_bias", default=True)
    F, E = config.integer("intermediate_size"), num_experts(config, "num_local_experts", default=256)
    ffn = routed(config, E=E, top_k=top_k(config, 8), F=F, score_bias=score_bias)
    mixer = Attention(N=sizes.N, K=sizes.K, H=sizes.H, rope=rope, qk_norm="full")
    model = rms_model(config, sizes, [LayerSpec(mixer=mixer, ffn=ffn)] * sizes.L)
    ahead = config.integer("num_mtp_modules", default=0, low=0, high=64) if config.flag("use_mtp", default=False) else 0
    kinds = config.per_layer("attn_type_list", sizes.L, int)
    if kinds is not None and set(kinds) != {1}:
        raise config.unsupported("attn_type_list", kinds, "names layers without softmax attention")
    config.finish(harmless=(*ROUTING, "mtp_transformer_layers", "num_mtp_modules"))
    left_out = (f"{ahead} multi-token prediction modules",) if ahead else ()
    return replace(model, plan_only=ROUTED, left_out=left_out)


def glm4_moe(config: ConfigReader) -> ModelSpec:
    sizes = read_sizes(config, context=131_072, kv_heads=8)
    rope = read_rope(config, sizes.H, sizes.context, partial=0.5)
    F = config.integer("moe_intermediate_size", default=1408)
    shared = config.integer("n_shared_experts", default=1, low=0, high=MAX_EXPERTS)
    moe = routed(config, E=num_experts(config, "n_routed_experts", default=128), top_k=top_k(config, 8), F=F, shared_F=shared * F, score_bias=True)
    first = config.integer("first_k_dense_replace", default=1, low=0, high=MAX_LAYERS)
    head_norm = config.flag("use_qk_norm", default=False)
    bias = config.flag("attention_bias", default=False)
    mixer = Attention(N=sizes.N, K=sizes.K, H=sizes.H, rope=rope, qkv_bias=bias, qk_norm="head" if head_norm else "none")
    dense = dense_ffn(config)
    model = rms_model(config, sizes, [LayerSpec(mixer=mixer, ffn=dense if i < first else moe) for i in range(sizes.L)], eps=1e-5)
    ahead = config.integer("num_nextn_predict_layers", "num_mtp_layers", default=0, low=0, high=64)
    config.finish(harmless=ROUTING)
    return replace(model, plan_only=ROUTED, extra_parameters=next_token_layers(model, ahead))


def llama4(config: ConfigReader) -> ModelSpec:
    """The text decoder of a Llama 4: chunked local attention with rotation, every fourth layer global and without; experts beside a shared one."""
    text = config.nested("text_config", family="llama4_text", harmless=(*_LLAMA4_INERT, "model_type"))
    absent = {"vocab_size": 202_048, "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40}
    sizes = read_sizes(text, context=131_072, kv_heads=8, head_size=128, absent=absent)
    interval = text.integer("no_rope_layer_interval", default=4)
    rotates = text.per_layer("no_rope_layers", sizes.L, int) if text.values.get("no_rope_layers") else None
    text.raw("no_rope_layers")
    rotates = rotates or [(i + 1) % interval != 0 for i in range(sizes.L)]
    chunk = text.integer("attention_chunk_size", default=8192, high=MAX_CONTEXT)
    rope = read_rope(text, sizes.H, sizes.context, theta=500_000.0, interleaved=True)
    F, step = text.integer("intermediate_size", default=8192), text.integer("interleave_moe_layer_step", default=1)
    moe = routed(text, E=num_experts(text, "num_local_experts", default=16), top_k=top_k(text, 1), F=F, shared_F=F)
    dense = DenseFFN(F=text.integer("intermediate_size_mlp", default=16_384), activation=moe.activation)
    bias = text.flag("attention_bias", default=False)
    local, far = (
        Attention(N=sizes.N, K=sizes.K, H=sizes.H, rope=turn, window=w, chunked=w is not None, qkv_bias=bias, out_bias=bias)
        for turn, w in ((rope, chunk), (None, None))
    )
    layers = [LayerSpec(mixer=local if turn else far, ffn=moe if (i + 1) % step == 0 else dense) for i, turn in enumerate(rotates)]
    text.require("moe_layers")
    text.require("layer_types")
    model = rms_model(text, sizes, layers, eps=1e-5)
    return under_eyes(config, replace(model, family="llama4", plan_only=ROUTED))


# L2 norms of queries and keys hold no weights; temperature tuning, scores and limits cost no bytes
_LLAMA4_INERT = ("use_qk_norm", "attn_temperature_tuning", "floor_scale", "attn_scale", "for_llm_compressor", *ROUTING)
