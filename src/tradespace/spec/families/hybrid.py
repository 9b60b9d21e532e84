"""Hybrids of recurrent and attention layers, priced and not yet run: Qwen3-Next and 3.5 (gated delta nets), Nemotron-H (Mamba-2), Kimi Linear, MiniMax 01/M1.

arXiv:2504.03624 (Nemotron-H), arXiv:2510.26692 (Kimi Linear), arXiv:2501.08313 (MiniMax-01). Nemotron-NAS (arXiv:2411.19146) is here
because its layers all differ.
"""

from __future__ import annotations

from dataclasses import replace

from tradespace.spec.families.llama import dense_ffn, rms_model
from tradespace.spec.families.moe import ROUTED, ROUTING, routed, top_k
from tradespace.spec.families.parts import (
    FULL,
    Sizes,
    activation,
    check_heads,
    num_experts,
    quantization,
    read_rope,
    read_sizes,
    rope_from,
    sliding_window,
    stored_dtype,
    under_eyes,
)
from tradespace.spec.families.reader import MAX_EXPERTS, MAX_HEADS, MAX_LAYERS, ConfigReader, shown
from tradespace.spec.mixers import Attention, Mixer, Rope
from tradespace.spec.mixers_recurrent import GatedDeltaNet, LightningAttention, Mamba2
from tradespace.spec.model import DenseFFN, LayerSpec, ModelSpec, RoutedFFN

RECURRENT = "recurrent layers have no implementation yet"
LINEAR = "linear_attention"


def _linear_layers(config: ConfigReader, L: int) -> list[bool]:
    """Per layer whether it is recurrent: `layer_types`, or all but every `full_attention_interval`-th."""
    interval = config.integer("full_attention_interval", default=4)
    kinds = config.per_layer("layer_types", L, str)
    if kinds is None:
        return [(i + 1) % interval != 0 for i in range(L)]
    for kind in kinds:
        if kind not in (FULL, LINEAR):
            raise config.unsupported("layer_types", kind, "is an unknown kind of layer")
    return [kind == LINEAR for kind in kinds]


def _partial_rope(config: ConfigReader, sizes: Sizes) -> Rope:
    """Rotation of a quarter of each head; the three position axes of a picture (mrope) coincide for text, so their split drops out."""
    partial = config.number("partial_rotary_factor", default=0.25, low=1e-6, high=1.0)
    params = config.values.get("rope_parameters")
    if not isinstance(params, dict):
        return read_rope(config, sizes.H, sizes.context, partial=partial)
    config.raw("rope_parameters")
    theta = config.number("rope_theta", default=10_000.0, low=1e-6)
    text = {key: value for key, value in params.items() if key not in ("mrope_interleaved", "mrope_section")}
    return rope_from(config, "rope_parameters", text, H=sizes.H, context=sizes.context, theta=theta, partial=partial)


def _delta_layers(config: ConfigReader, sizes: Sizes, ffns: list[DenseFFN | RoutedFFN]) -> list[LayerSpec]:
    state = {"float32": 4, "bfloat16": 2, "float16": 2}
    dtype = config.text("mamba_ssm_dtype", default="float32")
    if dtype not in state:
        raise config.unsupported("mamba_ssm_dtype", dtype)
    delta = GatedDeltaNet(
        N=config.integer("linear_num_value_heads", default=32, high=MAX_HEADS),
        K=config.integer("linear_num_key_heads", default=16, high=MAX_HEADS),
        H=config.integer("linear_key_head_dim", default=128),
        value_H=config.integer("linear_value_head_dim", default=128),
        conv=config.integer("linear_conv_kernel_dim", default=4, high=64),
        state_bytes=state[dtype],
    )
    check_heads(config, delta.N, delta.K, "linear_num_key_heads")
    config.require("attn_output_gate", True)
    bias = config.flag("attention_bias", default=False)
    rope = _partial_rope(config, sizes)
    gated = Attention(N=sizes.N, K=sizes.K, H=sizes.H, rope=rope, qk_norm="head", output_gate=True, qkv_bias=bias, out_bias=bias)
    linear = _linear_layers(config, sizes.L)
    return [LayerSpec(mixer=delta if flag else gated, ffn=ffn) for flag, ffn in zip(linear, ffns, strict=True)]


def _delta_model(config: ConfigReader, *, experts: bool, kv_heads: int) -> ModelSpec:
    sizes = read_sizes(config, context=32_768, kv_heads=kv_heads, head_size=256)
    config.require("mlp_only_layers", [])
    config.require("decoder_sparse_step", 1)
    ffn: DenseFFN | RoutedFFN
    if experts:
        E, F = num_experts(config, "num_experts", "num_local_experts", default=512), config.integer("moe_intermediate_size", default=512)
        shared = config.integer("shared_expert_intermediate_size", default=512)
        ffn = routed(config, E=E, top_k=top_k(config, 10), F=F, shared_F=shared, shared_gate=True)
        config.optional_integer("intermediate_size")
    else:
        ffn = dense_ffn(config)
    model = rms_model(config, sizes, _delta_layers(config, sizes, [ffn] * sizes.L))
    reason = f"{RECURRENT}, and {ROUTED}" if experts else RECURRENT
    return replace(model, norm_plus_one=True, plan_only=reason)


_QWEN_INERT = (*ROUTING, "mtp_use_dedicated_embeddings", "output_gate_type")


def _ahead(config: ConfigReader) -> tuple[str, ...]:
    count = config.integer("mtp_num_hidden_layers", "num_nextn_predict_layers", default=0, low=0, high=64)
    return (f"{count} multi-token prediction layers",) if count else ()


def qwen3_next(config: ConfigReader) -> ModelSpec:
    model = replace(_delta_model(config, experts=True, kv_heads=2), left_out=_ahead(config))
    config.finish(harmless=_QWEN_INERT)
    return model


def qwen3_5_text(config: ConfigReader) -> ModelSpec:
    experts = "moe" in config.family
    model = replace(_delta_model(config, experts=experts, kv_heads=2 if experts else 4), left_out=_ahead(config))
    config.finish(harmless=_QWEN_INERT)
    return model


def qwen3_5(config: ConfigReader) -> ModelSpec:
    """The text decoder under a Qwen3.5's (or 3.6's) eyes."""
    text = config.nested("text_config", family=f"{config.family}_text", harmless=(*_QWEN_INERT, "model_type"))
    experts = "moe" in config.family
    model = _delta_model(text, experts=experts, kv_heads=2 if experts else 4)
    return under_eyes(config, replace(model, left_out=_ahead(text)))


# ---------------------------------------------------------------------------------------------------------------------- Nemotron-H

_PATTERN = {"M": "mamba", "linear_attention": "mamba", "*": "attention", "full_attention": "attention", "-": "mlp", "E": "moe"}
_PATTERN |= {"mamba": "mamba", "attention": "attention", "mlp": "mlp", "moe": "moe"}


def _nemotron_kinds(config: ConfigReader) -> list[str]:
    pattern = config.raw("layers_block_type", "layer_types")
    text = config.text("hybrid_override_pattern", default="")
    entries = pattern if isinstance(pattern, list) else list(text)
    if not entries or len(entries) > MAX_LAYERS:
        raise config.wrong("hybrid_override_pattern", f"must hold one letter per layer, at most {MAX_LAYERS}; it is {shown(pattern or text)}")
    for entry in entries:
        if entry not in _PATTERN:
            raise config.unsupported("hybrid_override_pattern", entry, "is an unknown kind of layer. Known: M (Mamba-2), * (attention), - (dense), E (experts)")
    stated = config.optional_integer("num_hidden_layers", high=MAX_LAYERS)
    if stated is not None and stated != len(entries):
        raise config.wrong("num_hidden_layers", f"is {stated}, but the pattern has {len(entries)} layers")
    return [_PATTERN[entry] for entry in entries]


def _nemotron_parts(config: ConfigReader, D: int, kinds: set[str]) -> dict[str, LayerSpec]:
    act = activation(config, "mlp_hidden_act", default="relu2")
    mlp_bias = config.flag("mlp_bias", default=False)
    N, K = config.integer("num_attention_heads", default=32, high=MAX_HEADS), config.integer("num_key_value_heads", default=8, high=MAX_HEADS)
    check_heads(config, N, K)
    H = config.integer("head_dim", "attention_head_dim", default=128)
    heads, size = config.integer("mamba_num_heads", default=128, high=MAX_HEADS), config.integer("mamba_head_dim", default=64)
    groups = config.integer("n_groups", "mamba_n_groups", default=8, high=MAX_HEADS)
    check_heads(config, heads, groups, "n_groups")
    config.require("attention_bias", False)
    config.require("mamba_hidden_act", "silu")
    config.require("mamba_ssm_cache_dtype", "float32")
    mamba = Mamba2(
        N=heads,
        H=size,
        S=config.integer("ssm_state_size", default=128),
        groups=groups,
        conv=config.integer("conv_kernel", "mamba_d_conv", default=4, high=64),
        conv_bias=config.flag("use_conv_bias", "mamba_conv_bias", default=True),
        bias=config.flag("use_bias", default=False),
    )
    parts = {
        "mamba": LayerSpec(mixer=mamba, ffn=None),
        "attention": LayerSpec(mixer=Attention(N=N, K=K, H=H), ffn=None),  # no positions: the recurrent layers know the order
    }
    if "mlp" in kinds:
        parts["mlp"] = LayerSpec(mixer=None, ffn=DenseFFN(F=config.integer("intermediate_size"), activation=act, gated=False, bias=mlp_bias))
    if "moe" in kinds:
        shared = config.integer("n_shared_experts", default=1, low=0, high=MAX_EXPERTS)
        ffn = RoutedFFN(
            E=num_experts(config, "n_routed_experts", "num_local_experts", default=8),
            top_k=top_k(config, 2),
            F=config.integer("moe_intermediate_size"),
            activation=act,
            gated=False,
            bias=mlp_bias,
            shared_F=shared * config.integer("moe_shared_expert_intermediate_size"),
            score_bias=True,
            latent_D=config.optional_integer("moe_latent_size") or 0,
        )
        parts["moe"] = LayerSpec(mixer=None, ffn=ffn)
    return parts


_NEMOTRON_INERT = (
    *ROUTING,
    *("chunk_size", "expand", "time_step_floor", "time_step_min", "time_step_max", "time_step_limit", "time_step_rank", "rescale_prenorm_residual"),
    *("use_mamba_kernels", "residual_in_fp32", "mamba_proj_bias", "moe_shared_expert_overlap", "mtp_hybrid_override_pattern", "mtp_layers_block_type"),
    # nothing rotates in this family, and the second name of the epsilon is read below
    *("rope_theta", "partial_rotary_factor", "sliding_window", "norm_eps", "rms_norm_eps", "moe_intermediate_size", "intermediate_size"),
)


def nemotron_h(config: ConfigReader) -> ModelSpec:
    kinds = _nemotron_kinds(config)
    D = config.integer("hidden_size")
    parts = _nemotron_parts(config, D, set(kinds))
    config.require("sliding_window")
    model = ModelSpec(
        name=config.name,
        family=config.family,
        D=D,
        V=config.integer("vocab_size", high=2**26),
        layers=tuple(parts[kind] for kind in kinds),
        max_context=config.integer("max_position_embeddings", default=4096, high=2**32),
        norm_eps=config.number("layer_norm_epsilon", default=1e-5, high=1.0),
        tied=config.flag("tie_word_embeddings", default=False),
        stored_dtype=stored_dtype(config),
        quantization=quantization(config),
        plan_only=f"{RECURRENT}, and {ROUTED}" if "moe" in kinds else RECURRENT,
    )
    ahead = config.integer("num_nextn_predict_layers", default=0, low=0, high=64)
    config.finish(harmless=_NEMOTRON_INERT)
    return replace(model, left_out=(f"{ahead} multi-token prediction layers",) if ahead else ())


# ------------------------------------------------------------------------------------------------------------ MiniMax-01, Nemotron-NAS


def minimax(config: ConfigReader) -> ModelSpec:
    """MiniMax-Text-01 and M1: lightning attention, and softmax attention in every eighth layer."""
    sizes = read_sizes(config, context=131_072, kv_heads=8)
    rotary = config.optional_integer("rotary_dim")
    rope = read_rope(config, sizes.H, sizes.context, theta=1e6, partial=1.0 if rotary is None else min(1.0, rotary / sizes.H))
    softmax = Attention(N=sizes.N, K=sizes.K, H=sizes.H, rope=rope, window=sliding_window(config))
    lightning: Mixer = LightningAttention(N=sizes.N, H=sizes.H)
    E, F = num_experts(config, "num_local_experts", "num_experts", default=8), config.integer("intermediate_size")
    ffn = routed(config, E=E, top_k=top_k(config, 2), F=F)
    named, numbered = config.per_layer("layer_types", sizes.L, str), config.per_layer("attn_type_list", sizes.L, int)
    if named is not None:
        kinds = named
    elif numbered is not None:
        kinds = [FULL if number == 1 else LINEAR if number == 0 else str(number) for number in numbered]
    else:
        kinds = [LINEAR if i % 2 else FULL for i in range(sizes.L)]
    for kind in kinds:
        if kind not in (FULL, LINEAR):
            raise config.unsupported("layer_types", kind, "is an unknown kind of layer")
    config.require("shared_intermediate_size", 0)
    model = rms_model(config, sizes, [LayerSpec(mixer=lightning if kind == LINEAR else softmax, ffn=ffn) for kind in kinds], eps=1e-5)
    scales = [f"{part}_{end}_factor" for part in ("full_attn", "linear_attn", "mlp") for end in ("alpha", "beta")]
    older = [f"layernorm_{part}_attention_{end}" for part in ("full", "linear") for end in ("alpha", "beta")]
    config.finish(harmless=(*ROUTING, *scales, *older, "layernorm_mlp_alpha", "layernorm_mlp_beta", "block_size", "postnorm", "shared_moe_mode"))
    return replace(model, plan_only=f"{RECURRENT}, and {ROUTED}")


def nemotron_nas(config: ConfigReader) -> ModelSpec:
    """Llama 3 cut by a search: each block has its own group size and feed-forward width, or lacks attention altogether."""
    D, N = config.integer("hidden_size"), config.integer("num_attention_heads", high=MAX_HEADS)
    L = config.integer("num_hidden_layers", high=MAX_LAYERS)
    H = config.optional_integer("head_dim") or D // N
    sizes = Sizes(D=D, L=L, V=config.integer("vocab_size", high=2**26), N=N, K=N, H=H, context=config.integer("max_position_embeddings", high=2**32))
    rope = read_rope(config, H, sizes.context)
    act = activation(config, "hidden_act", default="silu")
    config.require("attention_bias", False)
    config.require("mlp_bias", False)
    layers = [_nas_block(config, sizes, rope, act, block) for block in config.per_layer("block_configs", L, dict) or ()]
    if not layers:
        raise config.wrong("block_configs", "is missing")
    model = rms_model(config, sizes, layers, eps=1e-5)
    config.finish(harmless=("num_key_value_heads", "intermediate_size", "decilm"))
    return replace(model, plan_only="layers without attention or of differing widths have no loader yet")


def _nas_block(config: ConfigReader, sizes: Sizes, rope: Rope, act, block: dict) -> LayerSpec:
    attention, ffn = (
        ConfigReader(block.get(part) or {}, name=config.name, family=config.family, path=f"block_configs.{part}.") for part in ("attention", "ffn")
    )
    for reader in (attention, ffn):
        for key in ("replace_with_linear", "sparsify"):
            reader.require(key, False)
        for key in ("window_length", "num_sink_tokens", "unshifted_sink", "use_prefill_window_in_sink_attention"):
            reader.require(key, False)
    mixer = None
    if not attention.flag("no_op", default=False):
        group = attention.integer("n_heads_in_group", default=1, high=MAX_HEADS)
        check_heads(attention, sizes.N, group, "n_heads_in_group")
        mixer = Attention(N=sizes.N, K=sizes.N // group, H=sizes.H, rope=rope)
    dense = None
    if not ffn.flag("no_op", default=False):
        # as the search writes it: two thirds of a multiple of the width, up to a whole 256
        width = int(2 * ffn.number("ffn_mult", default=1.0, high=64) * sizes.D / 3)
        dense = DenseFFN(F=-(-width // 256) * 256, activation=act)
    attention.finish()
    ffn.finish()
    return LayerSpec(mixer=mixer, ffn=dense)
